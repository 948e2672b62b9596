"""Memories as columns, and their layout in a Lance table: one row per memory; model and format are metadata."""

import json
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import CheckpointError, ConfigError, DataError
from worldloom.core.json_text import parse_json
from worldloom.core.types import ModelSpec, ObservationSpec
from worldloom.data import float_list, float_lists, floats_of, lance_errors

FORMAT = "worldloom.memory"
VERSION = 1
THUMBNAIL = 32  # the longer side of a thumbnail, in pixels


class MemoryConfig(Config):
    """The configuration of a memory: which observations are stored, and how many memories.

    `frames` is `whole` (another model can encode them), `thumbnail` (for people) or `none`. Above `capacity` memories,
    redundant ones are forgotten (see `worldloom.memory.forgetting`). `durable` flushes each append to the disk, so that
    even a power cut loses no memory. An append that brings the journal to `flush_every` memories moves them into the
    table. With `index_from` or more memories, `recall` searches `probes` cells of an index. With fewer memories, and
    for memories that are not indexed yet, the search is exact.
    """

    frames: Literal["whole", "thumbnail", "none"] = "whole"
    capacity: int = Field(default=1_000_000, ge=100)
    durable: bool = False
    flush_every: int = Field(default=4096, ge=1)
    index_from: int = Field(default=65_536, ge=1024)
    probes: int = Field(default=32, ge=1)


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """The content of a memory: the fingerprint of the model, the sizes of the stored values, and the configuration."""

    model: str
    latent_dim: int
    block_size: int
    observation: ObservationSpec
    config: MemoryConfig

    @classmethod
    def of(cls, model: ModelSpec, config: MemoryConfig) -> "MemorySpec":
        """Return the spec for memories of a model."""
        return cls(
            model=model.fingerprint,
            latent_dim=model.latent_dim,
            block_size=model.block_size,
            observation=model.observation,
            config=config,
        )

    @property
    def frame_shape(self) -> tuple[int, int, int] | None:
        """The shape (H, W, C) of the stored frames, or None if no frames are stored."""
        pixels = self.observation.pixels
        if pixels is None or self.config.frames == "none":
            return None
        if self.config.frames == "whole":
            return pixels
        scale = min(1.0, THUMBNAIL / max(pixels[:2]))
        return max(1, round(pixels[0] * scale)), max(1, round(pixels[1] * scale)), pixels[2]

    @property
    def vector(self) -> int:
        """The number of stored values of an observation's vector."""
        return self.observation.vector if self.config.frames == "whole" else 0

    def check(self, model: ModelSpec, path: Path) -> None:
        """Raise `CheckpointError` if the latents are of another model."""
        if self.model != model.fingerprint:
            raise CheckpointError(
                f"{path} has latents of model {self.model[:12]!r}, but this model is {model.fingerprint[:12]!r}; the "
                f"latents of different models cannot be compared. Run 'worldloom memory reencode {path} RUN' with the "
                f"run of this model, or choose another directory"
            )

    def schema(self) -> pa.Schema:
        """Return the columns, with the format, its version and this spec as metadata."""
        fields = [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("time", pa.float64(), nullable=False),
            pa.field("episode", pa.int64(), nullable=False),
            pa.field("step", pa.int64(), nullable=False),
            pa.field("latent", float_list(self.latent_dim), nullable=False),
            pa.field("action", float_list(self.block_size), nullable=False),
            pa.field("surprise", pa.float32(), nullable=False),
            pa.field("outcome", pa.string(), nullable=False),
        ]
        if self.frame_shape is not None:
            fields.append(pa.field("pixels", pa.large_binary()))
        if self.vector:
            fields.append(pa.field("vector", float_list(self.vector)))
        values = {**asdict(self), "config": self.config.model_dump(mode="json")}
        return pa.schema(fields, metadata={"format": FORMAT, "version": str(VERSION), "spec": json.dumps(values)})

    @classmethod
    def read(cls, schema: pa.Schema, path: Path) -> "MemorySpec":
        """Return the spec stored in a table.

        Raises:
            DataError: the table is not a memory of this library, or has a different version of the format.
        """
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        version = format_version(metadata, path)
        if version > VERSION:
            raise DataError(
                f"{path} has version {version} of the memory format, but this version of worldloom reads up to "
                f"{VERSION}; install the version of worldloom that wrote the memory"
            )
        if version < VERSION:
            raise DataError(
                f"{path} has version {version} of the memory format, but this version of worldloom reads {VERSION}; "
                f"run 'worldloom memory migrate {path}', which keeps every memory"
            )
        try:
            values = parse_json(metadata["spec"])
            return cls(
                model=values["model"],
                latent_dim=values["latent_dim"],
                block_size=values["block_size"],
                observation=ObservationSpec.from_json(values["observation"]),
                config=MemoryConfig.parse(values["config"]),
            )
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise DataError(
                f"the spec in {path} is damaged ({type(error).__name__}: {error}); restore the memory from a copy"
            ) from error


