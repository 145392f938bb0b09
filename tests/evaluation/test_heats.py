"""Heats on live models: what is measured, in how many passes through the arena, and that survivors have their full scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergeopt as mo
from mergeopt.errors import ConfigError
from mergeopt.evaluation.heats import run_heat
from mergeopt.evaluation.outcome import Outcome
from mergeopt.evaluation.racing import Racing
from mergeopt.merge_problem import MergeProblem
from mergeopt.task import Part, Records
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.metrics import Accuracy, CrossEntropy, MacroF1
from tests.evaluation.conftest import objective

Folders = tuple[Path, dict[str, Path]]
COUNT = 90


class Pictures(ImageTask):
    """Noise with labels drawn from a seed, so that every model is wrong in its own way; counts what it is asked."""

    def __init__(self, seed: int, count: int = COUNT, *, broken: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        pixels, labels = torch.randn((count, 1, 8, 8), generator=generator), torch.randint(0, 5, (count,), generator=generator)
        super().__init__(name=f"noise {seed}", parts={"search": ImageItems(pixels, labels, settings={})}, batch=16)
        self.asked: list[int] = []
        self.broken = broken

    def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        if self.broken and items is not None and len(items) < COUNT:
            raise KeyError("too few questions")
        self.asked += range(len(self.items(part))) if items is None else items
        return super().records(model, part, device, items)


def made(folders: Folders, *objectives: mo.Objective, **options: Any) -> MergeProblem:
    ranges = {"weight": {"low": -2.0, "high": 3.0}}
    return MergeProblem(mo.Pool(*folders), "task_arithmetic", objectives, parameters=ranges, device="cpu", **options)


def raced(problem: MergeProblem, racing: Racing, count: int = 12, together: int = 12) -> list[Outcome]:
    """Race seeded candidates, as many at a time as given, each entering the archive when it is scored in full."""
    race = problem.race(racing, seed=0)
    recipes = [problem.decode(genome) for genome in np.random.default_rng(0).random((count, problem.info.space.dim))]
    outcomes: list[Outcome] = []
    for start in range(0, count, together):
        batch = recipes[start : start + together]
        for outcome in run_heat(problem.evaluator, batch, race.heat(range(start, start + len(batch)))):
            if outcome.error is None and outcome.censored is None:
                records = {name: score.records for name, score in outcome.scores.items()}
                race.admit(len(outcomes), {name: score.value for name, score in outcome.scores.items()}, lambda records=records: records)  # type: ignore[misc]
            outcomes.append(outcome)
    return outcomes


def full(problem: MergeProblem, count: int = 12) -> list[Mapping[str, mo.Score]]:
    recipes = [problem.decode(genome) for genome in np.random.default_rng(0).random((count, problem.info.space.dim))]
    return [outcome.scores for outcome in problem.evaluator.evaluate(recipes, "search")]


@pytest.mark.parametrize("racing", [Racing("sequential", first=20, z=2.0), Racing("halving", first=10)], ids=lambda racing: racing.rule)
def test_survivors_have_their_full_scores(vit_folders: Folders, racing: Racing) -> None:
    """Who is not dropped has the records and the score of a full scoring, in item order, but for rounding; others were asked less."""
    problem = made(vit_folders, mo.TaskObjective("loss", Pictures(1), CrossEntropy()))
    outcomes, expected = raced(problem, racing), full(problem)
    dropped = [outcome.censored for outcome in outcomes if outcome.censored is not None]
    assert 0 < len(dropped) < len(outcomes)
    for outcome, scores in zip(outcomes, expected, strict=True):
        if outcome.censored is not None:
            assert outcome.censored.scores["loss"].items < COUNT
            continue
        assert outcome.scores["loss"].value == pytest.approx(scores["loss"].value, rel=1e-6)
        for name, column in scores["loss"].records.items():
            np.testing.assert_allclose(outcome.scores["loss"].records[name], column, rtol=1e-5, atol=1e-6)
    best = min(range(len(expected)), key=lambda index: expected[index]["loss"].value)
    assert outcomes[best].censored is None


def test_how_many_are_made_at_a_time_changes_nothing(vit_folders: Folders) -> None:
    """A heat that does not fit into the arena at once is made again rung by rung, to the same decisions and scores."""
    told = []
    for batch in (12, 5, 1):
        problem = made(vit_folders, mo.TaskObjective("loss", Pictures(1), CrossEntropy()), batch=batch)
        outcomes = raced(problem, Racing("halving", first=10))
        told.append([(o.censored and (o.censored.by, dict(o.censored.estimates)), [s.value for s in o.scores.values()]) for o in outcomes])
    assert told[0] == told[1] == told[2]


def test_each_item_is_asked_once_and_tasks_are_shared(vit_folders: Folders) -> None:
    """Objectives on one task share its records, no candidate is asked an item twice, and a short task is finished early."""
    long, short = Pictures(1), Pictures(2, 25)
    problem = made(
        vit_folders,
        mo.TaskObjective("loss", long, CrossEntropy()),
        mo.TaskObjective("right", long, Accuracy()),
        mo.TaskObjective("short", short, CrossEntropy()),
    )
    problem.evaluator  # noqa: B018 - checks of the model ask, too
    long.asked, short.asked = [], []
    (outcome,) = raced(problem, Racing("sequential", first=20), count=1)
    assert sorted(long.asked) == list(range(COUNT))
    assert sorted(short.asked) == list(range(25))
    assert {name: score.items for name, score in outcome.scores.items()} == {"loss": COUNT, "right": COUNT, "short": 25}


def test_what_a_task_raises_is_a_failure_of_the_candidate(vit_folders: Folders) -> None:
    """A task that raises amid a race fails the candidate with its reason, and the race goes on."""
    task = Pictures(1, broken=True)
    outcomes = raced(made(vit_folders, mo.TaskObjective("loss", task, CrossEntropy())), Racing("sequential", first=20), count=3)
    reason = "objective 'loss' raised KeyError: 'too few questions'"
    assert [outcome.error for outcome in outcomes] == [None, reason, reason]  # with nobody to race against, all are asked at once
    assert outcomes[0].scores["loss"].items == COUNT


def test_what_a_metric_raises_is_a_failure_of_the_candidate(vit_folders: Folders) -> None:
    """A metric that raises, or gives another number of values than there are items, fails the candidate with its reason."""

    class Raising(CrossEntropy):
        def values(self, records: Records) -> Any:
            raise KeyError("no such column")

    class Short(CrossEntropy):
        def values(self, records: Records) -> Any:
            return super().values(records)[1:]

    said = {Raising: "objective 'loss' raised KeyError: 'no such column'", Short: "objective 'loss': expected one value per item (90)"}
    for metric, reason in said.items():
        problem = made(vit_folders, mo.TaskObjective("loss", Pictures(1), metric()))
        (outcome,) = raced(problem, Racing("sequential", first=20), count=1)
        assert outcome.error is not None
        assert outcome.error.startswith(reason)


def test_a_loss_that_is_not_finite_is_a_failure(vit_folders: Folders) -> None:
    """Infinite records fail a candidate at the rung where they appear."""

    class Overflowing(Pictures):
        def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
            found = super().records(model, part, device, items)
            return {**found, "loss": np.where(found["loss"] > np.median(found["loss"]), np.inf, found["loss"])}

    outcome, _ = raced(
        made(vit_folders, mo.TaskObjective("loss", Overflowing(1), CrossEntropy())), Racing("halving", first=10), count=2, together=2
    )
    assert outcome.error == "objective 'loss': cross_entropy over 30 items of the search part is inf, not a finite number"


@pytest.mark.parametrize("rule", ["sequential", "anytime"])
def test_objectives_that_cannot_be_raced_are_named(vit_folders: Folders, rule: str) -> None:
    """A metric of all records together, a plain function, and for `anytime` an unbounded loss are refused by the objective's name."""
    cases: list[tuple[mo.Objective, str]] = [
        (mo.TaskObjective("f1", Pictures(1), MacroF1()), "'f1'.*macro_f1"),
        (objective("calibration"), "'calibration'.*function of a model"),
    ]
    if rule == "anytime":
        cases.append((mo.TaskObjective("loss", Pictures(1), CrossEntropy()), "cross_entropy.*'loss'.*no such limits"))
    for one, words in cases:
        problem = made(vit_folders, mo.TaskObjective("right", Pictures(1), Accuracy()), one)
        with pytest.raises(ConfigError, match=words):
            problem.race(Racing("sequential" if rule == "sequential" else "anytime"), seed=0)


