"""Reads one committed file of each of the project's formats, version 1, and checks that other versions are refused.

`tests/fixtures/formats_v1/make.py` wrote the files. The test compares their content with `expected.json` within a
tolerance, because processors round differently.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worldloom.agents import log_entries, read_situation
from worldloom.core.chain import Chain
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import read_json, write_json
from worldloom.core.signing import SigningKey, make_key
from worldloom.core.types import Observations
from worldloom.data import EpisodeDataset
from worldloom.federation import Constitution, Ledger, Records, read_constitution, recompute, verify_ledger
from worldloom.guardrails import RuleLayer, read_rules
from worldloom.memory import EpisodicMemory
from worldloom.workflow import Run, replay_entry

FILES = Path(__file__).parent / "fixtures" / "formats_v1"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy, since opening some of the files makes locks beside them; a repository does not keep their permissions."""
    files = Path(shutil.copytree(FILES, tmp_path / "files"))
    (files / "memory").chmod(0o700)
    (files / "memory" / "journal.sqlite").chmod(0o600)
    return files


def read_dataset(files: Path) -> dict[str, Any]:
    dataset = EpisodeDataset.open(files / "dataset")
    episode = dataset.episode(5)
    return {
        "fingerprint": dataset.fingerprint(),
        "lengths": dataset.lengths.tolist(),
        "pixels": [list(episode.pixels.shape), int(episode.pixels.astype(int).sum())],
        "actions": episode.actions[:2].tolist(),
        "labels": {name: values[0].tolist() for name, values in episode.labels.items()},
    }


def latents(run: Run, files: Path) -> torch.Tensor:
    pixels = EpisodeDataset.open(files / "dataset").episode(0).pixels
    with torch.inference_mode():
        return run.model.encode(Observations(pixels=torch.from_numpy(pixels[:3])))


def read_run(files: Path) -> dict[str, Any]:
    run = Run.open(files / "run")
    return {
        "recipe": run.recipe.name,
        "environment": run.environment["id"],
        "figures": sorted(run.figures),
        "steps": [line["step"] for line in run.folder.metrics()],
        "latents": latents(run, files).tolist(),
    }


def read_heads(files: Path) -> dict[str, Any]:
    run = Run.open(files / "run")
    here, heads = latents(run, files), run.heads
    coarse, geometry = heads.hierarchy[0]
    with torch.inference_mode():
        return {
            "distance": heads.distance(here[:1], here[1:]).tolist(),
            "step length": [heads.geometry.step_length, geometry.step_length],
            "support": heads.support.gap(here).tolist(),
            "position": heads.probes["position"](here).tolist(),
            "coarse": coarse.spec.block,
        }


def read_margins(files: Path) -> dict[str, Any]:
    run = Run.open(files / "run")
    rules = run.bind(read_rules([files / "rules" / "rules.yaml"], trusted=None))
    margins = rules.margins(run.recipe.method("guarded").calibrated_as)
    return {"values": margins.values.tolist(), "risk": margins.risk, "episodes": margins.episodes}


def read_memory(files: Path) -> dict[str, Any]:
    with EpisodicMemory.open(files / "memory", spec=Run.open(files / "run").model.spec) as memory:
        held = memory.read()
        return {
            "memories": len(memory),
            "latents": torch.as_tensor(held.latents[:2]).tolist(),
            "pictures": int(memory.pictures(held.ids[:2]).astype(int).sum()),
        }


def read_audit_log(files: Path) -> dict[str, Any]:
    found = list(log_entries(files / "audit-log"))
    decided = next(entry for entry in found if entry.body["event"] == "decided")
    observations, situation = read_situation(files / "audit-log", decided)
    plan, _, _ = replay_entry(files / "audit-log", decided.index, run=files / "run")
    return {
        "events": [entry.body["event"] for entry in found],
        "pixels": list(observations.pixels.shape),
        "goal": situation.goal.tolist(),
        "recorded": decided.body["first"],
        "replayed": plan.actions[:, 0].tolist(),
    }


def read_rule_set(files: Path) -> dict[str, Any]:
    path = files / "rules" / "rules.yaml"
    key = read_json(path.with_name("rules.yaml.sig"))["key"]
    rules = read_rules([path], trusted=[key])
    return {"fingerprint": rules.fingerprint, "titles": rules.titles, "risk": rules.risk}


def constitution_of(files: Path) -> Constitution:
    return read_constitution(files / "consortium" / "constitution.yaml")


def read_signed_constitution(files: Path) -> dict[str, Any]:
    constitution = constitution_of(files)
    return {"fingerprint": constitution.fingerprint, "members": list(constitution.members), "cap": constitution.cap}


def read_ledger(files: Path) -> dict[str, Any]:
    path = files / "consortium" / "rounds" / "ledger.jsonl"
    verdict = verify_ledger(path, constitution_of(files))
    kinds = [entry.body["kind"] for entry in Records(path).entries()]
    return {"length": verdict.length, "head": verdict.head.hash, "broken": verdict.broken, "kinds": kinds}


def read_contributions(files: Path) -> dict[str, Any]:
    rounds = files / "consortium" / "rounds"
    bases = recompute(rounds, constitution_of(files), into=files / "again")
    return {"bases": {str(number): fingerprint for number, fingerprint in bases.items()}}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "dataset": read_dataset,
    "run": read_run,
    "heads": read_heads,
    "margins": read_margins,
    "memory": read_memory,
    "audit log": read_audit_log,
    "rule set": read_rule_set,
    "constitution": read_signed_constitution,
    "ledger": read_ledger,
    "contributions": read_contributions,
}


def alike(found: Any, expected: Any) -> bool:
    """Whether two JSON values are equal but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-3, abs=1e-3))
    return bool(found == expected)


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_version_1_is_read(files, name) -> None:
    found, expected = READERS[name](files), read_json(files / "expected.json")[name]
    assert alike(found, expected), f"{found}\nexpected {expected}"


@pytest.mark.parametrize(("name", "pattern"), [("run", "run/config.json"), ("margins", "run/margins/*.json")])
def test_a_document_of_another_version_is_refused(files, name, pattern) -> None:
    (path,) = files.glob(pattern)
    write_json(path, {**read_json(path), "format": 2})
    with pytest.raises(StorageError, match=r"format 2; expected .* format 1"):
        READERS[name](files)


def test_an_audit_log_of_another_version_is_refused(tmp_path) -> None:
    with Chain(tmp_path / "log.jsonl") as chain:
        chain.append({"event": "opened", "format": 2})
    with pytest.raises(DataError, match="format 2; this version of worldloom reads format 1"):
        list(log_entries(tmp_path))


def test_a_ledger_of_another_version_does_not_verify(files, tmp_path) -> None:
    make_key(tmp_path / "key")
    key = SigningKey(tmp_path / "key")
    values = constitution_of(files).model_dump(mode="json")
    values["members"]["north"]["key"] = key.public
    constitution = Constitution.parse({**values, "coordinators": ["north"]})
    with Ledger(tmp_path / "ledger.jsonl", key) as ledger:
        ledger.append("constitution", {"format": 2, "fingerprint": constitution.fingerprint})
    verdict = verify_ledger(tmp_path / "ledger.jsonl", constitution)
    assert verdict.broken == 0
    assert verdict.why == "has ledger format 2; this version of worldloom reads format 1"


@pytest.mark.parametrize(("config", "key"), [(RuleLayer, "rules"), (Constitution, "constitution")])
def test_yaml_of_another_version_is_refused(config: type[Config], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .*1"):
        config.parse({key: 2})
