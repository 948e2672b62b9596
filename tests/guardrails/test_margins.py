"""Margins keep what they promise: for another episode, for the plan that is chosen, and while errors drift."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from worldloom.core.errors import DataError
from worldloom.guardrails import AdaptiveMargin, conformal_quantile, margin_shape, refusing, tolerance_quantile


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


def searched(stretch: float, shape: Tensor, episodes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What was predicted of the plan that a search chose in each episode, and what it really came to.

    Of 50 candidates it takes the most daring one that is predicted to hold: what pays is beyond the limit.
    """
    really = 4 * torch.rand(episodes, 50, 1, 1, generator=generator) - 2
    predicted = really + 0.5 * torch.randn(really.shape, generator=generator)
    holds = (predicted + stretch * shape <= 0).flatten(1)
    best = torch.where(holds, really.flatten(1), -torch.inf).argmax(dim=1)
    rows = torch.arange(episodes)
    kept = holds.any(dim=1)[:, None, None]
    return torch.where(kept, predicted[rows, best], -torch.inf), torch.where(kept, really[rows, best], -torch.inf)


def test_the_promise_holds_for_the_chosen_plan_where_one_for_each_candidate_breaks() -> None:
    generator, risk, trials = torch.Generator().manual_seed(0), 0.1, 60
    chosen_broken = candidate_broken = beyond = 0.0
    for _ in range(trials):
        logged = 4 * torch.rand(400, 1, 1, generator=generator) - 2
        shape = margin_shape(-0.5 * torch.randn(logged.shape, generator=generator), risk)
        _, really = searched(1.0, shape, 200, generator)
        candidate_broken += float((really > 0).float().mean()) / trials
        stretch = 1.0
        for _ in range(40):
            predicted, really = searched(stretch, shape, 100, generator)
            scores = torch.where((really > 0).flatten(), refusing(predicted, shape), 0.0)
            needed = tolerance_quantile(scores, risk, 0.9)
            if needed <= stretch:
                break
            stretch = max(needed, 1.05 * stretch)
        _, really = searched(stretch, shape, 200, generator)
        rate = float((really > 0).float().mean())
        chosen_broken += rate / trials
        beyond += (rate > 1.5 * risk) / trials
    assert chosen_broken <= risk
    assert chosen_broken > risk / 5  # and it is not just very careful
    assert beyond <= 0.1
    assert candidate_broken > 2 * risk


def test_margins_cover_each_step_alone_and_never_fall_along_a_plan() -> None:
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(4000, 2, 4, generator=generator) * torch.tensor([0.2, 0.6, 0.4, 1.0])
    errors[:, 1] *= 3
    margins = margin_shape(errors, 0.1)
    assert (margins.diff(dim=1) >= 0).all()
    assert (margins[1] > 2 * margins[0]).all()
    beyond = (errors > margins).float().mean(dim=0)
    assert beyond.max() <= 0.1
    assert beyond[:, 3].min() > 0.09
    # Errors that make it look worse than it is need no margin.
    assert margin_shape(-errors.abs() - 1, 0.1).max() <= 1e-3


def test_what_no_label_tells_is_left_out() -> None:
    errors = torch.rand(100, 1, 2)
    errors[::2, 0, 1] = math.nan
    assert margin_shape(errors, 0.1).isfinite().all()
    with pytest.raises(DataError, match="0 windows of held-out logs are too few"):
        margin_shape(torch.full((50, 1, 1), math.nan), 0.1)


@given(st.integers(1, 400), st.floats(0.01, 0.5), st.floats(0.5, 0.99))
def test_at_a_confidence_fewer_may_lie_beyond(count: int, risk: float, confidence: float) -> None:
    scores = torch.arange(float(count))
    quantile = tolerance_quantile(scores, risk, confidence)
    if math.isinf(quantile):
        assert (1 - risk) ** count > 1 - confidence - 1e-9
        return
    beyond = int((scores > quantile).sum())
    assert binom.cdf(beyond, count, risk) <= 1 - confidence + 1e-9
    assert binom.cdf(beyond + 1, count, risk) > 1 - confidence - 1e-9


def test_so_many_episodes_tell_so_small_a_risk() -> None:
    # Of 400 at 5%: 14 may lie beyond; of 400 at 1%: one.
    assert tolerance_quantile(torch.arange(400.0), 0.05, 0.9) == 399 - 14
    assert tolerance_quantile(torch.arange(400.0), 0.01, 0.9) == 398
    assert math.isinf(tolerance_quantile(torch.arange(44.0), 0.05, 0.9))
    assert tolerance_quantile(torch.arange(45.0), 0.05, 0.9) == 44
    with pytest.raises(DataError, match="expected a confidence between"):
        tolerance_quantile(torch.arange(45.0), 0.05, 1.0)


def test_a_plan_is_refused_from_the_stretch_on_that_is_said() -> None:
    predicted = torch.tensor([[[-2.0, -1.0]], [[-1.0, -8.0]], [[0.5, -3.0]]])
    shape = torch.tensor([[1.0, 2.0]])
    least = refusing(predicted, shape)
    assert least.tolist() == [0.5, 1.0, -0.5]
    for stretch, plan in ((least[0], predicted[0]), (least[1], predicted[1])):
        assert (plan + (stretch + 1e-3) * shape > 0).any()
        assert (plan + (stretch - 1e-3) * shape <= 0).all()
    assert refusing(torch.full((1, 1, 2), math.nan), shape).isinf().all()


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
    beyond, seen = sum(margin.update(error) for error in errors), len(errors)
    assert abs(beyond / seen - risk) <= (1 + rate) / (rate * seen) + 1e-9


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
    with pytest.raises(DataError, match="got NaN"):
        conformal_quantile(torch.tensor([1.0, math.nan]), 0.5)
    with pytest.raises(DataError, match="expected a risk between 0 and 1"):
        conformal_quantile(torch.tensor([1.0]), 1.0)
