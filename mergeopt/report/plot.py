"""Pictures of a front: how the search went (1 objective), the front (2), its pairwise projections (3 to 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mergeopt.errors import ConfigError
from mergeopt.report.summary import Mark, Summary
from mergeopt.task import ObjectiveInfo, Part

__all__ = ["MOST_OBJECTIVES", "draw"]

MOST_OBJECTIVES = 6
CROWD = 20  # points of a front from which on their error bars are told in the legend only
FORMATS = (".png", ".pdf", ".svg")
Values = npt.NDArray[np.float64]

# Okabe and Ito's palette, told apart with any kind of colour vision; shape and filling say the same a second time.
TRIAL, FRONT, REPORT = "#8c8c8c", "#0072B2", "#D55E00"
BASELINES = ("#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5200")
SHAPES = ("s", "^", "v", "D", "P", "X", "<", ">")


def draw(summary: Summary, to: Path) -> None:
    """Draw a run and write the picture; the file's ending says the format (png, pdf, svg).

    Args:
        summary: of the run.
        to: file to write; its folder is made where it is missing.

    Raises:
        ConfigError: more than six objectives, nothing was scored, or an unknown ending.
    """
    count = len(summary.objectives)
    if to.suffix.lower() not in FORMATS:
        raise ConfigError(f"expected a picture file ending in {', '.join(FORMATS)}, got {to.name!r}")
    if count > MOST_OBJECTIVES:
        raise ConfigError(f"a picture shows at most {MOST_OBJECTIVES} objectives, the run has {count}; see `mergeopt front RUN_DIR --json`")
    if not summary.front:
        raise ConfigError(f"there is nothing to draw: no trial of {summary.folder} was scored and feasible")
    figure = {1: _history, 2: _plane}.get(count, _projections)(summary)
    to.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(to, dpi=150, metadata={"Date": None} if to.suffix == ".svg" else None)


def _history(summary: Summary) -> Figure:
    """Draw the value of every trial and the best so far, against the number of trials."""
    objective = summary.objectives[0]
    figure, ax = _sheet(summary, width=8.4)
    values = np.array([mark.search[objective.name] for mark in summary.trials])
    order = np.arange(1, len(values) + 1)
    best = np.maximum.accumulate(values) if objective.direction == "maximize" else np.minimum.accumulate(values)
    ax.scatter(order, values, s=14, color=TRIAL, alpha=0.45, linewidths=0)
    ax.step(order, best, where="post", color=FRONT, linewidth=2)
    winner = summary.front[0]
    place = next((i for i, mark in enumerate(summary.trials) if mark.trial == winner.trial), len(values) - 1) + 1
    ax.plot([place], [winner.search[objective.name]], "o", color=FRONT, markersize=7)
    if winner.report is not None:
        error = _error(winner, objective, "report")
        ax.errorbar([place], [winner.report[objective.name]], yerr=[error], **_report_style())
    handles = [_key("o", TRIAL, "trial (search)", faint=True), Line2D([], [], color=FRONT, linewidth=2, label="best so far (search)")]
    for i, mark in enumerate(summary.baselines):
        ax.axhline(mark.search[objective.name], color=_colour(i), linestyle=(0, (4, 2)), linewidth=1.2)
        handles.append(Line2D([], [], color=_colour(i), linestyle=(0, (4, 2)), linewidth=1.2, label=f"{mark.label} (search)"))
    ax.set_xlabel("trials")
    ax.set_ylabel(_axis(objective))
    return _finish(figure, handles + _report_keys(summary))


def _plane(summary: Summary) -> Figure:
    """Draw two objectives against each other, the front as the staircase of what it dominates."""
    first, second = summary.objectives
    figure, ax = _sheet(summary, width=8.4)
    _scatter(ax, summary, first, second)
    points = sorted((mark.search[first.name], mark.search[second.name]) for mark in summary.front)
    # Between two neighbours the dominated region ends at the worse value of each.
    where = "pre" if first.direction == "maximize" else "post"
    ax.step(*zip(*points, strict=True), where=where, color=FRONT, linewidth=1.2, alpha=0.8, zorder=3)  # type: ignore[arg-type]
    ax.set_xlabel(_axis(first))
    ax.set_ylabel(_axis(second))
    return _finish(figure, _keys(summary))


def _projections(summary: Summary) -> Figure:
    """Draw every pair of objectives in a panel of its own, the legend in the empty upper corner."""
    count = len(summary.objectives)
    side = {3: 4.2, 4: 3.2}.get(count, 2.5)
    figure = Figure(figsize=(side * (count - 1) + 0.6, side * (count - 1) + 0.6), layout="constrained")
    figure.suptitle(_title(summary), fontsize=11)
    grid = figure.subplots(count - 1, count - 1, squeeze=False, sharex="col", sharey="row")
    for row in range(count - 1):
        for column in range(count - 1):
            ax = grid[row, column]
            if column > row:
                ax.set_axis_off()
                continue
            _frame(ax)
            _scatter(ax, summary, summary.objectives[column], summary.objectives[row + 1])
            if row == count - 2:
                ax.set_xlabel(_axis(summary.objectives[column]), fontsize=9)
            if column == 0:
                ax.set_ylabel(_axis(summary.objectives[row + 1]), fontsize=9)
    grid[0, 1].legend(handles=_keys(summary), loc="upper left", fontsize=9, frameon=False, borderaxespad=0.2)
    return figure


def _scatter(ax: Axes, summary: Summary, x: ObjectiveInfo, y: ObjectiveInfo) -> None:
    trials = _points(summary.trials, x, y)
    ax.scatter(trials[:, 0], trials[:, 1], s=14, color=TRIAL, alpha=0.35, linewidths=0, zorder=1)
    for mark in summary.front:
        if mark.report is None:
            continue
        here, there = (mark.search[x.name], mark.search[y.name]), (mark.report[x.name], mark.report[y.name])
        errors: dict[str, Any] = {}
        if not _crowded(summary):
            ax.plot(*zip(here, there, strict=True), color=REPORT, linewidth=0.7, alpha=0.35, zorder=2)
            errors = {"xerr": [_error(mark, x, "report")], "yerr": [_error(mark, y, "report")]}
        ax.errorbar([there[0]], [there[1]], **errors, **_report_style(alpha=_fade(summary)))
    front = _points(summary.front, x, y)
    ax.scatter(front[:, 0], front[:, 1], s=30, color=FRONT, linewidths=0, zorder=4)
    for i, mark in enumerate(summary.baselines):
        style: dict[str, Any] = {"marker": SHAPES[i % len(SHAPES)], "s": 62, "edgecolors": "white", "linewidths": 0.8, "zorder": 5}
        ax.scatter([mark.search[x.name]], [mark.search[y.name]], color=_colour(i), **style)


def _sheet(summary: Summary, *, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 5.2), layout="constrained")
    ax = figure.subplots()
    ax.set_title(_title(summary), fontsize=11, loc="left")
    _frame(ax)
    return figure, ax


def _frame(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.margins(0.06)


def _finish(figure: Figure, handles: Sequence[Line2D]) -> Figure:
    figure.legend(handles=list(handles), loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _keys(summary: Summary) -> list[Line2D]:
    marks = [_key(SHAPES[i % len(SHAPES)], _colour(i), f"{mark.label} (search)") for i, mark in enumerate(summary.baselines)]
    return [_key("o", TRIAL, "trial (search)", faint=True), _key("o", FRONT, "front (search)"), *_report_keys(summary), *marks]


def _report_keys(summary: Summary) -> list[Line2D]:
    if all(mark.report is None for mark in summary.front):
        return []
    what = "best" if len(summary.objectives) == 1 else "front"
    label = f"{what} on the report part,\n± one standard error"
    if _crowded(summary):
        known = [error for mark in summary.front for o in summary.objectives if (error := mark.error(o.name, "report")) is not None]
        label = f"{what} on the report part" + (f"\n(median standard error {np.median(known):.2g})" if known else "")
    return [Line2D([], [], marker="o", linestyle="none", markerfacecolor="white", markeredgecolor=REPORT, markersize=6, label=label)]


def _key(marker: str, color: str, label: str, *, faint: bool = False) -> Line2D:
    return Line2D(
        [], [], marker=marker, linestyle="none", color=color, alpha=0.5 if faint else 1.0, markersize=4 if faint else 6, label=label
    )


def _report_style(*, alpha: float = 1.0) -> dict[str, Any]:
    return {
        "fmt": "o",
        "markersize": 5,
        "markerfacecolor": "white",
        "markeredgecolor": REPORT,
        "ecolor": REPORT,
        "elinewidth": 0.9,
        "alpha": alpha,
        "zorder": 2.5,
    }


def _crowded(summary: Summary) -> bool:
    """Return whether error bars would hide what they belong to."""
    return len(summary.front) > CROWD


def _fade(summary: Summary) -> float:
    return 0.9 if len(summary.front) <= 12 else 0.6


def _points(marks: Sequence[Mark], x: ObjectiveInfo, y: ObjectiveInfo) -> Values:
    return np.array([(mark.search[x.name], mark.search[y.name]) for mark in marks], dtype=np.float64).reshape(-1, 2)


def _error(mark: Mark, objective: ObjectiveInfo, part: Part) -> float:
    return mark.error(objective.name, part) or 0.0


def _colour(i: int) -> str:
    return BASELINES[i % len(BASELINES)]


def _axis(objective: ObjectiveInfo) -> str:
    return f"{objective.name} ({'higher' if objective.direction == 'maximize' else 'lower'} is better)"


def _title(summary: Summary) -> str:
    scored, front = len(summary.trials), len(summary.front)
    what = "best of" if len(summary.objectives) == 1 else f"front of {front} among"
    return f"{summary.name}: {what} {scored} scored trials"
