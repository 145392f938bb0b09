"""What a candidate costs outside search library and evaluation: decode, checks, store, tell; milliseconds of CPU, JSON with --json.

    python tests/bench/overhead.py [--json] [--candidates N] [--experts K] [--layers L] [--profile FILE]

A search of K experts over L layers by NSGA-II (12 and 3: 36 genes) with two objectives that are sums of genes: their evaluation makes no
model and takes microseconds, which are left out as pymoo's own time is. Everything else runs as it does for users, the store on a disk
included. `making` is what turning a recipe into parameter values of tensors adds where models are made.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mergeopt as mo
from mergeopt.evaluation.recipe_values import recipe_values
from mergeopt.models.groups import Grouping
from mergeopt.problem import Evaluation, Proposal
from mergeopt.task import Part, Score
from mergeopt_strategies.pymoo_adapter import nsga2
from tests.bench import stack


class Stopwatch:
    """Adds up the CPU time of some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.process_time() - start

        return timed


class Costless(mo.MergeProblem):
    """A search for a merge whose objectives are sums of genes: no model is made."""

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        for proposal in proposals:
            genes = np.zeros(1) if proposal.genome is None else proposal.genome
            values = (float(np.square(genes).sum()), float(np.square(genes - 1.0).sum()))
            yield Evaluation({objective.info.name: Score(value) for objective, value in zip(self.objectives, values, strict=True)})


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        problem = _problem(Path(folder), asked.layers, asked.experts)
        _search(problem, 40, Path(folder) / "warm")
        profile = cProfile.Profile()
        if asked.profile:
            profile.enable()
        spent, library = _search(problem, asked.candidates, Path(folder) / "run")
        profile.disable()
        making = _making(problem)
    if asked.profile:
        profile.dump_stats(asked.profile)
    report: dict[str, Any] = {
        "genes": problem.info.space.dim,
        "candidates": asked.candidates,
        "milliseconds_each": 1000 * (spent - library) / asked.candidates,
        "library_milliseconds_each": 1000 * library / asked.candidates,
        "making_milliseconds_each": 1000 * making,
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in ("mergeopt", "pymoo", "torch")} | {"python": platform.python_version()},
    }
    print(json.dumps(report) if asked.json else "\n".join(f"{name:28} {value}" for name, value in report.items()))


def _problem(folder: Path, layers: int, experts: int) -> Costless:
    def build() -> torch.nn.Module:
        return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([stack.block(8) for _ in range(layers)])})

    stack.write(folder, build, experts)
    pool = mo.Pool(folder / "m0.safetensors", {f"e{k}": folder / f"m{k}.safetensors" for k in range(1, experts + 1)}, module=build)
    nothing = [
        mo.FunctionObjective(name, lambda model, items, device: 0.0, items=None, direction="minimize", source="")
        for name in ("near", "far")
    ]
    return Costless(pool, "task_arithmetic", nothing, groups="layer", parameters={"weight": {"low": 0.0, "high": 1.0}})


def _search(problem: Costless, candidates: int, out: Path) -> tuple[float, float]:
    """Return the CPU seconds of a search, and those that pymoo took of them."""
    strategy, library = nsga2(pop_size=40), Stopwatch()
    strategy._call = library.around(strategy._call)  # type: ignore[method-assign]
    start = time.process_time()
    mo.optimize(problem, strategy, budget=candidates, seed=0, out=out)
    return time.process_time() - start, library.seconds


def _making(problem: Costless) -> float:
    """Return the CPU seconds of reading a recipe's parameter values and spreading them over tensors."""
    recipes = [problem.decode(genome) for genome in problem.info.space.sample(np.random.default_rng(0), 200)]
    known: dict[str, Grouping] = {}
    start = time.process_time()
    for recipe in recipes:
        for value in recipe_values(problem.operator, recipe, problem.layout, known).values():
            value.spread()
    return (time.process_time() - start) / len(recipes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--candidates", type=int, default=800, help="of the search")
    parser.add_argument("--experts", type=int, default=3, help="K")
    parser.add_argument("--layers", type=int, default=12, help="L")
    parser.add_argument("--profile", help="file for what Python's profiler saw")
    return parser.parse_args()


if __name__ == "__main__":
    main()
