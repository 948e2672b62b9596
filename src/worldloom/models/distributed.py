"""Batch statistics and parameters that are distributed over several ranks.

`gather` and `mean_over_ranks` are differentiable, and their backward passes are the true adjoints: each rank receives
the gradient of the sum of all ranks' losses with respect to its own inputs. After data parallelism averages the
gradients, the result is the gradient of a single rank with the complete batch. Without a process group, both functions
return their input.
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
    """Within the block, behave like a single rank: statistics cover only this rank's batch."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world_size() -> int:
    """Return the number of ranks; 1 without a process group or within `alone`."""
    if _alone.get():
        return 1
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather(values: Float[Tensor, "B *axes"]) -> Float[Tensor, "WB *axes"]:
    """Concatenate the ranks' values along the first axis; the shape must be the same on every rank."""
    if world_size() == 1:
        return values
    gathered: Tensor = _Gather.apply(values.unsqueeze(0))
    return gathered.flatten(0, 1)


def mean_over_ranks(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Average values over the ranks."""
    return values if world_size() == 1 else gather(values.unsqueeze(0)).mean(0)


def _sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether the tensor is sharded; do not import `torch.distributed.tensor`, because that takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a full tensor, and other tensors unchanged. All ranks must call this function."""
    return tensor.full_tensor() if _sharded(tensor) else tensor


def shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard as a view; a tensor that is not sharded is returned unchanged."""
    return tensor.to_local() if _sharded(tensor) else tensor


def lay_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a copy of the full `tensor`, with the memory layout and the sharding over ranks of the tensor `model`."""
    if _sharded(model):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the full tensor and takes its shard, so nothing is sent.
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
    return torch.empty_like(model, requires_grad=False).copy_(tensor)


class _Gather(torch.autograd.Function):
    """All-gather along axis 0. The backward pass sums the gradients over the ranks and keeps this rank's part."""

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
