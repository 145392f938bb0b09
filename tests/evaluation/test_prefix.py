from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.evaluation.prefix import Identity, identity
from mergeopt.lineage import Lineage, Step
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import Proposal
from mergeopt.recipe import Learned, Measured, Recipe
from tests.evaluation.shared_layers import Family, bits, layers_run, parted, scored
from tests.lineages import random_step
from tests.problems.batched import KINDS, Asked, causal_lm, image_classification, text_classification

CPU = torch.device("cpu")
PLENTY = 1 << 30
LAYERS = 3
SEARCHING = 3  # passes of the first batch that find the cuts

pytestmark = pytest.mark.usefixtures("cache")


def batches(problem: MergeProblem) -> int:
    task: Any = problem.objectives[0].task  # type: ignore[attr-defined]
    return len(list(task.batches(problem.evaluator.arena.model, "search")))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_scores_are_those_of_whole_passes(kind: Callable[[Path], Asked], tmp_path: Path) -> None:
    """Every record is the same to the last bit, and each layer that candidates share runs once; another evaluation goes on from there."""
    family = Family.made(kind, tmp_path)
    plain, reusing = family.problem(), family.problem(prefixes=PLENTY)
    genomes = parted(plain, [3, 1, 2, 0])
    expected = bits(scored(plain, genomes))
    assert len({str(own) for own in expected}) == len(genomes)
    with layers_run(reusing.evaluator.arena.model) as runs:
        assert bits(scored(reusing, genomes)) == expected
        count = batches(reusing)
        # of the five, the first runs all three layers, the others those they do not share with it
        assert [runs[layer] for layer in range(LAYERS)] == [2 * count + SEARCHING, 3 * count + SEARCHING, 4 * count + SEARCHING]
        runs.clear()
        again = parted(plain, [2], seed=0)
        assert bits(scored(reusing, again)) == [expected[0], bits(scored(plain, again))[1]]
        assert runs[0] == runs[1] == 0


@pytest.mark.parametrize("operator", ["linear", "ties", "dare_ties", "slerp"])
def test_every_kind_of_plan(operator: str, tmp_path: Path) -> None:
    """Scores are those of whole passes whatever rule makes the weights, and layers are shared whatever rule makes them."""
    family = Family.made(text_classification, tmp_path)
    plain, reusing = family.problem(operator), family.problem(operator, prefixes=PLENTY)
    genomes = parted(plain, [2, 2, 2])
    with layers_run(reusing.evaluator.arena.model) as runs:
        assert bits(scored(reusing, genomes)) == bits(scored(plain, genomes))
    assert runs[0] - SEARCHING == batches(reusing) < runs[2] - SEARCHING


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.5])
def test_memory_stays_below_its_limit(share: float, tmp_path: Path) -> None:
    """With less memory than the cuts take, less is reused and the scores are the same; the limit is kept."""
    family = Family.made(causal_lm, tmp_path)
    plain = family.problem()
    genomes = [*parted(plain, [2, 2]), *parted(plain, [1, 1, 1], seed=1)]
    expected = bits(scored(plain, genomes))
    first = family.problem(prefixes=PLENTY)
    scored(first, parted(plain, [2, 2]))
    assert first.evaluator.prefixes is not None
    limit = int(share * first.evaluator.prefixes.bytes)
    assert first.evaluator.prefixes.bytes > 0
    reusing = family.problem(prefixes=limit)
    with layers_run(reusing.evaluator.arena.model) as runs:
        assert bits(scored(reusing, genomes)) == expected
    assert reusing.evaluator.prefixes is not None
    assert reusing.evaluator.prefixes.bytes <= limit
    # two families, of three and of four candidates
    least, most = 2 * batches(reusing), 7 * batches(reusing)
    assert runs[0] - SEARCHING in ([most] if share == 0.0 else range(least, most) if share < 1.0 else [least])


def test_members_that_evolve_share_nothing(tmp_path: Path) -> None:
    """Two recipes with the same values, of members of other generations, are scored as the models they are."""
    family = Family.made(image_classification, tmp_path)
    found = []
    for limit in (None, PLENTY):
        problem = family.problem(prefixes=limit)
        recipe = problem.decode(parted(problem, [])[0])
        rng, lineage = np.random.default_rng(0), Lineage(problem.pool.expert_names)
        recipes = [recipe]
        for _ in range(3):
            lineage = lineage.child(random_step(lineage, rng, newest=True, mutation="evolver", slot=0, scale=0.5, rate=0.5))
            recipes.append(replace(recipe, lineage=lineage))
        found.append(bits(list(problem.evaluate([Proposal("x", recipe=own) for own in recipes], "search"))))
    assert len({str(own) for own in found[0]}) == 4
    assert found[0] == found[1]


def test_whatever_a_recipe_says_tells_candidates_apart(tmp_path: Path) -> None:
    """Recipes that differ in anything but the values of some tensors share no layers; those that differ in these share the others."""
    problem = Family.made(text_classification, tmp_path).problem("ties")
    recipe = problem.decode(parted(problem, [])[0])

    def told(own: Recipe) -> Identity:
        values = problem.evaluator.values(problem.operator, own)
        return identity(own, values, len(problem.layout.segments))

    others = [
        replace(recipe, statistics=Measured("here", "0" * 64)),
        replace(
            recipe, lineage=Lineage(problem.pool.expert_names).child(Step(0, ((1, 0),), mutation="evolver", scale=0.5, rate=0.5, seed=1))
        ),
        replace(recipe, learned=Learned("here", "0" * 64, {"a": 1.0})),
    ]
    assert all(told(other).all_tensors != told(recipe).all_tensors for other in others)
    near = problem.decode(parted(problem, [2])[1])
    assert told(near).all_tensors == told(recipe).all_tensors
    differing = [s.layer for s, a, b in zip(problem.layout.segments, told(near).tensors, told(recipe).tensors, strict=True) if a != b]
    assert set(differing) == {"layer.2", "head"}


def test_a_function_may_do_what_it_likes(tmp_path: Path) -> None:
    """Functions see whole models: passes with gradients, in training mode, or of a changed copy give what they give without reuse."""
    family = Family.made(text_classification, tmp_path)
    inputs = next(iter(family.task.batches(family.problem().evaluator.arena.model, "search"))).inputs

    def function(model: torch.nn.Module, items: Any, device: torch.device) -> list[float]:
        plain = model(**inputs).logits
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.01)
        changed = other(**inputs).logits
        with torch.enable_grad():
            wide = model(**inputs).logits
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        return [float(tensor.double().square().sum()) for tensor in (plain, changed, wide, *hidden)]

    found = []
    for limit in (None, PLENTY):
        problem = family.problem(objective=FunctionObjective("own", function, items=None, direction="minimize"), prefixes=limit)
        found.append(bits(scored(problem, parted(problem, [2, 1]))))
    assert found[0] == found[1]
