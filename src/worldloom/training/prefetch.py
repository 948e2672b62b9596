"""Prefetching of batches in a thread, so that the model does not wait for them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetch(make: Callable[[int], T], steps: range, *, ahead: int = 2) -> Iterator[Callable[[], T]]:
    """Yield a function that returns `make(step)` for one step after another, computed up to `ahead` steps in advance.

    If `make` raises an error, the call that would return its result raises this error.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    left = iter(steps)
    waiting: deque[Future[T]] = deque()
    failed = threading.Event()

    def attempt(step: int) -> T:
        if failed.is_set():
            raise CancelledError  # never returned, because the earlier error is raised first
        try:
            return make(step)
        except BaseException:
            failed.set()
            raise

    def submit(count: int) -> None:
        waiting.extend(pool.submit(attempt, step) for step in islice(left, count))

    def following() -> T:
        submit(1)
        return waiting.popleft().result()

    try:
        submit(ahead)
        yield following
    finally:
        pool.shutdown(cancel_futures=True)
