"""Tables of a run for a terminal, and the same in plain text elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mergeopt.report.summary import Mark, Summary
from mergeopt.task import ObjectiveInfo

__all__ = ["front_tables", "hypervolume_table", "render", "verdict"]

REASONS = 3  # reasons of failures shown, the commonest first
MANY = 24  # points shown when the whole front was not asked for
VALUE, REPORTED, GAP = 8, 15, 2  # characters: a value, a value with its error, the space between columns


def render(summary: Summary, *, width: int, whole: bool = False) -> RenderableType:
    """Return the closing report of a run: its front, how it holds on the report part, and hypervolumes.

    Args:
        summary: of the run.
        width: characters that a line holds.
        whole: show every point of the front, however many there are.
    """
    parts: list[RenderableType] = []
    for table in front_tables(summary, width=width, whole=whole):
        parts.extend([table, Text("")])
    parts.extend(Text(line) for line in verdict(summary))
    if summary.hypervolumes:
        parts.extend([Text(""), hypervolume_table(summary)])
        reference = ", ".join(f"{name} {_number(value)}" for name, value in summary.reference.items())
        parts.append(Text(f"reference point: {reference}", style="dim"))
    return Group(*parts)


def front_tables(summary: Summary, *, width: int, whole: bool = False) -> list[Table]:
    """Return the front and the baselines, one row each: search values, and report values ± one standard error beside them.

    Objectives that do not fit beside each other go into further tables.
    """
    shown = summary.front if whole or len(summary.front) <= MANY else _spread(summary.front, MANY)
    labels = [mark.label for mark in (*shown, *summary.baselines)]
    room = width - max(map(len, labels), default=0) - GAP
    return [_block(summary, block, shown) for block in _blocks(summary.objectives, room)]


def hypervolume_table(summary: Summary) -> Table:
    """Return the hypervolume of the front beside those of the baselines, on both parts."""
    table = _table("hypervolume", "search")
    reported = any(report is not None for _, report in summary.hypervolumes.values()) or any(summary.report_failed.values())
    if reported:
        table.add_column("report", justify="right")
    for name, (search, report) in summary.hypervolumes.items():
        cells = [escape(name), _number(search)]
        if reported:
            failed = summary.report_failed.get(name, 0)
            cells.append(" ".join([*([] if report is None else [_number(report)]), *([f"({failed} failed)"] if failed else [])]))
        table.add_row(*cells, style="bold" if name == "front" else "dim")
    return table


def verdict(summary: Summary) -> list[str]:
    """Return what a reader must know of the front, in plain lines."""
    lines = []
    count = len(summary.front)
    tried = summary.failed + summary.censored + len(summary.trials)
    if summary.censored:
        scored, full = summary.items
        lines.append(
            f"{summary.censored} of {tried} trials were dropped by the race: {scored:,} of {full:,} items scored ({full / scored:.1f} x)"
        )
    if summary.recalled:
        lines.append(f"{summary.recalled} of {tried} trials make the same model as earlier ones and were answered from memory")
    if summary.failed:
        lines.append(f"{summary.failed} of {tried} trials failed")
    lines += [f"  {times} x {reason}" for reason, times in summary.reasons[:REASONS]]
    if not count:
        lines.append("no trial was scored: there is no front")
    elif not summary.feasible:
        lines.append("no trial keeps all constraints; shown are those that break them least")
    if count and summary.still_nondominated is not None and len(summary.objectives) > 1:
        scored = sum(mark.report is not None for mark in summary.front)
        among = f"{count} points" if scored == count else f"the {scored} points that could be scored there"
        lines.append(f"{summary.still_nondominated} of {among} stay mutually non-dominated on the report part, which the search never saw")
    lines += _beaten(summary)
    lines += [flaw.line for flaw in summary.flaws if any((*flaw.front.values(), *flaw.baselines.values()))]
    lines += [f"warning: {warning}" for warning in summary.warnings]
    return lines


def _beaten(summary: Summary) -> list[str]:
    """Say which baselines dominate points of the front."""
    lines = []
    for baseline in summary.baselines:
        count = sum(_dominates(baseline, mark, summary.objectives) for mark in summary.front)
        if count:
            lines.append(f"{count} of {len(summary.front)} points are dominated by {baseline.label} (a longer search or init may help)")
    return lines


def _dominates(better: Mark, worse: Mark, objectives: Sequence[ObjectiveInfo]) -> bool:
    signs = [1.0 if objective.direction == "maximize" else -1.0 for objective in objectives]
    gains = [sign * (better.search[o.name] - worse.search[o.name]) for sign, o in zip(signs, objectives, strict=True)]
    return min(gains) >= 0 and max(gains) > 0


def _blocks(objectives: Sequence[ObjectiveInfo], room: int) -> list[list[ObjectiveInfo]]:
    """Split the objectives so that the columns of each block fit beside each other; a block has at least one."""
    blocks: list[list[ObjectiveInfo]] = []
    left = 0
    for objective in objectives:
        taken = max(len(objective.name) + 2, VALUE) + REPORTED + 2 * GAP
        if not blocks or taken > left:
            blocks.append([])
            left = room
        blocks[-1].append(objective)
        left -= taken
    return blocks


def _block(summary: Summary, objectives: Sequence[ObjectiveInfo], shown: Sequence[Mark]) -> Table:
    reported = any(mark.report is not None or mark.report_error is not None for mark in (*summary.front, *summary.baselines))
    table = _table("front")
    for objective in objectives:
        table.add_column(f"{escape(objective.name)} {_arrow(objective)}\nsearch", justify="right", no_wrap=True)
        if reported:
            table.add_column("\nreport ± s.e.", justify="right", no_wrap=True)
    for mark in shown:
        table.add_row(*_row(mark, objectives, reported=reported))
    if len(shown) < len(summary.front):
        table.add_row(f"{len(summary.front) - len(shown)} more", style="dim")
    if summary.baselines:
        table.add_row()
    for mark in summary.baselines:
        table.add_row(*_row(mark, objectives, reported=reported), style="dim")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _row(mark: Mark, objectives: Sequence[ObjectiveInfo], *, reported: bool) -> list[str]:
    cells = [escape(mark.label)]
    for objective in objectives:
        cells.append(_number(mark.search[objective.name]))
        if reported:
            cells.append(_with_error(mark, objective))
    return cells


def _with_error(mark: Mark, objective: ObjectiveInfo) -> str:
    if mark.report is None:
        return "" if mark.report_error is None else "failed"
    error = mark.error(objective.name, "report")
    value = _number(mark.report[objective.name])
    return value if error is None else f"{value} ± {error:.3f}" if error >= 5e-4 else f"{value} ± {error:.1e}"


def _spread(front: tuple[Mark, ...], count: int) -> tuple[Mark, ...]:
    """Pick points evenly along the front, its two ends included."""
    return tuple(front[round(i * (len(front) - 1) / (count - 1))] for i in range(count))


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 1e-2 <= math.fabs(value) < 1e3 else f"{value:.3g}"


def _arrow(objective: ObjectiveInfo) -> str:
    return "↑" if objective.direction == "maximize" else "↓"
