"""worldloom's own dataset as a format, so that conversion works in both directions."""

from dataclasses import replace
from pathlib import Path

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.data import FORMAT, EpisodeDataset, MissingDataset, open_table, resize
from worldloom.formats.format import CLOCK, Sink, Source, add_format


class StoreSource(Source):
    """A source that reads an `EpisodeDataset`."""

    format = "worldloom"
    refused = ("camera", "vector", "pictures", *CLOCK, "action_low", "action_high", "columns")
    reason = "a worldloom dataset has one camera of bytes, one vector and one time base, and stores its bounds"

    def begin(self) -> None:
        """Open the dataset."""
        self._dataset = EpisodeDataset.open(self.path)
        self.spec, self.fingerprint = self._dataset.spec, self._dataset.fingerprint()
        pixels, size = self.spec.observation.pixels, self.options.size
        if size is not None and pixels is not None:
            observation = replace(self.spec.observation, pixels=(*size, pixels[2]))
            self.spec = replace(self.spec, observation=observation)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> list[Episode]:
        """Return the episode."""
        episode = self._dataset.episode(index)
        if episode.pixels is None:
            return [episode]
        return [replace(episode, pixels=resize(episode.pixels, self.options.size))]


class StoreSink(Sink):
    """A sink that appends to an `EpisodeDataset`, with one commit per 128 MiB of decoded data or 256 episodes."""

    most_bytes, most_episodes = 2**27, 256

    def places(self) -> list[Path]:
        """Return no paths, because creating a dataset fails if the dataset exists."""
        return []

    def begin(self, *, resume: bool) -> int:
        """Open or create the dataset, and return its number of episodes."""
        try:
            if not resume:
                raise MissingDataset
            self._dataset = EpisodeDataset.open(self.path)
        except MissingDataset:
            self._dataset = EpisodeDataset.create(self.path, self.spec)
        if self._dataset.spec.to_json() != self.spec.to_json():
            raise DataError(
                f"{self.path} has different observations, actions or labels from the source; choose another path"
            )
        return len(self._dataset)

    def save(self, episodes: list[Episode]) -> None:
        """Commit the episodes."""
        self._dataset.append(episodes)

    def complete(self) -> None:
        """Do nothing, because the dataset is complete after each commit."""


def _detects(path: Path) -> bool:
    """Return whether `path` is a Lance table with worldloom's format in its metadata."""
    if not (path / "_versions").is_dir():
        return False
    metadata: dict[bytes, bytes] = open_table(path).schema.metadata or {}
    return metadata.get(b"format") == FORMAT.encode()


add_format(StoreSource, StoreSink, _detects, "worldloom's own store: a Lance table with one row per frame")
