"""An expert alone is that expert: for every rule that is linear in the experts, in every element type, on every device there is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from mergeopt.evaluation.device import DTYPES
from mergeopt.evaluation.materialize import stream
from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from tests.evaluation.conftest import size

SHAPES = {"a": (1,), "b": (3, 5), "c": (), "d": (65,), "e": (31, 33), "f": (2,)}
STORED = [torch.float32, torch.bfloat16, torch.float16]
RULES: list[tuple[str, str, int]] = [
    *(("linear", "paper", experts) for experts in (1, 9)),
    *(("task_arithmetic", "paper", experts) for experts in (1, 9)),
    ("slerp", "paper", 2),
    ("slerp", "mergekit", 2),
    ("nuslerp", "paper", 2),
]
"""Operators that promise it, with a number of experts."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Tensors(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and nine experts of each stored type: ordinary, large and subnormal weights."""
    place = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(0)
    for stored, k in itertools.product(STORED, range(10)):
        state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        state["e"][::3] *= 1000.0
        state["e"][1::3] *= torch.finfo(stored).smallest_normal / 8
        save_file({name: tensor.to(stored) for name, tensor in state.items()}, place / f"{_name(stored)}-{k}.safetensors")
    return place


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _problem(folder: Path, operator: str, variant: str, experts: int, stored: torch.dtype, **options: Any) -> MergeProblem:
    files = [folder / f"{_name(stored)}-{k}.safetensors" for k in range(experts + 1)]
    pool = Pool(files[0], files[1:], module=Tensors)
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    parameters = {"t": {"low": 0.0, "high": 1.0}} if operator == "slerp" else {"weight": {"low": 0.0, "high": 1.0}}
    return MergeProblem(pool, operator, [objective], variant=variant, parameters=parameters, **options)


def _alone(problem: MergeProblem, expert: int) -> npt.NDArray[np.float64]:
    """Return the genome that asks for one expert."""
    if problem.operator.name == "slerp":
        return np.array([float(expert)])
    return np.asarray([float(place == expert) for place in range(len(problem.pool.expert_names))])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "variant", "experts"), RULES)
def test_an_expert_alone_is_that_expert(folder: Path, operator: str, variant: str, experts: int, dtype: str, device: str) -> None:
    """Made alone, in a batch or tensor by tensor, it has every stored weight, rounded once where the merge's type is narrower."""
    for stored in STORED:
        problem = _problem(folder, operator, variant, experts, stored, dtype=dtype, device=device, batch=experts)
        recipes = [problem.decode(_alone(problem, expert)) for expert in range(experts)]
        evaluator = problem.evaluator
        together: list[torch.Tensor] = []
        for start in range(0, experts, evaluator.arena.candidates):  # no more than the arena holds
            some = recipes[start : start + evaluator.arena.candidates]
            evaluator.make(some)
            together += evaluator.arena.rows[: len(some)].clone()
        for expert, recipe in enumerate(recipes):
            evaluator.model(recipe)
            _check(problem, expert, evaluator.arena.rows[0])
            _check(problem, expert, together[expert])
            streamed = torch.zeros_like(together[expert], dtype=torch.float32)
            for segment, tensor in stream(problem.layout, problem.operator, evaluator.values(problem.operator, recipe), problem.device):
                streamed[segment.start : segment.end] = tensor.reshape(-1)
            _check(problem, expert, streamed.to(problem.dtype))


def _check(problem: MergeProblem, expert: int, row: torch.Tensor) -> None:
    source = problem.pool.experts[problem.pool.expert_names[expert]]
    for segment in problem.layout.segments:
        stored = source.read(segment.name).to(torch.float32).to(problem.dtype)
        assert torch.equal(row[segment.start : segment.end].cpu().view(segment.shape), stored), (expert, segment.name)
