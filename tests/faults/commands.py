"""Commands of `mergeopt` as child processes, and what the tests of faults ask of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SMALL: Mapping[str, Any] = {
    "problem": {"name": "digits", "tasks": ["upright", "turned"]},
    "merge": {"operator": "task_arithmetic", "parameters": {"weight": {"low": 0.0, "high": 1.0}}},
    "strategy": {"name": "nsga2", "pop_size": 8},
    "budget": 16,
    "seed": 5,
    "device": "cpu",
    "out": "run",
}
"""A search of two objectives whose candidates take about 0.1 s."""


@dataclass(frozen=True)
class Done:
    """How a command ended: exit status (negative: the signal that killed it) and what it printed."""

    status: int
    out: str
    err: str


class Child:
    """A command at work.

    Args:
        pid: of the process.
        out: file of its standard output.
        err: file of its standard error.
        answers: where the server tells its end.
    """

    def __init__(self, pid: int, out: Path, err: Path, answers: IO[str]) -> None:
        self.pid = pid
        self._out, self._err, self._answers = out, err, answers
        self._done: Done | None = None

    @property
    def said(self) -> str:
        """What it has printed on standard error so far."""
        return self._err.read_text()

    @property
    def ended(self) -> bool:
        """Whether it has ended, by itself or not."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return self._done is not None

    def stop(self) -> None:
        """End it if it has not ended: a failed test may have left it at work."""
        if self._done is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> Done:
        """Return how it ended, once it has."""
        if self._done is None:
            status = json.loads(self._answers.readline())["status"]
            self._done = Done(status, self._out.read_text(), self._err.read_text())
        return self._done


class Commands:
    """Starts commands one after the other, in processes forked from one whose imports are done.

    Args:
        folder: for the printed output.
        environment: of the server, besides this process's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._last: Child | None = None
        path = os.pathsep.join(str(ROOT / name) for name in ("", "strategies", "problems"))
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forkserver.py"))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._requests, self._answers = self._server.stdin, self._server.stdout
        assert "ready" in json.loads(self._answers.readline())

    def start(self, cwd: Path, *arguments: object, limit: int | None = None, memory: int | None = None) -> Child:
        """Start `mergeopt ARGUMENTS` in a folder; no file may grow beyond `limit`, nor its allocations by more than `memory`, in bytes."""
        number = next(self._numbers)
        out, err = self._folder / f"{number}.out", self._folder / f"{number}.err"
        request = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd),
            "out": str(out),
            "err": str(err),
            "limit": limit,
            "memory": memory,
        }
        if self._last is not None:
            self._last.stop()
        out.touch()
        err.touch()
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        self._last = Child(json.loads(self._answers.readline())["pid"], out, err, self._answers)
        return self._last

    def __call__(self, cwd: Path, *arguments: object, limit: int | None = None, memory: int | None = None) -> Done:
        """Run `mergeopt ARGUMENTS` in a folder to its end."""
        return self.start(cwd, *arguments, limit=limit, memory=memory).wait()

    def close(self) -> None:
        """End the server."""
        if self._last is not None:
            self._last.stop()
        self._requests.close()
        self._server.wait(timeout=30)
        self._answers.close()


def write(folder: Path, **changes: Any) -> Path:
    """Write `run.yaml`, the small run file, with other values for some keys (None leaves a key out), and return its path."""
    data = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return folder / "run.yaml"


def stored(folder: Path) -> int:
    """Return how many trials a run folder holds, 0 where there is no run yet."""
    return _number(folder, "SELECT count(*) FROM trials")


def stood(folder: Path) -> int:
    """Return how many gradient steps the learner of a run folder had taken when its state was stored last, 0 where none is stored."""
    return _number(folder, "SELECT coalesce(max(steps), 0) FROM learner")


def _number(folder: Path, query: str) -> int:
    if not (folder / "run.db").exists():
        return 0
    try:
        connection = sqlite3.connect(f"{(folder / 'run.db').as_uri()}?mode=ro", uri=True, timeout=5.0)
        try:
            return int(connection.execute(query).fetchone()[0])
        finally:
            connection.close()
    except sqlite3.OperationalError:  # being made, or just left by a killed writer
        return 0


def wait_until(what: Callable[[], bool], child: Child, seconds: float = 60.0) -> None:
    """Return when something is so, or the command says that it is done, or has ended."""
    until = time.monotonic() + seconds
    while not what() and "done (" not in child.said and not child.ended:
        assert time.monotonic() < until, child.said
        time.sleep(0.01)


def wait_for_trials(folder: Path, count: int, child: Child, seconds: float = 60.0) -> None:
    """Return when a run folder holds so many trials, or the run is done."""
    wait_until(lambda: stored(folder) >= count, child, seconds)


def refused(done: Done, *texts: str) -> None:
    """Check that a command ended as a user's mistake: status 2, these texts in its message, no traceback, no output."""
    assert done.status == 2, done
    for text in texts:
        assert text in done.err, done.err
    assert "Traceback" not in done.err
    assert "unexpected" not in done.err
    assert done.out == ""


def listing(folder: Path) -> list[str]:
    """Return all paths below a folder, hidden ones too, relative to it and sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
