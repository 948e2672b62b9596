"""`worldloom rules`: sign, verify and show the rule sets that agents obey."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, table
from worldloom.cli.options import Json, Trust, Unsigned, trusted_keys
from worldloom.core.signing import make_key
from worldloom.core.yaml_config import read_yaml

app = typer.Typer(help="Sign, verify and show rule sets: guardrails, objectives and fallbacks.", no_args_is_help=True)

Files = Annotated[list[Path], typer.Argument(help="The layers of a rule set, uppermost first.")]


@app.command()
def key(path: Annotated[Path, typer.Argument(help="The file for the secret key.")], json: Json = False) -> None:
    """Create a secret key for signing, and print its public key for `--trust`."""
    public = make_key(path)
    answer(json, {"key": public, "path": path}, public)


@app.command()
def sign(
    files: Annotated[list[Path], typer.Argument(help="The layers to sign.")],
    key: Annotated[Path, typer.Option(help="The secret key.")],
    json: Json = False,
) -> None:
    """Sign the layers of a rule set with the pictures and runs that they name; write each signature beside its file."""
    from worldloom.guardrails import RuleLayer, sign_rules

    signatures, notes = [], []
    for file in files:
        signatures.append(str(sign_rules(file, key)))
        if not read_yaml(file, RuleLayer).version:
            notes.append(f"note: {file} has no 'version', so an older copy of it cannot be detected")
    answer(json, {"signatures": signatures, "notes": notes}, *signatures, *notes)


@app.command()
def show(files: Files, trust: Trust = None, unsigned: Unsigned = False, json: Json = False) -> None:
    """Verify the layers of a rule set, and show their combined rules."""
    from worldloom.guardrails import read_rules

    rules = read_rules(files, trusted=trusted_keys(trust, unsigned))
    keys = ["title", "kind", "owner", "layer", "reason"]
    rows = [[rule.title, rule.rail.name, rule.owner, rule.layer, rule.rail.reason] for rule in rules.stated()]
    found = {
        "layers": [layer.model_dump(include={"layer", "owner", "name", "version"}) for layer in rules.layers],
        "fingerprint": rules.fingerprint,
        "risk": rules.risk,
        "guardrails": [dict(zip(keys, row, strict=True)) for row in rows],
        "fallback": None if rules.fallback is None else rules.fallback.model_dump(mode="json"),
    }
    answer(
        json,
        found,
        *(f"{layer.layer}: {layer.owner}, version {layer.version or 'none'}" for layer in rules.layers),
        table("guardrails", ["", *keys[1:]], rows),
        f"risk: {'none' if rules.risk is None else f'{rules.risk:g}'}",
        f"fallback: {'stop' if rules.fallback is None else rules.fallback.name}",
        f"fingerprint: {rules.fingerprint}; {'signatures were not checked' if unsigned else 'all layers are signed'}",
    )


@app.command()
def revert(files: Files, trust: Trust = None, json: Json = False) -> None:
    """Accept these versions of a rule set from now on, even if newer ones were read before."""
    from worldloom.guardrails import read_rules

    rules = read_rules(files, trusted=trusted_keys(trust, unsigned=False), revert=True)
    layers = [layer.model_dump(include={"layer", "owner", "name", "version"}) for layer in rules.layers]
    lines = [f"{layer.layer}: {layer.owner}, version {layer.version or 'none'}, is accepted" for layer in rules.layers]
    answer(json, {"layers": layers}, *lines)
