import threading
import time

import pytest

from worldloom.training.prefetch import prefetch


def test_batches_come_in_order_and_ahead_of_time() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return 10 * step

    with prefetch(make, range(3, 8), ahead=2) as next_item:
        assert next_item() == 30
        for _ in range(100):
            if len(made) >= 3:
                break
            time.sleep(0.01)
        assert 3 <= len(made) <= 4  # one taken, two waiting, one in hand
        assert [next_item() for _ in range(4)] == [40, 50, 60, 70]


def test_what_goes_wrong_is_raised_where_it_is_asked_for() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        if step == 1:
            raise ValueError("no such window")
        return step

    with prefetch(make, range(5)) as next_item:
        assert next_item() == 0
        with pytest.raises(ValueError, match="no such window"):
            next_item()
    assert made == [0, 1]


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    with prefetch(lambda step: step, range(1000)) as next_item:
        next_item()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
