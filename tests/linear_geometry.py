"""The exact geometry of a linear world, to test search without fitting anything."""

import torch

from worldloom.heads import InverseModel, InverseModelConfig, LatentGeometry, Reversibility
from worldloom.testing import LinearWorld


def linear_geometry(world: LinearWorld, *, reversible: bool = True) -> LatentGeometry:
    """Inverse dynamics of z' = z + a as exact weights: the mean action of the block is the displacement / block."""
    spec = world.spec
    inverse = InverseModel(spec, InverseModelConfig(hidden=(4,)))
    first, last = inverse.network.layers[0], inverse.network.layers[-1]
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.zero_()
            layer.bias.zero_()
        for axis in range(2):
            first.weight[2 * axis, 2 + axis], first.weight[2 * axis + 1, 2 + axis] = 1.0, -1.0
            for step in range(spec.block):
                last.weight[2 * step + axis, 2 * axis] = 1 / spec.block
                last.weight[2 * step + axis, 2 * axis + 1] = -1 / spec.block
        inverse.mean.zero_()
        inverse.std.fill_(1.0)
    return LatentGeometry(
        step_length=1.0 * spec.block,
        inverse=inverse,
        reversibility=Reversibility(gap=0.0 if reversible else 1.0, displacement=1.0),
    )
