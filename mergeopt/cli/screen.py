"""Where the command line writes: results to standard output, how work gets on to standard error."""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from mergeopt.study.snapshot import Progress as Standing

__all__ = ["Follow", "errors", "results"]

PAGE = 120  # characters of a line where there is no terminal to ask
STEP = 0.1  # share of the budget between two lines where there is no terminal
NAMESPACES = ("mergeopt", "mergeopt_problems", "mergeopt_strategies")


def results() -> Console:
    """Return the console that results go to."""
    return _console(stderr=False)


def errors() -> Console:
    """Return the console that progress and notes go to."""
    return _console(stderr=True)


class Follow:
    """Shows how a run gets on: a bar on a terminal, a line every tenth of the budget elsewhere. Use as a context.

    Args:
        console: where to.
        label: said once before anything else.
    """

    def __init__(self, console: Console, *, label: str = "") -> None:
        self.console = console
        self._label = label
        self._bar: Progress | None = _bar(console) if console.is_terminal else None
        self._task: TaskID | None = None
        self._phase = ""
        self._told = -1.0

    def __enter__(self) -> Follow:
        handler: logging.Handler = (
            RichHandler(console=self.console, show_time=False, show_level=False, show_path=False)
            if self._bar is not None
            else logging.StreamHandler(sys.stderr)
        )
        self._handler = handler
        for name in NAMESPACES:
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.INFO)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        for name in NAMESPACES:
            logging.getLogger(name).removeHandler(self._handler)

    def __call__(self, standing: Standing) -> None:
        """Show where the run stands."""
        if self._label:
            self.console.print(f"{self._label}:")
            self._label = ""
        if self._bar is not None:
            self._draw(self._bar, standing)
            return
        share = _share(standing)
        step = standing.phase in ("search", "learning") and (share >= self._told + STEP or (share == 1.0 and self._told < 1.0))
        if standing.phase != self._phase or step:
            self._phase, self._told = standing.phase, share
            self.console.print(_line(standing), highlight=False, soft_wrap=True)

    def _draw(self, bar: Progress, standing: Standing) -> None:
        if self._task is None:
            self._task = bar.add_task("", total=standing.budget, completed=standing.evaluations, detail="")
            bar.start()
        bar.update(self._task, completed=standing.evaluations, total=standing.budget, description=standing.phase, detail=_detail(standing))


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _line(standing: Standing) -> str:
    if standing.phase == "learning":
        return f"{standing.phase}: {_steps(standing)}, {standing.seconds:.1f} s"
    if standing.phase != "search":
        return f"{standing.phase} ({standing.seconds:.1f} s)"
    return f"{standing.phase}: {standing.evaluations}/{standing.budget} evaluations, {_detail(standing)}, {standing.seconds:.1f} s"


def _share(standing: Standing) -> float:
    """Return how far the phase has come, from 0 to 1."""
    if standing.phase == "learning":
        return standing.gradient_steps / max(1, standing.gradient_budget or 1)
    return standing.evaluations / standing.budget


def _steps(standing: Standing) -> str:
    of = "" if standing.gradient_budget is None else f"/{standing.gradient_budget}"
    return f"{standing.gradient_steps}{of} gradient steps"


def _detail(standing: Standing) -> str:
    if standing.phase == "learning":
        return _steps(standing)
    parts = [] if standing.hypervolume is None else [f"hypervolume {standing.hypervolume:.4f}"]
    counts = ((standing.failed, "failed"), (standing.censored, "dropped"), (standing.cached, "repeated"), (standing.recalled, "recalled"))
    parts += [f"{count} {what}" for count, what in counts if count]
    if standing.censored:
        parts.append(f"{standing.items / standing.items_in_full:.0%} of items scored")
    return ", ".join(parts) or "no front yet"


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PAGE
    return Console(stderr=stderr, width=width, highlight=False)
