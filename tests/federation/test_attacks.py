"""The attacks work where nothing protects, fail where something does, and poison what averages blindly."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from worldloom.core.errors import DataError
from worldloom.core.signing import Domain
from worldloom.federation import PrivacyConfig, clip_and_noise
from worldloom.federation.secure.aggregation_protocol import Masker, SumSession, Unmasker, decode_sum
from worldloom.federation.secure.privacy import delta_norm
from worldloom.testing.attacks import backdoor, likeness, membership_inference, reconstruct, scale, sign_flip

FRAME = (3, 8, 8)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frame(seed: int) -> Tensor:
    return torch.rand(FRAME, generator=generator(seed))


def delta_of(image: Tensor) -> dict[str, Tensor]:
    """What an owner with one frame would send after one step: the model predicts a fixed code of it."""
    source = generator(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(FRAME), 32), nn.Tanh(), nn.Linear(32, 4))
    for value in model.parameters():
        nn.init.normal_(value, std=0.05, generator=source)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(image[None]) - torch.tensor([1.0, -1.0, 0.5, 2.0])).square().mean().backward()
    optimiser.step()
    return {name: value.detach() - before[name] for name, value in model.named_parameters()}


def seen(delta: dict[str, Tensor], truth: Tensor) -> float:
    return likeness(reconstruct(delta, weight="1.weight", bias="1.bias").reshape(FRAME), truth).cosine


def test_without_privacy_a_frame_is_read_off_the_delta() -> None:
    truth = frame(1)
    found = reconstruct(delta_of(truth), weight="1.weight", bias="1.bias").reshape(FRAME)
    assert likeness(found, truth).cosine > 0.9999
    assert likeness(found, truth).psnr > 40
    assert likeness(frame(2), truth).psnr < 15  # another frame of the same kind scores so much


def test_clipping_alone_hides_nothing() -> None:
    truth, delta = frame(1), delta_of(frame(1))
    clipped = clip_and_noise(delta, PrivacyConfig(clip=delta_norm(delta) / 10, noise=0.0), generator())
    assert seen(clipped, truth) > 0.999


def test_noise_hides_the_frame_and_more_noise_hides_it_more() -> None:
    truth, delta = frame(1), delta_of(frame(1))
    scores = []
    for noise in (0.0, 0.01, 0.1, 1.0):
        config = PrivacyConfig(clip=delta_norm(delta), noise=noise)
        runs = [seen(clip_and_noise(delta, config, generator(seed)), truth) for seed in range(20)]
        scores.append(float(np.mean(np.abs(runs))))
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.999
    assert scores[-1] < 0.2


def test_under_secure_aggregation_a_frame_cannot_be_read_off_what_the_coordinator_sees() -> None:
    names = ("ann", "bob", "cho")
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    deltas = {name: delta_of(frame(seed)) for seed, name in enumerate(names)}
    session = SumSession(
        name="round 1",
        owners={name: key.public_key().public_bytes_raw().hex() for name, key in keys.items()},
        shapes={name: tuple(value.shape) for name, value in deltas["ann"].items()},
        threshold=2,
    )

    def signs(name: str) -> Callable[[bytes], bytes]:
        return lambda content: keys[name].sign(Domain.MASK_KEYS.value + content)

    maskers, unmasker = {name: Masker(name, session, signs(name)) for name in names}, Unmasker(session)
    for name, masker in maskers.items():
        unmasker.take("advertise", name, masker.advertise())
    for name, masker in maskers.items():
        unmasker.take("share", name, masker.share(unmasker.roster))
    for seed, (name, masker) in enumerate(maskers.items()):
        message = masker.mask(unmasker.inboxes[name], deltas[name])
        unmasker.take("mask", name, message)
        view = decode_sum(np.frombuffer(message["masked"], "<u8"), session)
        # 192 values: five deviations of the cosine of a random guess.
        assert abs(seen(view, frame(seed))) < 5 / math.sqrt(math.prod(FRAME))
    for name, masker in maskers.items():
        unmasker.take("unmask", name, masker.unmask(unmasker.survivors))
    total = unmasker.sum(names)
    # The sum gives a mixture away: of three frames, none is seen as it is.
    shown = reconstruct(total, weight="1.weight", bias="1.bias").reshape(FRAME)
    alone = [reconstruct(deltas[name], weight="1.weight", bias="1.bias").reshape(FRAME) for name in names]
    for seed in range(3):
        assert likeness(alone[seed], frame(seed)).psnr > 40
        assert likeness(shown, frame(seed)).psnr < 20


def test_a_patch_layer_gives_its_patch_away() -> None:
    patch = torch.rand((3, 4, 4), generator=generator())
    layer = nn.Conv2d(3, 8, kernel_size=4, stride=4)
    layer(patch[None]).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    found = reconstruct({"w": layer.weight.grad, "b": layer.bias.grad}, weight="w", bias="b")
    assert likeness(found, patch).psnr > 60


def test_what_cannot_be_reconstructed_says_why() -> None:
    with pytest.raises(DataError, match="in the delta"):
        reconstruct({"w": torch.ones(2, 3)}, weight="w", bias="b")
    with pytest.raises(DataError, match="did not change"):
        reconstruct({"w": torch.ones(2, 3), "b": torch.zeros(2)}, weight="w", bias="b")
    with pytest.raises(DataError, match="one row for each"):
        reconstruct({"w": torch.ones(2, 3), "b": torch.ones(3)}, weight="w", bias="b")
    with pytest.raises(DataError, match="equal shape"):
        likeness(torch.ones(2), torch.ones(3))
    assert likeness(torch.ones(2), torch.ones(2)).psnr == math.inf


def test_members_with_lower_losses_are_found() -> None:
    found = membership_inference([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert found.auroc == found.high == 1.0
    assert found.low < 0.8  # three of each prove little
    assert membership_inference([1.0, 1.0], [1.0]).auroc == 0.5
    assert membership_inference([2.0], [1.0]).auroc == 0.0
    assert membership_inference([1.0, 3.0], [2.0, 4.0]).auroc == 0.75


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_the_interval_holds_the_auroc_and_turns_with_the_sides(members: list[float], others: list[float]) -> None:
    one, other = membership_inference(members, others), membership_inference(others, members)
    assert 0 <= one.low <= one.auroc <= one.high <= 1
    assert one.auroc == pytest.approx(1 - other.auroc, abs=1e-9)
    assert one.low == pytest.approx(1 - other.high, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_the_interval_covers_the_truth_as_often_as_it_says(shift: float) -> None:
    source, truth, runs = np.random.default_rng(0), 0.5 * (1 + math.erf(shift / 2)), 400
    held = 0
    for _ in range(runs):
        found = membership_inference(source.normal(size=30).tolist(), source.normal(shift, size=40).tolist())
        held += found.low <= truth <= found.high
    assert 0.91 < held / runs < 0.99


def test_losses_that_are_none_are_refused() -> None:
    for members, others in (([], [1.0]), ([1.0], []), ([math.nan], [1.0])):
        with pytest.raises(DataError, match="expected at least one loss of a member"):
            membership_inference(members, others)


def test_poisoned_deltas_do_to_a_mean_what_they_promise() -> None:
    honest = {"a": torch.tensor([1.0, -2.0]), "steps": torch.tensor(3)}
    assert torch.equal(sign_flip(honest, 2.0)["a"], torch.tensor([-2.0, 4.0]))
    assert torch.equal(scale(honest, 10.0)["a"], torch.tensor([10.0, -20.0]))
    target = {"a": torch.tensor([5.0, 5.0]), "steps": torch.tensor(9)}
    assert torch.equal(backdoor(honest, target)["a"], target["a"])
    assert torch.equal(backdoor(honest, target, strength=0.0)["a"], honest["a"])
    # Four owners whose deltas are small, and one that replaces the model: the mean is the target.
    quiet = {"a": torch.zeros(2), "steps": torch.tensor(3)}
    mean = (4 * quiet["a"] + backdoor(quiet, target, strength=5.0)["a"]) / 5
    assert torch.allclose(mean, target["a"])
    assert all(changed["steps"] == 3 for changed in (sign_flip(honest), scale(honest, 2.0), backdoor(honest, target)))
    assert torch.equal(honest["a"], torch.tensor([1.0, -2.0]))
    with pytest.raises(DataError, match="names and shapes"):
        backdoor(honest, {"a": torch.zeros(3)})
