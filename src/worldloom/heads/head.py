"""Small networks on a model's latents as files, tied to the weights that made the latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from worldloom.core.config import Config
from worldloom.core.errors import CheckpointError
from worldloom.core.seams import WorldModel
from worldloom.models import load_tensors, save_tensors

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def save_head(
    stem: Path | str, module: nn.Module, *, kind: str, model: WorldModel, config: Config, **extra: Any
) -> str:
    """Write the module's tensors with its configuration and the model's fingerprint; return the digest."""
    metadata = {"model": model.spec.fingerprint, "config": config.model_dump(mode="json"), **extra}
    return save_tensors(stem, module.state_dict(), metadata, kind=kind)


def read_head(stem: Path | str, *, kind: str, model: WorldModel) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the tensors and the metadata of a head of this model.

    Raises:
        CheckpointError: it is missing, damaged, of another kind, or was fitted on another model's latents.
    """
    device = model.device
    tensors, metadata = load_tensors(stem, kind=kind, device=device)
    if metadata.get("model") != model.spec.fingerprint:
        raise CheckpointError(
            f"{stem} was fitted on the latents of model {str(metadata.get('model'))[:12]!r} and the model is "
            f"{model.spec.fingerprint[:12]!r}; fit it again, or load the model that it belongs to"
        )
    return tensors, metadata


def restore(stem: Path | str, module: ModuleT, tensors: Mapping[str, Any]) -> ModuleT:
    """Load the tensors into a module built from the same file's configuration, ready for use."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{stem} does not fit its own configuration: {error}; fit it again") from None
    return module.eval()
