"""When one member or state is fitter than another: by one number made of all objectives, or by non-dominated sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import moocore
import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, nearest
from mergeopt.task import ObjectiveInfo

__all__ = ["FITNESS", "Fitness", "check_fitness"]

Losses = npt.NDArray[np.float64]
Kind = Literal["mean", "pooled", "worst", "nondominated"]
FITNESS: tuple[str, ...] = get_args(Kind)


def check_fitness(kind: str) -> None:
    """Raise `ConfigError` when there is no such kind of fitness."""
    if kind not in FITNESS:
        raise ConfigError(f"fitness: unknown kind {kind!r}; {nearest(str(kind), FITNESS)}")


class Fitness:
    """Compares minimised objective vectors [m].

    - `mean`: the unweighted mean of the objectives.
    - `pooled`: the mean over all items of all objectives together, which large sets dominate; for means of per-item values only.
    - `worst`: the largest loss.
    - `nondominated`: by rank in a non-dominated sorting of what is compared with all members, then by crowding distance (Deb et al.
      2002, IEEE TEC 6(2), sections III-A and III-B).

    Args:
        kind: one of the above.
        objectives: of the problem.

    Raises:
        ConfigError: an unknown kind, or `pooled` over objectives that are no means over a known number of items.
    """

    def __init__(self, kind: str, objectives: Sequence[ObjectiveInfo]) -> None:
        check_fitness(kind)
        self.kind = kind
        self._shares = np.full(len(objectives), 1.0 / len(objectives))
        if kind == "pooled":
            for objective in objectives:
                if not objective.decomposable or not objective.items:
                    raise ConfigError(f"fitness: pooled needs means over items, and objective {objective.name!r} is none; use mean")
            items = np.array([objective.items for objective in objectives], dtype=np.float64)
            self._shares = items / items.sum()

    def better(self, child: Losses | None, parent: Losses | None, others: Sequence[Losses | None] = ()) -> bool:
        """Return whether a child is strictly fitter than its parent.

        Args:
            child: losses [m], None for one that failed.
            parent: the same.
            others: the other members, or the states accepted so far, which `nondominated` sorts them among.
        """
        if child is None or parent is None:
            return child is not None
        if self.kind != "nondominated":
            return self._number(child) < self._number(parent)
        if bool(np.all(child <= parent) and np.any(child < parent)):
            return True
        if bool(np.all(parent <= child)):
            return False
        first, second = _order([child, parent, *(other for other in others if other is not None)])[:2]
        return first < second

    def best(self, losses: Sequence[Losses | None]) -> int:
        """Return the index of the fittest, the first among equals; failed ones come last."""
        known = [index for index, row in enumerate(losses) if row is not None]
        if not known:
            return 0
        rows = [row for row in losses if row is not None]
        keys = [(self._number(row),) for row in rows] if self.kind != "nondominated" else _order(rows)
        return known[min(range(len(rows)), key=lambda index: keys[index])]

    def _number(self, losses: Losses) -> float:
        return float(losses.max()) if self.kind == "worst" else float(losses @ self._shares)


def _order(rows: Sequence[Losses]) -> list[tuple[float, ...]]:
    """Return (rank, minus the crowding distance) of each row, smaller for fitter."""
    table = np.array(rows)
    ranks = moocore.pareto_rank(table)
    distance = np.zeros(len(table))
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        distance[members] = _crowding(table[members])
    return [(float(rank), -float(far)) for rank, far in zip(ranks, distance, strict=True)]


def _crowding(rows: Losses) -> Losses:
    """Return the crowding distance of each row of one rank: the sum of its neighbours' normalised distances per objective."""
    distance = np.zeros(len(rows))
    for column in rows.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance
