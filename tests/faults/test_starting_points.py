"""Searches that start from known points: which points, what they cost, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergeopt.study.run import Run
from tests.faults.commands import Commands, refused, write
from tests.faults.repeats import everything

LAYERED = {"operator": "task_arithmetic", "groups": "layer"}


def weights(run: Run, kind: str) -> list[dict[str, float]]:
    """Return the weights of a run's trials of a kind, one value per expert."""
    recipes = [trial.recipe for trial in run.trials if trial.kind == kind]
    return [dict(recipe.arguments["weight"].values["model"]) for recipe in recipes if recipe is not None]


def test_experts_and_uniform_are_the_points_they_are_called(mergeopt: Commands, tmp_path: Path) -> None:
    """Each expert alone and equal shares are scored first, charged, and score what the baselines of the same models score."""
    write(tmp_path, init=["experts", "uniform"], budget=5, strategy="random")
    (tmp_path / "experts").mkdir()  # a folder of that name changes nothing
    done = mergeopt(tmp_path, "run", "run.yaml")
    assert done.status == 0, done.err
    run = Run.open(tmp_path / "run")
    assert weights(run, "init") == [{"upright": 1.0, "turned": 0.0}, {"upright": 0.0, "turned": 1.0}, {"upright": 0.5, "turned": 0.5}]
    points = [trial for trial in run.trials if trial.kind == "init"]
    assert all(trial.charged for trial in points)
    assert run.evaluations == 5
    assert sum(trial.kind == "asked" for trial in run.trials) == 2
    baselines = {trial.name: trial.values() for trial in run.baselines}
    assert points[0].values() == baselines["expert:upright"]
    assert points[1].values() == baselines["expert:turned"]
    for trial in points[:2]:
        assert mergeopt(tmp_path, "export", "run", "--trial", trial.number, "--to", f"model{trial.number}").status == 0


def test_a_recipe_and_another_runs_front_are_starting_points(mergeopt: Commands, finished: Path, tmp_path: Path) -> None:
    """A recipe file and every point of another run's front are scored first and give the values they had there."""
    front = Run.open(finished / "run").front
    recipe = front.points[0].recipe
    assert recipe is not None
    (tmp_path / "best.json").write_text(json.dumps(recipe.to_json()))
    shutil.copytree(finished / "run", tmp_path / "earlier")
    write(tmp_path, init=["best.json", "earlier"], budget=len(front.points) + 2, seed=9)
    done = mergeopt(tmp_path, "run", "run.yaml")
    assert done.status == 0, done.err
    run = Run.open(tmp_path / "run")
    points = [trial for trial in run.trials if trial.kind == "init"]
    assert points[0].values() == dict(front.points[0].values)
    assert [trial.values() for trial in points[1:]] == [dict(point.values) for point in front.points]
    assert [trial.charged for trial in points] == [True, False] + [True] * (len(front.points) - 1)  # the recipe is that front's first point
    assert run.evaluations == len(front.points) + 2
    for name, budget, resume in (("pieces", 3 + len(front.points) - 2, []), ("pieces", len(front.points) + 2, ["--resume"])):
        assert mergeopt(tmp_path, "run", "run.yaml", "--out", name, "--budget", budget, *resume).status == 0
    assert [row[:10] for row in everything(tmp_path / "pieces")] == [row[:10] for row in everything(tmp_path / "run")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"init": ["experts"], "merge": {"operator": "task_arithmetic", "parameters": {"weight": {"low": 0.2, "high": 0.8}}}},
            "init: experts",
        ),
        ({"init": ["recipe.json"], "merge": {"operator": "ties"}}, "init: recipe.json: a starting point must be a recipe of this search"),
        ({"init": ["recipe.json"], "merge": LAYERED}, "init: recipe.json: weight: the recipe's groups are not this search's ('layer')"),
        ({"init": ["recipe.json"], "merge": {"operator": "task_arithmetic", "exclude": ["classifier"]}}, "exclude is ()"),
        ({"init": ["recipe.json"], "problem": {"name": "digits", "tasks": ["turned", "upright"]}}, "over these very models"),
        ({"init": ["earlier"], "merge": {"operator": "ties"}}, "init: earlier: a starting point must be a recipe of this search"),
        ({"init": ["run.yaml"]}, "init: expected experts, uniform, a recipe file or a run folder, got 'run.yaml'"),
        ({"init": ["empty"]}, "empty holds no run"),
        ({"init": ["experts", "uniform"], "budget": 2}, "a budget of 2 evaluations cannot pay for 3 starting points"),
    ],
)
def test_a_point_that_is_not_of_the_search_is_refused(
    mergeopt: Commands, finished: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Points outside the ranges, of another operator, grouping or set of models, and what is no point are refused; nothing is written."""
    recipe = Run.open(finished / "run").front.points[0].recipe
    assert recipe is not None
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (tmp_path / "empty").mkdir()
    shutil.copytree(finished / "run", tmp_path / "earlier")
    write(tmp_path, **changes)
    refused(mergeopt(tmp_path, "run", "run.yaml"), said)
    assert not (tmp_path / "run").exists()


def test_a_recipe_outside_the_ranges_is_refused(mergeopt: Commands, finished: Path, tmp_path: Path) -> None:
    """A recipe whose weight is beyond the searched range is refused with the range and the value."""
    recipe = Run.open(finished / "run").front.points[0].recipe
    assert recipe is not None
    data = recipe.to_json()
    data["arguments"]["weight"]["values"]["model"]["turned"] = 1.25
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    write(tmp_path, init=["recipe.json"])
    refused(mergeopt(tmp_path, "run", "run.yaml"), "init: recipe.json: weight/model/turned: expected a value in [0.0, 1.0], got 1.25")
    assert not (tmp_path / "run").exists()
