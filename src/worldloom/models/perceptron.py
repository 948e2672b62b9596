"""The multilayer perceptron that encoders, predictors and heads use."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

Norm = Literal["none", "layer"]
Activation = Literal["relu", "silu", "gelu"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def hidden_layer(width: int, norm: Norm, activation: Activation) -> list[nn.Module]:
    """Return the modules after a hidden linear layer of `width`: the norm, if any, and the activation."""
    normalise: list[nn.Module] = [nn.LayerNorm(width)] if norm == "layer" else []
    return [*normalise, _ACTIVATIONS[activation]()]


class MLP(nn.Module):
    """A multilayer perceptron. `sizes` include input and output; `norm` and `activation` follow each hidden layer."""

    def __init__(self, sizes: Sequence[int], norm: Norm = "none", activation: Activation = "relu") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), *hidden_layer(outputs, norm, activation)]
        trailing = len(hidden_layer(1, norm, activation))
        self.layers = nn.Sequential(*layers[:-trailing])

    def forward(self, values: Float[Tensor, "*axes I"]) -> Float[Tensor, "*axes O"]:
        """Apply the layers along the last axis."""
        out: Tensor = self.layers(values)
        return out
