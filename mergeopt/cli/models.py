"""`mergeopt merge` and `mergeopt export`: what writes model folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from mergeopt.cli.screen import Follow, errors
from mergeopt.config import RunFile, load_operator
from mergeopt.errors import ConfigError
from mergeopt.learned import DESCRIPTION
from mergeopt.study.export import ExportReport
from mergeopt.study.front import FrontPoint
from mergeopt.study.merge import merge_file, merge_recipe
from mergeopt.study.run import Run

__all__ = ["Choice", "export_one", "merge_one", "pairs"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which candidate of a run is meant: exactly one of a trial, preferences, conditions, or the knee.

    Args:
        trial: number of a trial, on the front or not.
        prefer: `a=.7,b=.3`.
        where: conditions such as `a>=.8`.
        best: objective that decides among the points that meet the conditions.
        knee: the knee of the front.
    """

    trial: int | None = None
    prefer: str | None = None
    where: tuple[str, ...] = ()
    best: str | None = None
    knee: bool = False

    def check(self) -> None:
        """Raise `ConfigError` unless exactly one way of choosing was given."""
        given = [
            name
            for name, there in (
                ("--trial", self.trial is not None),
                ("--prefer", self.prefer is not None),
                ("--where", bool(self.where)),
                ("--knee", self.knee),
            )
            if there
        ]
        if len(given) != 1:
            raise ConfigError(f"expected one of --trial, --prefer, --where or --knee, got {' and '.join(given) or 'none'}")
        if bool(self.where) != (self.best is not None):
            raise ConfigError("--where and --best go together: conditions that a point must meet, and the objective that then decides")

    def of(self, run: Run) -> FrontPoint:
        """Return the candidate meant.

        Raises:
            ConfigError: there is no such trial or objective, nothing meets the conditions, or the front is empty.
        """
        self.check()
        if self.trial is not None:
            return run.point(self.trial)
        if self.prefer is not None:
            return run.front.pick(_preferences(self.prefer))
        if self.best is not None:
            return run.front.where(self.where, best=self.best)
        return run.front.knee()


def export_one(folder: Path, to: Path, choice: Choice, head: str | None = None) -> None:
    """Write a candidate of a run, or a preference's model of a learned set, as a model folder; say what it scores after reloading.

    Args:
        folder: of the run, or of the learned set.
        to: folder to write.
        choice: which candidate; a learned set knows preferences only.
        head: where heads are separate, the expert whose head to write, `all` for a folder each; None where there is but one.

    Raises:
        UserError: there is no such run or candidate, or the folder is taken.
        ExportError: the reloaded model scores something else than what the store says.
    """
    choice.check()
    if (folder / DESCRIPTION).is_file():
        typer.echo(_told(_export_learned(folder, to, choice, head)))
        return
    run = Run.open(folder)
    point = choice.of(run)
    with Follow(errors()):
        report = point.export(to, head)
    typer.echo(f"trial {point.trial}: {_told(report)}")
    if point.report_error is not None:
        typer.echo(f"  it could not be scored on the report part: {point.report_error}")
    if not point.feasible:
        typer.echo("  it breaks a constraint of the search")
    for name, value in report.scores.items():
        typer.echo(f"  {name}  {value:.6g} reloaded, {report.promised[name]:.6g} stored")
    if report.unscored is not None:
        typer.echo(f"  not scored again: {report.unscored}; what was written has been read back and compared")
    if report.scores:
        typer.echo("  equal bit for bit" if report.exact else "  equal up to rounding")


def _export_learned(folder: Path, to: Path, choice: Choice, head: str | None) -> ExportReport:
    from mergeopt.study.learned_front import LearnedFront

    if choice.prefer is None:
        raise ConfigError(f"{folder} is a learned set, which has a model for every preference; say which with --prefer A=.7,B=.3")
    return LearnedFront(folder).export(_preferences(choice.prefer), to, head)


def _preferences(text: str) -> dict[str, float]:
    return {name: _number("--prefer", name, value) for name, value in pairs([text], "--prefer").items()}


def merge_one(file: Path, out: Path, places: Sequence[str], operator: str | None = None, head: str | None = None) -> None:
    """Make the model of a merge file or of a recipe and write it as a folder.

    Args:
        file: merge file (YAML), or recipe (JSON).
        out: folder to write; it must not exist, or be empty.
        places: `NAME=PATH`, where sources of a recipe lie now.
        operator: `FILE.py:NAME`, the operator of a recipe that no installed package registers.
        head: where heads are separate, whose to write, `all` for a folder each; None for the one that a recipe names, or the only one.

    Raises:
        UserError: the file, its sources or the folder cannot be used.
    """
    moved = pairs(places, "--map")
    if file.suffix.lower() == ".json":
        report = merge_recipe(file, out, moved, None if operator is None else load_operator(operator, Path()), head)
    elif moved or operator is not None:
        raise ConfigError("--map and --operator are for recipes; edit the merge file instead")
    else:
        report = merge_file(RunFile.load(file), file.parent, out, head)
    typer.echo(_told(report))


def _told(report: ExportReport) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in report.coverage.items() if count)
    return f"written to {report.folder} (tensors: {counts})"


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Return what `NAME=VALUE,NAME=VALUE` says, by name.

    Raises:
        ConfigError: a pair lacks its name or its value, or a name stands twice.
    """
    found: dict[str, str] = {}
    for pair in (pair.strip() for text in texts for pair in text.split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            raise ConfigError(f"{option}: expected NAME=VALUE, got {pair!r}")
        if name in found:
            raise ConfigError(f"{option}: {name!r} stands twice")
        found[name] = value
    return found


def _number(option: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{option}: expected a number for {name!r}, got {text!r}") from error
