"""Strategies that work on models: killed and resumed, exported and made again, and refused where they cannot work."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from mergeopt.config import RunFile, build_problem
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.study.run import Run
from tests.faults.commands import Child, Commands, listing, refused, stood, stored, wait_until, write
from tests.faults.repeats import everything, front

WEIGHTS = "model.safetensors"
LEARNING = {"evaluations": 12, "gradient_steps": 80}
BUDGETS: dict[str, Any] = {"evolver": 12, "evolver-joint": 12, "adamerging": LEARNING, "pareto-set": LEARNING}
LEARNERS = ("adamerging", "pareto-set")
KILLS = 10
NAN = float("nan")


@pytest.fixture(scope="module", params=list(BUDGETS))
def alone(request: pytest.FixtureRequest, mergeopt: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of each strategy that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    write(folder, strategy=request.param, budget=BUDGETS[request.param])
    done = mergeopt(folder, "run", "run.yaml")
    assert done.status == 0, done.err
    return folder


def learns(folder: Path) -> bool:
    """Return whether the run of a folder is a learner's."""
    return Run.open(folder / "run").header["strategy"]["name"] in LEARNERS


def first_step(child: Child, untold: int) -> int:
    """Return how many gradient steps a command told of first, `untold` where it told of none."""
    told = re.search(r"^learning: (\d+)/", child.said, re.MULTILINE)
    return untold if told is None else int(told.group(1))


def got_on(folder: Path, steps: int, trials: int) -> bool:
    """Return whether a run has so many trials, or learned beyond so many gradient steps."""
    return stored(folder) >= trials or stood(folder) > steps


def resume(mergeopt: Commands, cwd: Path, alone: Path) -> Child:
    """Go on with the run `run` of a folder, which has the run file of another."""
    return mergeopt.start(cwd, "run", alone / "run.yaml", "--out", "run", "--resume")


@pytest.mark.slow
def test_a_run_killed_ten_times_is_the_run_that_was_left_alone(alone: Path, mergeopt: Commands, tmp_path: Path) -> None:
    """SIGKILL before the first trial, while learning and while scoring leaves trials, records and front of the undisturbed run.

    A learner is stopped by SIGTERM too; whatever stopped it, it learns on from its stored state.
    """
    rng = random.Random(11)
    folder = tmp_path / "run"
    child = mergeopt.start(tmp_path, "run", alone / "run.yaml", "--out", "run")
    wait_until((folder / "run.db").exists, child)
    child.stop()
    hits, learned_on = int(child.wait().status == -signal.SIGKILL), 0
    for kill in range(1, KILLS):
        before, trials = stood(folder), stored(folder) + (rng.choice([0, 1, 1, 2]) if kill > 1 else 0)
        child = resume(mergeopt, tmp_path, alone)
        wait_until(partial(got_on, folder, before, trials), child)
        time.sleep(rng.uniform(0.0, 0.15))
        child.stop()
        hits += child.wait().status == -signal.SIGKILL
        assert first_step(child, before + 1) > before
        learned_on += before > 0
        if learned_on == 1 and before > 0:
            terminate_while_learning(resume(mergeopt, tmp_path, alone), folder)
    done = resume(mergeopt, tmp_path, alone).wait()
    assert done.status == 0, done.err
    assert hits >= KILLS - 2  # the last ones may find the run finished
    assert learned_on or not learns(alone)
    assert everything(folder) == everything(alone / "run")
    assert front(folder) == front(alone / "run")


def terminate_while_learning(child: Child, folder: Path) -> None:
    """Send SIGTERM to a learner once it has learned on, and check that it ends cleanly and forgets nothing that was stored."""
    before = stood(folder)
    wait_until(lambda: first_step(child, 0) > before, child)
    os.kill(child.pid, signal.SIGTERM)
    done = child.wait()
    assert done.status == 130, done
    assert "Traceback" not in done.err
    assert "stopped by SIGTERM" in done.err
    run = Run.open(folder)
    assert run.status == "interrupted"
    assert before <= stood(folder) <= run.gradient_steps > before


