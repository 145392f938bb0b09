"""The commands and their options; each body lies in a module of its own and is imported when it is called."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    name="mergeopt",
    help="Search for model merges under several objectives, keep every trial, and export any point of the front.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run, as `mergeopt run` printed it.", show_default=False)]
Head = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where heads are separate: the expert whose head to write, or `all` for a folder each.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON of a stable shape instead.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mergeopt {version('mergeopt')}")
        raise typer.Exit


@app.callback()
def _main(
    _shown: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors; may stand anywhere.")] = False,
) -> None:
    """Search for model merges under several objectives, keep every trial, and export any point of the front."""


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the file's `out`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search, instead of the file's.")] = None,
    budget: Annotated[int | None, typer.Option(help="Candidates to evaluate, instead of the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N, instead of the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder; a larger budget extends it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search as a run file says, then print the front."""
    from mergeopt.cli.search import run_search

    overrides = {"out": None if out is None else str(out), "seed": seed, "budget": budget, "device": device}
    run_search(file, overrides, resume=resume, as_json=as_json)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)],
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N, instead of the file's.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load the models and score two candidates, to say the time, too.")] = False,
) -> None:
    """Say what a run file would search and what memory it would take; search nothing."""
    from mergeopt.cli.search import check_run_file

    check_run_file(file, {"device": device}, measure=measure)


@app.command()
def merge(
    file: Annotated[Path, typer.Argument(help="Merge file (YAML), or a recipe (JSON).", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.", show_default=False)],
    places: Annotated[list[str] | None, typer.Option("--map", metavar="NAME=PATH", help="Where a source of a recipe lies now.")] = None,
    operator: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="The operator of a recipe, where no installed package registers it.")
    ] = None,
    head: Head = None,
) -> None:
    """Make one merge, without a search."""
    from mergeopt.cli.models import merge_one

    merge_one(file, out, places or [], operator, head)


@app.command()
def front(
    folder: RunFolder,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the front into this file (png, pdf or svg).")] = None,
) -> None:
    """Print the front of a run, finished or not."""
    from mergeopt.cli.search import show_front

    show_front(folder, as_json=as_json, plot=plot)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a learned set (RUN/learned/...).", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder to write the model to.", show_default=False)],
    trial: Annotated[int | None, typer.Option(help="Export this trial.")] = None,
    prefer: Annotated[
        str | None, typer.Option(metavar="A=.7,B=.3", help="Export the point of the front nearest these preferences.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="A>=.8", help="Export a point of the front that meets this; needs --best; may be repeated.")
    ] = None,
    best: Annotated[str | None, typer.Option(metavar="B", help="With --where: the objective that decides among those.")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="Export the knee of the front.")] = False,
    head: Head = None,
) -> None:
    """Write one candidate of a run, or the model of a learned set for a preference, as a model folder."""
    from mergeopt.cli.models import Choice, export_one

    export_one(folder, to, Choice(trial=trial, prefer=prefer, where=tuple(where or ()), best=best, knee=knee), head)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="operators, strategies, problems, tasks or metrics.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Name what is registered; operators with their parameters."""
    from mergeopt.cli.listing import show

    show(kind, as_json=as_json)
