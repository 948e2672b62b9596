"""What to do when storage does not answer: wait for so long and no longer, and ask again."""

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

_DAMAGED_ATTEMPTS = 4  # what does not decode as often as this is damaged where it is stored
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0  # seconds


def answered(call: Callable[[], T], where: str, patience: float) -> T:
    """Return what `call` returns, or give it up after `patience` seconds where storage is remote.

    Lance may wait without end for a server that accepts a connection and says nothing. A call that is given up goes
    on in a thread that nobody waits for: it may still be carried out.

    Raises:
        Unanswered: the time is over.
    """
    if "://" not in where:
        return call()
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name="storage", daemon=True).start()
    try:
        return future.result(timeout=patience)
    except TimeoutError as error:
        if future.done():  # the call's own
            raise
        raise Unanswered(
            f"{where} gave no answer in {patience:g} s. Check the network and the storage, then run the same command "
            f"again"
        ) from error


def each_answered(items: Iterator[T], where: str, patience: float) -> Iterator[T]:
    """Yield what `items` yields, waiting at most `patience` seconds for each; see `answered`."""
    end = object()
    while (item := answered(lambda: next(items, end), where, patience)) is not end:
        yield item  # type: ignore[misc]  # mypy does not see that `end` is left out


def with_retries(
    call: Callable[[], T],
    where: str,
    seconds: float,
    *,
    doing: str = "read",
    retried: tuple[type[Exception], ...] = (StorageError, DataError),
    stopped: threading.Event | None = None,
) -> T:
    """Return what `call` returns; where it raises what is `retried`, try again for `seconds`.

    Pauses double from 0.2 to 10 s and jitter. What does not decode four times is damaged where it is stored, and is
    not tried further.

    Raises:
        StorageError: the time is over; it says how often it was tried.
        DataError: what is stored is damaged.
    """
    stopped = stopped or threading.Event()
    began, attempt, damaged = time.monotonic(), 0, 0
    while True:
        attempt += 1
        try:
            return call()
        except retried as error:
            damaged += isinstance(error, DataError)
            pause = random.uniform(0.5, 1.0) * min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
            spent = time.monotonic() - began
            if damaged >= _DAMAGED_ATTEMPTS:
                raise
            if stopped.is_set() or spent + pause > seconds:
                raise StorageError(
                    f"{where} could not be {doing} in {attempt} attempts over {spent:.0f} s: {error}. Check the "
                    f"network and the storage, then resume; or raise data.retry_seconds ({seconds:g})"
                ) from error
            _log.warning("%s: attempt %d failed (%s); the next in %.1f s", where, attempt, error, pause)
            stopped.wait(pause)
