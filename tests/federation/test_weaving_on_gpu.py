"""Owners who train on a GPU: what they weave is on the disk as from anywhere, and anyone computes it again."""

from pathlib import Path

import pytest
import torch
from consortium import OWNERS, Consortium

from worldloom.federation import Records, RoundStore, recompute

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rules", [{}, {"secure_aggregation": True, "aggregation": {"name": "mean"}}])
def test_owners_who_train_on_a_gpu_weave_and_anyone_computes_their_base_again(tmp_path: Path, rules: dict) -> None:
    consortium = Consortium(tmp_path, rules=rules, accelerator="cuda")
    coordinator = consortium.coordinator()
    last = coordinator.run()
    coordinator.close()
    assert {tensor.device.type for tensor in last.tensors.values()} == {"cpu"}
    assert all(bool(tensor.isfinite().all()) for tensor in last.tensors.values())
    records = Records(tmp_path / "rounds" / "ledger.jsonl")
    assert sorted(records.bases()) == [0, 1, 2, 3]
    for entry in records.entries("round"):
        assert set(entry.body["facts"]["weights"]) == set(OWNERS)
    first = RoundStore(tmp_path / "rounds").base(0)
    assert any(not torch.equal(first.tensors[name], last.tensors[name]) for name in last.tensors)
    again = recompute(tmp_path / "rounds", consortium.constitution, into=tmp_path / "again")
    assert again[3] == last.fingerprint
