"""The base of what must be closed."""

from typing import TypeVar

Entered = TypeVar("Entered", bound="Closing")


class Closing:
    """Something to close; as a context manager, it closes on leaving, after an error too."""

    def close(self) -> None:
        """Release what is held; nothing by default."""

    def __enter__(self: Entered) -> Entered:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
