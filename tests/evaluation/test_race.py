"""Races over tables of answers: who is compared with whom, on what, and how often that goes wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergeopt.evaluation.censored import Censored
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.race import Race, item_order
from mergeopt.evaluation.racing import Racing
from mergeopt.task import Part, Records
from mergeopt_problems.metrics import Accuracy

Table = npt.NDArray[np.bool_]
CPU = torch.device("cpu")
ORDER = [9, 11, 5, 10, 1, 4, 0, 7, 6, 3, 8, 2]  # of "0:data"


class Answers:
    """A task whose candidates are the rows of a table."""

    parts: tuple[Part, ...] = ("search",)

    def __init__(self, name: str, right: Table) -> None:
        self.name, self.hash, self.right = name, name, right

    def __len__(self) -> int:
        return int(self.right.shape[1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"label": 1}

    def items(self, part: Part) -> Answers:
        return self

    def check(self, model: torch.nn.Module) -> None:
        return

    def records(self, model: Any, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        right = self.right[model] if items is None else self.right[model, items]
        return {"prediction": right.astype(np.int64), "label": np.ones(len(right), np.int64)}


def run(racing: Racing, tables: Mapping[str, Table], seed: int = 0) -> tuple[list[Censored | None], list[dict[str, int]]]:
    """Race the rows in order; return who was dropped, and the items that each was asked by objective."""
    race = Race(racing, [TaskObjective(name, Answers(name, table), Accuracy()) for name, table in tables.items()], seed=seed)
    verdicts: list[Censored | None] = []
    asked: list[dict[str, int]] = []
    for row in range(len(next(iter(tables.values())))):
        heat, counts = race.heat([row]), dict.fromkeys(tables, 0)
        while not heat.finished(0):
            wanted = heat.wanted(0)
            counts = {name: counts[name] + len(items) for name, items in zip(tables, wanted, strict=True)}
            model: Any = row
            pairs = zip(heat.passes, wanted, strict=True)
            heat.add(0, [one.task.records(model, "search", CPU, items) if items else {} for one, items in pairs])
            heat.decide()
        result = heat.result(0)
        verdicts.append(result if isinstance(result, Censored) else None)
        asked.append(counts)
        if not isinstance(result, Censored):
            records = {name: score.records for name, score in result.items()}
            race.admit(row, {name: score.value for name, score in result.items()}, lambda records=records: records)  # type: ignore[misc]
    return verdicts, asked


def test_the_error_of_anytime_holds_where_the_next_objective_is_chosen() -> None:
    """A candidate that ties in one of two objectives, and is far worse in the other, is dropped with probability alpha at most."""
    alpha, items, races = 0.1, 120, 200
    rng = np.random.default_rng(0)
    far = np.array([np.ones(items), rng.random(items) < 0.3], dtype=bool)
    tie = np.array([[True, False] * (items // 2), [False, True] * (items // 2)])
    racing = Racing("anytime", first=5, growth=1.3, alpha=alpha)
    dropped = sum(run(racing, {"far": far, "tie": tie}, seed)[0][1] is not None for seed in range(races))
    assert dropped <= races * alpha + 3 * math.sqrt(races * alpha * (1 - alpha))


@pytest.mark.parametrize("rule", ["sequential", "anytime"])
def test_more_is_asked_only_where_it_is_needed(rule: str) -> None:
    """A candidate that is clearly worse in one objective and hardly in the other is asked about the other; alone it is asked all."""
    rng = np.random.default_rng(1)
    member, clear, hardly = rng.random((2, 500)) < 0.9, rng.random(500) < 0.1, rng.random(500) < 0.72
    tables = {"clear": np.array([member[0], clear]), "hardly": np.array([member[1], hardly])}
    (first, second), (alone, asked) = run(Racing("sequential" if rule == "sequential" else "anytime", first=20), tables)
    assert first is None
    assert alone == {"clear": 500, "hardly": 500}
    assert second is not None
    assert asked["clear"] == 20 < asked["hardly"]
    assert {name: score.items for name, score in second.scores.items()} == asked
    assert all(second.estimates[name] < table[0].mean() for name, table in tables.items())


def test_the_archive_holds_who_is_not_dominated() -> None:
    """Members that a newcomer dominates leave, one that is as good in everything does not enter."""
    rows = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]], dtype=bool)
    other = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    race = Race(Racing(first=10), [TaskObjective(n, Answers(n, t), Accuracy()) for n, t in (("a", rows), ("b", other))], seed=0)
    held = []
    for row in range(4):
        records = {name: Answers(name, table).records(row, "search", CPU) for name, table in (("a", rows), ("b", other))}
        race.admit(row, {"a": rows[row].mean(), "b": other[row].mean()}, lambda records=records: records)  # type: ignore[misc]
        held.append(race.members)
    assert held == [(0,), (1,), (1,), (1, 3)]


def test_the_order_of_items_is_the_same_everywhere() -> None:
    """An order is a permutation that follows from its identity by a hash alone; this one is frozen, since stored runs rely on it."""
    assert item_order("0:data", 12).tolist() == ORDER
    assert sorted(item_order("1:data", 500).tolist()) == list(range(500))
    assert item_order("1:data", 500).tolist() != item_order("2:data", 500).tolist()
