"""Margins keep what they promise: for another episode, for the plan that is chosen, and while errors drift."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from worldloom.core.errors import DataError
from worldloom.planning.calibration import AdaptiveMargin, conformal_margins, conformal_quantile


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.floats(0.02, 0.98))
def test_the_quantile_is_the_smallest_score_that_so_many_do_not_exceed(values: list[float], risk: float) -> None:
    quantile = conformal_quantile(torch.tensor(values), risk)
    covered = sum(value <= quantile for value in values)
    needed = (len(values) + 1) * (1 - risk)
    if math.isinf(quantile):
        assert needed > len(values) - 1e-6
    else:
        assert covered >= needed - 1e-6
        assert sum(value < quantile for value in values) < max(needed, 1)


def test_nineteen_episodes_tell_five_per_cent_and_eighteen_do_not() -> None:
    assert conformal_quantile(torch.arange(19.0), 0.05) == 18
    assert conformal_quantile(torch.arange(18.0), 0.05) == math.inf
    with pytest.raises(DataError, match="at least 19 are needed"):
        conformal_margins(torch.rand(30, 1, 2), 0.05)


def plans(episodes: int, candidates: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Errors (true - predicted) along 3 steps of every candidate, and of the one that was predicted safest."""
    errors = torch.randn(episodes, candidates, 1, 3, generator=generator) * torch.tensor([0.5, 1.0, 2.0])
    predicted = torch.randn(episodes, candidates, generator=generator) * 0.1 - errors[:, :, 0].amax(-1)
    chosen = predicted.argmin(dim=1)
    return errors, errors[torch.arange(episodes), chosen]


def test_the_promise_holds_for_the_chosen_plan_where_one_for_each_candidate_breaks() -> None:
    generator, risk, trials = torch.Generator().manual_seed(0), 0.1, 300
    chosen_broken = candidate_broken = 0.0
    for _ in range(trials):
        every, chosen = plans(80, 50, generator)
        _, later = plans(100, 50, generator)
        ours = conformal_margins(chosen, risk).values
        theirs = conformal_margins(every[:, 0], risk).values
        chosen_broken += float((later > ours).any(dim=2).any(dim=1).float().mean()) / trials
        candidate_broken += float((later > theirs).any(dim=2).any(dim=1).float().mean()) / trials
    # The mean over calibrations is at most the risk; 300 of them tell it to within about 0.005.
    assert chosen_broken <= risk + 0.01
    assert chosen_broken > risk / 3  # and it is not just very careful
    assert candidate_broken > 3 * risk


def test_margins_grow_along_the_plan_as_errors_do_and_none_is_below_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(200, 2, 4, generator=generator).abs() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    errors[:, 1] *= 10
    margins = conformal_margins(errors, 0.1)
    assert (margins.values.diff(dim=1) > 0).all()
    assert (margins.values[1] > 5 * margins.values[0]).all()
    assert (margins.risk, margins.episodes) == (0.1, 200)
    careful = conformal_margins(-errors - 1, 0.1)
    assert (careful.values >= 0).all()
    assert careful.values.max() < 1e-3


def test_steps_that_no_plan_reached_say_nothing() -> None:
    errors = torch.rand(100, 1, 3)
    errors[::2, :, 2] = -math.inf
    assert conformal_margins(errors, 0.1).values.isfinite().all()


def test_an_error_without_bound_gives_a_margin_without_bound() -> None:
    errors = torch.rand(100, 1, 3)
    errors[40:, 0, 1] = math.inf
    assert conformal_margins(errors, 0.1).values.isinf().all()


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=300),
    st.floats(0.01, 0.99),
    st.floats(0.01, 2),
    st.floats(0, 1),
)
def test_the_share_beyond_comes_to_the_risk_whatever_the_errors_are(
    errors: list[float], risk: float, rate: float, start: float
) -> None:
    margin = AdaptiveMargin(start, risk=risk, rate=rate)
    for error in errors:
        margin.update(error)
    assert abs(margin.beyond / margin.seen - risk) <= (1 + rate) / (rate * margin.seen) + 1e-9


def test_a_drift_is_followed() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = AdaptiveMargin(1.6, risk=0.1, rate=0.2)
    beyond = [margin.update(float(value)) for value in torch.rand(400, generator=generator) * 1.7]
    assert sum(beyond[100:]) / 300 == pytest.approx(0.1, abs=0.05)
    beyond = [margin.update(float(value)) for value in 3 + torch.rand(400, generator=generator) * 1.7]
    assert margin.margin > 4
    assert sum(beyond[100:]) / 300 == pytest.approx(0.1, abs=0.05)
    assert margin.update(math.nan)


@pytest.mark.parametrize(("margin", "risk", "rate"), [(math.inf, 0.1, 1.0), (1.0, 0.0, 1.0), (1.0, 0.1, 0.0)])
def test_what_promises_nothing_is_refused(margin: float, risk: float, rate: float) -> None:
    with pytest.raises(DataError, match="a risk between 0 and 1"):
        AdaptiveMargin(margin, risk=risk, rate=rate)
    with pytest.raises(DataError, match="not a number"):
        conformal_quantile(torch.tensor([1.0, math.nan]), 0.5)
    with pytest.raises(DataError, match="lies between 0 and 1"):
        conformal_quantile(torch.tensor([1.0]), 1.0)
