"""Run as a process of its own by the tests: makes one run, or kills one again and again until it is finished."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from mergeopt.errors import StoreError
from mergeopt.problem import Problem
from mergeopt.study.interrupt import Interrupted
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt.study.snapshot import Progress
from tests.study.analytic import Climber, Quadratic
from tests.study.quiz import Quiz


def run(folder: Path, budget: int, seconds: float, rule: str | None = None) -> None:
    """Make or resume the run, telling every step on standard output; with a rule it is a race."""

    def tell(progress: Progress) -> None:
        print(progress.phase, progress.evaluations, flush=True)

    resume = (folder / "run.db").exists()
    problem: Problem = Quadratic(seconds=seconds, fail=0.8)
    racing = None
    if rule is not None:
        from tests.study.test_racing import RULES

        kinds, racing = RULES[rule]
        problem = Quiz(kinds, seconds=seconds, fail=0.8)
    try:
        optimize(problem, Climber(), budget=budget, seed=3, out=folder, resume=resume, racing=racing, progress=tell)
    except Interrupted:
        print("stopped", flush=True)
    found = Run.open(folder)
    print(found.status, len(found.front), flush=True)


def kill_until_finished(folder: Path, budget: int, seconds: float, kills: int, rule: str | None = None) -> None:
    """Kill children at random moments, starting them again on the same folder; let the last one end."""
    rng = random.Random(0)
    hits = 0
    for attempt in range(kills + 1):
        pid = os.fork()
        if pid == 0:
            run(folder, budget, seconds, rule)
            os._exit(0)
        if attempt < kills:
            time.sleep(rng.uniform(0.0, 0.12))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        hits += os.WIFSIGNALED(status)
    print("killed", hits, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill_until_finished(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]), *sys.argv[6:7])
    elif sys.argv[1] == "full":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]), int(sys.argv[5])))
        try:
            run(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        except StoreError as error:
            print("StoreError:", error, flush=True)
    else:
        run(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
