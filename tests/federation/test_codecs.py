import pytest
import torch
from consortium import bytes_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from worldloom.core.config import parse_component
from worldloom.core.errors import ConfigError, DataError
from worldloom.federation import CODECS, Codec
from worldloom.federation.rounds.codecs import Float32, Int8, TopK

ALL = [Float32(), Int8(), Int8(rounding="stochastic"), TopK(share=0.3), TopK(share=0.3, quantised=True)]
IDS = ["float32", "int8", "int8-stochastic", "top-k", "top-k-int8"]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def deltas(draw: st.DrawFn) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    found = {}
    for name in draw(st.sets(st.sampled_from(["a", "b.weight", "c"]), min_size=1)):
        size = 10.0 ** draw(st.integers(-44, 28))
        found[name] = torch.randn(draw(SHAPES), generator=generator) * size
    return found


def shapes(delta: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in delta.items()}


@pytest.mark.parametrize("codec", ALL, ids=IDS)
@given(first=deltas(), seed=st.integers(0, 99))
def test_what_is_decoded_and_what_is_left_make_the_whole(codec: Codec, first: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    residual: dict[str, Tensor] | None = None
    for _ in range(3):
        payload, left = codec.encode(first, residual, generator=generator)
        found = codec.decode(payload, shapes(first))
        for name, tensor in first.items():
            whole = tensor.double() + (0 if residual is None else residual[name].double())
            error = (found[name].double() + left[name].double() - whole).abs()
            largest = whole.abs().max().item() if whole.numel() else 0.0
            assert (error <= 1e-6 * largest + 1e-45).all()
        residual = left


@given(deltas(), st.integers(0, 99))
def test_int8_errs_by_half_a_step_at_most_and_by_a_step_if_drawn(delta: dict[str, Tensor], seed: int) -> None:
    for codec, most in ((Int8(), 0.5), (Int8(rounding="stochastic"), 1.0)):
        payload, _ = codec.encode(delta, generator=torch.Generator().manual_seed(seed))
        found = codec.decode(payload, shapes(delta))
        for name, tensor in delta.items():
            rows = tensor.double().reshape(len(tensor), -1) if tensor.dim() > 1 and tensor.numel() else tensor.double()
            largest = rows.abs().amax(-1, keepdim=True) if rows.numel() and rows.dim() else rows.abs()
            error = (found[name].double().reshape(rows.shape) - rows).abs()
            assert (error <= torch.where(largest / 127 < 1.2e-38, largest, largest / 127 * most * (1 + 1e-4))).all()


def test_stochastic_rounding_is_right_in_the_mean_and_needs_a_generator() -> None:
    codec, delta = Int8(rounding="stochastic"), {"a": torch.tensor([127.0, 0.25, -0.25])}
    generator = torch.Generator().manual_seed(0)
    payloads = [codec.encode(delta, generator=generator)[0] for _ in range(2000)]
    mean = torch.stack([codec.decode(payload, shapes(delta))["a"] for payload in payloads]).mean(0)
    assert torch.allclose(mean, delta["a"], atol=0.05)
    with pytest.raises(ConfigError, match="generator"):
        codec.encode(delta)


def test_error_feedback_sends_in_time_what_top_k_leaves_out() -> None:
    delta = {"a": torch.tensor([8.0, 4.0, 2.0, 1.0])}
    codec, residual, sent = TopK(share=0.25), None, torch.zeros(4)
    for _ in range(100):
        payload, residual = codec.encode(delta, residual)
        sent += codec.decode(payload, shapes(delta))["a"]
    assert torch.allclose(sent / 100, delta["a"], rtol=0.2)


def test_top_k_keeps_the_largest() -> None:
    delta = {"a": torch.tensor([[1.0, -5.0], [3.0, 2.0]])}
    payload, left = TopK(share=0.5).encode(delta)
    assert torch.equal(TopK(share=0.5).decode(payload, shapes(delta))["a"], torch.tensor([[0.0, -5.0], [3.0, 0.0]]))
    assert torch.equal(left["a"], torch.tensor([[1.0, 0.0], [0.0, 2.0]]))


def test_bytes() -> None:
    delta = {"a": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    sizes = [bytes_of(codec.encode(delta)[0]) for codec in (Float32(), Int8(), TopK(share=0.01))]
    assert sizes == [40_000, 10_400, 800]


def test_encoding_refuses_what_is_not_finite_and_a_residual_of_another_model() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(DataError, match="'a'"):
            Int8().encode({"a": torch.tensor([1.0, bad])})
    with pytest.raises(DataError, match="residual"):
        Int8().encode({"a": torch.zeros(2)}, {"b": torch.zeros(2)})
    with pytest.raises(DataError, match="residual"):
        Int8().encode({"a": torch.zeros(2)}, {"a": torch.zeros(3)})


LIES = {
    "missing part": (Int8(), {"a|scale": None}),
    "part too many": (Int8(), {"b|value": torch.zeros(1)}),
    "shape": (Int8(), {"a|value": torch.zeros(3, 2, dtype=torch.int8)}),
    "rows": (Int8(), {"a|scale": torch.ones(3)}),
    "dtype": (Int8(), {"a|value": torch.zeros(2, 3)}),
    "infinite scale": (Int8(), {"a|scale": torch.tensor([1.0, torch.inf])}),
    "negative scale": (Int8(), {"a|scale": torch.tensor([1.0, -1.0])}),
    "step out of range": (Int8(), {"a|value": torch.full((2, 3), -128, dtype=torch.int8)}),
    "not finite": (Float32(), {"a|value": torch.full((2, 3), torch.nan)}),
    "index too large": (TopK(share=0.5), {"a|index": torch.tensor([0, 1, 6], dtype=torch.int32)}),
    "index below 0": (TopK(share=0.5), {"a|index": torch.tensor([-1, 1, 2], dtype=torch.int32)}),
    "index twice": (TopK(share=0.5), {"a|index": torch.tensor([1, 1, 2], dtype=torch.int32)}),
    "more than its share": (TopK(share=0.5), {"a|index": torch.arange(4, dtype=torch.int32), "a|value": torch.ones(4)}),
    "index dtype": (TopK(share=0.5), {"a|index": torch.arange(3)}),
    "value dtype": (TopK(share=0.5, quantised=True), {"a|value": torch.ones(3)}),
}


@pytest.mark.parametrize("lie", LIES)
def test_decoding_refuses_a_lying_payload(lie: str) -> None:
    codec, change = LIES[lie]
    payload, _ = codec.encode({"a": torch.ones(2, 3)})
    assert codec.decode(payload, {"a": torch.Size((2, 3))})["a"].shape == (2, 3)
    wrong = {name: tensor for name, tensor in {**payload, **change}.items() if tensor is not None}
    with pytest.raises(DataError):
        codec.decode(wrong, {"a": torch.Size((2, 3))})


@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_a_codec_is_read_back_from_its_name(codec: Codec) -> None:
    assert parse_component(CODECS, codec.model_dump(mode="json")) == codec


def test_a_row_too_small_for_a_step_is_left_to_the_residual_whole() -> None:
    delta = {"a": torch.tensor([[1e-37, 3e-38], [1.0, 0.5]])}
    payload, left = Int8().encode(delta)
    assert payload["a|scale"][0] == 0
    assert torch.equal(left["a"][0], delta["a"][0])
    assert payload["a|scale"][1] > 0
