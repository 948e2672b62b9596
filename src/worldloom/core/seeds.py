"""Random streams that depend on names, not on the order of use: one root seed, and one stream for each purpose."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(root: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream `names` under `root`. The seed is the same on every machine."""
    text = "/".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(root: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator for the stream `names` under `root`."""
    return np.random.default_rng(derive_seed(root, *names))


def torch_generator(root: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a PyTorch generator for the stream `names` under `root`, on `device`."""
    return torch.Generator(device=device).manual_seed(derive_seed(root, *names))


@contextmanager
def seeded_weights(root: int, *names: str | int) -> Iterator[None]:
    """Within the block, seed PyTorch's global CPU generator (for initial weights) from the stream `names`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(root, *names))
        yield
