"""Policies at the command line: signed, kept, and every decision under them on record."""

import json
from pathlib import Path

import pytest

POLICY = """
owner: the lab
guardrails:
  gently: {name: magnitude, limit: 0.8, reason: the floor is old}
  known: {name: familiar, times: 50}
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def test_a_file_that_is_named_like_a_key_does_not_replace_it(worldloom, refused, policy, tmp_path, monkeypatch) -> None:
    good, evil = (worldloom("rules", "key", str(tmp_path / f"{name}.pem")).out.strip() for name in ("good", "evil"))
    worldloom("rules", "sign", str(policy), "--key", str(tmp_path / "evil.pem"))
    monkeypatch.chdir(tmp_path)
    for name in (good, f"operator:{good}"):
        (tmp_path / name).write_text(f"{good} {evil}")
        assert "not a trusted key" in refused(3, "rules", "show", str(policy), "--trust", name)
    (tmp_path / "keys.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not a text file" in refused(2, "rules", "show", str(policy), "--trust", "keys.txt")
    (tmp_path / "keys.txt").write_text(evil)
    worldloom("rules", "show", str(policy), "--trust", "keys.txt")


def test_a_policy_is_signed_shown_and_kept(demo, worldloom, refused, policy, tmp_path) -> None:
    plan = ["plan", demo.run, "--method", "CEM, latent L2", "--rules", str(policy), "--json"]
    assert "no key is trusted" in refused(2, *plan)
    key = worldloom("rules", "key", str(tmp_path / "key.pem")).out.strip()
    assert "not signed" in refused(4, *plan, "--trust", key)
    signed = json.loads(worldloom("rules", "sign", str(policy), "--key", str(tmp_path / "key.pem"), "--json").out)
    assert [Path(path).is_file() for path in signed["signatures"]] == [True]
    shown = json.loads(worldloom("rules", "show", str(policy), "--trust", key, "--json").out)
    assert [rail["reason"] for rail in shown["guardrails"]] == ["the floor is old", ""]
    made = json.loads(worldloom(*plan, "--trust", key).out)
    assert all((x * x + y * y) ** 0.5 <= 0.8 + 1e-6 for x, y in made["actions"])
    assert made["refused"] is False
    stranger = json.loads(worldloom("rules", "key", str(tmp_path / "other.pem"), "--json").out)["key"]
    assert "not a trusted key" in refused(3, *plan, "--trust", stranger)
    policy.write_text(POLICY.replace("0.8", "8.0"))
    assert "changed" in refused(3, *plan, "--trust", key)


def test_an_older_version_is_read_again_only_on_purpose(worldloom, refused, policy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLDLOOM_STATE", str(tmp_path / "state"))
    key = worldloom("rules", "key", str(tmp_path / "key.pem")).out.strip()
    assert "no 'version'" in worldloom("rules", "sign", str(policy), "--key", str(tmp_path / "key.pem")).out
    newer = tmp_path / "newer.yaml"
    newer.write_text(POLICY + "version: 1\n")
    assert "note" not in worldloom("rules", "sign", str(newer), "--key", str(tmp_path / "key.pem")).out
    assert "version 1" in worldloom("rules", "show", str(newer), "--trust", key).out
    assert "version 1 of this rule layer was read before" in refused(3, "rules", "show", str(policy), "--trust", key)
    assert "version none, is accepted" in worldloom("rules", "revert", str(policy), "--trust", key).out
    assert worldloom("rules", "show", str(policy), "--trust", key).code == 0


def test_a_method_that_keeps_no_policy_does_not_act_under_one(demo, refused, policy) -> None:
    said = refused(2, "plan", demo.run, "--method", "random", "--rules", str(policy), "--unsigned")
    assert "does not obey guardrails" in said
    assert "CEM" in said


def test_what_nothing_satisfies_is_found_before_anything_acts(demo, refused, policy) -> None:
    policy.write_text(POLICY.replace("times: 50", "times: 0.000001"))
    said = refused(2, "plan", demo.run, "--method", "CEM, latent L2", "--rules", str(policy), "--unsigned")
    assert "satisfies the guardrail 'known'" in said


def test_a_plan_is_explained_and_its_decision_replayed(demo, worldloom, refused, policy, tmp_path) -> None:
    log, picture = tmp_path / "log", tmp_path / "plan.png"
    arguments = ["--rules", str(policy), "--unsigned", "--audit", str(log), "--explain", str(picture)]
    made = json.loads(worldloom("plan", demo.run, "--method", "CEM, latent L2", *arguments, "--json").out)
    explained = made["explained"]
    assert explained["considered"] > explained["ruled_out"] > 0
    assert explained["ruled_out_by"]["gently"] > 0
    assert max(explained["violations"].values()) <= 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    verified = worldloom("audit", "verify", str(log), "--json")
    head = json.loads(verified.out)
    assert "NOT CHECKED: whether entries were cut off at the end" in verified.err
    assert any("cut off at the end" in line for line in head["not checked"])
    listed = json.loads(worldloom("audit", "show", str(log), "--json").out)
    assert [entry["event"] for entry in listed] == ["opened", "began", "decided", "began", "decided"]
    assert head["length"] == 5
    again = json.loads(worldloom("audit", "replay", str(log), "--entry", "4", "--json").out)
    assert again["same"] is True
    kept = f"{head['length']}:{head['hash']}"
    again = worldloom("audit", "verify", str(log), "--kept", kept)
    assert again.code == 0
    assert "cut off" not in again.err
    whole = (log / "log.jsonl").read_text()
    (log / "log.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))
    assert "1 files in situations/ belong to no entry" in worldloom("audit", "verify", str(log)).err
    (log / "log.jsonl").write_text("")
    assert "has no entries" in refused(3, "audit", "verify", str(log))
    (log / "log.jsonl").write_text(whole)
    seen = tmp_path / "seen.png"
    assert worldloom("audit", "show", str(log), "--entry", "4", "--picture", str(seen)).code == 0
    assert seen.is_file()
    chain = log / "log.jsonl"
    lines = chain.read_bytes().splitlines(keepends=True)
    chain.write_bytes(b"".join(lines[:-1]))
    assert "are missing" in refused(3, "audit", "verify", str(log), "--kept", kept)
    chain.write_bytes(b"".join(lines).replace(b'"refused":[]', b'"refused":[0]', 1))
    assert "entry 2 was changed" in refused(3, "audit", "verify", str(log))
    assert "does not verify" in refused(3, "audit", "replay", str(log), "--entry", "4")


def test_a_risk_without_margins_asks_to_calibrate(demo, refused, policy) -> None:
    policy.write_text(POLICY + "risk: 0.05\n")
    said = refused(2, "plan", demo.run, "--method", "CEM, latent L2", "--rules", str(policy), "--unsigned")
    assert "'worldloom calibrate' first" in said
