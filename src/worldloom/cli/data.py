"""`worldloom data`: inspect, validate, preview and convert datasets."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, progress, table, values_table
from worldloom.cli.options import Json, PictureAxes, PictureRange, picture_options
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import require_writable

app = typer.Typer(help="Inspect, validate, preview and convert datasets.", no_args_is_help=True)
Dataset = Annotated[Path, typer.Argument(help="The directory of the dataset.")]


@app.command()
def inspect(path: Dataset, json: Json = False) -> None:
    """Show what a dataset contains."""
    from worldloom.data import EpisodeDataset, inspect

    summary = inspect(EpisodeDataset.open(path), progress=progress())
    answer(json, summary, values_table(str(path), summary))


@app.command()
def validate(path: Dataset, json: Json = False) -> None:
    """Check every episode; the exit code is 3 if anything is wrong."""
    from worldloom.data import validate

    problems = [asdict(problem) for problem in validate(path, progress=progress())]
    rows = [list(problem.values()) for problem in problems]
    found = table(f"{len(problems)} problems in {path}", ["where", "what", "remedy"], rows)
    answer(json, problems, found if problems else f"{path}: no problem found")
    if problems:
        raise typer.Exit(DataError.exit_code)


@app.command()
def preview(
    path: Dataset,
    out: Annotated[Path | None, typer.Option(help="The folder to write to; by default, the dataset's folder.")] = None,
    json: Json = False,
) -> None:
    """Write a contact sheet (PNG) and a video (MP4) of a dataset."""
    from worldloom.data import EpisodeDataset, contact_sheet, video

    dataset, target = EpisodeDataset.open(path), out or path.parent
    sheet, film = target / f"{path.name}.png", target / f"{path.name}.mp4"
    require_writable(sheet)
    contact_sheet(dataset, sheet)
    video(dataset, film, progress=progress())
    answer(json, {"contact_sheet": sheet, "video": film}, f"wrote {sheet}", f"wrote {film}")


@app.command()
def formats(json: Json = False) -> None:
    """List the formats that worldloom converts, and what each can do."""
    from worldloom.formats import FORMATS

    columns = ("name", "writable", "lossless_pixels", "description")
    found = [{column: getattr(FORMATS[name], column) for column in columns} for name in FORMATS]
    rows = [[{True: "yes", False: "no"}.get(value, value) for value in each.values()] for each in found]
    answer(json, found, table("formats", ["name", "writable", "lossless pixels", "description"], rows))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The dataset to read.")],
    target: Annotated[Path, typer.Argument(help="The path to write; run the same command again to resume.")],
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="The source's format; detected by default.")
    ] = None,
    target_format: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The target's format.")] = "worldloom",
    camera: Annotated[
        str | None, typer.Option(help="The image key, if there are several; 'none' for no images.")
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(help="A column of the observation vector, in order; by default, all numeric columns."),
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Resize frames, by area averaging.")] = None,
    picture_axes: PictureAxes = None,
    picture_range: PictureRange = None,
    rate: Annotated[float | None, typer.Option(help="Steps per second; by default, the camera's rate.")] = None,
    actions: Annotated[
        str,
        typer.Option(help="For logs faster than the frames: hold takes the action at the frame, mean averages."),
    ] = "hold",
    gap: Annotated[float, typer.Option(help="Split an episode at gaps longer than this many median periods.")] = 4.0,
    pair: Annotated[
        str | None,
        typer.Option(
            metavar="time|number",
            help="Pair frames and rows of the log by time or by number, if the results differ.",
        ),
    ] = None,
    low: Annotated[str | None, typer.Option(metavar="A,B,...", help="Lower bounds of the actions.")] = None,
    high: Annotated[str | None, typer.Option(metavar="A,B,...", help="Upper bounds of the actions.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME,...",
            help="The columns of a role: action, choice (a discrete action), observation, label or camera; for a "
            "folder also timestamp and unit.",
        ),
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second, for targets with a clock.")] = 10.0,
    crf: Annotated[int, typer.Option(help="Quality of H.264 for video targets, from 0 (best) to 51.")] = 18,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Use a lossless codec, if the target supports one.")
    ] = False,
    task: Annotated[str, typer.Option(help="A description of the task, for targets that store it.")] = "",
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Skip episodes that cannot be read, with a note in the report.")
    ] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Fail if the target exists.")] = False,
    json: Json = False,
) -> None:
    """Convert a dataset from one format to another, and report what the target cannot store."""
    from worldloom.formats import ReadOptions, WriteOptions
    from worldloom.formats import convert as convert_data

    read = ReadOptions.parse(
        {
            "camera": camera,
            "vector": vector,
            "size": None if size is None else size.lower().split("x"),
            "pictures": picture_options(picture_axes, picture_range),
            "rate": rate,
            "actions": actions,
            "gap": gap,
            "pair": pair,
            "action_low": None if low is None else low.split(","),
            "action_high": None if high is None else high.split(","),
            "columns": _roles(columns),
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
    summary = (
        f"{target}: {report.episodes} episodes, {report.frames:,} frames, {report.bytes / 2**20:,.1f} MiB decoded, "
        f"{report.seconds:.1f} s ({report.resumed} episodes were converted before)"
    )
    rows = [[group.kind, str(group.count), group.example] for group in report.groups()]
    notes = [table("notes", ["kind", "count", "first example"], rows)] if rows else []
    answer(json, report.to_json(), summary, *notes)


def _roles(assignments: list[str] | None) -> dict[str, str]:
    """Return the columns of each role; a role that is named several times has the columns of all."""
    columns: dict[str, str] = {}
    for assignment in assignments or []:
        role, equals, names = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--columns {assignment!r} has no '='; expected ROLE=NAME,NAME")
        columns[role] = f"{columns[role]},{names}" if role in columns else names
    return columns
