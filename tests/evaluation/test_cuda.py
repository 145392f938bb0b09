"""What holds on a CUDA card: the CPU's bits where sums have one order, its numbers elsewhere, and the same bits twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergeopt.evaluation.compiled import same_bits
from mergeopt.evaluation.product import product
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.registry import load, names
from mergeopt.task import Items
from tests.evaluation.conftest import objective

pytestmark = pytest.mark.cuda
CARD = torch.device("cuda:0")
Folders = tuple[Path, dict[str, Path]]


def doubt(model: torch.nn.Module, items: Items | None, device: torch.device) -> float:
    """Return the mean square of a model's logits for fixed pictures."""
    weight = next(model.parameters())
    pixels = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8).to(device, weight.dtype)
    logits: torch.Tensor = model(pixel_values=pixels).logits
    return float(logits.double().square().mean())


def problem(folders: Folders, operator: Any, device: str, **options: Any) -> MergeProblem:
    return MergeProblem(Pool(*folders), operator, [objective("doubt", doubt)], device=device, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_linear_combinations_have_the_cpus_bits(how: Any, dtype: torch.dtype) -> None:
    """On a card, eagerly and compiled, for one and for eight candidates, every number is that of the CPU."""
    generator = torch.Generator().manual_seed(0)
    coefficients, rows = torch.randn((8, 4), generator=generator), torch.randn((4, 70_000), generator=generator)
    for n in (1, 8):
        here, there = torch.empty((n, 70_000), dtype=dtype), torch.empty((n, 70_000), dtype=dtype, device=CARD)
        product(coefficients[:n], rows, list(here), "eager")
        product(coefficients[:n].to(CARD), rows.to(CARD), list(there), how)
        assert same_bits(there.cpu(), here)


@pytest.mark.parametrize("name", names("operators"))
def test_operators_give_the_cpus_weights(vit_folders: Folders, name: str) -> None:
    """Every registered operator makes on a card what it makes on the CPU, masks and votes included, up to rounding."""
    if load("operators", name)().requires.statistics:
        pytest.skip("measures experts, which these have no data for")
    here, there = (problem(vit_folders, name, device, groups="layer") for device in ("cpu", "cuda"))
    genomes = here.info.space.sample(np.random.default_rng(0), 3)
    rows = []
    for one in (here, there):
        assert one.evaluator.make([one.decode(genome) for genome in genomes]) == [None] * 3
        rows.append(one.evaluator.arena.rows[:3].cpu())
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_are_the_same_twice(vit_folders: Folders, dtype: str) -> None:
    """Two searches on a card score the same candidates to the same bits, in any batch; in float32 they are the CPU's up to rounding."""
    found = {}
    for run, (device, batch) in enumerate([("cuda", 8), ("cuda", 3), ("cpu", 8)]):
        one = problem(vit_folders, "task_arithmetic", device, dtype=dtype, batch=batch)
        recipes = [one.decode(genome) for genome in one.info.space.sample(np.random.default_rng(0), 5)]
        found[run] = [outcome.scores["doubt"].value for outcome in one.evaluator.evaluate(recipes, "search")]
    assert found[0] == found[1]
    if dtype == "float32":
        np.testing.assert_allclose(found[0], found[2], rtol=1e-4)


def test_the_fingerprint_names_the_card(vit_folders: Folders) -> None:
    """A run on a card stores the card's name, its driver and the versions of its libraries."""
    told = problem(vit_folders, "linear", "cuda").evaluator.fingerprint
    assert told["device"] == "cuda:0"
    assert told["hardware"]["name"] == torch.cuda.get_device_name(CARD)
    assert all(told["hardware"][part] for part in ("instructions", "driver", "cuda", "cudnn"))
