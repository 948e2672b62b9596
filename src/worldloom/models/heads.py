"""Small modules on latents, and the one loop that trains them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldloom.core.errors import TrainingError
from worldloom.core.progress import SILENT, Progress

Norm = Literal["none", "layer"]
Activation = Literal["relu", "silu", "gelu"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def hidden_layer(width: int, norm: Norm, activation: Activation) -> list[nn.Module]:
    """Return what follows a hidden linear layer of `width`: the norm, if any, and the activation."""
    normalise: list[nn.Module] = [nn.LayerNorm(width)] if norm == "layer" else []
    return [*normalise, _ACTIVATIONS[activation]()]


class MLP(nn.Module):
    """Linear layers of the given sizes, input and output included, with `norm` and `activation` between."""

    def __init__(self, sizes: Sequence[int], norm: Norm = "none", activation: Activation = "relu") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), *hidden_layer(outputs, norm, activation)]
        trailing = len(hidden_layer(1, norm, activation))
        self.layers = nn.Sequential(*layers[:-trailing])

    def forward(self, values: Float[Tensor, "*axes I"]) -> Float[Tensor, "*axes O"]:
        """Map the last axis."""
        out: Tensor = self.layers(values)
        return out


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """How well a probe reads labels: mean Euclidean error in their unit, and share of variance explained."""

    error: float
    r2: float


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A linear map from latents to labels, fitted in closed form; a measure, not a part of the model."""

    weight: Float[Tensor, "D L"]
    bias: Float[Tensor, "L"]

    @classmethod
    def fit(
        cls, latents: Float[Tensor, "*axes D"], labels: Float[Tensor, "*axes L"], *, ridge: float = 1e-3
    ) -> "LinearProbe":
        """Fit by ridge regression in double precision; `ridge` is relative to the mean variance of the latents."""
        inputs, outputs = latents.flatten(0, -2).double(), labels.flatten(0, -2).double()
        input_mean, output_mean = inputs.mean(0), outputs.mean(0)
        centred = inputs - input_mean
        gram = centred.T @ centred
        penalty = ridge * gram.diagonal().mean().clamp_min(1e-12)
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + penalty * identity, centred.T @ (outputs - output_mean))
        return cls(weight=weight.float(), bias=(output_mean - input_mean @ weight).float())

    def __call__(self, latents: Float[Tensor, "*axes D"]) -> Float[Tensor, "*axes L"]:
        """Read labels from latents."""
        return latents @ self.weight + self.bias

    def score(self, latents: Float[Tensor, "*axes D"], labels: Float[Tensor, "*axes L"]) -> ProbeScore:
        """Compare with the true labels; frames that the fit did not see make it honest."""
        residual = (self(latents) - labels).flatten(0, -2)
        spread = (labels - labels.flatten(0, -2).mean(0)).flatten(0, -2)
        unexplained = residual.square().sum() / spread.square().sum().clamp_min(1e-12)
        return ProbeScore(error=residual.norm(dim=-1).mean().item(), r2=1 - unexplained.item())


def fit_head(
    module: nn.Module,
    batch_fn: Callable[[int], Tensor],
    steps: int,
    learning_rate: float = 1e-3,
    progress: Progress = SILENT,
    *,
    weight_decay: float = 1e-4,
    clip: float = 5.0,
    description: str = "head",
) -> float:
    """Minimise `batch_fn(step)`, a scalar loss, over the module's parameters by AdamW with a cosine schedule.

    Leaves the module in evaluation mode and returns the mean loss of the last tenth of the steps.

    Raises:
        TrainingError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    warmup = max(1, min(100, steps // 20))
    tail: list[float] = []
    module.train()
    with progress.task(description, steps, "step") as task:
        for step in range(steps):
            rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate
            loss = batch_fn(step)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"{description}: the loss is {value} at step {step}; lower the learning rate ({learning_rate})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            if step >= steps - max(1, steps // 10):
                tail.append(value)
            task.advance(1, loss=value)
    module.eval()
    return sum(tail) / max(1, len(tail))