def test_exported_models_score_what_the_store_says_and_are_made_again(alone: Path, mergeopt: Commands, tmp_path: Path) -> None:
    """The knee, loaded by transformers alone, gives the stored values and records; so does the last trial, by the command's own word."""
    run = Run.open(alone / "run")
    knee, last = run.front.knee(), run.trials[-1].number
    for choice, to in ((["--knee"], "knee"), (["--trial", last], "last")):
        done = mergeopt(tmp_path, "export", alone / "run", *choice, "--to", to)
        assert done.status == 0, done.err
        assert "equal bit for bit" in done.out
    problem = build_problem(RunFile.load(alone / "run.yaml"), alone)
    assert isinstance(problem, MergeProblem)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "knee").eval()
    for objective in problem.objectives:
        assert isinstance(objective, TaskObjective)
        records = objective.task.records(model, "search", torch.device("cpu"))
        kept = run.records(knee.trial, "search", objective.info.name)
        assert objective.metric.aggregate(records) == knee.values[objective.info.name]
        assert sorted(kept) == sorted(records)
        for column in kept:
            np.testing.assert_array_equal(kept[column], records[column])


def test_a_run_that_was_moved_exports_the_same_models(alone: Path, mergeopt: Commands, tmp_path: Path) -> None:
    """With the run elsewhere and its old place gone, it exports the same bytes; an old recipe makes them with --map for its learned set."""
    last = Run.open(alone / "run").trials[-1].number
    moved = tmp_path / "moved"
    assert mergeopt(tmp_path, "export", alone / "run", "--trial", last, "--to", "old").status == 0
    assert mergeopt(tmp_path, "merge", "old/recipe.json", "--out", "again").status == 0
    shutil.move(alone / "run", moved)
    try:
        done = mergeopt(tmp_path, "export", moved, "--trial", last, "--to", "new")
        assert done.status == 0, done.err
        places = [f"--map=learned={place}" for place in (moved / "learned").glob("*")]
        if places:
            refused(mergeopt(tmp_path, "merge", "old/recipe.json", "--out", "none"), "cannot read the learned set", str(alone / "run"))
            assert not (tmp_path / "none").exists()
        done = mergeopt(tmp_path, "merge", "old/recipe.json", "--out", "mapped", *places)
        assert done.status == 0, done.err
    finally:
        shutil.move(moved, alone / "run")
    for name in ("again", "new", "mapped"):
        assert (tmp_path / name / WEIGHTS).read_bytes() == (tmp_path / "old" / WEIGHTS).read_bytes()


TIES_DENSITY = {"operator": "ties", "parameters": {"density": {"low": 0.1, "high": 1.0}}}
FEW = {"evaluations": 4, "gradient_steps": 4}
OWN = """\
import mergeopt


def bias(model, items, device):
    return float(model.classifier.bias[0])


def loss(model, items, device):
    return model.classifier.bias.square().sum()


@mergeopt.merge_operator("blunt", amount=mergeopt.Param.real(0.5, search=(0.0, 1.0)))
def blunt(deltas, *, amount):
    return amount * deltas.mean(dim=0)
"""
PLAIN = {"name": "own", "function": "own.py:bias", "direction": "minimize"}
GUIDED = {**PLAIN, "differentiable": "own.py:loss"}
ONE = {"name": "digits", "tasks": ["upright"]}

MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    ("evolver", {"problem": ONE}, "a population needs two or more experts, got one: upright; add experts"),
    ("evolver-joint", {"problem": ONE}, "a population needs two or more experts, got one: upright; add experts"),
    ("evolver", {"budget": 3}, "2 members and their first offspring need 4 evaluations, the budget has 3; raise it"),
    ({"name": "evolver", "scale": NAN}, {}, "scale: expected a number in [-10, 10], got nan"),
    ({"name": "evolver", "rate": 1.5}, {}, "rate: expected a number in [0, 1], got 1.5"),
    ({"name": "evolver", "mutation": "evolve"}, {}, "mutation: unknown 'evolve'; did you mean 'evolver'?"),
    ({"name": "evolver", "mutation": ["evolver"]}, {}, "mutation"),
    ({"name": "evolver", "mutation": "rand/1"}, {}, "mixes 4 different members, and there are 2: upright, turned; add experts"),
    ({"name": "evolver", "unit": "tensors"}, {}, "unit: unknown 'tensors'; did you mean 'tensor'?"),
    ({"name": "evolver", "fitness": "means"}, {}, "fitness: unknown kind 'means'; did you mean 'mean'?"),
    ({"name": "evolver", "update": "stedy"}, {}, "update: unknown 'stedy'; did you mean 'steady'?"),
    ({"name": "evolver", "reference": "unform"}, {}, "reference: unknown 'unform'; did you mean 'uniform'?"),
    ({"name": "evolver", "scael": 1}, {}, "strategy 'evolver' has no option 'scael'; did you mean 'scale'?"),
    (
        {"name": "evolver", "fitness": "pooled"},
        {"problem": {"name": "digits", "tasks": ["upright", "turned"], "metric": "macro_f1"}},
        "fitness: pooled needs means over items, and objective 'upright' is none; use mean",
    ),
    ({"name": "evolver-joint", "generations": 0}, {}, "generations: expected a whole number >= 1, got 0"),
    ({"name": "evolver-joint", "mutation": "current-to-best"}, {}, "use another mutation than current-to-best"),
    ({"name": "evolver-joint", "update": "steady"}, {}, "strategy 'evolver-joint' has no option 'update'"),
    ("adamerging", {"budget": 5}, "the budget must say for how long: budget: {evaluations: 5, gradient_steps: 300}"),
    ("adamerging", {"budget": {"evaluations": 5, "gradient_steps": 0}}, "expected 1 or more gradient steps in the budget, got 0"),
    ("adamerging", {"budget": {"evaluations": 5, "gradient_steps": 1.5}}, "budget.gradient_steps: expected a whole number, got 1.5"),
    (
        "adamerging",
        {"budget": {"evaluations": 5, "gradient_steps": -1}},
        "budget.gradient_steps: input should be greater than or equal to 0",
    ),
    (
        "adamerging",
        {"budget": {"evaluations": 5, "gradient_step": 3}},
        "unknown key 'budget.gradient_step'; did you mean 'gradient_steps'?",
    ),
    (
        "adamerging",
        {"merge": TIES_DENSITY},
        "its parameter 'density' has no useful gradient, so it cannot be learned; fix it with a number",
    ),
    ("adamerging", {"merge": {"operator": "own.py:blunt"}}, "its parameter 'amount' has no useful gradient, so it cannot be learned"),
    ("adamerging", {"objectives": ["upright", PLAIN]}, "objective 'own' has no differentiable loss; give a function's objective one"),
    (
        {"name": "adamerging", "loss": "kl"},
        {"objectives": ["upright", GUIDED]},
        "objective 'own' cannot give the loss 'kl'; it can give own",
    ),
    ({"name": "adamerging", "loss": {"uprigt": "kl"}}, {}, "loss: unknown objective 'uprigt'; did you mean 'upright'?"),
    ({"name": "adamerging", "loss": 3}, {}, "expected option 'loss' to be a name, or names by objective, got 3"),
    ({"name": "adamerging", "variant": "layerwise"}, {}, "unknown variant 'layerwise'; did you mean 'layer-wise'?"),
    ({"name": "adamerging", "learning_rate": 0}, {}, "expected option 'learning_rate' to be a finite number > 0, got 0"),
    ({"name": "adamerging", "weight": NAN}, {}, "expected option 'weight' to be a finite number, got nan"),
    ({"name": "adamerging", "clamp": [1, 0]}, {}, "expected option 'clamp' to have its lower bound first, got [1, 0]"),
    ({"name": "adamerging", "clamp": 3}, {}, "expected option 'clamp' to be [lowest, highest] or null, got 3"),
    ({"name": "adamerging", "batch": 0}, {}, "expected option 'batch' to be a whole number >= 1, got 0"),
    ({"name": "adamerging", "every": 0}, {}, "expected option 'every' to be a whole number >= 1, got 0"),
    ({"name": "adamerging", "evry": 1}, {}, "strategy 'adamerging' has no option 'evry'; did you mean 'every'?"),
    ("pareto-set", {"budget": 5}, "the budget must say for how long: budget: {evaluations: 5, gradient_steps: 300}"),
    ("pareto-set", {"budget": {"evaluations": 5, "gradient_steps": 0}}, "give the budget gradient_steps: 300, say"),
    ("pareto-set", {"problem": ONE}, "takes 2 to any number objectives, the problem has 1; choose another strategy"),
    ("pareto-set", {"objectives": ["upright", PLAIN]}, "objective 'own' has no differentiable loss; give a function's objective one"),
    (
        "pareto-set",
        {"merge": TIES_DENSITY},
        "its parameter 'density' has no useful gradient, so it cannot be learned; fix it with a number",
    ),
    (
        {"name": "pareto-set", "loss": "kl"},
        {"objectives": ["upright", GUIDED]},
        "objective 'own' cannot give the loss 'kl'; it can give own",
    ),
    ({"name": "pareto-set", "loss": "distance"}, {"objectives": ["upright", GUIDED]}, "objective 'own' cannot give the loss 'distance'"),
    ({"name": "pareto-set", "start": "hooi"}, {"objectives": ["upright", GUIDED]}, "'own' names none; give it one, or start: zero"),
    ({"name": "pareto-set", "preset": "papr"}, {}, "unknown preset 'papr'; did you mean 'paper'?"),
    ({"name": "pareto-set", "rank": 0}, {}, "expected option 'rank' to be a whole number >= 1, got 0"),
    ({"name": "pareto-set", "targets": "("}, {}, "option 'targets' is no regular expression: '('"),
    ({"name": "pareto-set", "targets": "bias"}, {}, "targets: 'bias' is found in no name of a matrix; matrices are named like"),
    ({"name": "pareto-set", "phi": "cubic"}, {}, "unknown phi 'cubic'; known: linear, mlp, quadratic"),
    ({"name": "pareto-set", "scalarizer": "stchh"}, {}, "unknown scalarizer 'stchh'; did you mean 'stch'?"),
    ({"name": "pareto-set", "smoothing": 0}, {}, "expected option 'smoothing' to be a finite number > 0, got 0"),
    ({"name": "pareto-set", "normalise": "yes"}, {}, "expected option 'normalise' to be true or false, got 'yes'"),
    ({"name": "pareto-set", "alpha": NAN}, {}, "expected option 'alpha' to be a finite number > 0, got nan"),
    ({"name": "pareto-set", "start": "hoi"}, {}, "unknown start 'hoi'; did you mean 'hooi'?"),
    ({"name": "pareto-set", "points": 2.5}, {}, "expected option 'points' to be a whole number >= 1, got 2.5"),
    ({"name": "pareto-set", "pints": 3}, {}, "strategy 'pareto-set' has no option 'pints'; did you mean 'points'?"),
]


