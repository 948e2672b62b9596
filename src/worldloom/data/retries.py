"""Timeouts and retries for storage that does not answer."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from worldloom.core.errors import DataError, StorageError
from worldloom.data.layout import Unanswered

T = TypeVar("T")

_log = logging.getLogger(__name__)

_DAMAGED_ATTEMPTS = 4  # failures to decode after which the stored data counts as damaged
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0  # seconds
_jitter = random.Random()  # not the global generator: its sequence belongs to the user


def with_timeout(call: Callable[[], T], where: str, timeout: float) -> T:
    """Return the result of `call`; if `where` is remote storage, abandon the call after `timeout` seconds.

    Lance can wait forever for a server that accepts a connection but sends nothing. An abandoned call continues in a
    background thread and may still take effect.

    Raises:
        Unanswered: the call timed out.
    """
    if "://" not in where:
        return call()
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again by `result`
            future.set_exception(error)

    threading.Thread(target=work, name="storage", daemon=True).start()
    try:
        return future.result(timeout=timeout)
    except TimeoutError as error:
        if future.done():  # raised by the call itself
            raise
        raise Unanswered(
            f"{where} did not answer within {timeout:g} s. Check the network and the storage, then run the same "
            f"command again"
        ) from error


def each_with_timeout(items: Iterator[T], where: str, timeout: float) -> Iterator[T]:
    """Yield the items of `items`, waiting at most `timeout` seconds for each; see `with_timeout`."""
    end = object()
    while (item := with_timeout(lambda: next(items, end), where, timeout)) is not end:
        yield item  # type: ignore[misc]  # mypy does not exclude `end`


def with_retries(
    call: Callable[[], T],
    where: str,
    seconds: float,
    *,
    doing: str = "read",
    retried: tuple[type[Exception], ...] = (StorageError, DataError),
    stopped: threading.Event | None = None,
) -> T:
    """Return the result of `call`; after errors of the types `retried`, try again for up to `seconds`.

    Pauses double from 0.2 to 10 s, with jitter. After four `DataError`s, the stored data counts as damaged, and the
    last error is raised.

    Raises:
        StorageError: `seconds` have passed, or `stopped` is set; the message gives the number of attempts.
        DataError: the stored data is damaged.
    """
    stopped = stopped or threading.Event()
    began, attempt, damaged = time.monotonic(), 0, 0
    while True:
        attempt += 1
        try:
            return call()
        except retried as error:
            damaged += isinstance(error, DataError)
            pause = _jitter.uniform(0.5, 1.0) * min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
            spent = time.monotonic() - began
            if damaged >= _DAMAGED_ATTEMPTS:
                raise
            if stopped.is_set() or spent + pause > seconds:
                raise StorageError(
                    f"{where} could not be {doing} in {attempt} attempts over {spent:.0f} s: {error}. Check the "
                    f"network and the storage, then run the same command again, or increase data.retry_seconds (now "
                    f"{seconds:g})"
                ) from error
            _log.warning("%s: attempt %d failed (%s); next attempt in %.1f s", where, attempt, error, pause)
            stopped.wait(pause)
