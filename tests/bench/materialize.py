"""What a candidate costs before it is scored, in memory copies of its weights, against other ways to make it: JSON with --json.

    python tests/bench/materialize.py [--json] [--parameters N] [--experts K] [--device cuda] [--dtype D] [--threads N]
        [--rounds N] [--force]

`share` is the part of the memory traffic's floor that is reached: a population of N candidates reads K + 1 models and writes N, that is
(K + 1 + N) / 2 copies; 1.0 would be a copy's own speed. `naive` loops over tensors, makes each merged tensor and loads the state dict.
Operators other than task arithmetic search their densities too, over a smaller model, and are compiled. Rows of mergekit 0.1.5
(`merge_state_dicts` on resident models, its result not yet in a model) appear where it can be imported; both sides make one smaller still.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mergeopt as mo
from mergeopt.evaluation import elementwise, product
from mergeopt.recipe import Recipe
from tests.bench import stack
from tests.bench.against_mergekit import against_mergekit
from tests.bench.references import error
from tests.bench.turns import ratio, take_turns, where

SEEDS = (0, 1)  # of populations
LARGEST = 600_000  # elements of tensors that other operators' errors are taken over: sorting for a reference takes long
NARROW, TWELVE_LAYERS = 384, 24_400_000  # width and parameters
BERT = 768  # width: layers as large as BERT-base's
WEIGHT = {"low": 0.0, "high": 1.0}
DENSITY = {"low": 0.1, "high": 0.8}
EPSILON = {"low": 0.0, "high": 0.1}
GAMMA = {"low": 0.0, "high": 0.05}
OPERATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "linear": ("linear", "paper", {"weight": WEIGHT}),
    "ties": ("ties", "paper", {"weight": WEIGHT, "density": DENSITY}),
    "dare_ties": ("dare_ties", "paper", {"weight": WEIGHT, "density": DENSITY}),
    "della": ("della", "paper", {"weight": WEIGHT, "density": DENSITY, "epsilon": EPSILON}),
    "breadcrumbs": ("breadcrumbs", "paper", {"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA}),
    "slerp": ("slerp", "paper", {"t": WEIGHT}),
    "nuslerp_rows": ("nuslerp", "paper", {"weight": WEIGHT, "axis": "rows"}),
}


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    elementwise.PAYS = product.PAYS = 0  # compiled in the turn that warms up
    with torch.inference_mode():
        report = _linear(asked) | _layer(asked)
        for name in OPERATORS:
            report |= _operator(name, asked) if name != "linear" else {}
        report |= against_mergekit(asked.smaller, asked.smallest, OPERATORS, force=asked.force)
    print(json.dumps(report) if asked.json else "\n".join(f"{name:36} {value}" for name, value in report.items()))


def _linear(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure task arithmetic: one candidate, a population, and the naive loop."""
    k, device, build = asked.experts, torch.device(asked.device), stack.stack_of(asked.parameters, BERT)
    with tempfile.TemporaryDirectory() as folder:
        stack.write(Path(folder), build, k)
        problem = stack.problem(
            Path(folder), build, "task_arithmetic", {"weight": WEIGHT}, experts=k, device=asked.device, dtype=asked.dtype
        )
        resident = stack.sources(Path(folder), k, asked.device)
        arena, populations = problem.evaluator.arena, [stack.population(problem, seed) for seed in SEEDS]
        weights = _weights(problem, populations[0][0])
        spare = torch.empty_like(arena.rows[0])
        work: dict[str, Callable[[], object]] = {
            "copy": lambda: spare.copy_(arena.rows[0]),
            "naive": lambda: arena.model.load_state_dict(_naive(resident, weights)),
            **_ours(problem, populations),
        }
        seconds = take_turns(work, asked.rounds, device, force=asked.force)
        off = error(problem, populations[0][0], resident)
    read = (k + 1) * 4 / arena.rows.element_size()  # in models of the written type
    return {
        "parameters": problem.layout.elements,
        "tensors": len(problem.layout.segments),
        "experts": k,
        "linear_copies_one": ratio(seconds, "one", "copy"),
        "linear_share_one": (read + 1) / 2 / ratio(seconds, "one", "copy"),
        "linear_copies_each_of_eight": ratio(seconds, "eight", "copy") / stack.MOST,
        "linear_share_eight": (read + stack.MOST) / 2 / ratio(seconds, "eight", "copy"),
        "naive_over_one": ratio(seconds, "naive", "one"),
        "naive_over_each_of_eight": stack.MOST * ratio(seconds, "naive", "eight"),
        "linear_error_to_float64": off,
        **where(seconds, device),
    }


