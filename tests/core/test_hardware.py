"""The number of CPU threads that a job chooses."""

from collections.abc import Iterator

import pytest
import torch

from worldloom.core import hardware
from worldloom.core.hardware import fastest_threads, set_threads, time_threads, use_threads


class Clock:
    """A clock that moves only when work is done: `seconds` for each number of threads."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.seconds, self.calls = 0.0, {1: seconds["one"], 2: seconds["two"]}, [0, 0, 0]

    def perf_counter(self) -> float:
        return self.now

    def work(self) -> None:
        self.calls[torch.get_num_threads()] += 1
        self.now += self.seconds[torch.get_num_threads()]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with use_threads(2):
        yield
    set_threads(0)


@pytest.mark.parametrize(("one", "two", "fastest"), [(2.0, 5.0, 1), (5.0, 2.0, 2), (1.0, 1.0, 1), (1.0, 0.97, 1)])
def test_the_fastest_number_is_chosen_and_the_fewest_of_equals(
    one: float, two: float, fastest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(one=one, two=two)
    monkeypatch.setattr(hardware, "time", clock)
    times = time_threads(clock.work, seconds=20.0)
    assert times == pytest.approx({1: one, 2: two})
    assert fastest_threads(times) == fastest
    assert torch.get_num_threads() == 2


def test_a_number_that_is_far_slower_is_dropped_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(one=0.1, two=0.6)
    monkeypatch.setattr(hardware, "time", clock)
    assert fastest_threads(time_threads(clock.work, seconds=20.0)) == 1
    assert clock.calls[2] == 1


def test_a_number_that_is_slower_in_a_few_calls_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(one=0.1, two=0.4)
    monkeypatch.setattr(hardware, "time", clock)
    assert fastest_threads(time_threads(clock.work, seconds=20.0)) == 1
    assert clock.calls[2] == 2  # one call to warm up, and one that is measured


@pytest.mark.parametrize(("one", "turns"), [(2.0, 3), (1.0, 10)])
def test_the_measurement_ends_soon_if_one_number_is_clearly_fastest(
    one: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(one=one, two=1.0)
    monkeypatch.setattr(hardware, "time", clock)
    time_threads(clock.work, seconds=20.0)
    assert clock.calls[1:] == [2 + turns, 1 + turns]  # with one and with two calls to warm up


def test_a_number_that_the_user_chose_is_not_measured() -> None:
    set_threads(2)
    assert time_threads(lambda: pytest.fail("measured")) == {}
    assert fastest_threads({}) == 0
