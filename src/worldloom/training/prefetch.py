"""Batches made ahead of time in a thread, so that the model does not wait for them."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Stream(Generic[T]):
    def __init__(self, items: "queue.Queue[T | _Failure]") -> None:
        self._items = items

    def next(self) -> T:
        item = self._items.get()
        if isinstance(item, _Failure):
            raise item.error
        return item


@contextmanager
def prefetch(make: Callable[[int], T], steps: range, *, ahead: int = 2) -> Iterator[Callable[[], T]]:
    """Give a function that returns `make(step)` for one step after another, made up to `ahead` steps early.

    What `make` raises is raised where its result is asked for.
    """
    items: queue.Queue[T | _Failure] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: T | _Failure) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                items.put(item, timeout=0.1)
                break

    def work() -> None:
        item: T | _Failure
        for step in steps:
            try:
                item = make(step)
            except BaseException as error:
                item = _Failure(error)
            put(item)
            if stopped.is_set() or isinstance(item, _Failure):
                break

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield _Stream(items).next
    finally:
        stopped.set()
        thread.join()
