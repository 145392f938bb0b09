"""From a run file to a run: the random search it is held against, and its starting points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergeopt.config import RunFile
from mergeopt.errors import ConfigError
from mergeopt.study.launch import Launch, starting_points
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from tests.study.analytic import Climber, Quadratic, facts

DIGITS: dict[str, Any] = {"problem": {"name": "digits", "tasks": ["upright", "turned"]}, "device": "cpu", "seed": 3}


def launch(out: Path, **changes: Any) -> Launch:
    """Return a search of the digits problem that asks for a random search beside it."""
    data = {**DIGITS, "strategy": "sobol", "budget": 3, "baselines": ["base", "random"], "out": str(out), **changes}
    return Launch(RunFile.parse(data), Path())


@pytest.fixture
def own_cache(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of random searches that shares the trained models."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "digits").symlink_to(cache_dir / "digits")
    monkeypatch.setenv("MERGEOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_random_search_has_the_searchs_own_budget_and_is_made_once(own_cache: Path, tmp_path: Path) -> None:
    """It spends what the search spends, also after another budget was asked for; asked again it comes from the cache."""
    first = launch(tmp_path / "a")
    run = first.run()
    random = first.random_search(run)
    assert random is not None
    assert (random.evaluations, random.header["strategy"]["name"], random.header["seed"]) == (3, "random", 3)
    assert own_cache in random.folder.parents
    again = launch(tmp_path / "b").random_search(run)
    assert again is not None
    assert (again.folder, again.header["created"]) == (random.folder, random.header["created"])
    smaller = launch(tmp_path / "c", budget=2)
    other = smaller.random_search(smaller.run())
    assert other is not None
    assert other.evaluations == 2
    assert facts(other)[: len(other.trials)] == facts(random)[: len(other.trials)]


def test_no_random_search_unless_it_is_listed(own_cache: Path, tmp_path: Path) -> None:
    """Only a run file that lists `random` among its baselines pays for it, and it is no baseline of the run itself."""
    plain = launch(tmp_path / "a", baselines=["base"])
    run = plain.run()
    assert plain.random_search(run) is None
    assert not (own_cache / "random").exists()
    assert [trial.name for trial in run.baselines] == ["base"]


def test_the_run_file_is_kept_with_the_run(tmp_path: Path) -> None:
    """The store holds the run file as it counted, so that problem and options can be had again."""
    run = launch(tmp_path / "a", baselines=["base"], budget=1).run()
    config = json.loads(json.dumps(run.header["config"]))
    assert RunFile.parse(config["run_file"]).seed == 3
    assert Path(config["root"]).is_absolute()
    assert run.header["strategy"]["options"] == "sobol"


def test_a_run_of_a_problem_without_models_is_a_starting_point_by_its_genomes(tmp_path: Path) -> None:
    """The front of an earlier run gives the very genomes it holds."""
    run = optimize(Quadratic(), Climber(), budget=12, out=tmp_path / "earlier")
    points = starting_points(Quadratic(), ["earlier"], tmp_path)
    assert [point.name for point in points] == [f"init:earlier:{p.trial}" for p in run.front.points]
    for found, point in zip(points, run.front.points, strict=True):
        assert point.genome is not None
        np.testing.assert_array_equal(found.genome, point.genome)


@pytest.mark.parametrize("entry", ["experts", "uniform", "nothing"])
def test_a_problem_without_models_has_no_experts(tmp_path: Path, entry: str) -> None:
    """Starting points that are models are refused where there are no models."""
    with pytest.raises(ConfigError, match=r"init: this problem starts from recipe files or run folders only"):
        starting_points(Quadratic(), [entry], tmp_path)


def test_a_run_without_a_front_is_no_starting_point(tmp_path: Path) -> None:
    """A run in which nothing the budget paid for could be scored has nothing to start from."""
    optimize(Quadratic(), Climber(), budget=3, out=tmp_path / "few")
    store = Run.open(tmp_path / "few")
    assert len(store.front) >= 1
    problem = Quadratic(fail=-1.0, with_baselines=False)
    with pytest.raises(RuntimeError, match="no candidate could be scored"):
        optimize(problem, Climber(), budget=3, out=tmp_path / "none")
    with pytest.raises(ConfigError, match="none has no front yet"):
        starting_points(problem, ["none"], tmp_path)
