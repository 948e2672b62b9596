"""A limit on repeated log messages: the first hundred are logged, and then one in a hundred."""

import logging

_FIRST, _EVERY = 100, 100


class SparingLog:
    """Logs the first hundred messages, and later every hundredth with the number of messages so far."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self.count = 0

    def log(self, level: int, message: str, *arguments: object, trace: bool = False) -> None:
        """Log a message; `trace` adds the traceback of the current exception."""
        self.count += 1
        if self.count == _FIRST:
            message += f" (from now on, only every {_EVERY}th such message is logged)"
        elif self.count > _FIRST and self.count % _EVERY == 0:
            message += f" (message {self.count} of this kind)"
        elif self.count > _FIRST:
            return
        self._logger.log(level, message, *arguments, exc_info=trace)
