"""Rows of a benchmark against mergekit 0.1.5, where it can be imported: its in-memory API on resident models, over ours."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.bench import stack
from tests.bench.turns import ratio, take_turns

__all__ = ["against_mergekit"]

WIDTH = 384
ROUNDS = 3  # its own rules take seconds each
RULES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "linear": ("linear", {"weight": (0.5, 0.3, 0.2)}, None),
    "ties": ("ties", {"weight": (0.9, 0.3, 0.6), "density": (0.3, 0.5, 0.2)}, 0),
    "dare_ties": ("dare_ties", {"weight": (0.9, 0.3, 0.6), "density": (0.3, 0.5, 0.2)}, 0),
    "della": ("della", {"weight": (0.9, 0.3, 0.6), "density": (0.3, 0.5, 0.2), "epsilon": (0.1, 0.1, 0.1)}, 0),
    "slerp": ("slerp", {"t": 0.4}, 0),
}


def against_mergekit(large: int, small: int, operators: Mapping[str, tuple[str, str, dict[str, Any]]], *, force: bool) -> dict[str, Any]:
    """Return how many times as long mergekit takes for a candidate as we do, alone and each of eight, by rule; nothing without mergekit.

    Args:
        large: parameters of the model that both sides make, on one thread of the CPU, by rules that are linear.
        small: the same of rules that take mergekit seconds.
        operators: ours by name: operator, variant and what is searched.
        force: report on a busy machine, too.
    """
    if importlib.util.find_spec("mergekit") is None:
        return {}
    report: dict[str, Any] = {"mergekit": version("mergekit"), "mergekit_parameters": [large, small]}
    for parameters, rules in ((large, ("linear", "slerp")), (small, ("ties", "dare_ties", "della"))):
        with tempfile.TemporaryDirectory() as folder:
            build = stack.stack_of(parameters, WIDTH)
            stack.write(Path(folder), build, 3)
            for rule in rules:
                report |= _rule(Path(folder), build, rule, operators, force)
    return report


def _rule(folder: Path, build: Callable[[], stack.Stack], rule: str, operators: Mapping[str, Any], force: bool) -> dict[str, Any]:
    from mergekit.merge_methods.api import merge_state_dicts

    name, parameters, base = RULES[rule]
    operator, variant, searched = operators[name]
    experts = 2 if rule == "slerp" else 3
    problem = stack.problem(folder, build, operator, searched, experts=experts, variant=variant)
    populations = [stack.population(problem, seed) for seed in (0, 1)]
    resident = stack.sources(folder, experts, "cpu")
    given = dict(enumerate(resident[1:] if rule in ("linear", "slerp") else resident))
    row, spare = problem.evaluator.arena.rows[0], torch.empty_like(problem.evaluator.arena.rows[0])
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: spare.copy_(row),
        "mergekit": lambda: merge_state_dicts(given, rule, parameters=parameters, base=base),
        "one": stack.alternately(problem, [population[:1] for population in populations]),
        "eight": stack.alternately(problem, populations),
    }
    seconds = take_turns(work, ROUNDS, torch.device("cpu"), force=force)
    return {
        f"mergekit_over_one_{rule}": ratio(seconds, "mergekit", "one"),
        f"mergekit_over_each_of_eight_{rule}": stack.MOST * ratio(seconds, "mergekit", "eight"),
        f"mergekit_copies_{rule}": ratio(seconds, "mergekit", "copy"),
    }