def _layer(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure one changed layer of twelve against all of them."""
    device, build = torch.device(asked.device), stack.stack_of(TWELVE_LAYERS, NARROW)
    with tempfile.TemporaryDirectory() as folder:
        stack.write(Path(folder), build, asked.experts)
        problem = stack.problem(Path(folder), build, "task_arithmetic", {"weight": WEIGHT}, experts=asked.experts, device=asked.device)
        row = problem.evaluator.arena.rows[0]
        spare = torch.empty_like(row)
        ours = _ours(problem, [stack.population(problem, seed) for seed in SEEDS])
        work: dict[str, Callable[[], object]] = {"copy": lambda: spare.copy_(row), "one": ours["one"], "layer": ours["layer"]}
        seconds = take_turns(work, asked.rounds, device, force=asked.force)
    return {"one_changed_layer_over_all": ratio(seconds, "layer", "one")}


def _operator(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Measure one candidate of an operator, a population, and one changed layer."""
    operator, variant, searched = OPERATORS[name]
    experts = 2 if "slerp" in name else asked.experts
    device, build = torch.device(asked.device), stack.stack_of(asked.smaller, BERT)
    with tempfile.TemporaryDirectory() as folder:
        stack.write(Path(folder), build, experts)
        problem = stack.problem(Path(folder), build, operator, searched, experts=experts, variant=variant, device=asked.device)
        populations = [stack.population(problem, seed) for seed in SEEDS]
        row = problem.evaluator.arena.rows[0]
        spare = torch.empty_like(row)
        work: dict[str, Callable[[], object]] = {
            "copy": lambda: spare.copy_(row),
            **_ours(problem, populations),
        }
        seconds = take_turns(work, asked.rounds, device, force=asked.force)
        off = error(problem, populations[0][0], stack.sources(Path(folder), experts, asked.device), largest=LARGEST)
    return {
        f"{name}_copies": ratio(seconds, "one", "copy"),
        f"{name}_share": (experts + 2) / 2 / ratio(seconds, "one", "copy"),
        f"{name}_copies_each_of_eight": ratio(seconds, "eight", "copy") / stack.MOST,
        f"{name}_one_changed_layer_over_all": ratio(seconds, "layer", "one"),
        f"{name}_error_to_float64": off,
    }


def _ours(problem: mo.MergeProblem, populations: list[list[Recipe]]) -> dict[str, Callable[[], object]]:
    """Return our work: a population, one candidate of the other, and one that differs in a layer from what was just made in its place."""
    return {
        "eight": stack.alternately(problem, populations),
        "one": stack.alternately(problem, [population[:1] for population in reversed(populations)]),
        "layer": stack.alternately(problem, [[stack.with_another_layer(problem, seed)] for seed in reversed(SEEDS)]),
    }


def _weights(problem: mo.MergeProblem, recipe: Recipe) -> dict[str, list[float]]:
    """Return the experts' weights by tensor."""
    values = problem.evaluator.values(problem.operator, recipe)["weight"].spread()
    return {segment.name: own for segment, own in zip(problem.layout.segments, np.asarray(values).tolist(), strict=True)}


def _naive(resident: list[dict[str, torch.Tensor]], weights: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    """Return task arithmetic as a loop over tensors."""
    base, *experts = resident
    made = {}
    for name, total in base.items():
        for weight, expert in zip(weights[name], experts, strict=True):
            total = total + weight * (expert[name] - base[name])
        made[name] = total
    return made


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--parameters", type=int, default=27_000_000, help="of the model")
    parser.add_argument("--smaller", type=int, default=10_000_000, help="parameters for other operators than task arithmetic")
    parser.add_argument("--smallest", type=int, default=4_000_000, help="parameters beside mergekit's slow rules")
    parser.add_argument("--experts", type=int, default=3, help="K")
    parser.add_argument("--rounds", type=int, default=7, help="turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of weights merged linearly; base and experts are float32")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--force", action="store_true", help="report on a busy machine, too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


if __name__ == "__main__":
    main()
