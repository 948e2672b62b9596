"""`worldloom rules`: signing, verifying and showing the rule sets that agents obey."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json, Trust, Unsigned, trusted_keys

app = typer.Typer(help="Sign, verify and show rule sets: guardrails, objectives and fallbacks.", no_args_is_help=True)

Files = Annotated[list[Path], typer.Argument(help="The layers of a rule set, uppermost first.")]


@app.command()
def key(path: Annotated[Path, typer.Argument(help="The file for the secret key.")]) -> None:
    """Make a secret key to sign with, and print the public key for those who trust it."""
    from worldloom.core.signing import make_key

    typer.echo(make_key(path))


@app.command()
def sign(
    files: Annotated[list[Path], typer.Argument(help="What to sign.")],
    key: Annotated[Path, typer.Option(help="The secret key.")],
) -> None:
    """Sign rule sets and the pictures that they forbid; each signature is written beside its file."""
    from worldloom.core.signing import sign_file
    from worldloom.core.yaml_config import read_yaml
    from worldloom.guardrails import RuleLayer

    for file in files:
        rules = read_yaml(file, RuleLayer)  # an invalid rule set is not signed
        for path in [*map(Path, dict.fromkeys(rules.files)), file]:
            typer.echo(str(sign_file(path, key)))


@app.command()
def show(files: Files, trust: Trust = None, unsigned: Unsigned = False, json: Json = False) -> None:
    """Verify the layers of a rule set, and show what they state together."""
    from worldloom.cli.console import print_json, print_table, say
    from worldloom.guardrails import read_rules

    rules = read_rules(files, trusted=trusted_keys(trust, unsigned))
    if json:
        print_json({
            "fingerprint": rules.fingerprint,
            "risk": rules.risk,
            "guardrails": [rail.__dict__ for rail in rules.stated()],
            "fallback": None if rules.fallback is None else rules.fallback.model_dump(mode="json"),
        })  # fmt: skip
        return
    rows = [[rail.title, rail.kind, rail.owner, rail.layer, rail.reason] for rail in rules.stated()]
    print_table("guardrails", ["", "kind", "owner", "layer", "reason"], rows)
    say(f"risk: {'none is stated' if rules.risk is None else f'{rules.risk:g}'}")
    say(f"fallback: {'stop' if rules.fallback is None else rules.fallback.name}")
    say(f"fingerprint: {rules.fingerprint}; {'signatures were not asked for' if unsigned else 'all are signed'}")
