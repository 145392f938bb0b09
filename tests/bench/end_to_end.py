"""Candidates made and scored per second, against two loops that score with the same code: JSON with --json.

    python tests/bench/end_to_end.py [--json] [--size small|base] [--device cuda] [--dtype float32] [--threads N] [--rounds N] [--force]

`naive` merges state dicts tensor by tensor and loads them into a resident model; `disk` also writes every candidate as a model folder and
loads that. Models are BERT classifiers of random weights, `base` with BERT-base's sizes. Beside each ratio stands that of making alone:
scoring, which costs all the same, leaves less of it.

`raced` holds a random search that races by successive halving, with all that a run does, against the naive loop over the same candidates;
on small models, and texts whose classes are those of one expert.

The bars are for `--size base` on a CPU: at 2,000 scored tokens naive / ours >= 1.25 and disk / ours >= 1.5, at 100 tokens >= 4 and >= 8;
naive / raced >= 5 with the same best. `small` has a fifth of the parameters and the same shape, and takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import mergeopt as mo
from mergeopt.evaluation import product
from mergeopt.models.architecture import quiet_transformers
from mergeopt.task import Part
from tests.bench.classifiers import EXPERTS, NaiveLoop, problem_over, write_models, write_texts
from tests.bench.turns import clock, ratio, take_turns, where

TEXTS: Mapping[Part, tuple[int, int]] = {"search": (16, 125), "report": (4, 25)}
"""How many texts of how many tokens: 2,000 and 100 tokens to score."""
RACED: Mapping[Part, tuple[int, int]] = {"search": (900, 7)}
BUDGET = 64  # candidates of the search that races


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    with quiet_transformers():
        with mock.patch.object(product, "PAYS", 0):  # compiled at once, not after some candidates
            report = {"size": asked.size, **_candidates(asked)}
        report |= _search(asked)
    print(json.dumps(report) if asked.json else "\n".join(f"{name:38} {value}" for name, value in report.items()))


def _candidates(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure candidates that are made and scored in full."""
    device = torch.device(asked.device)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), asked.size)
        write_texts(Path(folder), TEXTS)
        problem = problem_over(Path(folder), {"search": "search", "report": "report"}, groups="layer", batch=asked.batch, **_options(asked))
        seconds = take_turns(_work(problem, Path(folder), asked), asked.rounds, device, force=asked.force)
    report: dict[str, Any] = {"parameters": problem.layout.elements, "experts": EXPERTS, "dtype": asked.dtype}
    for part, (texts, length) in TEXTS.items():
        tokens, batch = texts * length, _batch(part, asked)
        report |= {
            f"candidates_per_second_{tokens}_tokens": round(float(batch / np.median(seconds[f"ours_{part}"])), 3),
            f"naive_over_ours_{tokens}_tokens": batch * ratio(seconds, f"naive_{part}", f"ours_{part}"),
            f"disk_over_ours_{tokens}_tokens": batch * ratio(seconds, f"disk_{part}", f"ours_{part}"),
        }
    making = {
        "naive_over_ours_making_alone": asked.batch * ratio(seconds, "naive_make", "ours_make"),
        "ours_making_copies": ratio(seconds, "ours_make", "copy") / asked.batch,
        "naive_making_copies": ratio(seconds, "naive_make", "copy"),
    }
    return {**report, **making, **where(seconds, device)}


def _options(asked: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": asked.dtype, "device": asked.device, "threads": asked.threads}


def _batch(part: Part, asked: argparse.Namespace) -> int:
    """Return how many candidates are timed at once: two of the long ones, in which making hardly counts."""
    return int(asked.batch if part == "report" else min(2, asked.batch))


def _work(problem: mo.MergeProblem, folder: Path, asked: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is timed: a memory copy, making alone, and making and scoring per kind of loop and number of tokens."""
    evaluator = problem.evaluator
    rng = np.random.default_rng(0)
    populations = [[problem.decode(genome) for genome in rng.random((asked.batch, problem.info.space.dim))] for _ in range(2)]
    naive, weights = NaiveLoop(folder, problem), [0.2, 0.5, 0.8]
    row, turn = evaluator.arena.rows[0], [0]
    spare = torch.empty_like(row)

    def ours(count: int) -> list[Any]:
        turn[0] += 1  # so that no call finds its own candidates already there
        return populations[turn[0] % 2][:count]

    def evaluate(part: Part) -> None:
        for outcome in evaluator.evaluate(ours(_batch(part, asked)), part):
            assert outcome.error is None, outcome.error

    work: dict[str, Callable[[], object]] = {
        "copy": lambda: spare.copy_(row),
        "ours_make": lambda: evaluator.make(ours(asked.batch)),
        "naive_make": lambda: naive.load(weights),
    }
    for part in TEXTS:
        work[f"ours_{part}"] = partial(evaluate, part)
        work[f"naive_{part}"] = partial(naive.resident, weights, part)
        work[f"disk_{part}"] = partial(naive.from_disk, weights, part, folder / "candidate")
    return work


def _search(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure a search that races; the naive loop scores the same candidates in full, in between."""
    now = clock(torch.device(asked.device))
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), "tiny")
        write_texts(Path(folder), RACED)
        problem = problem_over(Path(folder), {"search": "search"}, groups="model", baselines=(), **_options(asked))
        naive, genomes = NaiveLoop(Path(folder), problem), _genomes(problem)
        naive.resident(genomes[0], "search")
        problem.evaluator.make([problem.merged()])
        values: list[float] = []
        spent = [0.0]

        def follow(progress: object) -> None:
            began = now()
            if len(values) < BUDGET:
                values.append(naive.resident(genomes[len(values)], "search"))
            spent[0] += now() - began

        began = now()
        run = mo.optimize(problem, "random", budget=BUDGET, batch=BUDGET, racing="halving", out=Path(folder) / "run", progress=follow)
        seconds = now() - began - spent[0]
    assert [trial.genome.tolist() for trial in run.trials if trial.genome is not None] == genomes
    scored, in_full = run.items_scored
    return {
        "raced_candidates": len(values),
        "raced_items": RACED["search"][0],
        "raced_best": max(trial.scores["search"]["classes"].value for trial in run.trials if trial.ok),
        "raced_best_of_naive": max(values),
        "raced_share_of_items": scored / in_full,
        "naive_over_raced": spent[0] / seconds,
    }


def _genomes(problem: mo.MergeProblem) -> list[list[float]]:
    """Return the candidates that the search is going to ask for."""
    strategy = mo.load("strategies", "random")()
    strategy.setup(problem.info, seed=0, budget=mo.Budget(BUDGET), batch=1)
    return [candidate.genome.tolist() for candidate in strategy.ask(BUDGET).candidates]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--size", choices=("small", "base"), default="small", help="of the models")
    parser.add_argument("--batch", type=int, default=8, help="candidates made at a time")
    parser.add_argument("--rounds", type=int, default=7, help="turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of merged weights")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--force", action="store_true", help="report on a busy machine, too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


if __name__ == "__main__":
    main()
