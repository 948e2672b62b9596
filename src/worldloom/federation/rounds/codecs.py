"""Codecs that compress deltas; the part that a codec drops is added to the next delta (error feedback).

Error feedback: Seide et al. 2014; Karimireddy et al. 2019 (arXiv 1901.09847).
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from worldloom.core.config import Component
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.registry import Registry
from worldloom.federation.rounds.base import check_like, check_names, check_values

_LEVELS = 127  # symmetric: -128 is not used
_FLOAT32 = torch.finfo(torch.float32)
_SEPARATOR = "|"  # between a tensor's name and its part of a payload


class Codec(Component):
    """A codec of deltas; `decode` checks its payload, which may come from an untrusted sender."""

    def encode(
        self,
        delta: Mapping[str, Tensor],
        residual: Mapping[str, Tensor] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encode delta + residual; return the payload and the new residual, the part that the payload drops.

        Raises:
            DataError: a tensor is not finite in single precision, or the residual's names or shapes differ.
            ConfigError: stochastic rounding was chosen, but no generator was passed.
        """
        if residual is not None:
            check_names(residual, delta, "the codec's residual")
        payload: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for name in sorted(delta):
            if _SEPARATOR in name:
                raise DataError(f"tensor {name!r} has {_SEPARATOR!r} in its name, which codecs reserve; rename it")
            total = delta[name].detach().cpu().double()
            if residual is not None:
                if residual[name].shape != total.shape:
                    raise DataError(
                        f"the codec's residual of {name!r} has shape {tuple(residual[name].shape)}; expected "
                        f"{tuple(total.shape)}. If the model was changed, delete the residual"
                    )
                total = total + residual[name].double()
            check_values(name, total.float())
            parts = self._pack(total, generator)
            left[name] = (total - self._unpack(name, parts, total.shape).double()).float()
            payload.update({name + _SEPARATOR + part: tensor.contiguous() for part, tensor in parts.items()})
        return payload, left

    def decode(self, payload: Mapping[str, Tensor], like: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the delta in single precision, with exactly the names and shapes of `like` and only values in range.

        This is the trust boundary for contributions: later code does not check them again.

        Raises:
            DataError: a part is missing, unexpected, out of range, not finite, or has the wrong dtype or size.
        """
        check_names(payload, [name + _SEPARATOR + part for name in like for part in self._parts()], "a payload")
        found = {}
        for name, shape in like.items():
            parts = {part: payload[name + _SEPARATOR + part] for part in self._parts()}
            found[name] = self._unpack(name, parts, torch.Size(shape))
            check_values(name, found[name])
        return found

    @abstractmethod
    def _parts(self) -> tuple[str, ...]:
        """Return the names of the parts into which each tensor is encoded."""

    @abstractmethod
    def _pack(self, total: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Encode a tensor in double precision, and return its parts."""

    @abstractmethod
    def _unpack(self, name: str, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Check every part, and return the tensor in single precision."""


CODECS: Registry[type[Codec]] = Registry("codec")


@CODECS.register("float32")
class Float32(Codec):
    """Single precision, without compression."""

    name: Literal["float32"] = "float32"

    def _parts(self) -> tuple[str, ...]:
        return ("value",)

    def _pack(self, total: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"value": total.float()}

    def _unpack(self, name: str, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        return _checked(name, parts["value"], torch.float32, shape)


@CODECS.register("int8")
class Int8(Codec):
    """Values rounded to multiples of a step, which is 1/127 of the largest magnitude in their row.

    Rows are along the first axis; a vector is one row. The error of nearest rounding is at most half a step. The error
    of stochastic rounding is below one step, with mean zero. If all magnitudes of a row are below about 1.5e-36, its
    step (`scale`) would not be a normal number in single precision, so the complete row goes to the residual.
    """

    name: Literal["int8"] = "int8"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def _parts(self) -> tuple[str, ...]:
        return ("value", "scale")

    def _pack(self, total: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        if self.rounding == "stochastic" and generator is None:
            raise ConfigError("stochastic rounding needs a generator; pass one to encode, or use rounding=nearest")
        values, scale = _quantise(total.reshape(_rows(total.shape)), generator if self.rounding != "nearest" else None)
        return {"value": values.reshape(total.shape), "scale": scale}

    def _unpack(self, name: str, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        rows = _rows(shape)
        values = _checked(name, parts["value"], torch.int8, shape).reshape(rows)
        return _dequantise(name, values, _checked(name, parts["scale"], torch.float32, (rows[0],))).reshape(shape)


@CODECS.register("top-k")
class TopK(Codec):
    """Of each tensor, the values of largest magnitude: a fraction `share` of all values, but at least one.

    With `quantised` the values are stored as int8.
    """

    name: Literal["top-k"] = "top-k"
    share: float = Field(default=0.05, gt=0, le=1)
    quantised: bool = False

    def _parts(self) -> tuple[str, ...]:
        return ("index", "value", "scale") if self.quantised else ("index", "value")

    def _pack(self, total: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        flat = total.reshape(-1)
        # A stable sort breaks ties the same way everywhere.
        order = torch.argsort(flat.abs(), descending=True, stable=True)
        index = order[: self._count(len(flat))].sort().values
        parts = {"index": index.to(torch.int32), "value": flat[index].float()}
        if self.quantised:
            values, parts["scale"] = _quantise(flat[index][None], None)
            parts["value"] = values[0]
        return parts

    def _unpack(self, name: str, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        count = math.prod(shape)
        size = (self._count(count),)
        index = _checked(name, parts["index"], torch.int32, size).long()
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= count or bool((index.diff() <= 0).any())):
            raise DataError(
                f"the indices of {name!r} are not strictly ascending within 0 to {count - 1}; leave this payload out"
            )
        values = _checked(name, parts["value"], torch.int8 if self.quantised else torch.float32, size)
        if self.quantised:
            values = _dequantise(name, values[None], _checked(name, parts["scale"], torch.float32, (1,)))[0]
        found = torch.zeros(count)
        found[index] = values
        return found.reshape(shape)

    def _count(self, count: int) -> int:
        if count >= 2**31:
            raise DataError(f"a tensor has {count} values, but top-k supports fewer than 2^31; use another codec")
        return min(count, max(1, math.ceil(self.share * count)))


def _rows(shape: Iterable[int]) -> tuple[int, int]:
    sizes = tuple(shape)
    rows = sizes[0] if len(sizes) > 1 else 1
    return rows, math.prod(sizes) // max(rows, 1)


def _quantise(rows: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return the int8 values (R, C) and scales (R,) of rows; with a generator, rounding is stochastic."""
    largest = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
    scale = (largest / _LEVELS).float()
    # A subnormal scale is too coarse to be a step.
    scale = torch.where(scale < _FLOAT32.tiny, torch.zeros_like(scale), scale)
    steps = torch.where(scale[:, None] > 0, rows / scale.double().clamp_min(_FLOAT32.tiny)[:, None], 0.0)
    if generator is None:
        steps = steps.round()
    else:
        steps = (steps + torch.rand(steps.shape, generator=generator, dtype=steps.dtype)).floor()
    return steps.clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def _dequantise(name: str, values: Tensor, scale: Tensor) -> Tensor:
    if bool((values < -_LEVELS).any()) or bool((scale < 0).any()):
        raise DataError(f"tensor {name!r} has a value below -{_LEVELS} or a negative scale; leave this payload out")
    # If the scale was rounded up, the largest value may exceed the range of single precision.
    return (values.double() * scale.double()[:, None]).clamp(_FLOAT32.min, _FLOAT32.max).float()


def _checked(name: str, tensor: Tensor, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    check_like(name, tensor, torch.empty(tuple(shape), dtype=dtype, device="meta"))
    if tensor.is_floating_point():
        check_values(name, tensor)
    return tensor
