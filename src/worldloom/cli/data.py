"""`worldloom data`: look into datasets, and convert them."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json, key_values

app = typer.Typer(help="Inspect, validate, preview and convert datasets.", no_args_is_help=True)
Dataset = Annotated[Path, typer.Argument(help="The dataset's directory.")]


@app.command()
def inspect(path: Dataset, json: Json = False) -> None:
    """Say what a dataset holds."""
    from worldloom.cli.console import print_json, print_table
    from worldloom.data import EpisodeDataset, inspect

    summary = inspect(EpisodeDataset.open(path))
    if json:
        print_json(summary)
    else:
        print_table(str(path), ["", "value"], [[key, str(value)] for key, value in summary.items()])


@app.command()
def validate(path: Dataset, json: Json = False) -> None:
    """Check every episode; exit code 3 if anything is wrong."""
    from dataclasses import asdict

    from worldloom.cli.console import print_json, print_table, say
    from worldloom.core.errors import DataError
    from worldloom.data import validate

    problems = validate(path)
    if json:
        print_json([asdict(problem) for problem in problems])
    elif problems:
        rows = [[problem.where, problem.what, problem.remedy] for problem in problems]
        print_table(f"{len(problems)} problems in {path}", ["where", "what", "remedy"], rows)
    else:
        say(f"{path}: no problem found")
    if problems:
        raise typer.Exit(DataError.exit_code)


@app.command()
def preview(
    path: Dataset,
    out: Annotated[Path | None, typer.Option(help="Where to write; beside the dataset by default.")] = None,
) -> None:
    """Write a contact sheet (PNG) and a video (MP4)."""
    from worldloom.cli.console import say
    from worldloom.data import EpisodeDataset, contact_sheet, video

    dataset = EpisodeDataset.open(path)
    target = out or path.parent
    for write, name in ((contact_sheet, f"{path.name}.png"), (video, f"{path.name}.mp4")):
        write(dataset, target / name)
        say(f"wrote {target / name}")


@app.command()
def formats(json: Json = False) -> None:
    """List the formats that can be converted, and what each can do."""
    from worldloom.cli.console import print_json, print_table
    from worldloom.formats import FORMATS

    every = [FORMATS[name] for name in FORMATS]
    if json:
        columns = ("name", "description", "writable", "lossless_pixels")
        print_json([{column: getattr(each, column) for column in columns} for each in every])
        return
    rows = [
        [each.name, "yes" if each.writable else "no", "yes" if each.lossless_pixels else "no", each.description]
        for each in every
    ]
    print_table("formats", ["name", "can be written", "keeps every pixel", "what it is"], rows)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The dataset to read.")],
    target: Annotated[Path, typer.Argument(help="Where to write; run the same command again to go on.")],
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="The source's format; detected by default.")
    ] = None,
    target_format: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The target's format.")] = "worldloom",
    camera: Annotated[str | None, typer.Option(help="The image key, where there are several; 'none' for none.")] = None,
    vector: Annotated[
        list[str] | None, typer.Option(help="An observation column of the vector, in order; all numeric by default.")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Resize frames, by area averaging.")] = None,
    rate: Annotated[float | None, typer.Option(help="Steps a second; the camera's by default.")] = None,
    actions: Annotated[
        str, typer.Option(help="Of a log faster than the frames: hold (the one at the frame) or mean (velocities).")
    ] = "hold",
    gap: Annotated[float, typer.Option(help="A gap longer than this many median periods splits an episode.")] = 4.0,
    low: Annotated[str | None, typer.Option(metavar="A,B,...", help="Lower bounds of the actions.")] = None,
    high: Annotated[str | None, typer.Option(metavar="A,B,...", help="Upper bounds of the actions.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME,...", help="Columns of a folder: timestamp, unit, action, observation, label."),
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames a second, where the target has a clock.")] = 10.0,
    crf: Annotated[
        int, typer.Option(help="Quality of H.264, 0 to 51, less is better, where the target is video.")
    ] = 18,
    lossless: Annotated[bool, typer.Option("--lossless", help="A lossless codec, where the target takes one.")] = False,
    task: Annotated[str, typer.Option(help="What is done, in words, where the target asks for it.")] = "",
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Note what cannot be read, and go on with the next episode.")
    ] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Refuse a target that is there.")] = False,
    json: Json = False,
) -> None:
    """Convert a dataset from one format to another, and say what could not be carried."""
    from worldloom.cli.console import print_json, print_table, progress, say
    from worldloom.formats import ReadOptions, WriteOptions
    from worldloom.formats import convert as convert_data

    read = ReadOptions.parse(
        {
            "camera": camera,
            "vector": vector,
            "size": None if size is None else size.lower().split("x"),
            "rate": rate,
            "actions": actions,
            "gap": gap,
            "action_low": None if low is None else low.split(","),
            "action_high": None if high is None else high.split(","),
            "columns": {role: str(names) for role, names in key_values(columns, "--columns").items()},
        }
    )
    report = convert_data(
        source,
        target,
        source_format=source_format,
        target_format=target_format,
        read=read,
        write=WriteOptions.parse({"fps": fps, "crf": crf, "lossless": lossless, "task": task}),
        resume=not no_resume,
        skip_damaged=skip_damaged,
        progress=progress(),
    )
    if json:
        print_json(report.to_json())
        return
    say(
        f"{target}: {report.episodes} episodes, {report.frames:,} frames, {report.bytes / 2**20:,.1f} MiB decoded, "
        f"{report.seconds:.1f} s ({report.resumed} episodes were there)"
    )
    if report.notes:
        rows = [[group.kind, str(group.count), group.example] for group in report.groups()]
        print_table("what to know", ["kind", "times", "the first"], rows)
