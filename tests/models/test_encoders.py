import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from worldloom.core.errors import ConfigError
from worldloom.core.types import Observations, ObservationSpec
from worldloom.data import Statistics
from worldloom.models import JEPAConfig, PixelNormalisation, build_jepa
from worldloom.models.encoders import (
    ENCODERS,
    Fusion,
    Keypoints,
    PatchConv,
    StemmedPatchConv,
    VectorMLP,
    ViT,
    default_encoder,
)
from worldloom.models.encoders.keypoints import KeypointEncoder
from worldloom.models.encoders.vit import sincos_positions
from worldloom.models.stems import _SPEED

SMALL = [
    PatchConv(patch=4, channels=(8, 8), hidden=16),
    PatchConv(patch=8, channels=(8,), hidden=16),
    PatchConv(patch=4, channels=(8, 8, 8), kernel=3, hidden=16),
    ViT(patch=4, depth=2, width=16, heads=2),
    ViT(patch=4, depth=1, width=16, heads=2, positions="sincos"),
    StemmedPatchConv(patch=4, channels=(8, 8), hidden=16, size=(16, 16, 3)),
    Keypoints(channels=(8, 8), mixing=8, maps=4, features=2, hidden=16),
    Keypoints(patch=4, channels=(8, 12), mixing=6, maps=4, features=0, hidden=16),
    VectorMLP(hidden=(16,), norm="layer", activation="silu"),
    Fusion(pixels=PatchConv(patch=4, channels=(8,), hidden=16), vector=VectorMLP(hidden=(16,))),
]


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.name)
def test_each_frame_is_encoded_alone_whatever_its_shape(odd_case, config) -> None:
    encoder = config.build(odd_case.observation, odd_case.statistics, 6)
    observations = odd_case.observations(5)
    latents = encoder(observations)
    assert latents.shape == (5, 6)
    for row in range(5):
        torch.testing.assert_close(latents[row : row + 1], encoder(observations[row : row + 1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", SMALL[:8], ids=lambda config: config.name)
def test_every_pixel_reaches_the_latent(odd_case, config) -> None:
    torch.manual_seed(0)  # few of the weights hide a pixel behind a ReLU
    encoder = config.build(odd_case.observation, odd_case.statistics, 6)
    observations = odd_case.observations(1)
    plain = encoder(observations)
    for row, column in ((0, 0), (18, 12), (18, 0), (0, 12), (9, 6)):
        changed = observations.pixels.clone()
        changed[0, row, column] ^= 255
        assert not torch.equal(plain, encoder(Observations(pixels=changed, vector=observations.vector)))


@pytest.mark.parametrize("kernel", [2, 3])
def test_patch_conv_is_the_convolutions_that_it_says_it_is(pixel_case, kernel) -> None:
    config = PatchConv(patch=4, channels=(8, 6), kernel=kernel, hidden=16)
    encoder = config.build(pixel_case.observation, pixel_case.statistics, 5)
    observations = pixel_case.observations(3)
    std = pixel_case.statistics.pixel_std
    floor = max(1.0, 0.5 * std[std > 1].median().item())
    frames = (observations.pixels.double() - pixel_case.statistics.pixel_mean) / std.clamp_min(floor)
    first, second = encoder.double().convolutions
    features = functional.relu(functional.conv2d(frames.permute(0, 3, 1, 2), first.weight, first.bias, stride=4))
    features = functional.conv2d(features, second.weight, second.bias, stride=2, padding=1 if kernel == 3 else 0)
    features = functional.relu(features)
    expected = encoder.out(functional.relu(encoder.hidden(features.permute(0, 2, 3, 1).flatten(1))))
    torch.testing.assert_close(encoder.float()(observations).double(), expected, rtol=1e-4, atol=1e-4)


@given(contrast=st.floats(2, 255), share=st.floats(0.001, 0.2), unseen=st.floats(0, 0.5))
def test_a_visit_to_a_pixel_that_the_sample_never_saw_looks_like_one_elsewhere(contrast, share, unseen) -> None:
    std = torch.full((10, 10, 1), contrast * (share * (1 - share)) ** 0.5)
    std.view(-1)[: int(100 * unseen)] = 0
    frames = torch.zeros(1, 10, 10, 1, dtype=torch.uint8) + int(contrast)
    values = PixelNormalisation(torch.zeros(10, 10, 1), std)(frames).flatten()
    assert values.isfinite().all()
    assert values.max() <= 2.001 * values.min()  # never-seen pixels against the often seen


def test_constant_frames_stay_small() -> None:
    values = PixelNormalisation(torch.full((4, 4, 3), 9.0), torch.zeros(4, 4, 3))(
        torch.full((2, 4, 4, 3), 10, dtype=torch.uint8)
    )
    torch.testing.assert_close(values, torch.ones(2, 3, 4, 4))


def test_padding_is_zero_and_frames_lie_channels_last() -> None:
    normalise = PixelNormalisation(torch.full((5, 3, 2), 100.0), torch.full((5, 3, 2), 10.0), patch=4)
    values = normalise(torch.full((7, 5, 3, 2), 120, dtype=torch.uint8))
    assert values.shape == (7, 2, 8, 4)
    assert values.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(values[:, :, :5, :3], torch.full((7, 2, 5, 3), 2.0))
    assert values[:, :, 5:].abs().max() == 0
    assert values[:, :, :, 3:].abs().max() == 0


def test_a_constant_element_of_a_vector_does_not_explode(vector_case) -> None:
    case = vector_case
    case.statistics.vector_std[2] = 0.0
    encoder = VectorMLP().build(case.observation, case.statistics, 4)
    vector = case.statistics.vector_mean.clone()
    vector[2] += 1
    assert encoder.standardise(vector)[2].abs() <= 1


def test_sincos_positions_tell_places_apart() -> None:
    positions = sincos_positions(5, 7, 16)
    assert positions.shape == (35, 16)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1


def test_the_default_encoder_reads_what_is_observed(pixel_case, vector_case, odd_case) -> None:
    for case in (pixel_case, vector_case, odd_case):
        encoder = default_encoder(case.observation).build(case.observation, case.statistics, 32)
        first, second = case.observations(1), case.observations(1, seed=1)
        parts = [name for name in ("pixels", "vector") if getattr(first, name) is not None]
        for name in parts:
            mixed = Observations(**{part: getattr(second if part == name else first, part) for part in parts})
            assert not torch.equal(encoder(first), encoder(mixed)), name


def test_an_encoder_refuses_an_observation_that_it_cannot_read(pixel_case, vector_case) -> None:
    with pytest.raises(ConfigError, match="needs pixels, but the observation has none"):
        PatchConv().build(vector_case.observation, vector_case.statistics, 4)
    with pytest.raises(ConfigError, match="needs a vector, but the observation has none"):
        VectorMLP().build(pixel_case.observation, pixel_case.statistics, 4)


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.name)
def test_a_configuration_survives_json(config) -> None:
    whole = JEPAConfig(encoder=config)
    assert JEPAConfig.model_validate_json(whole.model_dump_json()) == whole
    assert config.name in ENCODERS


def test_a_wrong_key_or_name_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'patch-conv'"):
        JEPAConfig.parse({"encoder": {"name": "patchconv"}})
    with pytest.raises(ConfigError, match="did you mean 'hidden'"):
        JEPAConfig.parse({"encoder": {"name": "patch-conv", "hiden": 3}})
    assert JEPAConfig().override(["encoder.hidden=32"]).encoder.hidden == 32
    with pytest.raises(ConfigError, match="multiple of 'heads'"):
        JEPAConfig.parse({"encoder": {"name": "vit", "width": 20, "heads": 3}})


def test_weights_come_from_the_seed_alone(pixel_case) -> None:
    def weights(seed: int) -> torch.Tensor:
        case = pixel_case
        model = build_jepa(JEPAConfig(latent_dim=4), case.observation, case.action, case.statistics, seed=seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    torch.manual_seed(5)
    first, drawn = weights(1), torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn  # building left the default generator as it was
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_a_stem_of_the_same_size_begins_as_if_it_were_not_there(pixel_case) -> None:
    plain = PatchConv(patch=4, channels=(8,), hidden=16).build(pixel_case.observation, pixel_case.statistics, 6)
    config = StemmedPatchConv(patch=4, channels=(8,), hidden=16, size=(16, 16, 3))
    stemmed = config.build(pixel_case.observation, pixel_case.statistics, 6)
    stemmed.load_state_dict({**stemmed.state_dict(), **plain.state_dict()})
    observations = pixel_case.observations(4)
    torch.testing.assert_close(stemmed(observations), plain(observations), rtol=1e-5, atol=1e-5)


def test_what_lies_behind_the_stems_has_the_same_shapes_for_every_owner(pixel_case, odd_case) -> None:
    config = JEPAConfig(encoder=StemmedPatchConv(patch=4, channels=(8,), hidden=16, size=(16, 16, 3)), action_stem=3)
    states = [
        build_jepa(config, case.observation, case.action, case.statistics, seed=0).state_dict()
        for case in (pixel_case, odd_case)
    ]
    own = ("encoder.normalise.", "encoder.stem.")
    first, second = ({name: x.shape for name, x in state.items() if not name.startswith(own)} for state in states)
    assert first == second
    assert states[0]["encoder.stem.mix.weight"].shape != states[1]["encoder.stem.mix.weight"].shape


def test_a_stem_whose_size_does_not_come_out_even_is_refused(pixel_case) -> None:
    with pytest.raises(ConfigError, match="multiples of 4"):
        StemmedPatchConv(patch=4, channels=(8,), size=(18, 16, 3)).build(
            pixel_case.observation, pixel_case.statistics, 6
        )


def test_a_stem_that_is_folded_mixes_channels(pixel_case) -> None:
    config = StemmedPatchConv(patch=4, channels=(8,), hidden=16, size=(16, 16, 3))
    encoder = config.build(pixel_case.observation, pixel_case.statistics, 6)
    with torch.no_grad():
        encoder.stem.mix.weight.normal_(std=1 / _SPEED, generator=torch.Generator().manual_seed(0))
    observations = pixel_case.observations(4)
    features = _SPEED * encoder.stem.mix(encoder.normalise(observations.pixels))
    features = functional.relu(encoder.convolutions[0](features)).permute(0, 2, 3, 1).flatten(1)
    expected = encoder.out(functional.relu(encoder.hidden(features)))
    torch.testing.assert_close(encoder(observations), expected, rtol=1e-4, atol=1e-4)
    encoder(observations).square().sum().backward()
    assert encoder.stem.mix.weight.grad.abs().min() > 0


def _spot(row: int, column: int, size: int = 64) -> Observations:
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    pixels[0, row : row + 8, column : column + 8] = 255
    return Observations(pixels=pixels, vector=None)


def _keypoints(config: Keypoints, shape: tuple[int, int, int]) -> KeypointEncoder:
    statistics = Statistics(
        pixel_mean=torch.full(shape, 20.0), pixel_std=torch.full(shape, 40.0), vector_mean=None, vector_std=None,
        action_mean=torch.zeros(2), action_std=torch.ones(2),
    )  # fmt: skip
    encoder = config.build(ObservationSpec(pixels=shape), statistics, 8)
    assert isinstance(encoder, KeypointEncoder)
    return encoder


def test_keypoints_move_with_what_they_attend_to() -> None:
    encoder = _keypoints(Keypoints(features=0), (64, 64, 3))
    # One map attends to bright cells: the sum of all features, far above the others.
    with torch.no_grad():
        for layer in (encoder.patches, encoder.merge):
            layer.weight.fill_(1 / layer.weight[0].numel())
            layer.bias.zero_()
        encoder.mix.weight.zero_()
        encoder.attend.weight.fill_(1.0)
        encoder.attend.bias.zero_()
    places = [encoder.keypoints(_spot(row, column))[0, 0] for row, column in ((8, 8), (8, 16), (40, 16))]
    step = 4 / 7  # eight cells lie between -2 and 2
    torch.testing.assert_close(places[1] - places[0], torch.tensor([step, 0.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(places[2] - places[1], torch.tensor([0.0, 4 * step]), atol=0.05, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 3, 1), (9, 64, 4), (240, 320, 3)])
def test_keypoints_choose_their_patch_by_the_size_of_the_picture(shape) -> None:
    encoder = _keypoints(Keypoints(maps=4), shape)
    pixels = torch.full((2, *shape), 7, dtype=torch.uint8)
    latents = encoder(Observations(pixels=pixels, vector=None))
    assert latents.shape == (2, 8)
    assert latents.isfinite().all()
    assert encoder.positions.shape[0] <= 16 * 64  # cells; about eight along the shorter side


def test_a_patch_of_keypoints_larger_than_a_frame_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'patch' of encoder 'keypoints' is 9 pixels, but the frames have 8x12"):
        _keypoints(Keypoints(patch=9), (8, 12, 3))
