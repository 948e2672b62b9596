"""Statistics of the whole batch, and parameters, when several ranks hold a part of them each.

`gather` and `mean_over_ranks` are differentiable with their true adjoints: each rank's gradient holds what all
ranks' losses owe to its inputs. With the average of gradients that data parallelism takes, the result is the gradient
of one rank that holds the whole batch. Without a process group they change nothing.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_alone = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Train on this rank alone: statistics are those of its own batch."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world_size() -> int:
    """Return the number of ranks, 1 without a process group and within `alone`."""
    if _alone.get():
        return 1
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather(values: Float[Tensor, "B *axes"]) -> Float[Tensor, "WB *axes"]:
    """Concatenate the ranks' values along the first axis; every rank must hold the same shape."""
    if world_size() == 1:
        return values
    gathered: Tensor = _Gather.apply(values.unsqueeze(0))
    return gathered.flatten(0, 1)


def mean_over_ranks(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Average over the ranks."""
    return values if world_size() == 1 else gather(values.unsqueeze(0)).mean(0)


def _sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether the tensor is sharded. Without the module, which takes a second to load, no tensor is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, which all ranks must ask for together; other tensors as they are."""
    return tensor.full_tensor() if _sharded(tensor) else tensor


def shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if _sharded(tensor) else tensor


def lay_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a copy of a whole tensor that lies in memory, and over the ranks, as `model` does."""
    if _sharded(model):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole and takes its part: nothing is sent.
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
    return torch.empty_like(model, requires_grad=False).copy_(tensor)


class _Gather(torch.autograd.Function):
    """All-gather along axis 0, whose adjoint sums over the ranks and keeps this rank's part."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world_size())]
        distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        rows = len(total) // world_size()
        return total.narrow(0, distributed.get_rank() * rows, rows)
