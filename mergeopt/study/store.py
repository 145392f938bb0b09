"""The store of a run: one SQLite file, one writer, one transaction per trial.

Every number comes back exactly; of a score's zero alone SQLite forgets the sign.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergeopt.errors import StoreError
from mergeopt.evaluation.censored import Censored
from mergeopt.problem import Evaluation
from mergeopt.recipe import ordered_json
from mergeopt.strategy import State, Status
from mergeopt.study.database import DATABASE, database_errors, open_reader, open_writer, transaction
from mergeopt.study.lock import FolderLock
from mergeopt.study.records import pack, unpack
from mergeopt.study.trial import Trial
from mergeopt.task import Part, Records, Score

__all__ = ["Learned", "Store", "read_header", "read_records", "read_run"]

Header = dict[str, Any]
PARTIAL = "partial"  # in the place of a part: scores of the items that a dropped candidate was measured on


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """Where a learner stands.

    Args:
        trials: stored when it stood there.
        steps: gradient steps taken.
        state: what the strategy needs to go on.
    """

    trials: int
    steps: int
    state: State


class Store:
    """The one writer of a run folder.

    Args:
        folder: made where it is missing.

    Raises:
        StoreError: another process writes it, it cannot be written, or its file is damaged or foreign.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with database_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        try:
            self._connection = open_writer(folder)
        except StoreError:
            self._lock.release()
            raise

    def header(self) -> Header:
        """Return what `set` stored, by key."""
        with database_errors(self.folder):
            return _load_header(self._connection, self.folder)

    def trials(self) -> list[Trial]:
        """Return all trials, by number."""
        with database_errors(self.folder):
            return _load_trials(self._connection, self.folder)

    def set(self, values: Mapping[str, Any]) -> None:
        """Store JSON-able values under their keys, in one transaction."""
        rows = [(key, ordered_json(value)) for key, value in values.items()]
        with transaction(self._connection, self.folder):
            self._connection.executemany("INSERT INTO header VALUES (?, ?) ON CONFLICT(key) DO UPDATE SET value=excluded.value", rows)

    def append(self, trial: Trial) -> None:
        """Store a trial with its search scores, or what a race knows of it, and their records, in one transaction.

        Args:
            trial: its number is the next one; scores are stored unless it is a duplicate.
        """
        genome = None if trial.genome is None else np.ascontiguousarray(trial.genome, dtype="<f8").tobytes()
        row = (trial.number, trial.kind, trial.name, genome, trial.recipe_json, trial.key, trial.status.value, trial.error)
        more = (trial.duplicate_of, int(trial.charged), ordered_json(dict(trial.seconds)), trial.created)
        with transaction(self._connection, self.folder):
            self._connection.execute("INSERT INTO trials VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row + more)
            if trial.duplicate_of is None and trial.ok:
                self._insert_scores(trial.number, "search", trial.scores["search"])
            if trial.duplicate_of is None and trial.censored is not None:
                known = (trial.number, trial.censored.by, ordered_json(dict(trial.censored.estimates)))
                self._connection.execute("INSERT INTO censored VALUES (?, ?, ?)", known)
                self._insert_scores(trial.number, PARTIAL, trial.censored.scores)

    def records(self, trial: int) -> dict[str, Records]:
        """Return the per-item columns of a trial's search scores, by objective name."""
        with database_errors(self.folder):
            rows = self._connection.execute("SELECT objective, columns FROM records WHERE trial=? AND part='search'", (trial,)).fetchall()
        return {objective: unpack(columns) for objective, columns in rows}

    def rescore(self, trial: int, part: Part, evaluation: Evaluation) -> None:
        """Store what became of scoring a stored trial on another part, in one transaction.

        Args:
            trial: a number that is stored already.
            part: which data.
            evaluation: scores, or an error.
        """
        row = (trial, part, evaluation.error, ordered_json(dict(evaluation.seconds)), time.time())
        with transaction(self._connection, self.folder):
            self._connection.execute("INSERT OR REPLACE INTO rescores VALUES (?, ?, ?, ?, ?)", row)
            self._connection.execute("DELETE FROM scores WHERE trial=? AND part=?", (trial, part))
            self._connection.execute("DELETE FROM records WHERE trial=? AND part=?", (trial, part))
            if evaluation.error is None:
                self._insert_scores(trial, part, evaluation.scores)

    def learn(self, learned: Learned) -> None:
        """Store where a learner stands, in place of where it stood before, in one transaction."""
        arrays = {name: value for name, value in learned.state.items() if isinstance(value, np.ndarray)}
        plain = {name: value for name, value in learned.state.items() if name not in arrays}
        row = (learned.trials, learned.steps, ordered_json(plain), pack(arrays))
        with transaction(self._connection, self.folder):
            self._connection.execute("INSERT OR REPLACE INTO learner VALUES (1, ?, ?, ?, ?)", row)

    def learned(self) -> Learned | None:
        """Return where the learner of this run stood last, None where nothing was learned.

        Raises:
            StoreError: what is stored is damaged.
        """
        with database_errors(self.folder):
            row = self._connection.execute("SELECT trials, steps, plain, arrays FROM learner").fetchone()
        if row is None:
            return None
        try:
            return Learned(row[0], row[1], {**json.loads(row[2]), **unpack(row[3])})
        except (ValueError, TypeError) as error:
            raise _unreadable(self.folder, "the learner's state", error) from error

    def close(self) -> None:
        """Fold the log into the one file, where no reader is in the way, and let others write."""
        with contextlib.suppress(sqlite3.Error):  # the log is as good as the file; only its tidiness is at stake
            self._connection.execute("PRAGMA journal_mode=DELETE")
        self._connection.close()
        self._lock.release()

    def _insert_scores(self, trial: int, part: str, scores: Mapping[str, Score]) -> None:
        for name, score in scores.items():
            error = score.standard_error
            known = error if error is not None and math.isfinite(error) else None
            row = (trial, part, name, float(score.value), None if known is None else float(known), int(score.items))
            self._connection.execute("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?)", row)
            if score.records:
                self._connection.execute("INSERT INTO records VALUES (?, ?, ?, ?)", (trial, part, name, pack(score.records)))


def read_header(folder: Path) -> Header | None:
    """Return the header of a run folder without writing anything; None where no run was stored.

    Raises:
        StoreError: the file is damaged, foreign or locked.
    """
    path = folder / DATABASE
    with database_errors(folder):
        if not path.exists() or (path.stat().st_size == 0 and not path.with_name(DATABASE + "-wal").exists()):
            return None
    with open_reader(folder) as connection:
        return _load_header(connection, folder) or None


def read_run(folder: Path) -> tuple[Header, list[Trial]]:
    """Return header and trials of a run folder, as of one moment, without writing anything.

    Raises:
        StoreError: there is no run, or its file is damaged, foreign or locked.
    """
    with open_reader(folder) as connection:
        header = _load_header(connection, folder)
        if "problem" not in header:
            raise StoreError(f"{folder} holds a run that ended before it began; start it again")
        return header, _load_trials(connection, folder)


def read_records(folder: Path, trial: int, part: Part, objective: str) -> dict[str, npt.NDArray[np.generic]]:
    """Return the per-item columns of a trial's score, empty when it has none.

    Raises:
        StoreError: there is no run, or its file is damaged, foreign or locked.
    """
    with open_reader(folder) as connection:
        query = "SELECT columns FROM records WHERE trial=? AND part=? AND objective=?"
        row = connection.execute(query, (trial, part, objective)).fetchone()
    return {} if row is None else unpack(row[0])


def _load_header(connection: sqlite3.Connection, folder: Path) -> Header:
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return {}
    rows = connection.execute("SELECT key, value FROM header").fetchall()
    try:
        return {key: json.loads(value) for key, value in rows}
    except ValueError as error:
        raise _unreadable(folder, "the header", error) from error


def _load_trials(connection: sqlite3.Connection, folder: Path) -> list[Trial]:
    scores: dict[int, dict[str, dict[str, Score]]] = {}
    query = "SELECT trial, part, objective, value, standard_error, items FROM scores"
    for number, part, name, value, standard_error, items in connection.execute(query):
        scores.setdefault(number, {}).setdefault(part, {})[name] = Score(value, standard_error, items)
    trials: list[Trial] = []
    dropped = _load_censored(connection, folder, scores)
    failed = dict(connection.execute("SELECT trial, error FROM rescores WHERE part='report' AND error IS NOT NULL"))
    for row in connection.execute("SELECT * FROM trials ORDER BY number"):
        try:
            trial = _trial(row, scores, dropped)
            trials.append(replace(trial, report_error=failed.get(trial.origin)))
        except (ValueError, TypeError) as error:
            raise _unreadable(folder, f"trial {row[0]}", error) from error
        if trials[-1].number != len(trials) - 1:
            raise _unreadable(folder, f"trial {len(trials) - 1}", "it is missing")
    return trials


def _load_censored(connection: sqlite3.Connection, folder: Path, scores: Mapping[int, dict[str, dict[str, Score]]]) -> dict[int, Censored]:
    """Return what is known of dropped candidates, taking their partial scores out of the others; none in files from before races."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name='censored'").fetchone():
        return {}
    found = {}
    for number, by, estimates in connection.execute("SELECT trial, by, estimates FROM censored"):
        try:
            found[number] = Censored(by, json.loads(estimates), scores[number].pop(PARTIAL))
        except (ValueError, KeyError) as error:
            raise _unreadable(folder, f"trial {number}", error) from error
    return found


def _trial(row: tuple[Any, ...], scores: Mapping[int, Mapping[Any, Mapping[str, Score]]], dropped: Mapping[int, Censored]) -> Trial:
    number, kind, name, genome, recipe, key, status, error, duplicate_of, charged, seconds, created = row
    known: Literal["asked", "init", "baseline"] = kind
    origin = number if duplicate_of is None else duplicate_of
    return Trial(
        number=number,
        kind=known,
        name=name,
        genome=None if genome is None else np.frombuffer(genome, dtype="<f8").astype(np.float64),
        recipe_json=recipe,
        key=key,
        status=Status(status),
        error=error,
        duplicate_of=duplicate_of,
        charged=bool(charged),
        seconds=json.loads(seconds),
        created=created,
        scores=scores.get(origin, {}),
        censored=dropped.get(origin),
    )


def _unreadable(folder: Path, what: str, why: object) -> StoreError:
    return StoreError(f"{folder / DATABASE}: {what} cannot be read ({why}); restore the run folder from a copy, or start again in another")
