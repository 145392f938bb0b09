"""What others may read while a run goes on: `status.json`, `front.json` and the progress callback."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeopt.strategy import Budget, Status
from mergeopt.study.database import database_errors
from mergeopt.study.front import Front, FrontPoint, hypervolume
from mergeopt.study.trial import Trial, items_scored, losses, recalled, to_natural
from mergeopt.task import ObjectiveInfo, Part

__all__ = ["Progress", "Publisher", "front_json", "held_out", "report_warnings", "search_front"]

FORMAT = 1
INTERVAL = 1.0  # seconds between two writes, at least
SHARE = 0.05  # of the run's time that writing may take


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands.

    Args:
        phase: `baselines`, `starting points`, `search`, `report` or `done`.
        evaluations: units of the budget spent.
        budget: units there are.
        cached: exact duplicates answered from the store, not charged.
        failed: charged candidates that failed.
        censored: charged candidates that a race dropped.
        recalled: candidates that make the same model as earlier ones and were answered from memory; charged like any other.
        items: on which candidates were scored, over all objectives.
        items_in_full: that full scorings would have taken.
        gradient_steps: taken by a strategy that learns.
        gradient_budget: gradient steps there are, None where nothing was said.
        best: objective name -> best search value so far, natural direction.
        hypervolume: of the front so far, about a second old at most; None while unknown.
        seconds: since this process began to work on the run.
    """

    phase: str
    evaluations: int
    budget: int
    cached: int
    failed: int
    best: Mapping[str, float] = field(default_factory=dict)
    hypervolume: float | None = None
    seconds: float = 0.0
    gradient_steps: int = 0
    gradient_budget: int | None = None
    censored: int = 0
    recalled: int = 0
    items: int = 0
    items_in_full: int = 0


class Publisher:
    """Tells the callback of every step, and renames fresh files into place about once a second.

    Args:
        folder: of the run.
        objectives: of the problem.
        budget: of the run.
        progress: called with every step; None to tell nobody.
    """

    def __init__(
        self, folder: Path, objectives: Sequence[ObjectiveInfo], budget: Budget, progress: Callable[[Progress], None] | None
    ) -> None:
        self._folder = folder
        self._objectives = tuple(objectives)
        self._budget = budget
        self._progress = progress
        self._began = time.monotonic()
        self._next = 0.0
        self._hypervolume: float | None = None

    def publish(
        self,
        trials: Sequence[Trial],
        reference: Sequence[float] | None,
        phase: str,
        state: str,
        *,
        gradient_steps: int = 0,
        force: bool = False,
    ) -> None:
        """Tell where the run stands.

        Args:
            trials: all so far.
            reference: of the hypervolume, None while unknown.
            phase: for people.
            state: `running`, `interrupted` or `finished`.
            gradient_steps: taken so far.
            force: write the files now, however recent they are.
        """
        now = time.monotonic()
        due = force or now >= self._next
        if due:
            front = search_front(trials, self._objectives, reference)
            self._hypervolume = front.hypervolume()
        if not due and self._progress is None:
            return
        progress = self._measure(trials, phase, gradient_steps)
        if due:
            self._write("status.json", {"state": state, "pid": os.getpid(), **_plain(progress)})
            self._write("front.json", front_json(trials, self._objectives, reference))
            self._next = time.monotonic() + max(INTERVAL, (time.monotonic() - now) / SHARE)
        if self._progress is not None:
            self._progress(progress)

    def _measure(self, trials: Sequence[Trial], phase: str, gradient_steps: int) -> Progress:
        charged = [trial for trial in trials if trial.charged]
        rows = [row for row in (trial.vector(self._objectives) for trial in charged if trial.ok) if row is not None]
        best = to_natural(losses(rows, self._objectives).min(axis=0), self._objectives).tolist() if rows else []
        items, in_full = items_scored(trials, self._objectives)
        return Progress(
            phase=phase,
            evaluations=len(charged),
            budget=self._budget.evaluations,
            cached=sum(trial.kind != "baseline" and not trial.charged for trial in trials),
            failed=sum(trial.status is Status.FAILED for trial in charged),
            censored=sum(trial.status is Status.CENSORED for trial in charged),
            recalled=recalled(trials),
            items=items,
            items_in_full=in_full,
            best={objective.name: value for objective, value in zip(self._objectives, best, strict=False)},
            hypervolume=self._hypervolume,
            seconds=time.monotonic() - self._began,
            gradient_steps=gradient_steps,
            gradient_budget=self._budget.gradient_steps,
        )

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        """Write to a temporary file and rename it, so that a reader sees the old one or the new one, never half of one."""
        temporary = self._folder / f".{name}.new"
        with database_errors(self._folder):
            temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(self._folder / name)