def format_version(metadata: dict[str, str], path: Path) -> int:
    """Return the version of the format; raise `DataError` if the table is not a memory."""
    version = metadata.get("version", "")
    if metadata.get("format") != FORMAT or not re.fullmatch("[0-9]{1,9}", version):
        raise DataError(f"{path} is a Lance table but not a worldloom memory; check the path")
    return int(version)


@dataclass(frozen=True, kw_only=True, eq=False)
class Memories:
    """M memories as columns, in the order of their ids unless noted otherwise.

    `ids` grow with each append and are never reused; `times` are seconds since 1970. `episodes` number stretches of
    continuous experience, and `steps` count environment steps within each episode. `actions` are the blocks that led to
    the state (zeros at the start of an episode). `surprises` are NaN where they were not measured; `outcomes` may be
    "".
    """

    ids: Int64[np.ndarray, "M"]
    times: Float64[np.ndarray, "M"]
    episodes: Int64[np.ndarray, "M"]
    steps: Int64[np.ndarray, "M"]
    latents: Float32[np.ndarray, "M D"]
    actions: Float32[np.ndarray, "M A"]
    surprises: Float32[np.ndarray, "M"]
    outcomes: Shaped[np.ndarray, "M"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> "Memories":
        """Return the selected memories."""
        return Memories(**{name: column[index] for name, column in vars(self).items()})

    @classmethod
    def concatenate(cls, parts: Sequence["Memories"]) -> "Memories":
        """Return the memories of one or more parts, concatenated."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    @classmethod
    def of_table(cls, table: pa.Table) -> "Memories":
        """Read the columns of a table."""
        return cls(
            ids=table["id"].to_numpy(),
            times=table["time"].to_numpy(),
            episodes=table["episode"].to_numpy(),
            steps=table["step"].to_numpy(),
            latents=floats_of(table["latent"])[0],
            actions=floats_of(table["action"])[0],
            surprises=table["surprise"].to_numpy(),
            outcomes=np.array(table["outcome"].to_pylist(), dtype=str),
        )

    def columns(self) -> dict[str, Any]:
        """Return the columns of a table, by their names in `COLUMNS`."""
        return {
            "id": self.ids,
            "time": self.times,
            "episode": self.episodes,
            "step": self.steps,
            "latent": float_lists(self.latents),
            "action": float_lists(self.actions),
            "surprise": self.surprises,
            "outcome": pa.array(self.outcomes.tolist(), pa.string()),
        }

    def arrow(self, spec: MemorySpec, frames: pa.Array | None, vectors: pa.Array | None) -> pa.Table:
        """Return these memories as an Arrow table with the columns of `spec`, including frames and vectors."""
        columns = {**self.columns(), "pixels": frames, "vector": vectors}
        schema = spec.schema()
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)


_COMPARE = {">=": operator.ge, "<": operator.lt, "=": operator.eq}
COLUMNS = ["id", "time", "episode", "step", "latent", "action", "surprise", "outcome"]


@dataclass(frozen=True, kw_only=True)
class Where:
    """A selection of memories that satisfy all given conditions. Times are seconds since 1970; `until` is excluded."""

    since: float | None = None
    until: float | None = None
    episode: int | None = None
    outcome: str | None = None
    min_surprise: float | None = None

    def _conditions(self) -> list[tuple[str, str, Any]]:
        """Return column, operator and value of each condition that is set."""
        every = [
            ("time", ">=", self.since),
            ("time", "<", self.until),
            ("episode", "=", self.episode),
            ("outcome", "=", self.outcome),
            ("surprise", ">=", self.min_surprise),
        ]
        return [condition for condition in every if condition[2] is not None]

    def sql(self) -> str | None:
        """Return the condition in Lance's SQL, or None for all memories."""
        held = []
        for column, sign, value in self._conditions():
            literal = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)
            held.append(f"{column} {sign} {literal}")
        if self.min_surprise is not None:
            held.append("NOT isnan(surprise)")
        return " AND ".join(held) or None

    def holds(self, memories: Memories) -> Bool[np.ndarray, "M"]:
        """Return a mask of the memories that are selected."""
        selected = np.ones(len(memories), bool)
        for column, sign, value in self._conditions():
            selected &= _COMPARE[sign](getattr(memories, f"{column}s"), value)
        return selected


@contextmanager
def memory_errors(path: Path, doing: Literal["read", "write"]) -> Iterator[None]:
    """Convert Lance's errors to this library's, for the memory at `path`."""
    remedy = "Restore the directory from a copy, or move it away and create a new memory"
    with lance_errors(str(path), doing, remedy=remedy):
        yield


def moment(time: float) -> str:
    """Return a time as ISO 8601, in UTC, to the second."""
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")
