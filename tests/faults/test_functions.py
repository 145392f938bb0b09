"""Objectives of a user's own that fail: a failed trial with its reason, or the end of a run in which nothing can be scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergeopt.strategy import Status
from mergeopt.study.run import Run
from tests.faults.commands import Commands, write
from tests.faults.repeats import everything

OWN = """
import math
import torch


def bias(model):
    return float(model.classifier.bias.detach().double().sum())


def sometimes(model, items, device):
    if int(abs(bias(model)) * 1e6) % 2:
        raise RuntimeError("odd, and I do not like it")
    return bias(model)


def sometimes_nan(model, items, device):
    return math.nan if int(abs(bias(model)) * 1e6) % 2 else bias(model)


def always(model, items, device):
    raise KeyError("no such thing")


def nothing(model, items, device):
    return None


def infinite(model, items, device):
    return torch.tensor(float("inf"))


def too_few(model, items, device):
    return [1.0, 2.0]


def leaves(model, items, device):
    raise SystemExit("leaving")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with functions of a user's own."""
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def with_function(name: str, **more: Any) -> list[Any]:
    """Return objectives: one of the problem's own, and a function."""
    return ["upright", {"name": "own", "function": f"own.py:{name}", "direction": "minimize", **more}]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sometimes", "objective 'own' raised RuntimeError: odd, and I do not like it (own.py:12)"),
        ("sometimes_nan", "objective 'own': expected from sometimes_nan one number, or a 1-D array of numbers, got nan"),
    ],
)
def test_a_function_that_fails_for_some_candidates_fails_those_trials(mergeopt: Commands, own: Path, name: str, reason: str) -> None:
    """Trials for which a function raises or returns NaN are FAILED with the reason, the search goes on, and it repeats and resumes."""
    write(own, objectives=with_function(name), budget=12)
    done = mergeopt(own, "run", "run.yaml")
    assert done.status == 0, done.err
    run = Run.open(own / "run")
    failed = [trial for trial in run.trials if not trial.ok]
    assert run.evaluations == 12
    assert 0 < len(failed) < 12
    assert {trial.error for trial in failed} == {reason}
    assert {trial.status for trial in failed} == {Status.FAILED}
    assert not {trial.number for trial in failed} & {point.trial for point in run.front.points}
    for budget, resume in ((5, []), (12, ["--resume"])):
        assert mergeopt(own, "run", "run.yaml", "--out", "pieces", "--budget", budget, *resume).status == 0
    assert [row[:10] for row in everything(own / "pieces")] == [row[:10] for row in everything(own / "run")]


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("always", {}, "objective 'own' raised KeyError: 'no such thing' (own.py:21)"),
        ("nothing", {}, "got None"),
        ("infinite", {}, "got inf"),
        ("too_few", {"items": "upright"}, "expected from too_few one number, or 450 numbers (one per item), got shape [2]"),
    ],
)
def test_a_function_that_always_fails_ends_the_run(mergeopt: Commands, own: Path, name: str, more: dict[str, Any], reason: str) -> None:
    """When no candidate can be scored the run ends with status 1 and the reason, not with an empty front."""
    write(own, objectives=with_function(name, **more), budget=40, strategy="random")
    done = mergeopt(own, "run", "run.yaml")
    assert done.status == 1, done
    assert "no candidate could be scored: all of the first 20 candidates failed" in done.err
    assert reason in done.err
    assert "Traceback" not in done.err
    assert len(json.loads(mergeopt(own, "front", "run", "--json").out)["points"]) == 0


def test_a_function_that_leaves_ends_the_run_and_keeps_what_was_stored(mergeopt: Commands, own: Path) -> None:
    """A function that exits ends the command with another status than 0; the run can be opened and reads as interrupted."""
    write(own, objectives=with_function("leaves"), budget=4)
    done = mergeopt(own, "run", "run.yaml")
    assert done.status != 0
    assert "Traceback" not in done.err
    assert Run.open(own / "run").status == "interrupted"