def test_a_run_on_real_models_races(data_dir: Path, zoo_dir: Path, tmp_path: Path) -> None:
    """A search over merges of real image experts drops candidates, and every point of its front has its full score."""
    from mergeopt_problems.image_classification import ImageClassification

    names = ("mnist", "kannada")
    objectives = []
    for name in names:
        data = {"path": str(data_dir / f"open/images/{name}.parquet"), "search": "val", "image": "pixels", "shape": [28, 28]}
        task = ImageClassification(data=data, classes=f"{name}:.*", preprocess={"mean": 0.3, "std": 0.35}, limit=100, name=name)
        objectives.append(mo.TaskObjective(name, task, Accuracy()))
    folder = zoo_dir / "vit_images"
    pool = mo.Pool(base=str(folder / "base"), experts={name: str(folder / name) for name in names})
    problem = MergeProblem(pool, "task_arithmetic", objectives, device="cpu", threads=1)
    run = mo.optimize(problem, {"name": "nsga2", "pop_size": 8}, budget=20, out=tmp_path, racing={"rule": "sequential", "first": 25})
    assert sum(trial.censored is not None for trial in run.trials) >= 3
    for point in run.front.points:
        assert point.recipe is not None
        (outcome,) = problem.evaluator.evaluate([point.recipe], "search")
        assert {name: (score.value, score.items) for name, score in outcome.scores.items()} == {n: (point.values[n], 100) for n in names}
