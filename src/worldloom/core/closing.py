"""The base class of objects that must be closed."""

from typing import TypeVar

Entered = TypeVar("Entered", bound="Closing")


class Closing:
    """Base class of objects that must be closed. Leaving the `with` block closes them, even after an error."""

    def close(self) -> None:
        """Release files and other resources; the default does nothing."""

    def __enter__(self: Entered) -> Entered:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
