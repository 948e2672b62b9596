"""`worldloom collect`: reward-free logs from any Gymnasium environment."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Imports, Json, import_modules, key_values


def collect(
    env_id: Annotated[str, typer.Argument(help="A Gymnasium id, such as worldloom/TwoRoom-v0.")],
    out: Annotated[Path, typer.Option(help="The dataset's directory; a partial one is completed.")],
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes there shall be.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="The most steps of an episode.")] = 100,
    policy: Annotated[str, typer.Option(help="directed-walk, uniform, or one that an imported module registers.")] = (
        "directed-walk"
    ),
    policy_option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of it.")] = None,
    env_arg: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the world.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="An info column to keep for probes and scores, never for the agent; all numeric by default."),
    ] = None,
    num_envs: Annotated[int, typer.Option(min=1, help="Environments stepped at once.")] = 50,
    seed: Annotated[int, typer.Option(help="The root of every episode's seed.")] = 0,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Collect episodes without rewards or goals; run again to complete what was interrupted."""
    from worldloom.cli.console import print_json, progress, say
    from worldloom.data import collect as collect_episodes
    from worldloom.data import inspect
    from worldloom.envs import register_envs

    register_envs()
    import_modules(imports)
    dataset = collect_episodes(
        out,
        env_id=env_id,
        episodes=episodes,
        steps=steps,
        policy=policy,
        policy_options=key_values(policy_option, "--policy-option"),
        env_kwargs=key_values(env_arg, "--env-arg"),
        labels=label,
        num_envs=num_envs,
        seed=seed,
        progress=progress(),
    )
    if json:
        print_json(inspect(dataset))
    else:
        say(f"{out}: {len(dataset)} episodes, {dataset.frames:,} frames")
