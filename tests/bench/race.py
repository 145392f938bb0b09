"""What racing saves, and what it loses, on frozen tables of real answers: JSON with --json.

    python tests/bench/race.py [--json] [--orders N]

Candidates and items come in random orders; the code is that of a run, without a model. `saved` is the items of a full scoring over those
that were scored. One objective: `regret` is what the best that was scored in full lacks to the best there is, in points of accuracy, and
`saved_improving` is for candidates that come from the worst to the best, which no race can save much on. Several: `lost` counts members of
the true front that were dropped. `spread` and `close` are the tables of race_table.py; `simulated` are tables in which answers are
independent given ability and difficulty, made anew from a seed.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import torch

import mergeopt as mo
from mergeopt.evaluation.race import Heat, Race
from mergeopt.evaluation.racing import Racing
from mergeopt.task import Part, Records
from mergeopt_problems.metrics import Accuracy
from tests.bench.race_table import read_table

Table = npt.NDArray[np.bool_]

RULES: Mapping[str, Racing] = {
    "sequential": Racing("sequential"),
    "anytime": Racing("anytime"),
    "sequential z=2": Racing("sequential", z=2.0),
    "halving": Racing("halving"),
}
SEVERAL = ("sequential", "anytime")  # rules shown for several objectives
BATCHES = (8, 20)  # candidates of one ask, for the rule that races them together
SETS: Mapping[str, Sequence[Sequence[str]]] = {
    "1": [["mnist"], ["fashion"], ["notmnist"], ["kannada"]],
    "2": [["mnist", "fashion"], ["notmnist", "kannada"], ["mnist", "notmnist"], ["fashion", "kannada"]],
    "4": [["mnist", "fashion", "notmnist", "kannada"]],
}
SIMULATED: Mapping[str, Sequence[Sequence[str]]] = {"1": [["a"], ["b"]], "2": [["a", "b"]]}
SPREADS = {"wide": 0.3, "near ties": 0.1, "ties": 0.02}


class Answers:
    """A task whose records are rows of a table."""

    parts: tuple[Part, ...] = ("search",)

    def __init__(self, name: str, right: Table) -> None:
        self.name, self.right = name, right
        self.hash = name

    def __len__(self) -> int:
        return int(self.right.shape[1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"label": 1, "item": index}

    def items(self, part: Part) -> Answers:
        """Return itself: the items are the columns."""
        return self

    def check(self, model: torch.nn.Module) -> None:
        """Accept anything."""

    def records(self, model: Any, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        """Return the answers of a candidate, which is its row."""
        right = self.right[model] if items is None else self.right[model, items]
        return {"prediction": right.astype(np.int64), "label": np.ones(len(right), np.int64)}


def replay(tables: Mapping[str, Table], racing: Racing, seed: int | None, batch: int) -> tuple[float, npt.NDArray[np.intp]]:
    """Race all candidates of a table in the random order of a seed, or with None from the worst to the best in the first objective.

    Returns the items of a full scoring over those scored, and who was scored in full.
    """
    objectives = [mo.TaskObjective(name, Answers(name, table), Accuracy()) for name, table in tables.items()]
    race = Race(racing, objectives, seed=seed or 0)
    first = next(iter(tables.values()))
    order = np.argsort(first.mean(axis=1)) if seed is None else np.random.default_rng(seed).permutation(len(first))
    scored, full = 0, []
    for start in range(0, len(order), batch):
        asked = order[start : start + batch].tolist()
        heat = race.heat(asked)
        for index, count in _run(race, heat, asked):
            scored += count
            result = heat.result(index)
            if isinstance(result, dict):
                race.admit(asked[index], {name: score.value for name, score in result.items()}, functools.partial(_records, result))
                full.append(asked[index])
    return len(order) * race.items / scored, np.array(sorted(full))


def _run(race: Race, heat: Heat, asked: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Run a heat as an evaluator does; yield each candidate as soon as its result is known, with the items it was scored on."""
    counts = [0] * len(asked)
    for index in range(len(asked)):
        while not heat.finished(index):
            for other in heat.todo():
                wanted = heat.wanted(other)
                counts[other] += sum(map(len, wanted))
                candidate: Any = asked[other]
                pairs = zip(heat.passes, wanted, strict=True)
                heat.add(
                    other, [one.task.records(candidate, "search", torch.device("cpu"), items) if items else {} for one, items in pairs]
                )
            heat.decide()
        yield index, counts[index]