def search_front(trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> Front:
    """Return the front of what was charged to the budget; baselines are what it is held against, not part of it."""
    return Front.of_trials([trial for trial in trials if trial.charged], objectives, reference)


def held_out(trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> list[Trial]:
    """Return the trials that are to be scored on the report part: scored baselines and the front's members."""
    front = {point.trial for point in search_front(trials, objectives, reference).points}
    return [trial for trial in trials if trial.ok and (trial.kind == "baseline" or trial.number in front)]


def report_warnings(trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> list[str]:
    """Return what to say of baselines and members of the front that could not be scored on the report part; nothing where all were."""
    wanted = held_out(trials, objectives, reference)
    sets = {"points of the front": [t for t in wanted if t.charged], "baselines": [t for t in wanted if t.kind == "baseline"]}
    counts = {what: (sum(trial.report_error is not None for trial in own), len(own)) for what, own in sets.items()}
    told = " and ".join(f"{failed} of {count} {what}" for what, (failed, count) in counts.items() if failed)
    if not told:
        return []
    reason, times = Counter(trial.report_error for trial in wanted if trial.report_error is not None).most_common(1)[0]
    return [f"{told} could not be scored on the report part, {times} with: {reason}; resuming the run tries them again"]


def front_json(trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> dict[str, Any]:
    """Return the front as JSON-able data; its shape is a stable interface.

    `baselines` holds every scored baseline by name and, under `experts`, all baselines named `expert:...` together: their joint
    hypervolume, the best of them per objective, and their names as `members`. Of a set, `report_failed` members could not be scored on
    the report part: its report values are those of the others. `report_error` of a point or baseline says why, and `warnings` sums up.
    """
    front = search_front(trials, objectives, reference)
    return {
        "version": FORMAT,
        "objectives": [{"name": objective.name, "direction": objective.direction} for objective in objectives],
        "reference": None if reference is None else list(reference),
        "feasible": front.feasible,
        "hypervolume": front.hypervolume(),
        "report_hypervolume": front.hypervolume("report"),
        "report_failed": sum(point.report_error is not None for point in front.points),
        "baselines": _baselines(trials, objectives, reference),
        "points": [_point(point, front.names) for point in front.points],
        "warnings": report_warnings(trials, objectives, reference),
    }


def _baselines(trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> dict[str, Any]:
    scored = [trial for trial in trials if trial.kind == "baseline" and trial.ok]
    found: dict[str, Any] = {
        trial.name: {"trial": trial.number, **_group([trial], objectives, reference), "report_error": trial.report_error}
        for trial in scored
    }
    experts = [trial for trial in scored if trial.name.startswith("expert:")]
    if experts and "experts" not in found:
        found["experts"] = {"members": [trial.name for trial in experts], **_group(experts, objectives, reference)}
    return found


def _group(trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo], reference: Sequence[float] | None) -> dict[str, Any]:
    data: dict[str, Any] = {"report_failed": sum(trial.report_error is not None for trial in trials)}
    parts: tuple[tuple[Part, str], ...] = (("search", "hypervolume"), ("report", "report_hypervolume"))
    for part, key in parts:
        rows = [row for row in (trial.vector(objectives, part) for trial in trials) if row is not None]
        volume = None if reference is None or not rows else hypervolume([row.tolist() for row in rows], objectives, reference)
        best = to_natural(losses(rows, objectives).min(axis=0), objectives).tolist() if rows else None
        data[key] = volume
        data[part] = None if best is None else {objective.name: value for objective, value in zip(objectives, best, strict=True)}
    return data


def _point(point: FrontPoint, names: Sequence[str]) -> dict[str, Any]:
    return {
        "trial": point.trial,
        "search": {name: point.values[name] for name in names},
        "report": None if point.report is None else {name: point.report[name] for name in names},
        "report_error": point.report_error,
        "standard_errors": {part: {name: errors[name] for name in names} for part, errors in point.standard_errors.items()},
        "recipe": None if point.recipe is None else point.recipe.to_json(),
        "genome": None if point.genome is None else point.genome.tolist(),
    }


def _plain(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in Progress.__slots__}
