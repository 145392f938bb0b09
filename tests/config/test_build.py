"""Problems as run files describe them, against the same problems made by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergeopt.config import RunFile, build_operator, build_pool, build_problem
from mergeopt.errors import ConfigError
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.problem import Problem
from mergeopt_problems.digits import digits

OPERATOR = """
from mergeopt import Param, merge_operator


@merge_operator("halfway", share=Param.real(0.5, low=0.0, high=1.0, search=(0.0, 1.0)))
def halfway(deltas, *, share):
    return deltas.mean(0) * share
"""
BASE = {"problem": {"name": "digits", "tasks": ["upright", "turned"]}, "device": "cpu"}


def fingerprint(problem: Problem) -> str:
    """Return what determines all scores."""
    return problem.info.fingerprint


def build(root: Path = Path(), **changes: Any) -> MergeProblem:
    """Return the problem of a run file with these keys."""
    problem = build_problem(RunFile.parse({**BASE, **changes}), root)
    assert isinstance(problem, MergeProblem)
    return problem


def test_a_run_file_makes_the_problem_that_a_script_makes() -> None:
    """Run file and API give problems of one fingerprint."""
    materials = digits(tasks=["upright", "turned"])
    made = MergeProblem(Pool(materials.base, materials.experts), "ties", materials.objectives, groups="layer", device="cpu", name="digits")
    assert fingerprint(build(merge={"operator": "ties", "groups": "layer"})) == fingerprint(made)


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ({"operator": "linear", "statistics": {"items": 9}}, "statistics: operator 'linear' measures nothing of the experts"),
        ({"operator": "regmean", "statistics": {"labels": "data"}}, "statistics: labels: operator 'regmean' uses no labels"),
    ],
)
def test_settings_of_no_effect_on_a_measurement_are_refused(merge: dict[str, Any], said: str) -> None:
    """How experts are measured is said for operators that measure them, and whose labels for Fisher information alone."""
    with pytest.raises(ConfigError, match=said):
        build(merge=merge)


def test_memory_changes_no_score() -> None:
    """How candidates are kept in memory is part of the problem, and not of what determines its scores."""
    layers, reusing = build(memory={"scoring": "layers"}), build(memory={"prefixes": "1GiB"})
    assert (layers.scoring, reusing.scoring, layers.prefixes, reusing.prefixes) == ("layers", "candidates", None, 2**30)
    assert fingerprint(layers) == fingerprint(reusing) == fingerprint(build())


@pytest.mark.parametrize(
    "changes",
    [
        {"merge": {"operator": "linear"}},
        {"merge": {"groups": "layer"}},
        {"merge": {"exclude": ["classifier"]}},
        {"merge": {"parameters": {"weight": {"low": 0.0, "high": 0.7}}}},
        {"model": {"dtype": "bfloat16"}},
        {"problem": {"name": "digits", "tasks": ["turned", "upright"]}},
        {"problem": {"name": "digits", "tasks": ["upright", "turned"], "metric": "macro_f1"}},
        {"objectives": ["turned", "upright"]},
        {"objectives": ["upright"]},
    ],
)
def test_whatever_changes_scores_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    """Operator, groups, exclusions, ranges, type, models, metric and objectives all count."""
    assert fingerprint(build(**changes)) != fingerprint(build())


def test_what_does_not_change_scores_does_not_change_the_fingerprint() -> None:
    """Seed, budget, strategy, batch, baselines and folder are no part of a problem."""
    assert fingerprint(build(seed=9, budget=3, strategy="random", batch=3, baselines=[], out="x")) == fingerprint(build())


def test_paths_are_relative_to_the_run_file_and_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the models beside a run file make the same problem, wherever one stands."""
    materials = digits(tasks=["upright", "turned"])
    for name, source in {"base": materials.base, **materials.experts}.items():
        shutil.copytree(source, tmp_path / "files" / name)
    (tmp_path / "files" / "own.py").write_text("def size(model, items, device): return 1.0\n")
    objective = {"name": "size", "function": "own.py:size", "direction": "minimize"}
    sources = {"base": "base", "experts": {"upright": "upright", "turned": "turned"}, "objectives": [objective]}
    monkeypatch.chdir(tmp_path)
    relative = build_problem(RunFile.parse(sources), Path("files"))
    assert isinstance(relative, MergeProblem)
    found = fingerprint(relative)
    monkeypatch.chdir("/")
    absolute = build_problem(RunFile.parse({**sources, "base": materials.base}), tmp_path / "files")
    assert found == fingerprint(absolute)
    assert [Path(source.path).is_absolute() for source in relative.decode(np.full(2, 0.5)).experts] == [True, True]
    assert build_pool(RunFile.parse(sources), tmp_path / "files").expert_names == ("upright", "turned")


def test_an_operator_of_ones_own_is_searched_like_any_other(tmp_path: Path) -> None:
    """`operator: FILE.py:NAME` gives a problem whose space has the function's parameters."""
    (tmp_path / "own.py").write_text(OPERATOR)
    problem = build(tmp_path, merge={"operator": "own.py:halfway"})
    assert problem.info.space.names == ("share/model",)
    recipe = problem.decode(np.array([0.25]))
    assert recipe.operator == "halfway"
    assert recipe.arguments["share"].values == {"model": 0.25}


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        ("own.py:half", r"defines no 'half'; did you mean 'halfway'\?"),
        ("own.py:plain", "is no merge operator; decorate the function"),
        ("absent.py:halfway", "no such file"),
    ],
)
def test_what_is_no_operator_is_refused(tmp_path: Path, operator: str, said: str) -> None:
    """A missing file or name, and a function that was not decorated, are refused."""
    (tmp_path / "own.py").write_text(OPERATOR + "\n\ndef plain(deltas):\n    return deltas.mean(0)\n")
    with pytest.raises(ConfigError, match=said):
        build_operator(RunFile.parse({**BASE, "merge": {"operator": operator}}), tmp_path)


def test_a_function_may_share_the_items_of_another_objective(tmp_path: Path) -> None:
    """`items: NAME` hands the items of the problem's own objective to a function; a constraint is kept."""
    (tmp_path / "own.py").write_text("def count(model, items, device): return [1.0] * len(items)\n")
    own = {
        "name": "count",
        "function": "own.py:count",
        "items": "turned",
        "direction": "maximize",
        "constraint": {"min": 0.5},
        "worst": 0.0,
    }
    problem = build(tmp_path, objectives=["upright", own])
    info = problem.info.objectives[1]
    assert (info.name, info.direction, info.constraint, info.worst) == ("count", "maximize", (0.5, None), 0.0)
    (evaluation,) = problem.evaluate(problem.baselines()[:1], "search")
    assert evaluation.scores["count"].items == 450
    assert evaluation.scores["count"].value == 1.0
