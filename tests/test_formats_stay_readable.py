"""Reads one committed file of each of the project's formats, and checks that other versions are refused.

`tests/fixtures/formats_v1/make.py` wrote the files of version 1, `formats_v2/make.py` those of version 2, and
`formats_v3/make_ledgers.py` those of version 3. Signatures of version 1 are refused, because they do not say what was
signed, and ledgers of versions 1 and 2, because members did not sign their contributions in them. The test compares
the content with `expected.json` within a tolerance, because processors round differently.
"""

import contextlib
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
from worldloom.federation import Constitution, Ledger, read_constitution, recompute, verify_ledger
from worldloom.guardrails import RuleLayer, read_rules
from worldloom.guardrails.rule_versions import SignedLayer, check_versions
from worldloom.memory import EpisodicMemory
from worldloom.workflow import Run, replay_entry

FIXTURES = Path(__file__).parent / "fixtures"


def copied(version: int, folder: Path) -> Path:
    """A copy, since opening some of the files makes locks beside them.

    The permissions of a memory are set, because a repository does not keep them.
    """
    files = Path(shutil.copytree(FIXTURES / f"formats_v{version}", folder / f"v{version}"))
    if (files / "memory").exists():
        (files / "memory").chmod(0o700)
        (files / "memory" / "journal.sqlite").chmod(0o600)
    return files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return copied(1, tmp_path)


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


def test_a_dataset_of_version_2_has_the_content_of_version_1(files: Path) -> None:
    found, expected = read_dataset(copied(2, files.parent)), read_dataset(files)
    assert found.pop("fingerprint") == "b5ae7e5909187303a4c42735145cec12"
    assert expected.pop("fingerprint") != "b5ae7e5909187303a4c42735145cec12"
    assert found == expected


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
    """Margins of version 2 are for the run of version 1."""
    if not (files / "run").exists():
        shutil.copytree(FIXTURES / "formats_v1" / "run", files / "run")
        shutil.rmtree(files / "run" / "margins")
        shutil.copytree(files / "margins", files / "run" / "margins")
    (path,) = (files / "run" / "margins").iterdir()
    run = Run.open(files / "run", trusted=[read_json(path).get("key", "0" * 64)])
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
    again = replay_entry(files / "audit-log", decided.index, run=files / "run")
    return {
        "events": [entry.body["event"] for entry in found],
        "pixels": list(observations.pixels.shape),
        "goal": situation.goal.tolist(),
        "recorded": decided.body["first"],
        "replayed": again.plan.actions[:, 0].tolist(),
    }


def read_rule_set(files: Path) -> dict[str, Any]:
    path = files / "rules" / "rules.yaml"
    key = read_json(path.with_name("rules.yaml.sig"))["key"]
    rules = read_rules([path], trusted=[key])
    return {"fingerprint": rules.fingerprint, "titles": rules.titles, "risk": rules.risk}


def read_rules_with_a_picture(files: Path) -> dict[str, Any]:
    """The layer names its picture relative to the working directory."""
    with contextlib.chdir(files / "rules-with-a-picture"):
        rules = read_rules(["rules.yaml"], trusted=[read_json(Path("rules.yaml.sig"))["key"]])
    return {"fingerprint": rules.fingerprint, "parts": dict(rules.parts)}


def read_rule_versions(files: Path) -> dict[str, Any]:
    """The record knows version 3 of the rule layer, so version 2 is refused."""
    rules, key = files / "rules" / "rules.yaml", read_json(files / "rules" / "rules.yaml.sig")["key"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDLOOM_STATE", str(files / "state"))
        version = read_rules([rules], trusted=[key]).layers[0].version
        older = SignedLayer.of(rules, b"", [], series=(key, "operator", "the lab", ""), version=version - 1)
        with pytest.raises(DataError) as refused:
            check_versions([older])
    return {"version": version, "older": str(refused.value).removeprefix(str(rules))}


def constitution_of(files: Path) -> Constitution:
    return read_constitution(files / "consortium" / "constitution.yaml")


def read_signed_constitution(files: Path) -> dict[str, Any]:
    constitution = constitution_of(files)
    return {"fingerprint": constitution.fingerprint, "members": list(constitution.members), "cap": constitution.cap}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "dataset": read_dataset,
    "run": read_run,
    "heads": read_heads,
    "memory": read_memory,
    "audit log": read_audit_log,
    "constitution": read_signed_constitution,
}
SECOND: dict[str, Callable[[Path], dict[str, Any]]] = {
    "rule set": read_rule_set,
    "rule set with a picture": read_rules_with_a_picture,
    "margins": read_margins,
    "rule versions": read_rule_versions,
    "constitution": read_signed_constitution,
}
CASES = [(1, name) for name in READERS] + [(2, name) for name in SECOND]


def alike(found: Any, expected: Any) -> bool:
    """Whether two JSON values are equal but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-3, abs=1e-3))
    return bool(found == expected)


@pytest.mark.parametrize(("version", "name"), CASES)
def test_a_file_of_each_version_is_read(tmp_path, version, name) -> None:
    files = copied(version, tmp_path)
    found, expected = (READERS if version == 1 else SECOND)[name](files), read_json(files / "expected.json")[name]
    assert alike(found, expected), f"{found}\nexpected {expected}"


def test_a_signature_without_a_domain_is_refused(files) -> None:
    with pytest.raises(
        StorageError, match=r"format 1; expected .* format 2\. Ask the owner of .* to sign the file again"
    ):
        read_rule_set(files)


@pytest.mark.parametrize("name", ["plain", "secure"])
def test_a_ledger_and_its_contributions_are_read(name, tmp_path) -> None:
    files = copied(3, tmp_path) / name
    expected, rules = read_json(files / "expected.json"), read_constitution(files / "constitution.yaml")
    verdict = verify_ledger(files / "rounds" / "ledger.jsonl", rules)
    assert (verdict.length, verdict.head.hash, verdict.broken) == (expected["length"], expected["head"], None)
    bases = recompute(files / "rounds", rules, into=tmp_path / "again")
    assert {str(number): base for number, base in bases.items()} == expected["bases"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_ledger_in_which_members_did_not_sign_is_refused(version, tmp_path) -> None:
    files = copied(version, tmp_path)
    found = verify_ledger(files / "consortium" / "rounds" / "ledger.jsonl", constitution_of(files))
    assert found.broken == 0
    assert found.why.startswith(f"has ledger format {version}; this version of worldloom reads format 3. Read the")


def test_a_document_of_another_version_is_refused(files) -> None:
    path = files / "run" / "config.json"
    write_json(path, {**read_json(path), "format": 2})
    with pytest.raises(StorageError, match=r"format 2; expected .* format 1"):
        read_run(files)


def test_margins_without_a_signature_are_refused(files) -> None:
    with pytest.raises(StorageError, match=r"format 1; expected .* format 2\. Run 'worldloom calibrate'"):
        read_margins(files)


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
        ledger.append("constitution", {"format": 4, "fingerprint": constitution.fingerprint})
    verdict = verify_ledger(tmp_path / "ledger.jsonl", constitution)
    assert verdict.broken == 0
    assert verdict.why.startswith("has ledger format 4; this version of worldloom reads format 3")


@pytest.mark.parametrize(("config", "key"), [(RuleLayer, "rules"), (Constitution, "constitution")])
def test_yaml_of_another_version_is_refused(config: type[Config], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .*1"):
        config.parse({key: 2})
