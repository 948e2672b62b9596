"""A policy belongs to its owner: what stands above is tightened, never loosened, and what is signed is what is kept."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.signing import Domain, make_key, sign_file
from worldloom.guardrails import Hold, RuleLayer, RuleSet, Stop, read_rules

OPERATOR = """
layer: operator
owner: Acme Works
risk: 0.05
guardrails:
  arm's reach:
    name: keep-in
    quantity: place
    region: {name: ball, centre: [0, 0], radius: 4}
    reason: the cable is no longer
fallback: {name: hold}
"""
COMMUNITY = """
layer: community
owner: the village
risk: 0.01
guardrails:
  arm's reach:
    name: keep-in
    quantity: place
    region: {name: ball, centre: [1, 0], radius: 3}
    reason: children play there
  gently: {name: magnitude, limit: 0.5}
objectives:
  quietly: {name: effort, weight: 0.1}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def layer(name: str, **values: object) -> RuleLayer:
    return RuleLayer.parse({"layer": name, "owner": name, **values})


def test_layers_say_together_what_is_tightest(tmp_path: Path) -> None:
    paths = [write(tmp_path, "operator.yaml", OPERATOR), write(tmp_path, "community.yaml", COMMUNITY)]
    policy = read_rules(paths, trusted=None)
    assert policy.risk == 0.01
    assert isinstance(policy.fallback, Hold)
    assert [(one.title, one.owner, one.rail.reason) for one in policy.stated()] == [
        ("arm's reach", "the village", "children play there"),
        ("gently", "the village", ""),
    ]
    assert policy.fingerprint != read_rules(paths[:1], trusted=None).fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("centre: [1, 0], radius: 3", "centre: [2, 0], radius: 3"), 'loosens the guardrail "arm\'s reach"'),
        (("name: keep-in", "name: keep-out"), "loosens the guardrail"),
        (("risk: 0.01", "risk: 0.1"), "loosens the risk"),
        (("owner: the village", "owner: the village\nfallback: {name: stop}"), "loosens the fallback"),
        (("layer: community", "layer: operator"), "in the order"),
    ],
)
def test_a_layer_that_loosens_is_refused_and_named(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    paths = [
        write(tmp_path, "operator.yaml", OPERATOR),
        write(tmp_path, "community.yaml", COMMUNITY.replace(*change)),
    ]
    with pytest.raises(ConfigError, match=said):
        read_rules(paths, trusted=None)


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.none() | st.floats(0.001, 0.5)), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_no_stack_of_layers_says_less_than_one_of_them(
    stated: list[tuple[float, float | None]], names_it: list[bool]
) -> None:
    layers = []
    for name, (limit, risk), named in zip(("operator", "site", "community"), stated, names_it, strict=True):
        rails = {"slow": {"name": "magnitude", "limit": limit}} if named else {}
        layers.append(layer(name, risk=risk, guardrails=rails))
    try:
        policy = RuleSet(layers=tuple(layers))
    except ConfigError:
        limits = [limit for (limit, _), named in zip(stated, names_it, strict=True) if named]
        risks = [risk for _, risk in stated if risk is not None]
        assert limits != sorted(limits, reverse=True) or risks != sorted(risks, reverse=True)
        return
    limits = [limit for (limit, _), named in zip(stated, names_it, strict=True) if named]
    risks = [risk for _, risk in stated if risk is not None]
    assert policy.risk == min(risks, default=None)
    assert [one.rail.limit for one in policy.stated()] == ([min(limits)] if limits else [])


@pytest.mark.parametrize("other", ["sl\u043ew", "slow\u200d", "\uff53low", "slow "])
@pytest.mark.parametrize("part", ["guardrails", "objectives"])
def test_titles_that_look_the_same_are_not_two_rules(other: str, part: str) -> None:
    upper = layer("operator", guardrails={"slow": {"name": "magnitude", "limit": 1}})
    rule = {"name": "magnitude", "limit": 9} if part == "guardrails" else {"name": "effort"}
    with pytest.raises(ConfigError, match=r"looks like the title 'slow' in the operator layer, but differs from it"):
        RuleSet(layers=(upper, layer("site", **{part: {other: rule}})))


def test_the_uppermost_fallback_is_taken() -> None:
    policy = RuleSet(layers=(layer("operator"), layer("site", fallback={"name": "stop", "action": [0.0]})))
    assert policy.fallback == Stop(action=(0.0,))


def test_an_unknown_key_is_said_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "policy.yaml", OPERATOR.replace("reason:", "raison:"))
    with pytest.raises(
        ConfigError, match=r"line 10: guardrails.arm's reach: unknown key 'raison'; did you mean 'reason'"
    ):
        read_rules([path], trusted=None)
    path.write_text(OPERATOR.replace("radius: 4", "radius: wide").replace("name: hold", "name: hodl"))
    with pytest.raises(ConfigError, match=r"line 9: .*region: radius: .*'wide'.*line 11: fallback: .*'hold'"):
        read_rules([path], trusted=None)


def test_only_what_a_trusted_owner_signed_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "policy.yaml", OPERATOR)
    owner, stranger = make_key(tmp_path / "owner.pem"), make_key(tmp_path / "stranger.pem")
    with pytest.raises(StorageError, match="not signed"):
        read_rules([path], trusted={owner})
    sign_file(path, tmp_path / "owner.pem", Domain.RULE_LAYER)
    assert read_rules([path], trusted={owner, stranger}).risk == 0.05
    with pytest.raises(DataError, match="not a trusted key"):
        read_rules([path], trusted={stranger})
    path.write_text(OPERATOR.replace("0.05", "0.5"))
    with pytest.raises(DataError, match="changed"):
        read_rules([path], trusted={owner})


def test_a_key_that_is_trusted_for_one_layer_does_not_speak_as_another(tmp_path: Path) -> None:
    path = write(tmp_path, "policy.yaml", OPERATOR)
    public = make_key(tmp_path / "owner.pem")
    sign_file(path, tmp_path / "owner.pem", Domain.RULE_LAYER)
    assert read_rules([path], trusted={f"operator:{public}"}).risk == 0.05
    with pytest.raises(DataError, match="is a layer of the operator"):
        read_rules([path], trusted={f"community:{public}", f"site:{public}"})


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.symlink_to("/dev/zero")
    write(tmp_path, "policy.yaml.sig", "{}")
    with pytest.raises(ConfigError, match="larger than"):
        read_rules([path], trusted=None)
    make_key(tmp_path / "owner.pem")
    with pytest.raises(DataError, match="larger than"):
        sign_file(path, tmp_path / "owner.pem", Domain.RULE_LAYER)
    with pytest.raises(DataError, match="larger than"):
        read_rules([path], trusted=set())
