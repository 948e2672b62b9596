"""Batches made ahead of time in a thread, so that the model does not wait for them."""

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
    """Yield a function that returns `make(step)` for one step after another, made up to `ahead` steps early.

    An error that `make` raises is raised where its result is asked for.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    left = iter(steps)
    waiting: deque[Future[T]] = deque()
    failed = threading.Event()

    def attempt(step: int) -> T:
        if failed.is_set():
            raise CancelledError  # never asked for: the error before it comes first
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
