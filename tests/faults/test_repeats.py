"""The same run file and seed give the same run, however often it is stopped and wherever it runs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergeopt.study.run import Run
from tests.faults.commands import Commands, refused, stored, wait_for_trials, write
from tests.faults.repeats import everything

STRATEGIES: list[Any] = [{"name": "nsga2", "pop_size": 8}, "random", "sobol"]
NAMES = ["nsga2", "random", "sobol"]
BUDGET = 24
KILLS = 10


@pytest.fixture(scope="module", params=STRATEGIES, ids=NAMES)
def alone(request: pytest.FixtureRequest, mergeopt: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of each strategy that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    write(folder, strategy=request.param, budget=BUDGET)
    done = mergeopt(folder, "run", "run.yaml")
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands of another process, whose text hashes differ."""
    commands = Commands(tmp_path_factory.mktemp("printed"), {"PYTHONHASHSEED": "4242"})
    yield commands
    commands.close()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_from_another_folder_and_process(alone: Path, elsewhere: Commands, tmp_path: Path) -> None:
    """Genomes, values, standard errors and per-item records are equal bit for bit, whatever the working directory and the text hashes."""
    done = elsewhere(tmp_path, "run", alone / "run.yaml", "--out", "deep/er/run")
    assert done.status == 0, done.err
    assert everything(tmp_path / "deep" / "er" / "run") == everything(alone / "run")


def test_another_seed_gives_another_run(mergeopt: Commands, finished: Path, tmp_path: Path) -> None:
    """The seed decides what is asked."""
    done = mergeopt(tmp_path, "run", finished / "run.yaml", "--out", "run", "--seed", "6", "--budget", "4")
    assert done.status == 0, done.err
    ours, theirs = ([t.genome.tobytes() for t in Run.open(f / "run").trials if t.genome is not None] for f in (tmp_path, finished))
    assert not set(ours) & set(theirs)


def command(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start the installed command itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "mergeopt", *map(str, arguments)]
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    """Return when a run folder holds so many trials."""
    end = time.monotonic() + 90.0
    while stored(folder) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_killed_ten_times_is_the_run_that_was_left_alone(alone: Path, mergeopt: Commands, tmp_path: Path) -> None:
    """SIGKILL at ten random moments, each time resumed, leaves trials and front of the uninterrupted run, bit for bit."""
    rng = random.Random(7)
    folder = tmp_path / "run"
    process = command(tmp_path, "run", alone / "run.yaml", "--out", "run")
    until(process, folder, rng.choice([1, 3, 5]))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert Run.open(folder).status == "interrupted"
    assert mergeopt(tmp_path, "front", "run").status == 0
    hits = 1
    for _ in range(KILLS - 1):
        child = mergeopt.start(tmp_path, "run", alone / "run.yaml", "--out", "run", "--resume")
        wait_for_trials(folder, stored(folder) + rng.choice([0, 1, 1, 2, 3]), child)
        time.sleep(rng.uniform(0.0, 0.15))
        child.stop()
        hits += child.wait().status == -signal.SIGKILL
    done = mergeopt(tmp_path, "run", alone / "run.yaml", "--out", "run", "--resume")
    assert done.status == 0, done.err
    assert hits >= KILLS - 2  # the last ones may find the run finished
    assert len(Run.open(folder).header["segments"]) > 3
    assert everything(folder) == everything(alone / "run")
    assert Run.open(folder).front_json() == Run.open(alone / "run").front_json()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_cleanly(mergeopt: Commands, finished: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end with status 130, the front so far, no traceback, and how to resume; resuming completes the run."""
    process = command(tmp_path, "run", finished / "run.yaml", "--out", "run", "--budget", "2000")
    until(process, tmp_path / "run", 9)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"stopped by {number.name}; go on with: mergeopt run {finished / 'run.yaml'} --out run" in err
    assert "--resume" in err
    assert "front" in out
    assert "trial" in out
    run = Run.open(tmp_path / "run")
    assert run.status == "interrupted"
    assert 5 <= run.evaluations < 100
    budget = max(16, run.evaluations + 2)
    done = mergeopt(tmp_path, "run", finished / "run.yaml", "--out", "run", "--resume", "--budget", budget)
    assert done.status == 0, done.err
    resumed, plain = everything(tmp_path / "run"), everything(finished / "run")
    assert [row[:10] for row in resumed[: len(plain)]] == [row[:10] for row in plain]


def test_a_larger_budget_extends_a_run_as_if_it_had_had_it_from_the_start(mergeopt: Commands, finished: Path, tmp_path: Path) -> None:
    """Sixteen evaluations made of six and ten are the sixteen of one run, report scores of the last front included."""
    for budget in (6, 16):
        resume = ["--resume"] if budget == 16 else []
        done = mergeopt(tmp_path, "run", finished / "run.yaml", "--out", "run", "--budget", budget, *resume)
        assert done.status == 0, done.err
    ours, theirs = everything(tmp_path / "run"), everything(finished / "run")
    assert [row[:10] for row in ours] == [row[:10] for row in theirs]
    assert [row[10]["search"] for row in ours] == [row[10]["search"] for row in theirs]
    assert Run.open(tmp_path / "run").front_json() == Run.open(finished / "run").front_json()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 6}, "another seed (stored 5, now 6)"),
        ({"strategy": "random"}, "another strategy (stored 'nsga2', now 'random')"),
        ({"strategy": {"name": "nsga2", "pop_size": 12}}, "another strategy options"),
        ({"batch": 4}, "another batch (stored 8, now 4)"),
        ({"merge": {"operator": "ties"}}, "another problem"),
        ({"merge": {"operator": "task_arithmetic", "parameters": {"weight": {"low": 0.0, "high": 1.5}}}}, "another problem"),
        ({"problem": {"name": "digits", "tasks": ["turned", "upright"]}}, "another problem"),
        ({"init": ["uniform"], "budget": 20}, "is asked 'asked', but now init 'init:uniform' is in its place"),
        ({"baselines": ["uniform"], "budget": 20}, "is baseline 'base', but now baseline 'uniform' is in its place"),
    ],
)
def test_resuming_with_something_else_is_refused_and_changes_no_trial(
    mergeopt: Commands, finished: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Another seed, strategy, batch, problem or starting point is refused by name, and the stored trials stay as they are."""
    write(tmp_path, **changes)
    before = everything(finished / "run")
    refused(mergeopt(tmp_path, "run", "run.yaml", "--out", finished / "run", "--resume"), "cannot resume", said)
    assert everything(finished / "run") == before


def test_resuming_nothing_is_refused(mergeopt: Commands, tmp_path: Path) -> None:
    """There must be a run to resume."""
    write(tmp_path)
    refused(mergeopt(tmp_path, "run", "run.yaml", "--resume"), "there is no run to resume in run")
    assert not (tmp_path / "run").exists()
