"""Our own store as a format, so that conversion goes both ways."""

from dataclasses import replace
from pathlib import Path

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.data import FORMAT, DatasetSpec, EpisodeDataset, MissingDataset, open_table
from worldloom.formats.format import FORMATS, Format, Note, ReadOptions, Sink, Source, WriteOptions, refuse, resize

COMMIT_BYTES = 2**27  # decoded bytes that make a commit
COMMIT_EPISODES = 256  # ... or this many episodes


class StoreSource(Source):
    """An `EpisodeDataset`, episode by episode."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        why = "worldloom's own store holds one camera, one vector and one time base, and states its bounds"
        refuse(options, ["camera", "vector", "rate", "actions", "gap", "action_low", "action_high", "columns"], why)
        self._dataset, self._size = EpisodeDataset.open(path), options.size
        self.spec, self.fingerprint, self.notes = self._dataset.spec, self._dataset.fingerprint(), []
        pixels = self.spec.observation.pixels
        if options.size is not None and pixels is not None:
            observation = replace(self.spec.observation, pixels=(*options.size, pixels[2]))
            self.spec = replace(self.spec, observation=observation)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> list[Episode]:
        """Return the episode."""
        episode = self._dataset.episode(index)
        return [episode if episode.pixels is None else replace(episode, pixels=resize(episode.pixels, self._size))]


class StoreSink(Sink):
    """Appends to an `EpisodeDataset`, with a commit for every 128 MiB of decoded data or 256 episodes."""

    def __init__(self, dataset: EpisodeDataset) -> None:
        self._dataset = dataset
        self.written = len(dataset)
        self._pending: list[Episode] = []
        self._bytes = 0

    def write(self, episode: Episode) -> None:
        """Add an episode; a full commit is written."""
        self._pending.append(episode)
        self._bytes += decoded_bytes(episode)
        if self._bytes >= COMMIT_BYTES or len(self._pending) >= COMMIT_EPISODES:
            self._commit()

    def finish(self) -> list[Note]:
        """Commit the rest."""
        self._commit()
        return []

    def close(self) -> None:
        """Commit whole episodes that wait, after an error elsewhere too."""
        self._commit()

    def _commit(self) -> None:
        # Taken out first: a commit that failed is not tried again on closing.
        pending, self._pending, self._bytes = self._pending, [], 0
        self._dataset.append(pending)


class Store(Format):
    """worldloom's Lance dataset."""

    name = "worldloom"
    description = "worldloom's own store: a Lance table, a row a frame"

    def detects(self, path: Path) -> bool:
        """Look for a Lance table that states our format."""
        if not (path / "_versions").is_dir():
            return False
        metadata: dict[bytes, bytes] = open_table(path).schema.metadata or {}
        return metadata.get(b"format") == FORMAT.encode()

    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open the latest version."""
        return StoreSource(path, options)

    def create(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> Sink:
        """Create the dataset, or open it to append."""
        try:
            if not resume:
                raise MissingDataset(str(path))
            dataset = EpisodeDataset.open(path)
        except MissingDataset:
            return StoreSink(EpisodeDataset.create(path, spec))
        if dataset.spec.to_json() != spec.to_json():
            raise DataError(f"{path} holds other observations, actions or labels than the source; choose another path")
        return StoreSink(dataset)


def decoded_bytes(episode: Episode) -> int:
    """Return the size of an episode's arrays in memory."""
    arrays = [episode.pixels, episode.vector, episode.actions, *episode.labels.values()]
    return sum(array.nbytes for array in arrays if array is not None)


FORMATS.register(Store.name)(Store())
