"""A list that keeps only its newest items, and counts all items that were added."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

T = TypeVar("T")


class Newest(list[T]):
    """A list of at least the newest `limit` items, and at most a tenth more. Only append and extend it.

    `total` counts all items, and `kinds` counts them by their `key`; both include the items that were dropped.
    """

    def __init__(self, limit: int, *, key: Callable[[T], str] = lambda item: "") -> None:
        super().__init__()
        self._limit, self._key = limit, key
        self._dropped: Counter[str] = Counter()
        self.total = 0

    def append(self, item: T) -> None:
        """Add an item."""
        super().append(item)
        self.total += 1
        if len(self) > self._limit + max(1, self._limit // 10):  # in batches, because a deletion moves all items
            surplus = len(self) - self._limit
            self._dropped.update(map(self._key, self[:surplus]))
            del self[:surplus]

    def extend(self, items: Iterable[T]) -> None:
        """Add items. Of a long range, only the numbers that are kept are visited."""
        if isinstance(items, range) and len(items) > self._limit:
            unseen = len(items) - self._limit
            self.total += unseen
            self._dropped[""] += unseen
            items = cast(Iterable[T], items[unseen:])
        for item in items:
            self.append(item)

    def __iadd__(self, items: Iterable[T]) -> "Newest[T]":  # type: ignore[override,misc]
        self.extend(items)
        return self

    @property
    def kinds(self) -> Counter[str]:
        """The number of all items of each kind."""
        return self._dropped + Counter(map(self._key, self))