def _records(scores: Mapping[str, mo.Score]) -> dict[str, Records]:
    return {name: score.records for name, score in scores.items()}


def measure(group: Mapping[str, Table], names: Sequence[Sequence[str]], racing: Racing, orders: int, batch: int) -> dict[str, Any]:
    """Return what a rule saves and loses over several sets of objectives and random orders."""
    saved, regrets, lost, fronts, improving = [], [], 0, 0, []
    for chosen in names:
        tables = {name: group[name] for name in chosen}
        accuracy = np.stack([table.mean(axis=1) for table in tables.values()], axis=1)
        front = np.flatnonzero(moocore.is_nondominated(-accuracy, keep_weakly=True))
        for seed in range(orders):
            factor, full = replay(tables, racing, seed, batch)
            saved.append(factor)
            regrets.append(100.0 * float(accuracy[:, 0].max() - accuracy[full, 0].max()))
            lost += len(set(front.tolist()) - set(full.tolist()))
            fronts += len(front)
        if len(chosen) == 1:
            improving.append(replay(tables, racing, None, batch)[0])
    report = {"saved": _overall(saved), "saved_least": round(min(saved), 2)}
    if improving:
        return {
            **report,
            "saved_improving": _overall(improving),
            "regret": round(float(np.mean(regrets)), 4),
            "regret_most": round(max(regrets), 4),
        }
    return {**report, "lost": lost, "of": fronts}


def _overall(factors: Sequence[float]) -> float:
    """Return the items of all full scorings over all those scored."""
    return round(statistics.harmonic_mean(factors), 2)


def simulated(spread: float, seed: int, candidates: int = 100, items: int = 2000) -> Table:
    """Return answers that are independent given ability, of that spread, and difficulty (normal both), bool [candidates, items]."""
    rng = np.random.default_rng(seed)
    ability, difficulty = spread * rng.standard_normal((candidates, 1)), rng.standard_normal((1, items))
    return rng.random((candidates, items)) < 1.0 / (1.0 + np.exp(1.7 * (difficulty - 0.5 - ability)))


def main() -> None:
    """Replay everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--orders", type=int, default=2, help="random orders of candidates")
    asked = parser.parse_args()
    began = time.process_time()
    report: dict[str, Any] = {name: _all_rules(read_table(name), SETS, asked.orders) for name in ("spread", "close")}
    for name, spread in SPREADS.items():
        tables = {label: simulated(spread, seed) for seed, label in enumerate("ab")}
        report[f"simulated {name}"] = _all_rules(tables, SIMULATED, asked.orders)
    bars = {f"{count} objectives": report["spread"][count]["sequential"] for count in SETS}
    versions = {"python": platform.python_version(), "numpy": np.__version__, "mergeopt": version("mergeopt")}
    report = {"bars": bars, **report, "orders": asked.orders, "cpu_seconds": round(time.process_time() - began, 1), "versions": versions}
    print(json.dumps(report, indent=None if asked.json else 1))


def _all_rules(group: Mapping[str, Table], sets: Mapping[str, Sequence[Sequence[str]]], orders: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {count: {} for count in sets}
    for count, names in sets.items():
        for rule, racing in RULES.items():
            if count != "1" and rule not in SEVERAL:
                continue
            for batch in BATCHES if racing.together else BATCHES[:1]:
                label = f"{rule}, {batch} at a time" if racing.together else rule
                found[count][label] = measure(group, names, racing, orders, batch)
    return found


if __name__ == "__main__":
    main()