@pytest.mark.parametrize(("strategy", "changes", "said"), MISTAKES)
def test_what_a_strategy_cannot_do_is_refused(
    mergeopt: Commands, tmp_path: Path, strategy: Any, changes: dict[str, Any], said: str
) -> None:
    """Options, budgets, merges and objectives that a strategy cannot use are named with the remedy, and nothing is written."""
    (tmp_path / "own.py").write_text(OWN)
    learner = (strategy if isinstance(strategy, str) else strategy["name"]) in LEARNERS
    write(tmp_path, **{"strategy": strategy, "budget": FEW if learner else 16, **changes})
    refused(mergeopt(tmp_path, "run", "run.yaml"), said)
    assert listing(tmp_path) == ["own.py", "run.yaml"]


def test_a_merge_that_equal_shares_are_not_part_of_is_refused(mergeopt: Commands, tmp_path: Path) -> None:
    """Members are judged by their merge with equal shares, so a range without them is refused before anything is written."""
    weight = {"weight": {"low": 0.6, "high": 0.9}}
    write(tmp_path, strategy="evolver-joint", merge={"operator": "task_arithmetic", "parameters": weight})
    refused(mergeopt(tmp_path, "run", "run.yaml"), "evolver-joint", "weight/model/upright: expected a value in [0.6, 0.9], got 0.5")
    assert listing(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize("strategy", list(BUDGETS))
def test_experts_of_another_architecture_are_refused(mergeopt: Commands, models: Path, tmp_path: Path, strategy: str) -> None:
    """An expert with other tensors than the base has is named, and nothing is written."""
    held = load_file(models / "turned" / WEIGHTS)
    narrow = {name: tensor.clone() for name, tensor in held.items() if ".layer.1." not in name}
    assert 0 < len(narrow) < len(held)
    save_file(narrow, models / "turned" / WEIGHTS, metadata={"format": "pt"})
    sources: dict[str, Any] = {"problem": None, "base": "models/base", "experts": ["models/upright", "models/turned"]}
    write(tmp_path, **sources, strategy=strategy, budget=FEW, objectives=[{**PLAIN, "function": "own.py:bias"}])
    (tmp_path / "own.py").write_text(OWN)
    before = listing(tmp_path)
    refused(mergeopt(tmp_path, "run", "run.yaml"), "these models do not fit together", "turned", "only models of one architecture")
    assert listing(tmp_path) == before


OTHER_OPTIONS: dict[str, Any] = {
    "evolver": {"rate": 0.4},
    "evolver-joint": {"generations": 3},
    "adamerging": {"every": 9},
    "pareto-set": {"rank": 2},
}


def test_resuming_with_other_options_or_another_budget_is_refused(alone: Path, mergeopt: Commands, tmp_path: Path) -> None:
    """Other options and, where it decides what is searched, another budget are refused by name; the stored run stays as it is."""
    name = Run.open(alone / "run").header["strategy"]["name"]
    before = everything(alone / "run")
    again = ["run", "run.yaml", "--out", alone / "run", "--resume"]
    write(tmp_path, strategy={"name": name, **OTHER_OPTIONS[name]}, budget=BUDGETS[name])
    refused(mergeopt(tmp_path, *again), "cannot resume", f"another strategy options (stored '{name}', now")
    if learns(alone):
        write(tmp_path, strategy=name, budget={**LEARNING, "evaluations": 13})
        refused(mergeopt(tmp_path, *again), "cannot resume", "12 evaluations and 80 gradient steps", "keep that, or start a run in another")
    assert everything(alone / "run") == before


def test_resuming_a_finished_run_with_other_gradient_steps_is_refused(alone: Path, mergeopt: Commands, tmp_path: Path) -> None:
    """A run that learned for so many steps is none that learned for more."""
    if not learns(alone):
        pytest.skip("it does not learn")
    write(tmp_path, strategy=Run.open(alone / "run").header["strategy"]["name"], budget={**LEARNING, "gradient_steps": 90})
    refused(mergeopt(tmp_path, "run", "run.yaml", "--out", alone / "run", "--resume"), "cannot resume", "80 gradient steps")


def evolved(alone: Path) -> dict[str, Any]:
    """Return the recipe of a run's trial with the longest lineage, as JSON; empty where there is none."""
    recipes = [trial.recipe for trial in Run.open(alone / "run").trials]
    found = [recipe.to_json() for recipe in recipes if recipe is not None and recipe.lineage is not None]
    return max(found, key=lambda data: len(data["lineage"]["steps"]), default={})


@pytest.fixture(scope="module")
def lineage(mergeopt: Commands, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recipe of a model that evolved, as text."""
    folder = tmp_path_factory.mktemp("lineage")
    write(folder, strategy="evolver", budget=6, baselines=[])
    assert mergeopt(folder, "run", "run.yaml").status == 0
    return json.dumps(evolved(folder))


STEP = [0, [[1, 0]], 0.5, 0.5, 1, "evolver", "parameter"]


def changed(place: int, value: Any) -> list[Any]:
    """Return one step with another entry."""
    return [value if index == place else entry for index, entry in enumerate(STEP)]


LINEAGES: list[tuple[str, Any, str]] = [
    ("steps", [changed(5, "evolve")], "step 0 of the lineage: unknown mutation 'evolve'; did you mean 'evolver'?"),
    ("steps", [changed(5, None)], "step 0: expected mutation to be text, got None"),
    ("steps", [changed(6, "tensors")], "unknown unit 'tensors'; did you mean 'tensor'?"),
    ("steps", [changed(1, [[1, 1]])], "version 1 of slot 1 has not been made yet"),
    ("steps", [changed(1, [[2, 0]])], "version 0 of slot 2 has not been made yet"),
    ("steps", [changed(1, [[1, -1]])], "version -1 of slot 1 has not been made yet"),
    ("steps", [changed(1, [[0, 0]])], "got a reference to slot 0 itself"),
    ("steps", [changed(1, [])], "expected 1 reference(s) for mutation 'evolver', got 0"),
    ("steps", [changed(1, 3)], "expected references to be [slot, version] pairs, got 3"),
    ("steps", [changed(0, 2)], "expected slot to be one of 0..1, got 2"),
    ("steps", [changed(0, True)], "expected slot to be one of 0..1, got True"),
    ("steps", [changed(2, NAN)], "step 0: expected scale to be a finite number, got nan"),
    ("steps", [changed(2, "1")], "step 0: expected scale to be a finite number, got '1'"),
    ("steps", [changed(2, 10**400)], "step 0: expected scale to be a finite number"),
    ("steps", [changed(3, 1.5)], "expected rate to be in [0, 1], got 1.5"),
    ("steps", [changed(4, 2**63)], "expected seed to be a whole number in 0..2^63-1"),
    ("steps", [changed(4, 0.5)], "expected seed to be a whole number in 0..2^63-1, got 0.5"),
    ("steps", [[]], "expected [slot, references, scale, rate, seed, mutation, unit], got []"),
    ("steps", {}, "expected steps to be a list, got dict"),
    ("steps", [STEP] * 20_000 + [changed(1, [[1, 7]])], "step 20000 of the lineage: version 7 of slot 1 has not been made yet"),
    ("members", ["turned", "upright"], "its lineage is of turned, upright, its experts are upright, turned"),
    ("members", ["upright"], "damaged"),
    ("members", ["upright", "upright"], "expected members to be a list of different names"),
    ("members", 3, "expected members to be a list of different names, got 3"),
    ("format", 2, "expected a lineage of format 1, got format 2"),
    ("more", 1, "expected the keys format, members, steps"),
]


@pytest.mark.parametrize(("key", "value", "said"), LINEAGES, ids=[said[:60] for *_, said in LINEAGES])
def test_a_damaged_lineage_is_refused(mergeopt: Commands, lineage: str, tmp_path: Path, key: str, value: Any, said: str) -> None:
    """A lineage that says what cannot be is refused by the step, and nothing is written."""
    data = json.loads(lineage)
    data["lineage"][key] = value
    if key == "members":
        data["lineage"]["steps"] = []
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "model"), said)
    assert listing(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize("value", [None, 3, [], {}, "x"])
def test_a_lineage_that_is_none_is_refused(mergeopt: Commands, lineage: str, tmp_path: Path, value: Any) -> None:
    """What stands in place of a lineage is refused."""
    (tmp_path / "recipe.json").write_text(json.dumps({**json.loads(lineage), "lineage": value}))
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "model"), "lineage")
    assert listing(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "version", "weight"],
    ids=["brackets", "version", "weight"],
)
def test_a_recipe_beyond_all_bounds_is_refused(mergeopt: Commands, lineage: str, tmp_path: Path, text: str) -> None:
    """Numbers that no float holds and nesting that no parser follows are damages like any other."""
    data = json.loads(lineage)
    if text == "version":
        data["operator"]["version"] = float("inf")
    if text == "weight":
        data["arguments"]["weight"]["values"]["model"]["upright"] = 10**400
    (tmp_path / "recipe.json").write_text(json.dumps(data) if text in ("version", "weight") else text)
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "model"), "recipe")
    assert listing(tmp_path) == ["recipe.json"]


def test_an_offspring_that_is_not_finite_is_not_written(mergeopt: Commands, lineage: str, tmp_path: Path) -> None:
    """A step whose mixture overflows makes no model."""
    data = json.loads(lineage)
    data["lineage"]["steps"] = [changed(2, 1e300)]
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    done = mergeopt(tmp_path, "merge", "recipe.json", "--out", "model")
    assert done.status == 1
    assert "not finite" in done.err
    assert listing(tmp_path) == ["recipe.json"]
