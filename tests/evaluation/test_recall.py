"""Models that were scored before are answered from memory, whichever recipe makes them, and never another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mergeopt as mo
from mergeopt.evaluation.racing import Racing
from mergeopt.evaluation.recall import Recall, bytes_of_records
from mergeopt.lineage import Lineage
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import Evaluation, Proposal
from mergeopt.report.summary import summarise
from mergeopt.report.table import verdict
from mergeopt.study.snapshot import Progress
from mergeopt_problems.metrics import CrossEntropy
from tests.evaluation.test_heats import Folders, Pictures
from tests.lineages import random_step
from tests.study.analytic import Listed

TO_TWO = {"weight": {"low": 0.0, "high": 2.0}}


def linear(folders: Folders, task: Pictures, operator: Any = "linear", **options: Any) -> MergeProblem:
    """Return a problem in which the genome is half the weights."""
    objective = mo.TaskObjective("loss", task, CrossEntropy())
    return MergeProblem(mo.Pool(*folders), operator, [objective], device="cpu", **{"parameters": TO_TWO, **options})


def evaluated(problem: MergeProblem, *genomes: npt.ArrayLike) -> list[Evaluation]:
    return list(problem.evaluate([Proposal(str(genome), np.array(genome)) for genome in genomes], "search"))


def test_two_recipes_of_one_model_are_scored_once(vit_folders: Folders) -> None:
    """Normalised weights 1, 1 and 2, 2 are one model: the second is answered from memory, with the same score and records."""
    task = Pictures(1)
    problem = linear(vit_folders, task)
    evaluated(problem, [0.1, 0.9])
    asked = len(task.asked)
    first, second, third = evaluated(problem, [0.5, 0.5], [1.0, 1.0], [0.25, 0.75])
    assert len(task.asked) == asked + 2 * len(task.items("search"))
    assert (set(first.seconds), set(second.seconds), set(third.seconds)) == ({"make", "score"}, {"make", "recall"}, {"make", "score"})
    assert second.scores["loss"].value == first.scores["loss"].value != third.scores["loss"].value


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties", "slerp", "function"])
def test_memory_changes_no_bit(vit_folders: Folders, operator: str) -> None:
    """With and without memory, alone and in batches, every recipe scores the same bits, repeated models among them."""
    rule: Any = _halfway if operator == "function" else operator
    parameters = None if operator in ("slerp", "function") else TO_TWO
    told = []
    for recall, batch in ((True, 4), (False, 3)):
        problem = linear(vit_folders, Pictures(1), rule, recall=recall, batch=batch, parameters=parameters)
        rng = np.random.default_rng(0)
        genomes = [rng.uniform(0.1, 1.0, problem.info.space.dim).round(1) for _ in range(4)]
        found = evaluated(problem, *genomes, *(genome / 2 for genome in genomes), *genomes)
        told.append([evaluation.scores["loss"].records["loss"].tobytes() for evaluation in found])
        assert any("recall" in evaluation.seconds for evaluation in found) == (recall and operator != "function")
    assert told[0] == told[1]


@mo.merge_operator("halfway", share=mo.Param.real(0.5, low=0.0, high=1.0, search=(0.0, 1.0)))
def _halfway(deltas: torch.Tensor, *, share: torch.Tensor) -> torch.Tensor:
    return share * deltas.mean(dim=0)


def test_evolved_members_are_other_models(vit_folders: Folders) -> None:
    """Equal coefficients over members that have evolved are not the model of the experts themselves, nor of older members."""
    problem = linear(vit_folders, Pictures(1))
    members = problem.members()
    rng = np.random.default_rng(0)
    lineages = [Lineage(members.names)]
    for _ in range(2):
        step = random_step(lineages[-1], rng, newest=True, slot=0, mutation="evolver", scale=0.6, rate=0.5, unit="parameter")
        lineages.append(lineages[-1].child(step))
    recipes = [members.merged(lineage) for lineage in lineages]
    found = [next(iter(problem.evaluate([Proposal("x", recipe=recipe)], "search"))) for recipe in [*recipes, *recipes]]
    values = [evaluation.scores["loss"].value for evaluation in found]
    assert len(set(values[:3])) == 3
    assert values[3:] == values[:3]
    assert ["recall" in evaluation.seconds for evaluation in found] == [False] * 3 + [True] * 3


def test_a_race_remembers_what_was_measured(vit_folders: Folders) -> None:
    """A model that comes again in a race takes no pass over data, and is judged anew by who is there then."""
    task = Pictures(1)
    problem = linear(vit_folders, task)
    race = problem.race(Racing("sequential", first=20), seed=0)
    proposals = [Proposal("a", np.array([0.5, 0.5])), Proposal("b", np.array([1.0, 1.0]))]
    (first,) = problem.run_heat(proposals[:1], race.heat([0]))
    asked = len(task.asked)
    (second,) = problem.run_heat(proposals[1:], race.heat([1]))
    assert len(task.asked) == asked
    assert "recall" in second.seconds
    assert second.scores["loss"].value == first.scores["loss"].value


def test_a_run_counts_them_apart(vit_folders: Folders, tmp_path: Path) -> None:
    """A recalled candidate is charged and no repetition; progress and table say how many there were."""
    seen: list[Progress] = []
    listed = Listed([np.array(genome) for genome in ([0.5, 0.5], [1.0, 1.0], [0.5, 0.5])])
    run = mo.optimize(linear(vit_folders, Pictures(1), baselines=[]), listed, budget=3, out=tmp_path, progress=seen.append)
    assert [(trial.charged, trial.duplicate_of) for trial in run.trials] == [(True, None), (True, None), (False, 0)]
    assert (seen[-1].recalled, seen[-1].cached) == (1, 1)
    assert "1 of 2 trials make the same model as earlier ones and were answered from memory" in verdict(summarise(run))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60_000)), max_size=60))
def test_memory_is_bounded_and_forgets_the_oldest(kept: list[tuple[int, int]]) -> None:
    """Whatever is kept, the bytes stay within the limit, and what was used last is still there where it fits at all."""
    recall: Recall[int] = Recall(100_000)
    for key, size in kept:
        known = recall.find(key)
        recall.keep(key, key * 7, size)
        assert recall.bytes <= 100_000
        assert recall.find(key) in (known, key * 7)
        assert recall.find(key) == key * 7 or known is None
    recall.keep(None, 1, 0)
    assert recall.find(None) is None


def test_a_column_in_several_records_counts_once() -> None:
    """Objectives that share a task's records share their bytes."""
    column = np.zeros(100)
    assert bytes_of_records([{"a": column}, {"a": column, "b": column.copy()}]) == 1600
