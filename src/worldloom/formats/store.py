"""worldloom's own dataset as a format, so that conversion works in both directions."""

from dataclasses import replace
from pathlib import Path

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.data import FORMAT, DatasetSpec, EpisodeDataset, MissingDataset, open_table, resize
from worldloom.formats.format import CLOCK, FORMATS, FileSink, FileSource, Format, ReadOptions, WriteOptions


class StoreSource(FileSource):
    """A source over an `EpisodeDataset`."""

    refused = ("camera", "vector", *CLOCK, "action_low", "action_high", "columns")
    reason = "a worldloom dataset has one camera, one vector and one time base, and stores its bounds"

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
    """Appends to an `EpisodeDataset`, with one commit per 128 MiB of decoded data or 256 episodes."""

    most_bytes, most_episodes = 2**27, 256

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        super().__init__(path, spec, options, resume=True)  # `EpisodeDataset.create` rejects an existing dataset
        self._dataset = self._create_or_open() if resume else EpisodeDataset.create(path, spec)
        self.saved = self.written = len(self._dataset)

    def _create_or_open(self) -> EpisodeDataset:
        try:
            dataset = EpisodeDataset.open(self.path)
        except MissingDataset:
            return EpisodeDataset.create(self.path, self.spec)
        if dataset.spec.to_json() != self.spec.to_json():
            raise DataError(
                f"{self.path} has different observations, actions or labels from the source; choose another path"
            )
        return dataset

    def save(self, episodes: list[Episode]) -> None:
        """Commit the episodes."""
        self._dataset.append(episodes)

    def complete(self) -> None:
        """Do nothing, because the dataset is complete after each commit."""


class Store(Format):
    """The format of worldloom's own datasets."""

    name = "worldloom"
    description = "a worldloom dataset: a Lance table with one row per frame"
    source, sink = StoreSource, StoreSink

    def detects(self, path: Path) -> bool:
        """Return whether `path` is a Lance table with worldloom's format in its metadata."""
        if not (path / "_versions").is_dir():
            return False
        metadata: dict[bytes, bytes] = open_table(path).schema.metadata or {}
        return metadata.get(b"format") == FORMAT.encode()


FORMATS.register(Store.name)(Store())
