"""The files of a consortium's rounds: bases, contributions, and the outer optimiser's momentum."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from worldloom.core.errors import StorageError
from worldloom.core.files import storage_errors, write_atomic
from worldloom.core.names import path_name
from worldloom.federation.rounds.aggregation import Source
from worldloom.federation.rounds.base import Base
from worldloom.models import load_tensors, save_tensors

_MOMENTUM = "outer-momentum"
_ROUND = "[0-9]" * 5  # how a round is written in the names of files


class RoundStore:
    """The folder of a consortium's rounds."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.ledger = self.path / "ledger.jsonl"

    def base(self, number: int, *, named: str | None = None) -> Base:
        """Return the base that a round starts from; `named` is its expected fingerprint.

        Raises:
            CheckpointError: the file is missing or damaged.
            DataError: the base has another fingerprint, or is not finite.
        """
        return Base.load(self._stem("bases", number), named=named)

    @property
    def newest(self) -> int:
        """The newest round whose base is stored; -1 without bases."""
        return max((int(path.stem) for path in self.path.glob(f"bases/{_ROUND}.json")), default=-1)

    @property
    def begun(self) -> int:
        """The newest round of which answers are stored; -1 without answers."""
        folders = [*self.path.glob(f"contributions/{_ROUND}"), *self.path.glob(f"sessions/{_ROUND}-*")]
        return max((int(path.name[:5]) for path in folders), default=-1)

    def momentum(self, number: int) -> dict[str, Tensor]:
        """Return the outer optimiser's momentum before a round; empty before the first round."""
        return load_tensors(self._stem("momenta", number), kind=_MOMENTUM)[0] if number else {}

    def save(self, number: int, base: Base, momentum: Mapping[str, Tensor]) -> None:
        """Write the base and the momentum that a round starts from."""
        if number:
            save_tensors(self._stem("momenta", number), momentum, kind=_MOMENTUM)
        base.save(self._stem("bases", number), {"round": number})

    def save_delta(self, number: int, owner: str, delta: Mapping[str, Tensor]) -> None:
        """Write a decoded contribution."""
        payload = safetensors.torch.save(dict(delta))  # not save_file, whose errors for a full disk have no number
        write_atomic(self.delta(number, owner), lambda temporary: temporary.write_bytes(payload))

    def message(self, number: int, owner: str) -> Path:
        """Return the path of a contribution as received."""
        return self.path / "contributions" / f"{number:05d}" / f"{path_name(owner, 'owner')}.msg"

    def delta(self, number: int, owner: str) -> Path:
        """Return the path of a decoded contribution."""
        return self.path / "contributions" / f"{number:05d}" / f"{path_name(owner, 'owner')}.safetensors"

    def source(self, number: int, owner: str) -> Source:
        """Return a function that reads single tensors of a decoded contribution.

        Raises:
            StorageError: the contribution is missing.
        """
        path = self.delta(number, owner)
        if not path.is_file():
            raise StorageError(
                f"the contribution of {owner} to round {number} is not at {path}; restore it from a copy"
            )
        return partial(_tensor, path)

    def _stem(self, folder: str, number: int) -> Path:
        return self.path / folder / f"{number:05d}"


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with storage_errors(path), safetensors.safe_open(str(path), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise StorageError(f"{path} is damaged ({error}); restore the file from a copy") from None
    return tensor
