"""Deltas are clipped and noised as stated, and the privacy spent is what theory says."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

from worldloom.core.errors import ConfigError, DataError
from worldloom.federation import Accountant, PrivacyBudgetSpent, PrivacyConfig, clip_and_noise
from worldloom.federation.secure.privacy import Event, delta_norm, effective_noise, gaussian_epsilon, secret_generator

numbers = st.floats(-1e6, 1e6, width=32)


def config(**values: object) -> PrivacyConfig:
    return PrivacyConfig.parse({"clip": 2.0, "noise": 1.0, **values})


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@given(st.lists(numbers, min_size=1, max_size=20), st.lists(numbers, max_size=20), st.floats(1e-3, 1e3))
def test_without_noise_a_delta_keeps_its_direction_and_never_exceeds_the_clip(
    first: list[float], second: list[float], clip: float
) -> None:
    delta = {"a": torch.tensor(first), "b": torch.tensor(second)}
    clipped = clip_and_noise(delta, config(clip=clip, noise=0.0), generator())
    before, after = delta_norm(delta), delta_norm(clipped)
    assert after <= clip
    assert after == pytest.approx(min(before, clip), rel=1e-5)
    factor = after / before if before else 1.0
    torch.testing.assert_close(clipped["a"], delta["a"] * factor, rtol=1e-4, atol=1e-4 * clip)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_noise_has_the_stated_deviation(share: float) -> None:
    n = 200_000
    noised = clip_and_noise({"a": torch.zeros(n)}, config(noise=1.5), generator(), share=share)["a"]
    stated = 1.5 * 2.0 * math.sqrt(share)
    # Five deviations of the estimates.
    assert abs(noised.std().item() / stated - 1) < 5 / math.sqrt(2 * n)
    assert abs(noised.mean().item()) < 5 * stated / math.sqrt(n)


def test_the_shares_of_owners_add_up_to_the_noise_of_one() -> None:
    source, n = generator(), 5
    parts = [clip_and_noise({"a": torch.zeros(100_000)}, config(), source, share=1 / n)["a"] for _ in range(n)]
    assert torch.stack(parts).sum(0).std().item() == pytest.approx(2.0, rel=0.02)


def test_the_order_of_the_names_does_not_matter_and_the_delta_is_left_alone() -> None:
    delta = {"a": torch.ones(3), "b": torch.zeros(2)}
    one = clip_and_noise(delta, config(), generator())
    other = clip_and_noise(dict(reversed(delta.items())), config(), generator())
    assert all(torch.equal(one[name], other[name]) for name in delta)
    assert torch.equal(delta["a"], torch.ones(3))


def test_two_secret_generators_differ() -> None:
    assert not torch.equal(torch.randn(4, generator=secret_generator()), torch.randn(4, generator=secret_generator()))


def test_what_cannot_be_noised_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        clip_and_noise({"a": torch.tensor([1.0, math.nan])}, config(), generator())
    with pytest.raises(DataError, match="int64"):
        clip_and_noise({"a": torch.tensor([1])}, config(), generator())
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match="share"):
            clip_and_noise({"a": torch.ones(1)}, config(), generator(), share=share)


@pytest.mark.parametrize(
    ("noise", "delta", "epsilon"),
    # Theorem 8 of Balle and Wang 2018, solved apart with mpmath at 40 digits.
    [(1.0, 1e-5, 4.3772), (0.5, 1e-5, 9.9973), (2.0, 1e-5, 1.9931)],
)
def test_one_round_matches_the_closed_form(noise: float, delta: float, epsilon: float) -> None:
    found = Accountant(config(noise=noise, delta=delta)).spend()
    assert found == pytest.approx(epsilon, abs=2e-4)


@given(st.floats(0.05, 50), st.floats(1e-9, 0.1))
def test_epsilon_satisfies_the_condition_of_the_gaussian_mechanism(noise: float, delta: float) -> None:
    epsilon, mu = gaussian_epsilon(noise, delta), 1 / noise
    reached = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    assert reached <= delta * (1 + 1e-6)
    if epsilon > 0:
        assert reached == pytest.approx(delta, rel=1e-5)


def test_rounds_compose_as_one_mechanism_with_less_noise() -> None:
    accountant = Accountant(config(noise=4.0))
    for _ in range(16):
        spent = accountant.spend()
    assert spent == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-9)


@settings(max_examples=10)
@given(st.integers(1, 50), st.floats(0.5, 8), st.sampled_from([0.1, 0.5, 1.0]))
def test_epsilon_grows_with_rounds_with_sampling_and_with_less_noise(rounds: int, noise: float, rate: float) -> None:
    def spent(rounds: int, noise: float, rate: float) -> float:
        return Accountant(config(noise=noise)).spend(rounds, rate)

    here = spent(rounds, noise, rate)
    assert spent(rounds + 1, noise, rate) > here
    assert spent(rounds, noise * 1.1, rate) < here
    assert spent(rounds, noise, rate / 3) < here


@pytest.mark.parametrize(("noise", "rate", "rounds"), [(1.0, 0.1, 10), (2.0, 0.5, 40), (0.7, 0.01, 100)])
def test_sampled_owners_cost_what_the_renyi_bound_says(noise: float, rate: float, rounds: int) -> None:
    # Integer orders of Mironov et al. 2019 (section 3.3), turned to epsilon by Balle et al. 2020 (theorem 21).
    def at(order: int) -> float:
        k = np.arange(order + 1)
        terms = (order - k) * math.log1p(-rate) + k * math.log(rate) + k * (k - 1) / (2 * noise**2)
        moment = logsumexp(gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1) + terms)
        renyi = rounds * moment / (order - 1)
        return float(renyi + math.log((order - 1) / order) - (math.log(1e-5) + math.log(order)) / (order - 1))

    bound = min(at(order) for order in range(2, 64))
    # The orders between, which the accountant tries too, gain some percent.
    assert 0.92 * bound <= Accountant(config(noise=noise)).spend(rounds, rate) <= bound * (1 + 1e-9)


@settings(max_examples=8)
@given(st.floats(0.3, 20), st.floats(0.5, 0.999))
def test_sampling_never_costs_more_than_taking_everyone(noise: float, rate: float) -> None:
    assert Accountant(config(noise=noise)).spend(5, rate) <= Accountant(config(noise=noise)).spend(5)


def test_a_round_beyond_the_budget_is_refused_and_not_counted() -> None:
    accountant = Accountant(config(noise=2.0, epsilon_budget=3.0))
    first = accountant.spend()
    spent = accountant.spend()
    assert first < spent <= 3.0
    with pytest.raises(PrivacyBudgetSpent, match="above the budget of 3"):
        accountant.spend(10)
    assert accountant.epsilon == spent
    assert len(accountant.state()) == 2


def test_without_noise_nothing_is_promised() -> None:
    assert Accountant(config(noise=0.0)).spend() == math.inf
    with pytest.raises(PrivacyBudgetSpent):
        Accountant(config(noise=0.0, epsilon_budget=1e9)).spend()


def test_the_state_goes_through_json() -> None:
    accountant = Accountant(config())
    accountant.spend(3)
    accountant.spend(2, 0.5, noise=1.7)
    again = Accountant(config(), json.loads(json.dumps(accountant.state())))
    assert again.epsilon == accountant.epsilon > 0
    for wrong in ({"rounds": 0, "noise": 1.0, "sample_rate": 1.0}, {"rounds": 1}, {"rounds": 1.5, "noise": 1.0}):
        with pytest.raises(DataError, match="state is invalid"):
            Accountant(config(), [wrong])
    for state in ({}, "", None, {"rounds": 1}):
        with pytest.raises(DataError, match="state is invalid"):
            Accountant(config(), state)


def test_unequal_weights_leave_the_heaviest_owner_less_noise() -> None:
    assert effective_noise(1.5, [0.2] * 5, share=0.2) == pytest.approx(1.5)
    assert effective_noise(1.5, [0.6, 0.1, 0.1, 0.1, 0.1], share=0.2) < 1.0
    with pytest.raises(ConfigError, match="weights"):
        effective_noise(1.0, [0.0, 0.0])


def test_an_event_that_makes_no_sense_is_refused() -> None:
    for values in ((0, 1.0, 1.0), (1, -1.0, 1.0), (1, math.nan, 1.0), (1, 1.0, 0.0), (1, 1.0, 1.1)):
        with pytest.raises(ConfigError, match="rounds|noise|sample_rate"):
            Event.parse({"rounds": values[0], "noise": values[1], "sample_rate": values[2]})
