from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.picture_layout import PictureOptions, is_picture, picture_layout

CHANNELS = st.integers(1, 16)
SIDES = st.integers(17, 40)


@given(height=SIDES, width=SIDES, channels=CHANNELS, first=st.booleans(), seed=st.integers(0, 99))
def test_bytes_arrive_unchanged_whichever_end_the_channels_are_at(height, width, channels, first, seed) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (2, height, width, channels), np.uint8)
    stored = pixels.transpose(0, 3, 1, 2) if first else pixels
    assert is_picture(stored.shape[1:], stored.dtype)
    layout = picture_layout(stored.shape[1:], stored.dtype, "camera")
    assert layout.pixels == pixels.shape[1:]
    assert np.array_equal(layout.convert(stored, "camera"), pixels)


@given(axes=st.sampled_from(["".join(each) for size in (2, 3, 4) for each in permutations("hwcs", size)]))
def test_named_axes_are_moved_and_stacked_frames_become_channels(axes: str) -> None:
    if not {"h", "w"} <= set(axes):
        with pytest.raises(ConfigError, match="letters h and w once"):
            PictureOptions.parse({"axes": axes})
        return
    size = {"h": 5, "w": 6, "c": 3, "s": 2}
    stored = np.random.default_rng(0).integers(0, 256, (4, *(size[axis] for axis in axes)), np.uint8)
    pixels = picture_layout(stored.shape[1:], np.uint8, "", options=PictureOptions(axes=axes)).convert(stored, "")
    assert pixels.shape[1:3] == (5, 6)
    for s in range(2 if "s" in axes else 1):
        for c in range(3 if "c" in axes else 1):
            place = tuple({"h": 4, "w": 1, "c": c, "s": s}[axis] for axis in axes)
            assert (pixels[:, 4, 1, s * (3 if "c" in axes else 1) + c] == stored[(slice(None), *place)]).all()


@pytest.mark.parametrize("shape", [(3, 40, 3), (64, 64, 64), (4, 64, 64, 3), (4, 3, 64, 64), (2, 8, 5)])
def test_an_unclear_order_of_axes_names_the_option(shape: tuple[int, ...]) -> None:
    assert is_picture(shape, np.uint8)
    with pytest.raises(DataError, match=r"order of axes is not clear.*--picture-axes"):
        picture_layout(shape, np.uint8, "camera")


@given(
    dtype=st.sampled_from([np.uint16, np.int32, np.float32, np.float64]),
    low=st.integers(0, 1000),
    span=st.integers(300, 60_000),
)
def test_other_values_need_a_range_and_are_then_scaled_in_order(dtype, low: int, span: int) -> None:
    stored = np.linspace(low, low + span, 32 * 32).reshape(1, 32, 32).astype(dtype)
    assert is_picture((32, 32), dtype)
    with pytest.raises(DataError, match=rf"{np.dtype(dtype)} values, such as {low:g} to .*--picture-range LOW:HIGH"):
        picture_layout((32, 32), dtype, "depth", sample=stored)
    layout = picture_layout((32, 32), dtype, "depth", options=PictureOptions(range=(low, low + span)))
    pixels = layout.convert(stored, "depth").reshape(-1).astype(int)
    assert (np.diff(pixels) >= 0).all()
    assert (pixels[0], pixels[-1], len(np.unique(pixels))) == (0, 255, 256)
    assert layout.outside(stored + dtype(1)) >= 1


def test_a_stated_range_is_used_and_must_hold() -> None:
    layout = picture_layout((32, 32, 3), np.float32, "camera", stated=(0.0, 1.0))
    stored = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert np.array_equal(layout.convert((stored / 255).astype(np.float32), ""), stored)
    with pytest.raises(DataError, match="values from 0 to 255; expected 0 to 1"):
        layout.convert(np.linspace(0, 255, 32 * 32 * 3).reshape(1, 32, 32, 3), "camera")
    with pytest.raises(DataError, match="NaN"):
        layout.convert(np.full((1, 32, 32, 3), np.nan), "camera")
    masks = picture_layout((32, 32), np.bool_, "mask")
    assert masks.convert(np.array([[[False, True] * 16] * 32]), "")[0, 0, :2, 0].tolist() == [0, 255]


@pytest.mark.parametrize(("shape", "dtype"), [((12,), "u1"), ((10, 10), "u1"), ((31, 64), "f4"), ((50, 3), "f8")])
def test_small_tables_are_not_pictures(shape: tuple[int, ...], dtype: str) -> None:
    assert not is_picture(shape, dtype)


def test_bytes_are_not_scaled() -> None:
    with pytest.raises(DataError, match="Leave out --picture-range"):
        picture_layout((8, 8, 3), np.uint8, "camera", options=PictureOptions(range=(0, 9)))
    with pytest.raises(ConfigError, match="low value below the high"):
        PictureOptions.parse({"range": ("9", "0")})
