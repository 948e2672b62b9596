"""`worldloom collect`: reward-free logs of a recipe's world, or of any Gymnasium environment."""

from pathlib import Path
from typing import Annotated, Any

import typer

from worldloom.cli.console import answer, progress
from worldloom.cli.options import Imports, Json, PictureAxes, PictureRange, import_modules, key_values, picture_options
from worldloom.core.errors import ConfigError


def collect(
    world: Annotated[
        str,
        typer.Argument(help="A recipe, such as two-room, or a Gymnasium id, such as worldloom/TwoRoom-v0."),
    ],
    out: Annotated[Path, typer.Option(help="The directory of the dataset; a partial dataset is completed.")],
    episodes: Annotated[int | None, typer.Option(min=1, help="The number of episodes [1000].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The maximum number of steps of an episode [100].")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="directed-walk, uniform, near-object, cube-walk, pusht-expert, or one of an imported module."
        ),
    ] = None,
    policy_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the policy.")
    ] = None,
    env_arg: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the world.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="An info to store as a label for probes and scores, never for agents; by default, all numeric infos."
        ),
    ] = None,
    num_envs: Annotated[
        int | None, typer.Option(min=1, help="The number of environments to step in parallel [100].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The root of the seeds of all episodes [0].")] = None,
    picture_axes: PictureAxes = None,
    picture_range: PictureRange = None,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Collect episodes without rewards or goals; run the command again to complete an interrupted collection.

    Omitted options come from the recipe, or have the value in brackets.
    """
    from worldloom.data import collect as collect_episodes
    from worldloom.data import inspect
    from worldloom.envs import register_envs
    from worldloom.recipes import RECIPES, CollectionConfig, load_recipe

    register_envs()
    import_modules(imports)
    base = load_recipe(world).collection if world in RECIPES else CollectionConfig(env_id=world)
    if base is None:
        raise ConfigError(
            f"recipe {world!r} has no environment to collect from. Pass a Gymnasium id, such as worldloom/TwoRoom-v0"
        )
    given: dict[str, Any] = {"episodes": episodes, "steps": steps, "policy": policy, "num_envs": num_envs, "seed": seed}
    given |= {"policy_options": key_values(policy_option, "--policy-option") or None}
    given |= {"env_kwargs": key_values(env_arg, "--env-arg") or None}
    options = base.model_dump() | {name: value for name, value in given.items() if value is not None}
    pictures = picture_options(picture_axes, picture_range)
    dataset = collect_episodes(out, **options, labels=label, pictures=pictures, progress=progress())
    answer(json, inspect(dataset) if json else None, f"{out}: {len(dataset)} episodes, {dataset.frames:,} frames")
