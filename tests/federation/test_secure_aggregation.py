"""The sum comes out exactly, whoever drops out; and of no single delta does anyone learn anything."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp
from torch import Tensor

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.signing import Domain
from worldloom.federation.secure.aggregation_protocol import (
    PRIME,
    Masker,
    SumLost,
    SumSession,
    Unmasker,
    decode_sum,
    encode_delta,
    join_secret,
    split_secret,
)

NAMES = ("ann", "bob", "cho", "dee", "eve")
KEYS = {name: Ed25519PrivateKey.generate() for name in NAMES}
SHAPES = {"a.weight": (3, 4), "b": (), "c": (5,)}


def signs(name: str) -> Callable[[bytes], bytes]:
    return lambda content: KEYS[name].sign(Domain.MASK_KEYS.value + content)


def session(owners: Iterable[str] = NAMES, threshold: int = 3, shapes: Any = None) -> SumSession:
    publics = {name: KEYS[name].public_key().public_bytes_raw().hex() for name in owners}
    return SumSession(
        name="round 1",
        owners=publics,
        shapes=shapes or SHAPES,
        threshold=threshold,
    )


def deltas(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    return {name: {key: torch.randn(shape, generator=source) for key, shape in SHAPES.items()} for name in NAMES}


def take(unmasker: Unmasker, phase: str, messages: Iterable[Mapping[str, Any]]) -> None:
    for message in messages:
        unmasker.take(phase, message["owner"], message)


class View:
    """One run of the protocol, and all that the coordinator saw of it."""

    def __init__(self, held: SumSession) -> None:
        self.session = held
        self.maskers = {name: Masker(name, held, signs(name)) for name in held.owners}
        self.unmasker = Unmasker(held)
        self.masked: dict[str, bytes] = {}
        self.answers: dict[str, dict[str, Any]] = {}

    def until_masked(
        self, given: Mapping[str, Mapping[str, Tensor]], *, silent: Iterable[str] = (), gone: Iterable[str] = ()
    ) -> list[str]:
        """`silent` owners advertise and then vanish; `gone` ones vanish after their shares went out."""
        roster = self.advertise()
        self.shared = {name: masker.share(roster) for name, masker in self.maskers.items() if name not in silent}
        take(self.unmasker, "share", self.shared.values())
        self.boxes = self.unmasker.inboxes
        messages = [self.maskers[name].mask(self.boxes[name], given[name]) for name in self.boxes if name not in gone]
        self.masked = {message["owner"]: message["masked"] for message in messages}
        take(self.unmasker, "mask", messages)
        return self.unmasker.survivors

    def advertise(self) -> dict[str, dict[str, Any]]:
        take(self.unmasker, "advertise", [masker.advertise() for masker in self.maskers.values()])
        return self.unmasker.roster

    def finish(self, survivors: Iterable[str], *, late: Iterable[str] = ()) -> dict[str, Tensor]:
        """`late` owners vanish after their masked delta went out."""
        survivors = list(survivors)
        self.answers = {name: self.maskers[name].unmask(survivors) for name in survivors if name not in late}
        take(self.unmasker, "unmask", self.answers.values())
        return self.unmasker.sum(self.answers)


def plain_sum(given: Mapping[str, Mapping[str, Tensor]], names: Iterable[str]) -> dict[str, Tensor]:
    names = list(names)
    return {key: torch.stack([given[name][key].double() for name in names]).sum(0) for key in SHAPES}


@pytest.mark.parametrize(
    ("silent", "gone", "late"),
    [((), (), ()), (("ann",), (), ()), ((), ("bob", "eve"), ()), ((), (), ("cho", "dee")), (("ann",), ("dee",), ())],
)
def test_the_sum_is_exact_whoever_drops_out(
    silent: tuple[str, ...], gone: tuple[str, ...], late: tuple[str, ...]
) -> None:
    view, given = View(session()), deltas()
    there = view.until_masked(given, silent=silent, gone=gone)
    assert there == sorted(set(NAMES) - {*silent, *gone})  # the late ones are in the sum
    found, expected = view.finish(there, late=late), plain_sum(given, there)
    for key in SHAPES:
        assert found[key].shape == SHAPES[key]
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=len(there) * 2.0**-25)


@settings(max_examples=25)
@given(st.lists(st.floats(-1024, 1024), min_size=18, max_size=18), st.integers(0, 5), st.data())
def test_the_sum_of_whole_steps_is_exact_to_the_last_bit(
    values: list[float], dropped: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(2, 5))
    names = NAMES[:n]
    gone = names[: min(dropped, n - (n // 2 + 1))]
    row = torch.tensor(values, dtype=torch.float64).mul(2**24).round().div(2**24)
    given = {name: {"x": row.roll(place)} for place, name in enumerate(names)}
    view = View(session(names, n // 2 + 1, {"x": (18,)}))
    there = view.until_masked(given, gone=gone)
    assert torch.equal(view.finish(there)["x"], torch.stack([given[name]["x"] for name in there]).sum(0))


@pytest.mark.parametrize("stage", ["silent", "gone", "late"])
def test_with_too_few_survivors_nothing_is_revealed(stage: str) -> None:
    view, given, away = View(session()), deltas(), ("ann", "bob", "cho")
    if stage == "late":
        there = view.until_masked(given)
        with pytest.raises(DataError, match="fewer than the threshold of 3"):
            view.finish(there, late=away)
    else:
        with pytest.raises(DataError, match="fewer than the threshold of 3"):
            view.until_masked(given, **{stage: away})
    # What the coordinator holds does not lead to the sum: it lacks the secrets of every mask.
    assert len(view.answers) < 3
    if view.masked:
        total = sum(np.frombuffer(data, "<u8") for data in view.masked.values())
        assert not torch.allclose(decode_sum(total, view.session)["c"], plain_sum(given, view.masked)["c"], atol=1.0)


def test_an_owner_refuses_to_unmask_too_few() -> None:
    view = View(session())
    view.until_masked(deltas())
    with pytest.raises(DataError, match="fewer than the threshold"):
        view.maskers["ann"].unmask(["ann", "bob"])


def test_owners_answer_once_and_in_order() -> None:
    view = View(session())
    there = view.until_masked(deltas())
    with pytest.raises(DataError, match="reveal its delta"):
        view.maskers["ann"].mask(view.boxes["ann"], deltas(1)["ann"])
    view.finish(there)
    with pytest.raises(DataError, match="reveal its delta"):
        view.maskers["ann"].unmask(["ann", "bob", "cho"])
    with pytest.raises(DataError, match="reveal its delta"):
        Masker("ann", view.session, signs("ann")).unmask(there)


def test_the_coordinator_never_holds_both_secrets_of_an_owner_even_when_it_lies() -> None:
    view = View(session())
    view.until_masked(deltas())
    # It tells some that ann is there, and the others that she is not.
    lists = {"ann": NAMES, "bob": NAMES, "cho": NAMES, "dee": NAMES[1:], "eve": NAMES[1:]}
    answers = [view.maskers[name].unmask(there) for name, there in lists.items()]
    points = {name: point for point, name in enumerate(sorted(NAMES), 1)}
    secret = int.from_bytes(view.maskers["ann"]._mask_key.private_bytes_raw(), "big")
    seed = int.from_bytes(view.maskers["ann"]._seed, "big")
    for owner in NAMES:
        held = {part: [a for a in answers if owner in a[part]] for part in ("seeds", "keys")}
        assert min(len(each) for each in held.values()) < 3
        for answer in answers:
            assert (owner in answer["seeds"]) != (owner in answer["keys"])
    seeds = {points[a["owner"]]: int(a["seeds"]["ann"], 16) for a in answers if "ann" in a["seeds"]}
    keys = {points[a["owner"]]: int(a["keys"]["ann"], 16) for a in answers if "ann" in a["keys"]}
    assert join_secret(seeds) == seed  # enough of one ...
    assert join_secret(keys) != secret  # ... and too few of the other
    # With one share more it would have had both: the count is what protects.
    more = {**keys, points["ann"]: view.maskers["ann"]._shares["ann"][0]}
    assert join_secret(more) == secret


def test_a_masked_delta_is_uniform_and_tells_nothing_of_the_delta() -> None:
    n = 20_000
    held = session(NAMES[:3], 2, {"x": (n,)})
    x = torch.linspace(-5, 5, n, dtype=torch.float64)
    view = View(held)
    view.until_masked({name: {"x": x} for name in NAMES[:3]})
    for data in view.masked.values():
        row = np.frombuffer(data, "<u8")
        for shift in (0, 24, 56):  # low, middle and high bytes
            assert chisquare(np.bincount((row >> np.uint64(shift)) & np.uint64(255), minlength=256)).pvalue > 1e-6
        assert abs(np.corrcoef(row.astype(float), x)[0, 1]) < 5 / np.sqrt(n)
    # The same measures find an encoded delta that is not masked.
    bare = encode_delta({"x": x}, held)
    assert chisquare(np.bincount((bare >> np.uint64(56)) & np.uint64(255), minlength=256)).pvalue < 1e-6
    assert abs(np.corrcoef(bare.view("<i8").astype(float), x)[0, 1]) > 0.99


def test_two_inputs_with_the_same_sum_look_alike_to_the_coordinator() -> None:
    n = 10_000
    held = session(NAMES[:3], 2, {"x": (n,)})
    flat, steep = torch.zeros(n, dtype=torch.float64), torch.linspace(-5, 5, n, dtype=torch.float64)
    worlds = [
        {"ann": {"x": flat}, "bob": {"x": flat}, "cho": {"x": flat}},
        {"ann": {"x": steep}, "bob": {"x": -steep}, "cho": {"x": flat}},
    ]
    seen = []
    for world in worlds:
        view = View(held)
        there = view.until_masked(world)
        sums = view.finish(there)["x"]
        assert torch.allclose(sums, flat, atol=1e-6)
        # All it can work out: each masked row, and each with the own masks taken off that it learned in the end.
        seen.append({name: np.frombuffer(data, "<u8").astype(float) for name, data in view.masked.items()})
    for name in NAMES[:3]:
        assert ks_2samp(seen[0][name], seen[1][name]).pvalue > 1e-6
        assert abs(np.corrcoef(seen[1][name], steep)[0, 1]) < 5 / np.sqrt(n)


def test_after_unmasking_a_single_delta_is_still_hidden_by_the_pair_masks() -> None:
    from worldloom.federation.secure.aggregation_protocol import _own_mask

    n = 20_000
    held = session(NAMES[:3], 2, {"x": (n,)})
    x = torch.linspace(-5, 5, n, dtype=torch.float64)
    view = View(held)
    view.finish(view.until_masked({name: {"x": x} for name in NAMES[:3]}))
    for name in NAMES[:3]:
        row = np.frombuffer(view.masked[name], "<u8") - _own_mask(view.maskers[name]._seed, held)
        assert abs(np.corrcoef(row.astype(float), x)[0, 1]) < 5 / np.sqrt(n)
        assert chisquare(np.bincount((row >> np.uint64(56)) & np.uint64(255), minlength=256)).pvalue > 1e-6


def test_the_same_delta_never_looks_the_same_twice() -> None:
    rows = []
    for _ in range(2):
        view = View(session())
        view.until_masked(deltas())
        rows.append(view.masked["ann"])
    assert rows[0] != rows[1]


def test_owners_that_are_put_away_and_taken_up_between_all_steps_give_the_same_sum() -> None:
    view, given = View(session()), deltas()

    def again(name: str) -> Masker:
        state = json.loads(json.dumps(view.maskers[name].state()))
        view.maskers[name] = Masker.of(state, view.session, signs(name))
        return view.maskers[name]

    take(view.unmasker, "advertise", [again(name).advertise() for name in NAMES])
    take(view.unmasker, "share", [again(name).share(view.unmasker.roster) for name in NAMES])
    boxes = view.unmasker.inboxes
    take(view.unmasker, "mask", [again(name).mask(boxes[name], given[name]) for name in NAMES if name != "eve"])
    there = view.unmasker.survivors
    take(view.unmasker, "unmask", [again(name).unmask(there) for name in there])
    expected = plain_sum(given, there)
    torch.testing.assert_close(view.unmasker.sum(there)["c"], expected["c"], rtol=0, atol=1e-6)
    # Taken up again it still answers once.
    with pytest.raises(DataError, match="reveal its delta"):
        again("ann").unmask(there)
    state = view.maskers["ann"].state()
    for wrong in ({}, {**state, "mask": "00"}, {**state, "seed": 3}, {**state, "owner": "mallory"}):
        with pytest.raises(DataError, match="state of an owner in the secure sum is invalid"):
            Masker.of(wrong, view.session, signs("ann"))


def test_keys_that_the_coordinator_puts_in_are_refused() -> None:
    view = View(session())
    roster, maskers = view.advertise(), view.maskers
    forged = {**roster, "bob": {**roster["bob"], "mask": roster["cho"]["mask"]}}
    with pytest.raises(DataError, match="'bob' are not signed"):
        maskers["ann"].share(forged)
    # Nor do keys of another session serve: they were signed for that one.
    other = view.session.model_copy(update={"name": "round 2"})
    masker = Masker("ann", other, signs("ann"))
    masker.advertise()
    with pytest.raises(DataError, match="not signed"):
        masker.share(roster)


def test_a_share_that_was_changed_or_sealed_for_another_is_refused() -> None:
    for change in (lambda text: text[:-2] + ("00" if text[-2:] != "00" else "11"), lambda text: "zz"):
        view = View(session())
        roster = view.advertise()
        take(view.unmasker, "share", [masker.share(roster) for masker in view.maskers.values()])
        boxes = view.unmasker.inboxes
        boxes["ann"]["bob"] = change(boxes["ann"]["bob"])
        with pytest.raises(DataError, match="not encrypted for ann"):
            view.maskers["ann"].mask(boxes["ann"], deltas()["ann"])
    view = View(session())
    roster = view.advertise()
    take(view.unmasker, "share", [masker.share(roster) for masker in view.maskers.values()])
    boxes = view.unmasker.inboxes
    # Neither one sealed for another, nor her own to bob sent back to her: each direction has a key of its own.
    for masker, sealed in (("ann", boxes["cho"]["bob"]), ("cho", boxes["bob"]["cho"])):
        with pytest.raises(DataError, match=f"not encrypted for {masker}"):
            view.maskers[masker].mask({**boxes[masker], "bob": sealed}, deltas()[masker])


@pytest.mark.parametrize("part", ["seeds", "keys"])
def test_a_wrong_share_is_found_and_the_round_goes_on_without_it(part: str) -> None:
    view, given = View(session()), deltas()
    there = view.until_masked(given, gone=("eve",))
    answers = {name: view.maskers[name].unmask(there) for name in there}
    owner = "eve" if part == "keys" else "ann"
    # Nonsense, and a share from which a secret comes that looks like one: the true one and 1 (of points 1, 2 and 3
    # the second counts -3 times).
    nearly = (int(answers["bob"][part][owner], 16) - pow(3, -1, PRIME)) % PRIME
    for share in (5, nearly):
        wrong = {**answers["bob"], part: {**answers["bob"][part], owner: f"{share:x}"}}
        unmasker = deepcopy(view.unmasker)
        take(unmasker, "unmask", [wrong, answers["ann"], answers["cho"], answers["dee"]])
        with pytest.raises(DataError, match=f"{owner}.* do not recover"):
            unmasker.sum(["ann", "bob", "cho"])
        found = unmasker.sum(["ann", "cho", "dee"])
        torch.testing.assert_close(found["c"], plain_sum(given, there)["c"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["seeds", "keys"])
def test_an_answer_that_lacks_a_share_is_refused(part: str) -> None:
    view = View(session())
    there = view.until_masked(deltas(), gone=("eve",))
    answer = view.maskers["bob"].unmask(there)
    for wrong in ({}, {**answer[part], "mallory": "1"}, dict.fromkeys(answer[part], 5), None):
        with pytest.raises(DataError, match="bob must send shares"):
            view.unmasker.take("unmask", "bob", {**answer, part: wrong})
    view.unmasker.take("unmask", "bob", answer)


def test_bad_messages_are_refused_and_can_be_left_out() -> None:
    view, given = View(session()), deltas()
    roster = view.advertise()
    shared = {name: masker.share(roster) for name, masker in view.maskers.items()}
    with pytest.raises(DataError, match="bob .*a share for each of"):
        view.unmasker.take("share", "bob", {"owner": "bob", "commitment": "0", "shares": {}})
    take(view.unmasker, "share", shared.values())
    with pytest.raises(DataError, match="has answered already"):
        view.unmasker.take("share", "ann", shared["ann"])
    boxes = view.unmasker.inboxes
    masked = {name: view.maskers[name].mask(boxes[name], given[name]) for name in NAMES}
    with pytest.raises(DataError, match="expected a masked delta of .* from cho"):
        view.unmasker.take("mask", "cho", {"owner": "cho", "masked": masked["cho"]["masked"][:-8]})
    with pytest.raises(DataError, match="not expected"):
        view.unmasker.take("mask", "mallory", {"owner": "mallory", "masked": masked["ann"]["masked"]})
    take(view.unmasker, "mask", [message for name, message in masked.items() if name != "bob"])
    there = view.unmasker.survivors
    torch.testing.assert_close(view.finish(there)["c"], plain_sum(given, there)["c"], rtol=0, atol=1e-6)


def test_values_over_the_limit_are_refused() -> None:
    held = session(shapes={"x": (2,)})
    with pytest.raises(DataError, match="above the limit of 1024"):
        encode_delta({"x": torch.tensor([0.5, -1025.0])}, held)
    x = {"x": torch.tensor([0.5, -1024.0])}
    assert decode_sum(encode_delta(x, held), held)["x"].tolist() == [0.5, -1024.0]
    with pytest.raises(DataError, match="not finite"):
        encode_delta({"x": torch.tensor([np.nan, 1.0])}, held)
    for wrong in ({}, {"y": torch.zeros(2)}, {"x": torch.zeros(3)}):
        with pytest.raises(DataError, match="tensors differ from"):
            encode_delta(wrong, held)


def test_a_session_in_which_halves_could_be_told_different_things_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than half"):
        session(NAMES[:4], threshold=2)
    with pytest.raises(ConfigError, match="more than half"):
        session(NAMES[:2], threshold=3)
    key = KEYS["ann"].public_key().public_bytes_raw().hex()
    with pytest.raises(ConfigError, match="same key"):
        SumSession(name="r", owners={"a": key, "b": key}, shapes={}, threshold=2)


@settings(max_examples=40)
@given(st.integers(0, 2**256 - 1), st.integers(1, 7), st.data())
def test_any_threshold_of_shares_give_the_secret_and_fewer_another_number(
    secret: int, owners: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, owners))
    shares = dict(enumerate(split_secret(secret, owners, threshold), 1))
    for few in combinations(shares, threshold):
        assert join_secret({point: shares[point] for point in few}) == secret
    for fewer in combinations(shares, threshold - 1):
        assert join_secret({point: shares[point] for point in fewer}) != secret or (fewer == () and secret == 0)
    assert all(0 <= share < PRIME for share in shares.values())


def test_fewer_shares_are_distributed_alike_whatever_the_secret() -> None:
    prime, owners, threshold = 7, 4, 3
    for points in combinations(range(owners), threshold - 1):
        counts = []
        for secret in range(prime):
            seen: Counter[tuple[int, ...]] = Counter()
            for coefficients in product(range(prime), repeat=threshold - 1):
                draws = iter(coefficients)
                shares = split_secret(secret, owners, threshold, prime=prime, draw=lambda _, draws=draws: next(draws))
                seen[tuple(shares[point] for point in points)] += 1
            counts.append(seen)
        assert all(count == counts[0] for count in counts)
        assert len(set(counts[0].values())) == 1  # uniform


def test_a_split_that_makes_no_sense_is_refused() -> None:
    for secret, owners, threshold in ((PRIME, 3, 2), (1, 3, 4), (1, 3, 0), (-1, 3, 2)):
        with pytest.raises(ConfigError, match="threshold"):
            split_secret(secret, owners, threshold)


@pytest.mark.parametrize("key", ["00" * 32, "ab", "zz" * 32, "AB" * 32, "01" + "00" * 31])
@pytest.mark.parametrize("part", ["mask", "box"])
def test_keys_that_nobody_can_use_are_refused_from_their_owner(part: str, key: str) -> None:
    from worldloom.federation.secure.aggregation_protocol import _claim

    view = View(session())
    keys = {name: text for name, text in view.maskers["eve"].advertise().items() if name != "signature"} | {part: key}
    with pytest.raises(DataError, match="'eve' sent an invalid X25519 key"):
        view.unmasker.take("advertise", "eve", {**keys, "signature": signs("eve")(_claim(keys, view.session)).hex()})


@pytest.mark.parametrize(("owners", "liars", "certain"), [(24, 2, True), (20, 3, True), (24, 5, True), (11, 4, False)])
def test_wrong_shares_of_several_helpers_do_not_matter(owners: int, liars: int, certain: bool) -> None:
    names = [f"o{number:02d}" for number in range(owners)]
    KEYS.update({name: Ed25519PrivateKey.generate() for name in names})
    view = View(session(names, owners // 2 + 1, {"x": (4,)}))
    given = {name: {"x": torch.full((4,), float(place))} for place, name in enumerate(names)}
    there = view.until_masked(given, gone=names[-1:])
    answers = {name: view.maskers[name].unmask(there) for name in there}
    for name in names[:liars]:
        answers[name]["seeds"] = {owner: f"{int(share, 16) ^ 1:x}" for owner, share in answers[name]["seeds"].items()}
        answers[name]["keys"] = dict.fromkeys(answers[name]["keys"], "no number")
    take(view.unmasker, "unmask", answers.values())
    found = view.unmasker.sum(there)
    assert torch.equal(found["x"], torch.full((4,), float(sum(range(owners - 1))), dtype=torch.float64))
    assert view.unmasker.wrong == (set(names[:liars]) if certain else set())


def test_an_owner_whose_shares_do_not_fit_its_commitment_is_named() -> None:
    view = View(session())
    there = view.until_masked(deltas())
    shared = view.unmasker._answers["share"]
    shared["eve"] = {**shared["eve"], "commitment": "0" * 64}
    with pytest.raises(SumLost, match="eve do not recover") as caught:
        view.finish(there)
    assert caught.value.owners == ["eve"]
