"""What a candidate costs before it is scored, in memory copies of its weights, against a loop over state dicts: JSON with --json.

    python tests/bench/materialize.py [--json] [--parameters N] [--experts K] [--device cuda] [--threads N] [--rounds N] [--force]

`share` is the part of the memory traffic's floor that is reached: a population of N candidates reads K + 1 models and writes N, that is
(K + 1 + N) / 2 copies; 1.0 would be a copy's own speed. `naive` loops over tensors, makes each merged tensor and loads the state dict.
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
from safetensors.torch import load_file, save_file

import mergeopt as mo
from mergeopt.evaluation.evaluator import Evaluator
from mergeopt.recipe import Recipe
from tests.bench.turns import ratio, take_turns, where

HIDDEN, FEED, VOCABULARY = 512, 2048, 8000
MOST = 8  # candidates


class Stack(torch.nn.Module):
    """The tensors of a transformer of so many layers, and no forward pass."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList([_block() for _ in range(layers)])


def _block() -> torch.nn.Module:
    parts = {name: torch.nn.Linear(HIDDEN, HIDDEN) for name in ("q", "k", "v", "o")}
    return torch.nn.ModuleDict(
        {**parts, "up": torch.nn.Linear(HIDDEN, FEED), "down": torch.nn.Linear(FEED, HIDDEN), "norm": torch.nn.LayerNorm(HIDDEN)}
    )


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    device = torch.device(asked.device)
    layers = max(2, round((asked.parameters - VOCABULARY * HIDDEN) / sum(p.numel() for p in _block().parameters())))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        problem = _problem(Path(folder), layers, asked.experts, asked.device)
        experts = [load_file(expert.path, device=asked.device) for expert in problem.pool.experts.values()]
        base = load_file(problem.pool.base.path, device=asked.device)
        evaluator = problem.evaluator
        rng = np.random.default_rng(0)
        genomes = rng.random((MOST, problem.info.space.dim))
        recipes = [problem.decode(genome) for genome in genomes]
        others = [problem.decode(1.0 - genome) for genome in genomes]
        one_layer = genomes[0].copy()
        one_layer[asked.experts : 2 * asked.experts] = rng.random(asked.experts)
        changed = problem.decode(one_layer)
        model = evaluator.arena.model
        spare = torch.empty_like(evaluator.arena.rows[0])
        work: dict[str, Callable[[], object]] = {
            "copy": lambda: spare.copy_(evaluator.arena.rows[0]),
            "naive": lambda: _naive(model, base, experts, genomes[0], problem),
            "one": _alternately(evaluator, [recipes[:1], others[:1]]),
            "eight": _alternately(evaluator, [recipes, others]),
            "layer": _alternately(evaluator, [recipes[:1], [changed]]),
        }
        seconds = take_turns(work, asked.rounds, device, force=asked.force)
        error = _error(evaluator, recipes[0], base, experts, genomes[0], problem)
    k = asked.experts
    report: dict[str, Any] = {
        "parameters": problem.layout.elements,
        "layers": layers,
        "experts": k,
        "linear_copies_one": ratio(seconds, "one", "copy"),
        "linear_share_one": (k + 2) / 2 / ratio(seconds, "one", "copy"),
        "linear_copies_each_of_eight": ratio(seconds, "eight", "copy") / MOST,
        "linear_share_eight": (k + 1 + MOST) / 2 / ratio(seconds, "eight", "copy"),
        "naive_over_one": ratio(seconds, "naive", "one"),
        "naive_over_each_of_eight": MOST * ratio(seconds, "naive", "eight"),
        "one_changed_layer_over_all": ratio(seconds, "layer", "one"),
        "error_to_float64": error,
        **where(seconds, device),
    }
    print(json.dumps(report) if asked.json else "\n".join(f"{name:28} {value}" for name, value in report.items()))


def _problem(folder: Path, layers: int, experts: int, device: str) -> mo.MergeProblem:
    def build() -> Stack:
        return Stack(layers)

    for index in range(experts + 1):
        torch.manual_seed(index)
        state = {name: torch.randn_like(tensor) for name, tensor in build().state_dict().items()}
        save_file(state, folder / f"m{index}.safetensors")
    names = {f"e{index}": folder / f"m{index}.safetensors" for index in range(1, experts + 1)}
    nothing = mo.FunctionObjective("nothing", lambda model, items, device: 0.0, items=None, direction="minimize", source="")
    parameters = {"weight": {"low": 0.0, "high": 1.0}}
    pool = mo.Pool(folder / "m0.safetensors", names, module=build)
    return mo.MergeProblem(pool, "task_arithmetic", [nothing], groups="layer", parameters=parameters, device=device, batch=MOST)


def _alternately(evaluator: Evaluator, populations: list[list[Recipe]]) -> Callable[[], object]:
    """Return what makes populations in turns, so that no call finds its own candidates already there."""
    turn = [0]

    def make() -> object:
        turn[0] += 1
        return evaluator.make(populations[turn[0] % len(populations)])

    return make


def _merged(base: torch.Tensor, experts: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    total = base
    for weight, expert in zip(weights, experts, strict=True):
        total = total + weight * (expert - base)
    return total


def _weights(genome: np.ndarray[Any, Any], problem: mo.MergeProblem) -> dict[str, list[float]]:
    layers = list(dict.fromkeys(segment.layer for segment in problem.layout.segments))
    table = genome.reshape(len(layers), -1).tolist()
    return {segment.name: table[layers.index(segment.layer)] for segment in problem.layout.segments}


def _naive(model: torch.nn.Module, base: Any, experts: list[Any], genome: np.ndarray[Any, Any], problem: mo.MergeProblem) -> None:
    weights = _weights(genome, problem)
    model.load_state_dict({name: _merged(base[name], [expert[name] for expert in experts], weights[name]) for name in base})


def _error(
    evaluator: Evaluator, recipe: Recipe, base: Any, experts: list[Any], genome: np.ndarray[Any, Any], problem: mo.MergeProblem
) -> float:
    """Return ||out - reference|| / ||reference|| with a float64 reference."""
    evaluator.make([recipe])
    off, norm, weights = 0.0, 0.0, _weights(genome, problem)
    for segment in problem.layout.segments:
        name = segment.name
        reference = _merged(base[name].double(), [expert[name].double() for expert in experts], weights[name]).reshape(-1)
        off += float((evaluator.arena.rows[0, segment.start : segment.end].double() - reference).square().sum())
        norm += float(reference.square().sum())
    return float(np.sqrt(off / norm))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--parameters", type=int, default=27_000_000, help="of the model")
    parser.add_argument("--experts", type=int, default=3, help="K")
    parser.add_argument("--rounds", type=int, default=7, help="turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--force", action="store_true", help="report on a busy machine, too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


if __name__ == "__main__":
    main()
