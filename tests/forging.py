"""Writes what a member or coordinator could sign, true or false, without training."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time worldloom is imported only by tests, after the hook that checks shapes
    from worldloom.core.chain import ChainHead
    from worldloom.core.signing import SigningKey


def signed(kind: str, body: Mapping[str, Any], key: "SigningKey", *, size: int = 0) -> bytes:
    """Return the signed part of a message; the whole message, with tensors that nobody has, is of `size` bytes."""
    from worldloom.core.signing import Domain

    payload = 0
    while True:
        values = {"kind": kind, "body": dict(body), "size": payload, "digest": "0" * 64, "key": key.public}
        header = json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii")
        said = struct.pack("<I", len(header)) + header
        whole = len(Domain.MESSAGE.value) + len(said) + 64
        if whole + payload == size or not size:
            return Domain.MESSAGE.value + said + bytes.fromhex(key.sign(said, Domain.MESSAGE))
        payload = size - whole


def contribution(
    constitution: Any, key: "SigningKey", owner: str, number: int, base: str, seen: "ChainHead", **changed: Any
) -> dict[str, Any]:
    """Return the facts of a contribution's entry, as its member would sign them; `changed` are other values."""
    from worldloom.federation.record.statements import SignedContribution, origin

    size = changed.pop("size", 0)
    body = {"owner": owner, "round": number, "base": base, "steps": 5, "frames": 90, "data_class": "open", "spent": {}}
    body |= origin(constitution, {"length": seen.length, "hash": seen.hash})
    statement = signed("contribution", {**body, **changed}, key, size=size)
    return dict(SignedContribution.of([statement], number, constitution).facts)


def chained(path: Path, bodies: Iterable[Mapping[str, Any]]) -> None:
    """Write a chain of these bodies, as anyone can without a key."""
    from worldloom.core.chain import NOTHING, Entry

    previous, lines = NOTHING, []
    for index, body in enumerate(bodies):
        entry = Entry(index=index, time=1.0, previous=previous, body=body)
        previous = entry.hash
        lines.append(entry.line() + "\n")
    path.write_text("".join(lines))


def rewritten(path: Path) -> None:
    """Write a ledger anew as somebody without any key can: each hash fits, and no signature does."""
    from worldloom.core.chain import Entry

    previous, lines = "0" * 64, []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        body = {**values["body"], "signature": "00" * 64}
        entry = Entry(index=values["index"], time=values["time"], previous=previous, body=body)
        previous = entry.hash
        lines.append(entry.line())
    path.write_text("".join(f"{line}\n" for line in lines))
