"""How often what a score rests on is flawed, by candidate, and whose share stands out: outputs that were cut, or hold no answer.

A share p of n items stands out when it is clearly outside of what the baselines have, or, where there are none, clearly other than the
median of the other points: |z| > 3 of the two-proportion test against the nearest such share q, z = (p - q) / sqrt(2 r (1 - r) / n) with
r = (p + q) / 2. Both are of the same items, so the test is on the safe side. Source: Fleiss, Levin and Paik (2003), Statistical Methods for
Rates and Proportions, chapter 3.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeopt.study.run import Run
from mergeopt.task import FLAWS

__all__ = ["Flaw", "flaws", "with_flaws"]

CLEAR = 3.0  # |z| from which a difference counts


@dataclass(frozen=True, slots=True)
class Flaw:
    """One flaw of one objective's items on the search part.

    Args:
        objective: its name.
        name: of the flaw, as the column of records is called.
        items: how many there are.
        front: share of them by trial of the front.
        baselines: share of them by trial of the baselines.
    """

    objective: str
    name: str
    items: int
    front: Mapping[int, float]
    baselines: Mapping[int, float]

    @property
    def outside(self) -> list[int]:
        """Trials of the front whose share stands out, ascending."""
        return sorted(trial for trial, share in self.front.items() if self._differs(share, self._expected(trial, share)))

    @property
    def line(self) -> str:
        """The shares in a few words."""
        beside = f", baselines {_span(self.baselines.values())}" if self.baselines else ""
        return f"{self.objective}: {_span(self.front.values())} of the outputs are {self.name}{beside}"

    @property
    def warning(self) -> str | None:
        """What to say of the trials that stand out, None where none does."""
        if not (outside := self.outside):
            return None
        told = ", ".join(str(trial) for trial in outside)
        than = f"the baselines' {_span(self.baselines.values())}" if self.baselines else "on the rest of the front"
        return (
            f"of trial{'s' * (len(outside) > 1)} {told}, {_span([self.front[trial] for trial in outside])} of the outputs for "
            f"{self.objective!r} are {self.name}, clearly other than {than}: scores may differ for that alone"
        )

    def _expected(self, trial: int, share: float) -> float:
        if self.baselines:
            return min(max(share, min(self.baselines.values())), max(self.baselines.values()))
        others = [other for number, other in self.front.items() if number != trial]
        return statistics.median(others) if others else share

    def _differs(self, share: float, expected: float) -> bool:
        mean = (share + expected) / 2
        return abs(share - expected) > CLEAR * math.sqrt(2 * mean * (1 - mean) / self.items)


def flaws(run: Run) -> tuple[Flaw, ...]:
    """Return what is recorded of a run's front and baselines, flaw by flaw; nothing where no task records any."""
    front, baselines = [point.trial for point in run.front.points], [trial.number for trial in run.baselines if trial.ok]
    return tuple(flaw for objective in run.objectives for flaw in _of(run, objective.name, front, baselines)) if front else ()


def with_flaws(document: Mapping[str, Any], found: Sequence[Flaw]) -> dict[str, Any]:
    """Return a front's JSON with `flaws` for each point and baseline that has any: objective -> flaw -> share of the items."""
    shares: dict[int, dict[str, dict[str, float]]] = {}
    for flaw in found:
        for trial, share in {**flaw.front, **flaw.baselines}.items():
            shares.setdefault(trial, {}).setdefault(flaw.objective, {})[flaw.name] = share
    points = [{**point, "flaws": shares[point["trial"]]} if point["trial"] in shares else point for point in document["points"]]
    baselines = {
        name: {**own, "flaws": shares[own["trial"]]} if own.get("trial") in shares else own for name, own in document["baselines"].items()
    }
    return {**document, "points": points, "baselines": baselines}


def _of(run: Run, objective: str, front: Sequence[int], baselines: Sequence[int]) -> list[Flaw]:
    known = [name for name in FLAWS if name in run.records(front[0], "search", objective)]
    if not known:
        return []
    columns = {trial: run.records(trial, "search", objective) for trial in {*front, *baselines}}
    return [
        Flaw(
            objective,
            name,
            len(columns[front[0]][name]),
            *({trial: float(columns[trial][name].mean()) for trial in trials if name in columns[trial]} for trials in (front, baselines)),
        )
        for name in known
    ]


def _span(shares: Sequence[float] | Any) -> str:
    low, high = (f"{100 * share:.3g}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"
