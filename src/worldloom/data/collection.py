"""Collection of reward-free logs from any Gymnasium environment, in batches that are committed atomically.

Episode i depends only on the arguments and i: the environment's seed and the policy's random generator are derived from
the root seed and i. The content therefore does not depend on the number of environments or on interruptions.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import ConfigError, DataError, EnvironmentFailure
from worldloom.core.files import require_writable
from worldloom.core.picture_layout import PictureOptions
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import Policy, SeeingPolicy
from worldloom.core.seeds import derive_seed, numpy_generator
from worldloom.core.types import Episode
from worldloom.data.dataset import EpisodeDataset
from worldloom.data.layout import MissingDataset, metadata_json
from worldloom.data.policies import POLICIES
from worldloom.data.recording import RecordingBatch
from worldloom.data.spec import DatasetSpec
from worldloom.envs import VectorWorld

_log = logging.getLogger(__name__)


def episode_seed(seed: int, episode: int) -> int:
    """Return the environment seed that `collect` uses for an episode."""
    return derive_seed(seed, "episode", episode) % 2**31  # many environments accept at most 32 bits


def policy_generator(seed: int, episode: int) -> np.random.Generator:
    """Return the random generator that the policy uses in an episode."""
    return numpy_generator(seed, "policy", episode)


def collect(
    path: str | Path,
    *,
    env_id: str,
    episodes: int,
    steps: int,
    policy: str = "directed-walk",
    policy_options: Mapping[str, Any] | None = None,
    num_envs: int = 50,
    seed: int,
    env_kwargs: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    pictures: PictureOptions | None = None,
    storage_options: dict[str, str] | None = None,
    progress: Progress = SILENT,
) -> EpisodeDataset:
    """Collect episodes of at most `steps` steps until the dataset has `episodes` episodes.

    An existing dataset with fewer episodes is completed. A dataset with more is returned unchanged, with a warning.
    `labels` names the entries of the environment's infos to keep; None keeps every numeric entry of at most 256 values
    that is present in all frames, and warns about those that some frames lack. `pictures` says how pictures are stored,
    if this is not clear from the observation space. Each batch of `num_envs` episodes is one commit. If the policy sees
    infos of the simulator, the dataset's `spec.environment` lists them under `policy_sees`.

    Raises:
        ConfigError: `episodes`, `steps` or `num_envs` is below 1, `policy` is unknown, or the environment lacks an
            info that the policy needs.
        DataError: the dataset was collected with different arguments, a label is missing, or the policy raised an
            exception or returned an action out of bounds.
        EnvironmentFailure: the environment raised an exception, or returned values that are not finite. As on Ctrl-C,
            the frames before the failure are saved as shorter episodes with `truncated_by` in their metadata.
        StorageError: `path` cannot be written (found before the first episode), or the disk is full; committed episodes
            are kept.
    """
    if min(episodes, steps, num_envs) < 1:
        raise ConfigError(
            f"'episodes', 'steps' and 'num_envs' must be at least 1; got {episodes}, {steps} and {num_envs}"
        )
    require_writable(path)
    factory = POLICIES[policy]
    kwargs, options = dict(env_kwargs or {}), dict(policy_options or {})
    source = {"id": env_id, "kwargs": kwargs, "policy": policy, "policy_options": options, "seed": seed}
    source |= {"steps": steps, "labels": None if labels is None else sorted(labels)}
    if pictures is not None:  # left out otherwise, so that datasets of earlier versions can be completed
        source["pictures"] = pictures.model_dump()
    source = json.loads(metadata_json(source))
    dataset = _resume(path, source, storage_options)
    done = 0 if dataset is None else len(dataset)
    if dataset is not None and done >= episodes:
        if done > episodes:
            _log.warning("%s has %d episodes, more than the requested %d; using all of them", path, done, episodes)
        return dataset
    with ExitStack() as stack:
        task = stack.enter_context(progress.task("collect", (episodes - done) * (steps + 1), "frames"))
        # Writes a batch while the next one is recorded. The end of the block, also by Ctrl-C, waits for pending writes.
        writer = stack.enter_context(ThreadPoolExecutor(1))
        written: Future[EpisodeDataset] | None = None
        worlds: dict[int, tuple[VectorWorld, Policy]] = {}  # by size: the last batch may be smaller
        wanted: Mapping[str, int | None] | None = None if labels is None else dict.fromkeys(labels)
        if dataset is not None:
            wanted = dataset.spec.labels
        for first in range(done, episodes, num_envs):
            numbers = range(first, min(first + num_envs, episodes))
            if len(numbers) not in worlds:
                world = stack.enter_context(VectorWorld(env_id, len(numbers), kwargs, pictures=pictures))
                worlds[len(numbers)] = world, factory(world.action, **options)
            world, actor = worlds[len(numbers)]
            batch = RecordingBatch(world, numbers, steps, wanted)
            seeds = [episode_seed(seed, number) for number in numbers]
            generators = [policy_generator(seed, number) for number in numbers]
            failure: BaseException | None = None
            try:
                batch.run(actor, seeds, generators, policy, task)
            except (EnvironmentFailure, KeyboardInterrupt) as error:
                failure = error
            recorded = batch.episodes(seeds, policy, None if failure is None else type(failure).__name__)
            if recorded:
                wanted = batch.labels
                sees = {"policy_sees": list(actor.sees)} if isinstance(actor, SeeingPolicy) and actor.sees else {}
                spec = DatasetSpec(
                    observation=world.observation, action=world.action, labels=batch.labels, environment=source | sees
                )
                before = written
                written = writer.submit(_commit, path, spec, before or dataset, recorded, storage_options)
                if before is not None:
                    before.result()  # at most one batch waits to be written
            if failure is not None:
                if written is not None:
                    written.result()
                if isinstance(failure, EnvironmentFailure):
                    raise _with_remedy(failure, path, recorded, first) from failure.__cause__ or failure
                raise failure
        assert written is not None
        return written.result()


def _resume(
    path: str | Path, source: Mapping[str, Any], storage_options: dict[str, str] | None
) -> EpisodeDataset | None:
    try:
        dataset = EpisodeDataset.open(path, storage_options=storage_options)
    except MissingDataset:
        if "://" not in str(path) and any(Path(path).glob("data/*.lance")):
            raise DataError(
                f"{path} has data files but no _versions folder; restore the folder from a copy, or choose another path"
            ) from None
        return None
    there = dataset.spec.environment
    differences = [
        f"{key} was {there.get(key)!r}, is {value!r}" for key, value in source.items() if there.get(key) != value
    ]
    if differences:
        raise DataError(
            f"{path} was collected with different arguments: {'; '.join(differences)}. Use the old arguments to "
            f"complete the dataset, or choose another path"
        )
    return dataset


def _commit(
    path: str | Path,
    spec: DatasetSpec,
    before: "Future[EpisodeDataset] | EpisodeDataset | None",
    episodes: list[Episode],
    storage_options: dict[str, str] | None,
) -> EpisodeDataset:
    """Wait for the commit `before`, then append. If `before` failed, raise its error, so that no episode is missing."""
    dataset = before.result() if isinstance(before, Future) else before
    if dataset is None:
        dataset = EpisodeDataset.create(path, spec, storage_options=storage_options)
    dataset.append(episodes)
    _log.info("%s has %d episodes", path, len(dataset))
    return dataset


def _with_remedy(
    failure: EnvironmentFailure, path: str | Path, recorded: list[Episode], first: int
) -> EnvironmentFailure:
    if not recorded:
        return EnvironmentFailure(f"{failure}. Repair the environment, then run the same command again")
    return EnvironmentFailure(
        f"{failure}. The frames before the failure are in {path} (episodes {first} to {first + len(recorded) - 1}, "
        f"truncated). Repair the environment, then run the same command again to continue with the next episode"
    )
