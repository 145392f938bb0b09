from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.task import Items, Objective
from tests.tiny_models import tiny_vit, write_folders

Function = Callable[[torch.nn.Module, Items | None, torch.device], Any]


def size(model: torch.nn.Module, items: Items | None, device: torch.device) -> float:
    """Return the sum of squared weights, which tells different models apart."""
    return float(sum(float(tensor.double().square().sum()) for tensor in model.state_dict().values()))


def objective(name: str = "size", function: Function = size) -> Objective:
    return FunctionObjective(name, function, items=None, direction="minimize")


@pytest.fixture(scope="session")
def vit_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A tiny ViT and two experts; tests do not write to them."""
    return write_folders(tiny_vit, tmp_path_factory.mktemp("vits"))


@pytest.fixture
def problem(vit_folders: tuple[Path, dict[str, Path]]) -> Callable[..., MergeProblem]:
    """Make a problem over the tiny ViTs; `exclude` goes to the pool, all else to the problem."""

    def make(operator: Any = "task_arithmetic", *functions: Function, exclude: tuple[str, ...] = (), **options: Any) -> MergeProblem:
        objectives = [objective(f"f{i}", function) for i, function in enumerate(functions)] or [objective()]
        return MergeProblem(Pool(*vit_folders, exclude=exclude), operator, objectives, device="cpu", **options)

    return make
