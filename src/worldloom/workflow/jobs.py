"""The main jobs: collect, train, evaluate and explore. Collection and training can be interrupted and resumed."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Int64

from worldloom import data
from worldloom.agents import fit_behaviour_cloning, fit_goal_inverse, fit_reactive
from worldloom.core.errors import CheckpointError, ConfigError, WorldloomError
from worldloom.core.files import require_writable, write_json
from worldloom.core.hardware import choosable_threads, use_threads
from worldloom.core.names import path_name
from worldloom.core.progress import SILENT, Progress
from worldloom.core.registry import nearest
from worldloom.core.seams import Agent, WorldModel
from worldloom.core.seeds import derive_seed, numpy_generator, torch_generator
from worldloom.data import POSITIONS, EpisodeDataset, Frames, TurnedPixels, load_frames, require_square
from worldloom.envs import declares_plant, register_envs
from worldloom.evaluation import PROTOCOLS, Changes, Protocol, Results, gym_protocol
from worldloom.evaluation import evaluate_together as evaluate_methods
from worldloom.evaluation import explore as explore_worlds
from worldloom.heads import (
    CoarseModel,
    LatentEpisodes,
    Probe,
    ProbeConfig,
    encode_episodes,
    fit_behaviour_prior,
    fit_coarse,
    fit_distance,
    fit_probe,
    measure_geometry,
    measure_support,
    rank_correlation,
    refine_predictor,
)
from worldloom.models import alone, load_model, save_model, stored_extra
from worldloom.planning import LatentL2
from worldloom.recipes import LabelledProbe, Recipe
from worldloom.training import FREE, Ranks, RunFolder, describe_provenance, fit, make_fabric
from worldloom.workflow.run import Run, differences, recipe_values
from worldloom.workflow.session import Session, fast_planning, session_of

_log = logging.getLogger(__name__)

register_envs()

_OPTIONAL = ("goal_inverse", "behaviour_prior")  # heads of one field each, which a recipe may leave out


def collect(recipe: Recipe, path: Path | str, *, progress: Progress = SILENT) -> EpisodeDataset:
    """Collect the logs of a recipe, or complete a partial dataset.

    Raises:
        ConfigError: the recipe has no environment.
        DataError, EnvironmentFailure, StorageError: see `worldloom.data.collect`.
    """
    if recipe.collection is None:
        raise ConfigError(
            f"recipe {recipe.name!r} has no environment; collect with worldloom.data.collect(path, env_id=...)"
        )
    options = recipe.collection.model_dump()
    return data.collect(path, **options, progress=progress)


def train(
    recipe: Recipe,
    dataset: EpisodeDataset | Path | str,
    path: Path | str,
    *,
    resume: bool = False,
    progress: Progress = SILENT,
) -> Run:
    """Train the world model, refine its predictor if the recipe says so, and fit the heads on the frozen latents.

    `resume` continues an interrupted run.

    Under torchrun, every process calls this function with the same arguments and a shared folder. The first process
    writes the folder, and fits the heads while the other processes wait.

    Raises:
        StorageError: the folder contains a run and `resume` is not set, or writing failed.
        ConfigError: a resumed run has a different recipe (the message lists the keys), a probe's label is missing, or a
            symmetric probe cannot be fitted on the dataset's observations.
        CheckpointError: a resumed run has different data.
        DataError, TrainingError: see `worldloom.training.fit`.
    """
    require_writable(path)
    if not isinstance(dataset, EpisodeDataset):
        dataset = EpisodeDataset.open(dataset, retry_seconds=recipe.data.retry_seconds)
    for name, probe in recipe.probes.items():
        if (label := probe.label or name) not in dataset.spec.labels:
            raise ConfigError(
                f"probe {name!r} needs the label {label!r}, which the dataset does not have; "
                f"{nearest(label, dataset.spec.labels)}"
            )
        if probe.symmetric:
            require_square(dataset.spec, f"probe {name!r} is symmetric, which")
    fabric = make_fabric(recipe.training)
    ranks = Ranks(fabric, recipe.training.timeout_minutes)
    progress = progress if ranks.first else SILENT
    folder = ranks.in_turn(lambda: _folder(recipe, dataset, Path(path), resume, ranks), ahead=ranks.first)
    run = Run(folder)
    if run.figures.get("complete") and all(_fitted(run, name) for name in _added(recipe)):
        _log.info("%s is complete", path)
        return run
    try:
        # One process decodes the frames into a file; the others on its machine memory-map the file.
        cache = ranks.in_turn(lambda: load_frames(dataset, recipe.data, progress=progress), ahead=ranks.first_here)
        with closing(cache):
            if (folder.model_directory / "model.json").is_file():
                load_model(folder.model_directory)  # raises if the model is incomplete
            else:
                begun = folder.checkpoint_directory.is_dir()
                fit(recipe.training, recipe.model, cache, folder, fabric=fabric, resume=begun, progress=progress)

            def beside() -> None:
                if ranks.first:
                    threads = recipe.training.threads or min(folder.threads or 0, choosable_threads())
                    with alone(), use_threads(threads):
                        _refine(run, cache, progress)
                        _train_heads(run, cache, progress)

            ranks.in_turn(beside, ahead=ranks.first)
    except WorldloomError:
        folder.withdraw()
        raise
    return run


def _folder(recipe: Recipe, dataset: EpisodeDataset, path: Path, resume: bool, ranks: Ranks) -> RunFolder:
    if not ranks.first:
        return RunFolder.open(path)
    fingerprint = dataset.fingerprint()
    config: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "environment": dataset.spec.environment,
        "data": str(Path(str(dataset.path)).resolve()) if "://" not in str(dataset.path) else str(dataset.path),
    }
    if not (resume and (path / "config.json").is_file()):
        seeds = {"training": recipe.training.seed}
        return RunFolder.create(path, config, describe_provenance(data_fingerprint=fingerprint, seeds=seeds))
    folder = RunFolder.open(path)
    recorded = Recipe.parse(recipe_values(folder))  # parsed, so that options added since get defaults
    differ = differences(recorded.model_dump(mode="json"), config["recipe"])
    # The methods, and the way data are read, do not affect the trained parameters.
    free = ["methods.", "data", "default_method", "protocol", "description", "rules"]
    free += [f"training.{key}" for key in FREE]
    # Additional coarser models, probes and policies are fitted later.
    free += ["hierarchy"] if recipe.hierarchy[: len(recorded.hierarchy)] == recorded.hierarchy else []
    free += [name for name in _OPTIONAL if getattr(recorded, name) is None]
    free += ["probes"] if recorded.probes.items() <= recipe.probes.items() else []
    if wrong := [key for key in differ if not key.startswith(tuple(free))]:
        raise ConfigError(
            f"{path} was started with a different recipe; the recipes differ in {', '.join(wrong[:8])}. Resume with "
            f"the same recipe and overrides, or choose another folder"
        )
    if (before := folder.provenance.get("data", "")) != fingerprint:
        raise CheckpointError(
            f"{path} was started on different data (fingerprint {before[:12]}, now {fingerprint[:12]}); resume with "
            f"the original dataset, {folder.config['data']}, or choose another folder"
        )
    if differ:
        folder.reconfigure(config)
    return folder


def _refine(run: Run, cache: Frames, progress: Progress) -> None:
    """Refine the predictor on frozen latents, if the recipe says so and it was not done before."""
    config, directory = run.recipe.refinement, run.folder.model_directory
    extra = stored_extra(directory)
    if config is None or extra.get("refined"):
        return
    model, training = load_model(directory, run.device), run.recipe.training
    episodes, _ = cache.split(training.validation_share, training.seed)
    views = [cache]
    if training.symmetry is not None:
        seeds = (derive_seed(training.seed, "refinement", copy) for copy in range(config.copies))
        views += [training.symmetry.turned(cache, seed=seed) for seed in seeds]
    parts = [
        encode_episodes(model, view, episodes=episodes, offset=offset, progress=progress)
        for view in views
        for offset in range(model.spec.block)
    ]
    refined = refine_predictor(model, parts, config, seed=training.seed, progress=progress)
    save_model(directory, refined, {**extra, "refined": True})


def _train_heads(run: Run, cache: Frames, progress: Progress) -> None:
    """Fit the heads that are missing."""
    recipe, model = run.recipe, run.model
    seed = recipe.training.seed
    training, held_out = cache.split(recipe.training.validation_share, seed)
    kept = {name: value for name, value in run.figures.items() if name.endswith("_seconds")}
    figures: dict[str, Any] = {"held_out": [int(episode) for episode in held_out], **kept}
    latents = encode_episodes(model, cache, episodes=training, progress=progress)

    def learn(name: str, fit_head: Callable[..., Any], *on: Any, of: WorldModel = model) -> None:
        began = time.perf_counter()
        if not _fitted(run, name):
            fit_head(*on, seed=seed, progress=progress).save(run.heads.stem(name), of)
            figures[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
            write_json(run.path / "heads.json", figures)

    learn("geometry", measure_geometry, model, latents, recipe.inverse)
    learn("support", measure_support, latents)
    learn("distance", fit_distance, latents, model, recipe.distance)
    below: WorldModel = model
    seen = latents
    for level, config in enumerate(recipe.hierarchy, 1):
        name = f"coarse-{level}"
        learn(name, fit_coarse, below, seen, config, of=below)
        coarse = CoarseModel.load(run.heads.stem(name), below)
        below, seen = coarse, coarse.coarsen(seen)
        learn(f"{name}-geometry", measure_geometry, coarse, seen, recipe.inverse, of=coarse)
    for name, probe in recipe.probes.items():
        learn(f"probe-{name}", _fit_probe, model, cache, training, name, probe)
    learn("reactive", fit_reactive, model, latents, run.heads.geometry, recipe.reactive)
    if recipe.goal_inverse is not None:
        learn("goal-inverse", fit_goal_inverse, model, latents, recipe.goal_inverse)
    if recipe.behaviour_prior is not None:
        learn("behaviour-prior", fit_behaviour_prior, model, latents, recipe.behaviour_prior)
    cloning = partial(fit_behaviour_cloning, episodes=training, device=model.device)
    learn("cloning", cloning, cache, recipe.cloning)
    reversibility = run.heads.geometry.reversibility
    figures |= {
        "step_length": run.heads.geometry.step_length,
        "reversibility_remaining": reversibility.remaining,
        "reversible": reversibility.reversible,
    }
    if len(held_out):
        figures |= _rank(run, encode_episodes(model, cache, episodes=held_out, progress=progress))
    write_json(run.path / "heads.json", {**figures, "complete": True})


def _fitted(run: Run, name: str) -> bool:
    """Return whether a head is complete: its JSON file is written last."""
    return run.path.joinpath("heads", name).with_suffix(".json").is_file()


def _added(recipe: Recipe) -> list[str]:
    """Return the heads that a recipe may add to a complete run."""
    levels = [f"coarse-{level}" for level in range(1, len(recipe.hierarchy) + 1)]
    probes = [f"probe-{name}" for name in recipe.probes]
    optional = [name.replace("_", "-") for name in _OPTIONAL if getattr(recipe, name) is not None]
    return ["support", *levels, *(f"{level}-geometry" for level in levels), *probes, *optional]


def _fit_probe(
    model: WorldModel,
    cache: Frames,
    training: Int64[np.ndarray, "_"],
    name: str,
    config: LabelledProbe,
    *,
    seed: int,
    progress: Progress,
) -> Probe:
    """Fit a probe on frames of the first training episodes, one block apart."""
    label, block = config.label or name, model.spec.block
    chosen = training[cache.lengths[training] > block][: config.episodes]
    views = [cache]
    if config.symmetric:
        assert cache.pixels is not None
        positions = numpy_generator(seed, "turned pixels").integers(1, POSITIONS, len(cache.pixels))
        views.append(replace(cache, pixels=TurnedPixels(cache.pixels, positions)))
    latents, values, groups = [], [], []
    for view in views:
        seen = encode_episodes(model, view, episodes=chosen, progress=progress)
        for row, (episode, length) in enumerate(zip(chosen.tolist(), seen.lengths.tolist(), strict=True)):
            frames = cache.starts[episode] + block * np.arange(length)
            latents.append(seen.latents[row, :length])
            values.append(torch.from_numpy(np.asarray(cache.labels[label][frames])))
            groups.append(torch.full((length,), row))
    fitting = ProbeConfig.parse(config.model_dump(include=set(ProbeConfig.model_fields)))
    return fit_probe(
        torch.cat(latents), torch.cat(values), fitting, groups=torch.cat(groups), seed=seed, progress=progress
    )


def _rank(run: Run, episodes: LatentEpisodes, pairs: int = 2048) -> dict[str, float]:
    """Return the rank correlations between distances and numbers of steps, for pairs of states in held-out episodes.

    A logged walk takes more steps than the shortest path, so only ranks are compared.
    """
    generator = torch_generator(run.recipe.training.seed, "rank")
    episode = torch.randint(len(episodes), (pairs,), generator=generator)
    shares = torch.rand(2, pairs, generator=generator) * episodes.lengths[episode].cpu()
    first, second = shares.long().sort(dim=0).values
    latents, goals = episodes.latents[episode, first], episodes.latents[episode, second]
    steps = (second - first).float()
    return {
        "rank_correlation/distance": rank_correlation(run.heads.distance, latents, goals, steps),
        "rank_correlation/latent": rank_correlation(LatentL2(), latents, goals, steps),
    }


def evaluate(
    run: Run | Session,
    *,
    protocol: str | None = None,
    success: str | None = None,
    goal_offset: int | None = None,
    methods: Sequence[str] | None = None,
    others: Mapping[str, Callable[[], Agent]] | None = None,
    progress: Progress = SILENT,
    **changes: Unpack[Changes],
) -> Results:
    """Evaluate methods of a run and write `results.json` and `report.html`; see `report_path`.

    In a session, agents start with the session's memory and obey its rules. Baselines that do not support rules act
    without them; on a plant (see `worldloom.evaluation.Worlds`) they are skipped. `others` maps row names to agents of
    other libraries; see `worldloom.evaluation.ForeignPolicy`. The default protocol is the one for the world in which
    the data were collected; see `Run.usual_protocol`. If there is none, or if `success` is given and the recipe has no
    protocol for this world, each goal is a frame that the logging policy reached, and `success` is the criterion, such
    as `position:3`. `changes` replace parts of the protocol; see `worldloom.evaluation.Changes`.

    Raises:
        ConfigError: the protocol or a method does not exist, `success` is needed but missing, or one of `methods` or
            `others` does not obey the session's rules and the world is a plant.
        EnvironmentFailure: see `worldloom.evaluation.runner`.
    """
    whole = session_of(run)
    require_writable(whole.run.path / "evaluation" / "report.html")
    judging = [_protocol(whole.run, protocol, success, goal_offset, **changes)]
    (results,) = _evaluate(whole, judging, methods, others, progress)
    return results


def evaluate_together(
    run: Run | Session,
    protocols: Sequence[str],
    *,
    methods: Sequence[str] | None = None,
    progress: Progress = SILENT,
    **changes: Unpack[Changes],
) -> list[Results]:
    """Evaluate methods of a run under several protocols that differ only in their success rules and pairs.

    A pair that several protocols draw is run only once. For each protocol, `results.json` and `report.html` are
    written; see `evaluate`.

    Raises:
        ConfigError: see `worldloom.evaluation.evaluate_together`; or a protocol or a method does not exist.
        EnvironmentFailure: see `worldloom.evaluation.runner`.
    """
    whole = session_of(run)
    require_writable(whole.run.path / "evaluation" / "report.html")
    return _evaluate(whole, [PROTOCOLS[name].customise(**changes) for name in protocols], methods, None, progress)


def _evaluate(
    session: Session,
    judging: Sequence[Protocol],
    methods: Sequence[str] | None,
    others: Mapping[str, Callable[[], Agent]] | None,
    progress: Progress,
) -> list[Results]:
    from worldloom.reports import write_report  # takes half a second to load
    from worldloom.workflow.report_data import report_data

    run = session.run
    chosen = list(run.recipe.methods) if methods is None else list(methods)
    for name in chosen:
        run.recipe.method(name)  # fail on an unknown method before any episode
    known = run.environment.get("id")
    for protocol in judging:
        if known is not None and protocol.env_id != known:
            _log.warning(
                "the world model was trained on data from %s, but protocol %s evaluates it in %s",
                known,
                protocol.title,
                protocol.env_id,
            )
    agents: dict[str, Callable[[], Agent]] = {name: partial(session.agent, name, compared=True) for name in chosen}
    agents |= others or {}
    with fast_planning(run):
        every = evaluate_methods(
            judging,
            agents,
            model=run.model.spec.fingerprint,
            training_seed=run.recipe.training.seed,
            provenance=run.folder.provenance,
            rules=session.acting(chosen=methods or (), others=list(others or {})),
            progress=progress,
        )
    for results in every:
        results.write(report_path(run, results).with_name("results.json"))
        write_report(report_path(run, results), results, report_data(run))
    return every


def explore(
    run: Run | Session,
    steps: int,
    *,
    method: str | None = None,
    protocol: str | None = None,
    split: str | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    progress: Progress = SILENT,
) -> int:
    """Let an agent explore the world of each episode of a protocol for `steps` steps; return the number of worlds.

    In a session with a memory, the agent stores its observations there. `evaluate` with `exploration=0` and the same
    protocol, split, episodes and seed then uses the same worlds, with the protocol's goals.

    Raises:
        ConfigError: the method does not explore, or the method, protocol or split does not exist.
    """
    session = session_of(run)
    name = method or session.run.recipe.default_method
    agent = session.agent(name)
    if not agent.explores:
        raise ConfigError(f"the method {name!r} does not explore; choose a method that explores, such as landmarks")
    chosen = _protocol(session.run, protocol, split=split, episodes=episodes, seed=seed, exploration=0)
    with fast_planning(session.run):
        return explore_worlds(chosen, agent, steps, rules=session.acting(), progress=progress)


def report_path(run: Run, results: Results) -> Path:
    """Return the path of the report of an evaluation.

    The folder is named after the protocol. A digest is added if the protocol, the seed or the methods differ from
    the defaults, so that evaluations do not overwrite each other.
    """
    protocol = results.protocol
    name = path_name(protocol.title.replace("/", "-"), "the protocol")
    methods = sorted({row.method for row in results.rows})
    if (
        protocol.title not in PROTOCOLS
        or PROTOCOLS[protocol.title] != protocol
        or methods != sorted(run.recipe.methods)
    ):
        text = json.dumps([protocol.fingerprint, protocol.seed, methods])
        name += f"-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
    return run.path / "evaluation" / name / "report.html"


def _protocol(
    run: Run,
    name: str | None,
    success: str | None = None,
    goal_offset: int | None = None,
    **changes: Unpack[Changes],
) -> Protocol:
    source = run.environment
    env_id = source.get("id")
    chosen = None
    if name is not None:
        chosen = PROTOCOLS[name]
    elif success is None or run.has_protocol:
        chosen = run.usual_protocol
    if chosen is not None:
        if success is not None or goal_offset is not None:
            raise ConfigError(
                f"protocol {chosen.title!r} already defines success and goals; leave out 'success' and 'goal_offset'"
            )
        return chosen.customise(**changes)
    given = {key: value for key, value in changes.items() if value is not None}
    if "split" in given or "exploration" in given:
        raise ConfigError("split and exploration need a named protocol; choose one with --protocol")
    if env_id is None:
        usual = run.recipe.protocol
        raise ConfigError(
            f"the dataset does not name its environment; choose a protocol with --protocol"
            f"{f', such as {usual}, the protocol of the recipe' if usual else ''}"
        )
    if success is None:
        raise ConfigError(
            f"{env_id} has no protocol; define success by a named vector and a tolerance, such as --success "
            f"position:3, or use the environment's own success flag with --success env"
        )
    offset = goal_offset or 25
    logged: dict[str, Any] = {key: source[key] for key in ("policy", "policy_options") if source.get(key)}
    conventions: dict[str, Any] = {"budget": 2 * offset, "pictures": source.get("pictures"), **logged, **given}
    stored, named = source.get("kwargs") or {}, changes.get("env_kwargs") or {}
    if declares_plant(env_id):
        if not named:
            raise ConfigError(
                f"the data are from {env_id} with {stored}, which is not a simulator. A file must not choose which "
                f"system is driven: name the arguments yourself, such as --env-arg address=tcp://HOST:PORT"
            )
        stored = {}
    conventions["env_kwargs"] = {**stored, **named}
    return gym_protocol(env_id, success=success, goal_offset=offset, **conventions)
