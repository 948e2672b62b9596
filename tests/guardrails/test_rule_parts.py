"""The pictures and runs that a signed rule layer names are part of what its owner signed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from worldloom.core.errors import CheckpointError, DataError, StorageError
from worldloom.core.files import read_json, write_json
from worldloom.core.signing import Domain, make_key, sign_file
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import Statistics
from worldloom.guardrails import BoundRules, RuleLayer, read_rules, sign_rules
from worldloom.guardrails.rule_set import part_digests
from worldloom.heads import Heads
from worldloom.models import JEPA, JEPAConfig, build_jepa, save_model
from worldloom.models.encoders import PatchConv
from worldloom.models.predictors import MLPPredictor

STATED = {
    "unlike": "guardrails: {never: {name: unlike, pictures: [fire.png], distance: 2}}",
    "avoid": "objectives: {rather not: {name: avoid, rail: {name: unlike, pictures: [fire.png], distance: 2}}}",
    "agreed": "guardrails: {alike: {name: agreed, runs: [peer], spread: 1}}",
    "information": "objectives: {learn: {name: information, runs: [peer]}}",
}


def picture(name: str, value: int) -> None:
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(name)


def model(seed: int) -> JEPA:
    config = JEPAConfig(
        encoder=PatchConv(patch=4, channels=(4,), hidden=8), predictor=MLPPredictor(hidden=(8,)), latent_dim=4
    )
    observation, action = ObservationSpec(pixels=(16, 16, 3), vector=0), ActionSpec(low=(-1.0,), high=(1.0,))
    made = build_jepa(config, observation, action, Statistics.unit(observation, action), seed=0)
    with torch.no_grad():
        next(made.predictor.parameters()).add_(seed)
    return made.eval()


class Owner:
    """An owner who signs a layer in the working directory, which contains the picture and the run."""

    def __init__(self) -> None:
        self.public = make_key("owner.pem")

    def sign(self, stated: str, name: str = "site.yaml") -> Path:
        Path(name).write_text(f"owner: Acme\nname: {name}\nversion: 1\n{STATED[stated]}\n")
        return sign_rules(name, "owner.pem")

    def bound(self, name: str = "site.yaml") -> BoundRules:
        heads = Heads(Path("heads"), model(0))
        heads.geometry = SimpleNamespace(step_length=1.0)
        return BoundRules(read_rules([name], trusted={self.public}), heads, Path("margins"))


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Owner:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLDLOOM_STATE", str(tmp_path / "state"))
    picture("fire.png", 200)
    save_model("peer/model", model(1))
    return Owner()


def exchange(stated: str) -> None:
    """Put another picture or model in place of the one that the layer names."""
    if "fire.png" in STATED[stated]:
        picture("fire.png", 10)
    else:
        save_model("peer/model", model(0))


@pytest.mark.parametrize("stated", STATED)
def test_what_a_layer_names_is_not_exchanged(owner: Owner, stated: str) -> None:
    owner.sign(stated)
    assert read_rules(["site.yaml"], trusted={owner.public}).parts
    exchange(stated)
    owner.sign(stated, "other.yaml")  # the owner has also signed what is there now, for another layer
    with pytest.raises(
        DataError, match=r"(file fire\.png|run peer) is not the one that the owner of site\.yaml signed"
    ):
        read_rules(["site.yaml"], trusted={owner.public})
    read_rules(["other.yaml"], trusted={owner.public})


def test_a_guardrail_uses_the_picture_that_was_verified(owner: Owner) -> None:
    owner.sign("unlike")
    rules, late = owner.bound(), owner.bound()
    ((latents, _),) = [rail.reads for rail in rules._rails]
    assert torch.equal(latents, Heads(Path("heads"), model(0)).examples(["fire.png"]))
    exchange("unlike")
    with pytest.raises(DataError, match=r"fire\.png is not the picture that was verified"):
        late._rails  # noqa: B018


def test_a_guardrail_uses_the_run_that_was_verified(owner: Owner) -> None:
    owner.sign("agreed")
    rules, late = owner.bound(), owner.bound()
    assert [rail.reads[1][0].spec.fingerprint for rail in rules._rails] == [owner_model().spec.fingerprint]
    exchange("agreed")
    with pytest.raises(CheckpointError, match=r"model\.json is not the model that was verified"):
        late._rails  # noqa: B018


def owner_model() -> JEPA:
    made = model(1)
    save_model("again/model", made)
    return made.eval()


def test_what_margins_are_bound_to_is_what_the_guardrail_uses(owner: Owner) -> None:
    Path("site.yaml").write_text(f"owner: Acme\n{STATED['unlike']}\n")
    heads = Heads(Path("heads"), model(0))
    heads.geometry = SimpleNamespace(step_length=1.0)
    rules = BoundRules(read_rules(["site.yaml"], trusted=None), heads, Path("margins"))
    assert "file fire.png" in rules.inputs()
    exchange("unlike")
    with pytest.raises(DataError, match="was verified"):
        rules._rails  # noqa: B018


@pytest.mark.parametrize("stated", ["unlike", "information"])
def test_a_signature_without_digests_asks_to_sign_again(owner: Owner, stated: str) -> None:
    signature = owner.sign(stated)
    values = read_json(signature)
    write_json(signature, {name: value for name, value in values.items() if name != "parts"})
    with pytest.raises(DataError, match="does not match the signature"):  # digests cannot be taken away
        read_rules(["site.yaml"], trusted={owner.public})
    sign_file("site.yaml", "owner.pem", Domain.RULE_LAYER)  # as an older version of worldloom signed
    with pytest.raises(DataError, match=r"contains no digest of it, .* Ask the owner to sign site\.yaml again"):
        read_rules(["site.yaml"], trusted={owner.public})


def test_digests_cannot_be_changed_or_moved_to_another_layer(owner: Owner) -> None:
    signature = owner.sign("unlike")
    values = read_json(signature)
    exchange("unlike")
    layer = RuleLayer.parse(
        {"owner": "Acme", "guardrails": {"n": {"name": "unlike", "pictures": ["fire.png"], "distance": 1}}}
    )
    for parts in (part_digests([layer]), [], ["file fire.png"], {"file fire.png": 1}, "x"):
        write_json(signature, values | {"parts": parts})
        with pytest.raises(DataError, match=r"does not match the signature|is not a signature"):
            read_rules(["site.yaml"], trusted={owner.public})


def test_a_missing_picture_or_run_is_not_signed(owner: Owner) -> None:
    Path("fire.png").unlink()
    with pytest.raises(StorageError, match=r"fire\.png does not exist"):
        owner.sign("avoid")
    Path("peer/model/model.json").unlink()
    with pytest.raises(CheckpointError, match="the run peer, which has no model"):
        owner.sign("information")
