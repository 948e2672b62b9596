"""Privacy against loss: the cost and the guarantee of noise, and the success of attacks on what is sent.

    python benchmarks/weaving_privacy.py [--seeds 0 1 2] [--threads 1] [--anew] [--quick]

Eight owners log a spot that their actions move over 8 x 8 receptors; each episode has a different background texture.
They train a model of about 3,000 shared values in rounds of `fedavg`. Their deltas are clipped and noised as in a node.
Without secure aggregation the coordinator sees each delta, so each has the full noise. With secure aggregation (no
owner drops out) each delta has its share of the noise, and only the sum is seen. Here the noise depends on the seed, so
that results can be reproduced; a node uses the randomness of the operating system.

Every owner is attacked. The attacker knows the bases, statistics of similar data, and everything that the coordinator
sees. The attacks are:

- losses: the loss of each episode under base plus delta, minus its loss under the base, summed over the rounds.
  Episodes whose loss falls more count as training data (`membership_inference`).
- picture: the input that the first layer reveals in each round (`reconstruct`). Episodes whose mean picture is more
  similar to it count as training data.
- one frame: the worst case, as in tests/federation/test_attacks.py. Each owner has one frame and takes one step of
  gradient descent; the clip is the largest norm. The attack distinguishes this frame from one that no owner has. The
  cosine to the true frame is reported too.

Each attack gives an AUROC for each owner and seed (0.5 is chance); the table has the mean and Student's 95% interval.
The loss is that of the last base on held-out episodes, as the gate measures it, averaged over owners. The table also
has the position error of the spot, which a linear probe reads 3 blocks ahead in new logs, in receptor spacings.
Intervals are over the seeds. Epsilon covers all rounds together, at the stated delta. The results go to
benchmarks/results/weaving_privacy.json. Results of a seed are stored beside it and reused, unless `--anew` is set.
`--quick` only tries the script, and stores nothing."""

import argparse
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from by_seed import Kept, command_of, interval, parser_of, run
from worldloom.cli.console import print_table, progress
from worldloom.core.errors import TrainingError
from worldloom.core.files import write_json
from worldloom.core.seeds import numpy_generator, torch_generator
from worldloom.core.signing import Domain
from worldloom.core.types import ActionSpec, Observations, ObservationSpec, Windows
from worldloom.data import DatasetSpec, Frames, WindowSampler, compute_statistics
from worldloom.federation import (
    OUTER,
    Accountant,
    Base,
    LocalTraining,
    PartitionConfig,
    PrivacyConfig,
    clip_and_noise,
    initial_base,
)
from worldloom.federation.secure.aggregation_protocol import Masker, SumSession, Unmasker
from worldloom.federation.secure.privacy import delta_norm
from worldloom.models import JEPA, JEPAConfig, build_jepa
from worldloom.models.encoders import VectorMLP
from worldloom.models.predictors import MLPPredictor
from worldloom.testing.attacks import membership_inference, reconstruct
from worldloom.training import LinearProbe, RunFolder, TrainingConfig

