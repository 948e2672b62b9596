"""`worldloom policy`: whose guardrails an agent keeps, and that nobody has changed them."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json, Trust, Unsigned, read_layers

app = typer.Typer(help="Sign, verify and show policies: guardrails, objectives and fallbacks.", no_args_is_help=True)

Files = Annotated[list[Path], typer.Argument(help="The layers of a policy, uppermost first.")]


@app.command()
def key(path: Annotated[Path, typer.Argument(help="Where to keep the secret key.")]) -> None:
    """Make a secret key to sign with; prints the public one, to be given to whoever is to trust it."""
    from worldloom.core.signing import make_key

    typer.echo(make_key(path))


@app.command()
def sign(
    files: Annotated[list[Path], typer.Argument(help="What to sign.")],
    key: Annotated[Path, typer.Option(help="The secret key.")],
) -> None:
    """Sign policies as they are now, and the pictures that they forbid; the signature is kept beside each."""
    from worldloom.agents import PolicyConfig
    from worldloom.core.signing import sign_file
    from worldloom.core.yaml_config import read_yaml

    for file in files:
        policy = read_yaml(file, PolicyConfig)  # nobody signs what cannot be read
        for path in [*map(Path, dict.fromkeys(policy.files)), file]:
            typer.echo(str(sign_file(path, key)))


@app.command()
def show(files: Files, trust: Trust = None, unsigned: Unsigned = False, json: Json = False) -> None:
    """Verify the layers of a policy, and show what they say together."""
    from worldloom.agents import Policy
    from worldloom.cli.console import print_json, print_table, say

    policy = Policy(layers=read_layers(files, trust, unsigned))
    if json:
        print_json({
            "fingerprint": policy.fingerprint,
            "risk": policy.risk,
            "guardrails": [rail.__dict__ for rail in policy.stated()],
            "fallback": None if policy.fallback is None else policy.fallback.model_dump(mode="json"),
        })  # fmt: skip
        return
    rows = [[rail.title, rail.kind, rail.owner, rail.layer, rail.reason] for rail in policy.stated()]
    print_table("guardrails", ["", "kind", "owner", "layer", "reason"], rows)
    say(f"risk: {'none is stated' if policy.risk is None else f'{policy.risk:g}'}")
    say(f"fallback: {'stop' if policy.fallback is None else policy.fallback.name}")
    say(f"fingerprint: {policy.fingerprint}; {'signatures were not asked for' if unsigned else 'all are signed'}")
