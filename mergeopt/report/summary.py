"""All that a table or a picture says of a run, as plain data in natural directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeopt.report.flaws import Flaw, flaws
from mergeopt.strategy import Status
from mergeopt.study.run import Run
from mergeopt.study.trial import Trial, recalled
from mergeopt.task import ObjectiveInfo, Part

__all__ = ["RANDOM", "Mark", "Summary", "summarise"]

RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Mark:
    """One scored candidate.

    Args:
        label: for people, `trial 17` or the name of a baseline.
        trial: its number in the run.
        search: objective name -> value on the search part.
        report: objective name -> value on the report part; None where it was not scored there.
        standard_errors: part -> objective name -> standard error over items; None where unknown.
        report_error: why it could not be scored on the report part, None where it was or nobody tried.
    """

    label: str
    trial: int
    search: Mapping[str, float]
    report: Mapping[str, float] | None = None
    standard_errors: Mapping[Part, Mapping[str, float | None]] = field(default_factory=dict)
    report_error: str | None = None

    def error(self, objective: str, part: Part) -> float | None:
        """Return the standard error of one value, None when unknown."""
        return self.standard_errors.get(part, {}).get(objective)


@dataclass(frozen=True, slots=True)
class Summary:
    """A run, ready to be shown.

    Args:
        name: of the problem.
        folder: of the run.
        objectives: in order.
        trials: scored candidates in order of their numbers, baselines left out.
        failed: how many candidates could not be scored.
        reasons: why, the commonest first, with how many trials each; baselines count here too.
        front: ordered best first in the first objective.
        feasible: whether the front keeps all constraints.
        baselines: in the problem's order.
        reference: point that bounds the hypervolume, by objective name; empty when it is not known.
        hypervolumes: name -> (search, report), the front first, then each baseline and set of baselines.
        still_nondominated: points of the front that are non-dominated on the report part among those that could be scored there; None where
            none was.
        warnings: what the data and the strategy had to say about the search, and whose outputs are flawed more or less than others'.
        flaws: how often outputs are flawed.
        recalled: how many candidates make the same model as earlier ones and were answered from memory.
        censored: how many candidates a race dropped before they were scored in full.
        items: on how many items candidates were scored, over all objectives, and how many full scorings would have taken.
        report_failed: name of a hypervolume -> how many members of its set could not be scored on the report part; the others count.
    """

    name: str
    folder: Path
    objectives: tuple[ObjectiveInfo, ...]
    trials: tuple[Mark, ...]
    failed: int
    reasons: tuple[tuple[str, int], ...]
    front: tuple[Mark, ...]
    feasible: bool
    baselines: tuple[Mark, ...]
    reference: Mapping[str, float]
    hypervolumes: Mapping[str, tuple[float, float | None]]
    still_nondominated: int | None
    warnings: tuple[str, ...] = ()
    flaws: tuple[Flaw, ...] = ()
    recalled: int = 0
    censored: int = 0
    items: tuple[int, int] = (0, 0)
    report_failed: Mapping[str, int] = field(default_factory=dict)


def summarise(run: Run, random: Run | None = None) -> Summary:
    """Return what there is to show of a run, however far it came.

    Args:
        run: as stored.
        random: a random search of the same problem and budget, to hold the run against.
    """
    data = run.front_json()
    stored = {trial.number: trial for trial in run.trials}
    charged = [trial for trial in run.trials if trial.charged]
    points = run.front.points
    reported = any(point.report is not None for point in points)
    found = flaws(run)
    return Summary(
        name=run.info.name,
        folder=run.folder,
        objectives=run.objectives,
        trials=tuple(_mark(trial, f"trial {trial.number}") for trial in charged if trial.ok),
        failed=sum(trial.status is Status.FAILED for trial in charged),
        recalled=recalled(run.trials),
        censored=sum(trial.status is Status.CENSORED for trial in charged),
        items=run.items_scored,
        reasons=tuple(Counter(_reason(trial) for trial in run.trials if trial.status is Status.FAILED).most_common()),
        front=tuple(_mark(stored[point.trial], f"trial {point.trial}") for point in points),
        feasible=run.front.feasible,
        baselines=tuple(_mark(trial, trial.name) for trial in run.baselines if trial.ok),
        reference=dict(zip(run.front.names, run.reference or (), strict=False)),
        hypervolumes=_hypervolumes(data) | _volume_of(random, run),
        still_nondominated=run.front.still_nondominated_on_report() if reported else None,
        report_failed=_report_failed(data, random),
        warnings=(*run.warnings, *data["warnings"], *(flaw.warning for flaw in found if flaw.warning is not None)),
        flaws=found,
    )


def _reason(trial: Trial) -> str:
    where = f"baseline {trial.name}: " if trial.kind == "baseline" else ""
    return f"{where}{trial.error or 'unknown'}"


def _mark(trial: Trial, label: str) -> Mark:
    errors = {part: {name: score.standard_error for name, score in scores.items()} for part, scores in trial.scores.items()}
    return Mark(label, trial.number, trial.values() or {}, trial.values("report"), errors, trial.report_error)


def _report_failed(data: Mapping[str, Any], random: Run | None) -> dict[str, int]:
    found = {"front": data["report_failed"]} | {name: group["report_failed"] for name, group in data["baselines"].items()}
    return found if random is None else found | {RANDOM: random.front_json()["report_failed"]}


def _hypervolumes(data: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return the hypervolumes that are known: the front's, and those of baselines, the members of a set told only as the set."""
    members = [name for group in data["baselines"].values() for name in group.get("members", ())]
    rows = {"front": data} | {name: group for name, group in data["baselines"].items() if name not in members}
    return {name: (row["hypervolume"], row["report_hypervolume"]) for name, row in rows.items() if row["hypervolume"] is not None}


def _volume_of(random: Run | None, run: Run) -> dict[str, tuple[float, float | None]]:
    """Return the hypervolume of a random search, above the very reference point of the run."""
    volume = None if random is None or run.reference is None else random.front.hypervolume(reference=run.reference)
    if random is None or volume is None:
        return {}
    return {RANDOM: (volume, random.front.hypervolume("report", reference=run.reference))}