RESULTS = Path(__file__).parent / "results" / "weaving_privacy.json"
OWNERS, EPISODES, OTHERS, LENGTH, SIDE = 8, 24, 24, 30, 8
SPACING = 0.3  # of receptors; the width of a spot, too
HORIZON, DRAWS = 3, 10
MODEL = JEPAConfig(encoder=VectorMLP(hidden=(32,)), predictor=MLPPredictor(hidden=(32,)), latent_dim=8, block=2)
FIRST = {"weight": "encoder.mlp.layers.0.weight", "bias": "encoder.mlp.layers.0.bias"}
CLIP, DELTA = 0.5, 1e-5
NOISES = (None, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # None: no clipping and no noise
COSTS, UNTRAINED = ("loss", "places"), "untrained"
ATTACKS = ("losses", "picture", "one frame")

State = Mapping[str, Tensor]


def main() -> None:
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--inner", type=int, default=40, help="steps of a round")
    logging.getLogger("worldloom").setLevel(logging.ERROR)  # noise raises alarms
    parser.set_defaults(noises=NOISES)
    run(parser.parse_args(), {"rounds": 2, "inner": 4, "noises": (None, 0.1)}, report)


def report(arguments: argparse.Namespace) -> None:
    """Measure what is missing; write and print the table."""
    settings = {"rounds": arguments.rounds, "inner": arguments.inner, "clip": CLIP, "owners": OWNERS}
    settings["partition"] = PartitionConfig().model_dump(mode="json")
    found = []
    for seed in arguments.seeds:
        kept, world = Kept(arguments, seed, settings), World(seed, arguments.rounds, arguments.inner)
        rows = {UNTRAINED: kept.measured(UNTRAINED, world.untrained)}
        for noise in arguments.noises:
            for secure in (False, True):
                name = title(noise, secure)
                rows[name] = kept.measured(name, partial(world.measure, noise, secure))
        found.append(rows)
    rows = [row_of(noise, secure, found, arguments.rounds) for noise in arguments.noises for secure in (False, True)]
    values = {
        "command": command_of(__file__, arguments),
        "seeds": arguments.seeds,
        "settings": settings,
        "delta": DELTA,
        "values": parameters(),
        "untrained": {key: interval([one[UNTRAINED][key] for one in found]) for key in COSTS},
        "rows": rows,
        "hardware": found[0][UNTRAINED]["hardware"],
    }
    write_json(arguments.results, values)
    header = ["noise", "seen", "epsilon", *COSTS, *ATTACKS, "cosine", "n"]
    untrained = ["untrained", "", "", *(told(values["untrained"][key]) for key in COSTS), *[""] * 5]
    print_table("privacy against loss", header, [untrained, *(shown(row) for row in rows)])


def title(noise: float | None, secure: bool) -> str:
    """Name a row."""
    return f"{'no clip' if noise is None else noise}, {'sum' if secure else 'each'}"


def row_of(noise: float | None, secure: bool, found: Sequence[Mapping[str, Any]], rounds: int) -> dict[str, Any]:
    """Return the cost, the guarantee and the effect of a noise, over the seeds."""
    every = [one[title(noise, secure)] for one in found]
    costs = {key: None if None in (values := [one[key] for one in every]) else interval(values) for key in COSTS}
    epsilon = math.inf
    if noise is not None:
        epsilon = Accountant(PrivacyConfig(clip=CLIP, noise=noise, delta=DELTA)).spend(rounds)
    return {
        "noise": noise,
        "secure": secure,
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        **costs,
        "norm": float(np.median([value for one in every for value in one["norms"]])),
        "n": sum(len(one["losses"]) for one in every),
        **{name: interval([value for one in every for value in one[name]]) for name in (*ATTACKS, "cosine")},
    }


def told(value: Mapping[str, Any] | None, form: str = ".3g") -> str:
    """Return a mean with its interval."""
    if value is None:
        return "not finite"
    ends = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{ends}"


def shown(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the printed table."""
    epsilon = "none" if row["epsilon"] is None else f"{row['epsilon']:,.3g}"
    attacks = [told(row[name], ".2f") for name in (*ATTACKS, "cosine")]
    noise = "not clipped" if row["noise"] is None else f"{row['noise']:g}"
    return [
        noise,
        "sum" if row["secure"] else "each",
        epsilon,
        *(told(row[key]) for key in COSTS),
        *attacks,
        str(row["n"]),
    ]


def spots(generator: np.random.Generator, episodes: int) -> Frames:
    """Return episodes of a spot that actions move between walls; the background texture is fixed in an episode."""
    frames = LENGTH + 1
    actions = np.zeros((episodes, frames, 2), np.float32)
    actions[:, :LENGTH] = np.clip(generator.normal(0, 0.3, (episodes, LENGTH, 2)).cumsum(1), -1, 1)
    place = np.zeros((episodes, frames, 2))
    place[:, 0] = generator.uniform(-1, 1, (episodes, 2))
    for step in range(LENGTH):
        place[:, step + 1] = np.clip(place[:, step] + 0.2 * actions[:, step], -1, 1)
    grid = np.stack(np.meshgrid(*[SPACING * (np.arange(SIDE) - (SIDE - 1) / 2)] * 2), axis=-1).reshape(-1, 2)
    spot = np.exp(-((place[:, :, None] - grid) ** 2).sum(-1) / (2 * SPACING**2))
    texture = generator.normal(0, 0.2, (episodes, 1, SIDE * SIDE))
    return Frames(
        spec=DatasetSpec(
            observation=ObservationSpec(vector=SIDE * SIDE),
            action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)),
            labels={"place": 2},
        ),
        fingerprint=f"spots-{generator.integers(2**31)}",
        pixels=None,
        vector=(spot + texture).astype(np.float32).reshape(-1, SIDE * SIDE),
        actions=actions.reshape(-1, 2),
        labels={"place": (place / SPACING).astype(np.float32).reshape(-1, 2)},
        starts=np.arange(episodes) * frames,
        lengths=np.full(episodes, LENGTH),
    )


def parameters() -> int:
    """Return the number of values that an owner sends."""
    cache = spots(np.random.default_rng(0), 1)
    return sum(tensor.numel() for tensor in initial_base(MODEL, cache.spec, PartitionConfig(), seed=0).tensors.values())


class World:
    """The owners of one seed, and their attacker."""

    def __init__(self, seed: int, rounds: int, inner: int) -> None:
        self._seed, self._rounds, self._inner = seed, rounds, inner
        self._names = [f"owner-{number}" for number in range(OWNERS)]
        self._logs = {name: spots(numpy_generator(seed, name), EPISODES) for name in self._names}
        self._others = {name: spots(numpy_generator(seed, name, "others"), OTHERS) for name in self._names}
        self._training = TrainingConfig(
            steps=rounds * inner, batch=16, horizon=HORIZON, seed=seed, threads=0, validation_share=0.25,
            validation_windows=64, checkpoint_every=10_000, validate_every=10_000, log_every=10_000, accelerator="cpu",
        )  # fmt: skip
        self._initial = initial_base(MODEL, self._logs[self._names[0]].spec, PartitionConfig(), seed=seed)
        # The attacker's own data of this kind, for the statistics that no owner sends.
        known = spots(numpy_generator(seed, "attacker"), OTHERS)
        statistics = compute_statistics(known, seed=seed)
        self._model = build_jepa(MODEL, known.spec.observation, known.spec.action, statistics, seed=seed).train()

    def untrained(self) -> dict[str, float]:
        """Return the mean held-out loss over owners of the first base, and its position error."""
        with tempfile.TemporaryDirectory() as folder:
            return {
                "loss": self._loss(self._local(Path(folder)), self._initial),
                "places": self._places(self._initial.tensors),
            }

    def measure(self, noise: float | None, secure: bool) -> dict[str, Any]:
        """Train under a noise, and attack every owner by its deltas as seen, and by one frame."""
        with tempfile.TemporaryDirectory() as folder:
            return {**self._woven(noise, secure, Path(folder)), **self._one_frame(noise, secure)}

    def _woven(self, noise: float | None, secure: bool, folder: Path) -> dict[str, Any]:
        config = None if noise is None else PrivacyConfig(clip=CLIP, noise=noise, delta=DELTA)
        local, base, history = self._local(folder), self._initial, []
        norms: list[float] = []
        loss: float | None
        places: float | None
        try:
            with progress().task(title(noise, secure), self._rounds, "round") as task:
                for number in range(self._rounds):
                    deltas = {name: self._delta(local[name], number, base) for name in self._names}
                    norms += [delta_norm(delta) for delta in deltas.values()]
                    seen = self._seen(deltas, config, secure, f"round {number}")
                    history.append((base.tensors, seen))
                    mean = {key: sum(seen[name][key] for name in self._names) / OWNERS for key in base.tensors}
                    base, _ = OUTER["fedavg"].parse({"name": "fedavg"}).step(base, mean, {})
                    task.advance(1)
            loss, places = self._loss(local, base), self._places(base.tensors)
        except TrainingError:
            loss = places = None  # a loss is no longer finite; the attacks use the rounds so far
        found: dict[str, list[float]] = {"losses": [], "picture": []}
        for name in self._names:
            found["losses"].append(self._by_losses(name, history))
            found["picture"].append(self._by_picture(name, history))
        return {"loss": finite(loss), "places": finite(places), "norms": norms, **found}

    def _local(self, folder: Path) -> dict[str, LocalTraining]:
        return {
            name: LocalTraining(
                RunFolder.create(folder / name, {}, {}),
                self._logs[name],
                training=self._training,
                model=MODEL,
                partition=PartitionConfig(),
            )
            for name in self._names
        }

    def _delta(self, local: LocalTraining, number: int, base: Base) -> dict[str, Tensor]:
        made = local.train(f"round {number}", base, self._inner)
        return {key: (made.after[key] - made.before[key]).detach() for key in base.tensors}

    def _loss(self, local: Mapping[str, LocalTraining], base: Base) -> float:
        return float(np.mean([one.judge(base)["total"] for one in local.values()]))

    @torch.no_grad()
    def _places(self, base: State) -> float:
        """Return the error of the spot that a probe of frozen latents reads `HORIZON` blocks ahead, in new logs."""
        model = self._put(base)
        fitted, held_out = (
            windows_of([(cache, None) for cache in caches.values()]) for caches in (self._logs, self._others)
        )
        probe = LinearProbe.fit(model(fitted).latents, fitted.labels["place"])
        missed = probe(model(held_out).predictions[:, -1]) - held_out.labels["place"][:, -1]
        return missed.norm(dim=-1).mean().item()

    def _seen(
        self, deltas: Mapping[str, State], config: PrivacyConfig | None, secure: bool, what: str
    ) -> dict[str, State]:
        """Return what the coordinator sees of each owner: its private delta, or its share of the sum of all."""
        sent = {
            name: dict(delta)
            if config is None
            else clip_and_noise(
                delta, config, torch_generator(self._seed, what, name), share=1 / OWNERS if secure else 1.0
            )
            for name, delta in deltas.items()
        }
        if not secure:
            return dict(sent)
        total = summed(sent, f"{self._seed} {what}")
        mean = {key: value / OWNERS for key, value in total.items()}
        return dict.fromkeys(self._names, mean)

    def _candidates(self, name: str) -> tuple[Frames, np.ndarray, Frames]:
        """Return an owner's logs with the episodes that it trains on, and logs that no owner has."""
        cache = self._logs[name]
        return cache, cache.split(self._training.validation_share, self._seed)[0], self._others[name]

    def _by_losses(self, name: str, history: Sequence[tuple[State, Mapping[str, State]]]) -> float:
        own, members, others = self._candidates(name)
        fall = np.zeros(len(members) + OTHERS)
        for base, seen in history:
            after = {key: base[key] + seen[name][key].to(base[key].dtype) for key in base}
            for sign, state in ((1, after), (-1, base)):
                fall += sign * losses(self._put(state), [(own, members), (others, np.arange(OTHERS))])
        return membership_inference(fall[: len(members)], fall[len(members) :]).auroc

    def _by_picture(self, name: str, history: Sequence[tuple[State, Mapping[str, State]]]) -> float:
        own, members, others = self._candidates(name)
        pictures = [self._pictures(own)[members], self._pictures(others)]
        likeness = [
            sum(cosine(reconstruct(seen[name], **FIRST), picture).abs() for _, seen in history) for picture in pictures
        ]
        return membership_inference(*[-one for one in likeness]).auroc

    def _one_frame(self, noise: float | None, secure: bool) -> dict[str, list[float]]:
        """Return for each owner the AUROC of its frame against a frame of no owner, and the cosine to its own."""
        right: dict[str, list[float]] = {name: [] for name in self._names}
        wrong: dict[str, list[float]] = {name: [] for name in self._names}
        for draw in range(DRAWS):
            random = numpy_generator(self._seed, "one frame", draw)
            frames = {name: torch.from_numpy(spots(random, 1).vector[0]) for name in self._names}
            # One per owner: all owners share the reconstruction from a sum, so their comparison frames must differ.
            strangers = {name: torch.from_numpy(spots(random, 1).vector[0]) for name in self._names}
            deltas = {name: self._step(frame) for name, frame in frames.items()}
            largest = max(delta_norm(delta) for delta in deltas.values())
            config = None if noise is None else PrivacyConfig(clip=largest, noise=noise, delta=DELTA)
            seen = self._seen(deltas, config, secure, f"one frame {draw}")
            for name, frame in frames.items():
                found = reconstruct(seen[name], **FIRST)
                right[name].append(float(cosine(found, self._standardised(frame)).abs()))
                wrong[name].append(float(cosine(found, self._standardised(strangers[name])).abs()))
        aurocs = [membership_inference([-x for x in right[name]], [-x for x in wrong[name]]).auroc for name in right]
        return {"one frame": aurocs, "cosine": [float(np.mean(values)) for values in right.values()]}

    def _step(self, frame: Tensor) -> dict[str, Tensor]:
        """Return the delta of one gradient step from the first base, toward a fixed code of one frame."""
        encoder = self._put(self._initial.tensors).encoder
        encoder.zero_grad()
        code = torch.randn(MODEL.latent_dim, generator=torch_generator(self._seed, "code"))
        (encoder(Observations(vector=frame[None])) - code).square().mean().backward()
        return {f"encoder.{key}": -value.grad.clone() for key, value in encoder.named_parameters()}

    def _put(self, state: State) -> JEPA:
        self._model.load_state_dict({**self._model.state_dict(), **state})
        return self._model

    def _standardised(self, vector: Tensor) -> Tensor:
        return self._model.encoder.standardise(vector)

    def _pictures(self, cache: Frames) -> Tensor:
        """Return the mean image of each episode, as the attacker would see it."""
        assert cache.vector is not None
        frames = torch.from_numpy(cache.vector).reshape(len(cache.lengths), LENGTH + 1, -1)
        return self._standardised(frames).mean(1)


def summed(deltas: Mapping[str, State], name: str) -> dict[str, Tensor]:
    """Return the sum of deltas by the secure aggregation protocol, which reveals nothing else."""
    keys = {owner: Ed25519PrivateKey.generate() for owner in deltas}
    session = SumSession(
        name=name,
        owners={owner: key.public_key().public_bytes_raw().hex() for owner, key in keys.items()},
        shapes={key: tuple(value.shape) for key, value in next(iter(deltas.values())).items()},
        threshold=len(deltas),
    )

    def signs(owner: str) -> Callable[[bytes], bytes]:
        return lambda content: keys[owner].sign(Domain.MASK_KEYS.value + content)

    maskers, unmasker = {owner: Masker(owner, session, signs(owner)) for owner in deltas}, Unmasker(session)
    for owner, masker in maskers.items():
        unmasker.take("advertise", owner, masker.advertise())
    for owner, masker in maskers.items():
        unmasker.take("share", owner, masker.share(unmasker.roster))
    for owner, masker in maskers.items():
        unmasker.take("mask", owner, masker.mask(unmasker.inboxes[owner], deltas[owner]))
    for owner, masker in maskers.items():
        unmasker.take("unmask", owner, masker.unmask(unmasker.survivors))
    return unmasker.sum(deltas)


def windows_of(parts: Sequence[tuple[Frames, np.ndarray | None]]) -> Windows:
    """Return the windows of these episodes, or of all episodes, for each part."""
    found = []
    for cache, episodes in parts:
        sampler = WindowSampler(cache, context=1, horizon=HORIZON, block=MODEL.block, episodes=episodes)
        found.append(sampler.at(np.arange(len(sampler))))
    return Windows(
        observations=Observations(vector=torch.cat([one.observations.vector for one in found])),
        actions=torch.cat([one.actions for one in found]),
        labels={"place": torch.cat([one.labels["place"] for one in found])},
    )


@torch.no_grad()
def losses(model: JEPA, candidates: Sequence[tuple[Frames, np.ndarray]]) -> np.ndarray:
    """Return the prediction loss of each episode; latents are normalised by all of them together, as in training."""
    outputs = model(windows_of(candidates))
    missed = (outputs.predictions - outputs.latents[:, 1:]).square().mean((1, 2))
    found: np.ndarray = missed.reshape(sum(len(episodes) for _, episodes in candidates), -1).mean(1).numpy()
    return found


def finite(value: float | None) -> float | None:
    """Return a number, or None if JSON cannot represent it."""
    return value if value is not None and math.isfinite(value) else None


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine along the last axis."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)


if __name__ == "__main__":
    main()
