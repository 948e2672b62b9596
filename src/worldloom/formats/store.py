"""Our own store as a format, so that conversion goes both ways."""

from dataclasses import replace
from pathlib import Path

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.data import FORMAT, DatasetSpec, EpisodeDataset, MissingDataset, open_table, resize
from worldloom.formats.format import CLOCK, FORMATS, FileSink, FileSource, Format, ReadOptions, WriteOptions


class StoreSource(FileSource):
    """An `EpisodeDataset`, episode by episode."""

    refused = ("camera", "vector", *CLOCK, "action_low", "action_high", "columns")
    reason = "worldloom's own store holds one camera, one vector and one time base, and states its bounds"

    def __init__(self, path: Path, options: ReadOptions) -> None:
        super().__init__(path, options)
        self._dataset = EpisodeDataset.open(path)
        self.spec, self.fingerprint = self._dataset.spec, self._dataset.fingerprint()
        pixels = self.spec.observation.pixels
        if options.size is not None and pixels is not None:
            observation = replace(self.spec.observation, pixels=(*options.size, pixels[2]))
            self.spec = replace(self.spec, observation=observation)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> list[Episode]:
        """Return the episode."""
        episode = self._dataset.episode(index)
        if episode.pixels is None:
            return [episode]
        return [replace(episode, pixels=resize(episode.pixels, self.options.size))]


class StoreSink(FileSink):
    """Appends to an `EpisodeDataset`, with a commit for every 128 MiB of decoded data or 256 episodes."""

    most_bytes, most_episodes = 2**27, 256

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        super().__init__(path, spec, options, resume=True)  # creating a dataset refuses what exists
        self._dataset = self._create_or_open() if resume else EpisodeDataset.create(path, spec)
        self.saved = self.written = len(self._dataset)

    def _create_or_open(self) -> EpisodeDataset:
        try:
            dataset = EpisodeDataset.open(self.path)
        except MissingDataset:
            return EpisodeDataset.create(self.path, self.spec)
        if dataset.spec.to_json() != self.spec.to_json():
            raise DataError(
                f"{self.path} holds other observations, actions or labels than the source; choose another path"
            )
        return dataset

    def save(self, episodes: list[Episode]) -> None:
        """Commit the episodes."""
        self._dataset.append(episodes)

    def complete(self) -> None:
        """Do nothing: each commit is complete."""


class Store(Format):
    """worldloom's Lance dataset."""

    name = "worldloom"
    description = "worldloom's own store: a Lance table, a row a frame"
    source, sink = StoreSource, StoreSink

    def detects(self, path: Path) -> bool:
        """Look for a Lance table that states our format."""
        if not (path / "_versions").is_dir():
            return False
        metadata: dict[bytes, bytes] = open_table(path).schema.metadata or {}
        return metadata.get(b"format") == FORMAT.encode()


FORMATS.register(Store.name)(Store())
