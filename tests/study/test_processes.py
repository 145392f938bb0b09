"""Runs as real processes: killed, signalled, out of disk, and two on one folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mergeopt.errors import StoreError
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt.study.snapshot import Progress
from tests.study.analytic import Climber, Quadratic, facts

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the script that makes runs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read what a process tells until a line begins with the text."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"the process ended without telling {text!r}: {process.communicate()}")


def test_a_run_killed_at_random_moments_and_resumed_is_the_uninterrupted_run(tmp_path: Path) -> None:
    """Two dozen SIGKILLs lose nothing: trials and front are those of a run that was left alone."""
    output, errors = start("kill", tmp_path / "killed", 60, 0.01, 24).communicate(timeout=50)
    hits = re.search(r"killed (\d+)", output)
    assert hits is not None, errors
    assert int(hits[1]) >= 5
    alone = optimize(Quadratic(fail=0.8), Climber(), budget=60, seed=3, out=tmp_path / "alone")
    killed = Run.open(tmp_path / "killed")
    assert killed.status == "finished"
    assert len(killed.header["segments"]) > 5
    assert facts(killed) == facts(alone)
    assert killed.front_json() == alone.front_json()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_cleanly_and_it_resumes(tmp_path: Path, number: signal.Signals) -> None:
    """The first signal ends a run as interrupted with its front, which resuming completes."""
    process = start("run", tmp_path / "run", 5000, 0.005)
    wait_for(process, "search 12")
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert re.search(r"^interrupted [1-9]", output, re.MULTILINE)
    run = Run.open(tmp_path / "run")
    assert (run.status, run.header["reason"]) == ("interrupted", number.name)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
    assert run.header["budget"] == 5000
    resumed = optimize(Quadratic(fail=0.8), Climber(), budget=run.evaluations + 3, seed=3, out=tmp_path / "run", resume=True)
    alone = optimize(Quadratic(fail=0.8), Climber(), budget=run.evaluations + 3, seed=3, out=tmp_path / "alone")
    assert facts(resumed) == facts(alone)


def test_others_read_a_run_while_it_is_written_and_cannot_write_it(tmp_path: Path) -> None:
    """While a process writes a run it can be opened, reads as running, and a second writer is refused by the first one's pid."""
    process = start("run", tmp_path / "run", 5000, 0.005)
    try:
        wait_for(process, "search 5")
        run = Run.open(tmp_path / "run")
        assert run.status == "running"
        assert run.evaluations >= 5
        assert len(run.front) >= 1
        with pytest.raises(StoreError, match=f"written by process {process.pid}"):
            optimize(Quadratic(fail=0.8), Climber(), budget=5000, seed=3, out=tmp_path / "run", resume=True)
    finally:
        process.kill()
        process.communicate()
    assert Run.open(tmp_path / "run").status == "interrupted"


def test_a_full_disk_ends_the_run_with_a_clear_error_and_keeps_the_trials(tmp_path: Path) -> None:
    """When no more can be written the run says which folder and what to do, and resumes once there is room."""
    output, errors = start("full", tmp_path / "run", 3000, 0.0, 500_000).communicate(timeout=40)
    assert re.search(r"StoreError: cannot write to the run folder .*run: .*free space, then go on with --resume", output), errors
    kept = Run.open(tmp_path / "run")
    assert kept.status == "interrupted"
    assert kept.evaluations > 8
    budget = kept.evaluations + 5
    resumed = optimize(Quadratic(fail=0.8), Climber(), budget=budget, seed=3, out=tmp_path / "run", resume=True)
    assert facts(resumed) == facts(optimize(Quadratic(fail=0.8), Climber(), budget=budget, seed=3, out=tmp_path / "alone"))


def test_signals_are_left_alone_outside_the_main_thread_and_restored_inside(tmp_path: Path) -> None:
    """A run in a thread works without handlers, and a run in the main thread gives the previous handlers back."""
    before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(optimize(Quadratic(), Climber(), budget=5, out=tmp_path / "thread")))
    thread.start()
    thread.join()
    optimize(Quadratic(), Climber(), budget=5, out=tmp_path / "main")
    assert runs[0].status == "finished"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """Two interrupts while one candidate is evaluated raise KeyboardInterrupt, and the run can be read as interrupted."""

    def twice(progress: Progress) -> None:
        if progress.evaluations == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        optimize(Quadratic(), Climber(), budget=50, out=tmp_path, progress=twice)
    run = Run.open(tmp_path)
    assert (run.status, run.evaluations) == ("interrupted", 3)
