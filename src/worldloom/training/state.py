"""Checkpoints of the training state: model, losses and optimiser, restored exactly; the last two are kept."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.core.errors import CheckpointError
from worldloom.models import delete_tensors, lay_like, load_tensors, save_tensors, whole
from worldloom.training.run_folder import RunFolder

_logger = logging.getLogger(__name__)
_KIND = "training-state"
_KEPT = 2


def save_state(
    run: RunFolder,
    step: int,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    metadata: Mapping[str, Any],
    *,
    write: bool = True,
) -> None:
    """Save the state after `step` steps, and delete all but the last two states.

    All ranks must call this function, because each may have a shard; only the rank with `write` writes files.
    """
    tensors = {f"learner/{name}": whole(tensor) for name, tensor in learner.state_dict().items()}
    # Sorted, because all ranks must gather the shards in the same order.
    for index, state in sorted(optimizer.state_dict()["state"].items()):
        tensors |= {f"optimizer/{index}/{name}": whole(torch.as_tensor(state[name])) for name in sorted(state)}
    if not write:
        return
    save_tensors(_stem(run, step), tensors, {"step": step, **metadata}, kind=_KIND)
    for old in saved_steps(run)[:-_KEPT]:
        delete_tensors(_stem(run, old))


def saved_steps(run: RunFolder) -> list[int]:
    """Return the steps with a saved state, in ascending order."""
    names = (path.name for path in run.checkpoint_directory.glob("step-*.json"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)\.json", name)))


def load_state(
    run: RunFolder, learner: nn.Module, optimizer: torch.optim.Optimizer, metadata: Mapping[str, Any]
) -> int:
    """Restore the latest valid state into `learner` and `optimizer`, and return the step of this state.

    If a state is damaged, the state before it is used. Without any saved state, nothing is restored and 0 is returned.

    Raises:
        CheckpointError: the state's configuration or data differ from `metadata`, or every state is damaged.
    """
    damage: CheckpointError | None = None
    for step in reversed(saved_steps(run)):
        try:
            tensors, saved = load_tensors(_stem(run, step), kind=_KIND)
        except CheckpointError as error:
            _logger.warning("skipping a damaged checkpoint: %s", error)
            damage = error
            continue
        _compare(run, saved, metadata)
        _restore(tensors, learner, optimizer)
        return int(saved["step"])
    if damage is not None:
        raise damage
    return 0


def _restore(tensors: Mapping[str, Tensor], learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    lying = learner.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    learner_state: dict[str, Tensor] = {}
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if part == "learner":
            learner_state[name] = lay_like(tensor, lying[name]) if name in lying else tensor
        else:
            index, _, field = name.partition("/")
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:
                # The fused optimiser iterates in memory order, so parameter and moments need the same layout.
                tensor = lay_like(tensor, parameter)
            optimizer_state.setdefault(int(index), {})[field] = tensor
    learner.load_state_dict(learner_state)
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})


def _compare(run: RunFolder, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for part, values in expected.items():
        before = saved.get(part)
        differing = "" if before == values else part
        if isinstance(before, Mapping) and isinstance(values, Mapping):
            # Keys that only an earlier version compared are ignored.
            keys = sorted(key for key in values if before.get(key) != values[key])
            differing = ", ".join(f"{part}.{key} was {before.get(key)!r}, is {values[key]!r}" for key in keys)
        if not differing:
            continue
        raise CheckpointError(
            f"{run.path} cannot be resumed because its settings or data changed: {differing}. Use the old settings and "
            f"the old data, or start a new run"
        )


def _stem(run: RunFolder, step: int) -> Any:
    return run.checkpoint_directory / f"step-{step:08d}"
