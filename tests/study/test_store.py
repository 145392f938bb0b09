"""The store: exactness, damage, foreign files, locks, and reading where nothing can be written."""

from __future__ import annotations

import shutil
import sqlite3
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopt.errors import StoreError
from mergeopt.problem import Evaluation
from mergeopt.strategy import Status
from mergeopt.study.database import DATABASE
from mergeopt.study.optimize import optimize
from mergeopt.study.records import pack, unpack
from mergeopt.study.run import Run
from mergeopt.study.store import Store, read_records, read_run
from mergeopt.study.trial import Trial
from mergeopt.task import Score
from tests.study.analytic import Climber, Quadratic, facts

FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with a finished run."""
    optimize(Quadratic(), Climber(), budget=30, out=tmp_path / "run")
    return tmp_path / "run"


@settings(max_examples=12, deadline=None)
@given(genome=st.lists(FLOATS, min_size=1, max_size=5), value=FLOATS, error=FLOATS)
def test_numbers_are_stored_exactly(tmp_path_factory: pytest.TempPathFactory, genome: list[float], value: float, error: float) -> None:
    """Genomes, values and standard errors come back with the bits they had, but for the sign of a score of zero."""
    folder = tmp_path_factory.mktemp("run")
    trial = Trial(0, "asked", "x", np.array(genome), None, "k", Status.OK, charged=True, scores={"search": {"a": Score(value, error, 3)}})
    store = Store(folder)
    store.set({"problem": {}})
    store.append(trial)
    store.close()
    (read,) = read_run(folder)[1]
    assert read.genome is not None
    assert read.genome.tobytes() == np.array(genome).tobytes()
    score = read.scores["search"]["a"]
    assert score.standard_error is not None
    assert [struct.pack("d", x) for x in (score.value, score.standard_error)] == [struct.pack("d", x) for x in (value + 0.0, error + 0.0)]


@pytest.mark.parametrize(
    "column",
    [
        np.array([1.5, np.nan, -0.0]),
        np.arange(6, dtype=np.int8).reshape(3, 2),
        np.array(["zero", "é"]),
        np.zeros(0),
        np.array([True, False]),
    ],
)
def test_record_columns_come_back_as_they_were(column: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    """Numbers and text keep type, shape and bits."""
    found = unpack(pack({"one": column, "two": np.ones(2)}))
    assert list(found) == ["one", "two"]
    assert found["one"].dtype == column.dtype
    assert found["one"].shape == column.shape
    assert found["one"].tobytes() == column.tobytes()


def test_objects_are_no_record_column() -> None:
    """Python objects are refused, since only pickle could store them."""
    with pytest.raises(StoreError, match="'odd': expected numbers or fixed-width text, got object"):
        pack({"odd": np.array([{}, {}])})


@pytest.mark.parametrize("frame", [b"", b"garbage", pack({"a": np.ones(3)})[:-4]])
def test_damaged_records_are_named(frame: bytes) -> None:
    """A damaged frame is a StoreError."""
    with pytest.raises(StoreError, match="records are damaged"):
        unpack(frame)


def test_a_trial_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    """When one score of a trial cannot be stored, nothing of the trial is."""
    store = Store(tmp_path)
    store.set({"problem": {}})
    bad = {"a": Score(1.0), "b": Score(2.0, records={"odd": np.array([{}])})}
    with pytest.raises(StoreError):
        store.append(Trial(0, "asked", "x", None, None, "k", Status.OK, scores={"search": bad}))
    store.append(Trial(0, "asked", "y", None, None, "k", Status.OK, scores={"search": {"a": Score(1.0)}}))
    store.close()
    (trial,) = read_run(tmp_path)[1]
    assert (trial.name, trial.values()) == ("y", {"a": 1.0})


def test_scoring_a_part_again_replaces_what_was_there(tmp_path: Path) -> None:
    """A second score on a part takes the place of the first, records included, and an error leaves none."""
    store = Store(tmp_path)
    store.set({"problem": {}})
    store.append(Trial(0, "asked", "x", None, None, "k", Status.OK, scores={"search": {"a": Score(1.0)}}))
    for value in (2.0, 3.0):
        store.rescore(0, "report", Evaluation({"a": Score(value, records={"v": np.array([value])})}))
    assert store.trials()[0].values("report") == {"a": 3.0}
    assert read_records(tmp_path, 0, "report", "a")["v"].tolist() == [3.0]
    store.rescore(0, "report", Evaluation({}, error="lost"))
    store.close()
    assert read_run(tmp_path)[1][0].values("report") is None


def test_two_writers_are_refused_in_one_process_too(tmp_path: Path) -> None:
    """A second writer is refused while the first is open, and welcome afterwards."""
    first = Store(tmp_path)
    with pytest.raises(StoreError, match="is being written by process"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_a_lock_file_that_was_left_behind_does_not_block(tmp_path: Path) -> None:
    """The lock is the system's, not the file's existence."""
    (tmp_path / "run.lock").write_text('{"pid": 1, "host": "elsewhere"}')
    Store(tmp_path).close()


@pytest.mark.parametrize("content", [b"not a database at all", b"SQLite format 3\x00" + b"\xff" * 5000])
def test_files_that_are_no_database_are_refused(tmp_path: Path, content: bytes) -> None:
    """Garbage in place of the store is a StoreError with what to do, for readers and writers, and stays as it is."""
    (tmp_path / "run.db").write_bytes(content)
    with pytest.raises(StoreError, match=r"run\.db is damaged .* another folder"):
        Run.open(tmp_path)
    for resume in (True, False):
        with pytest.raises(StoreError, match=r"run\.db is damaged"):
            optimize(Quadratic(), Climber(), budget=8, out=tmp_path, resume=resume)
    assert (tmp_path / "run.db").read_bytes() == content


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_truncated_files_are_refused(finished: Path, share: float) -> None:
    """A store that lost its end is not resumed."""
    path = finished / "run.db"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(StoreError, match=r"run\.db is damaged"):
        optimize(Quadratic(), Climber(), budget=40, out=finished, resume=True)


def test_databases_of_others_and_of_other_versions_are_refused(finished: Path, tmp_path: Path) -> None:
    """Another program's database and another layout version are told apart from damage."""
    with sqlite3.connect(finished / "run.db") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StoreError, match="layout version 99, this mergeopt reads version 1"):
        Run.open(finished)
    with sqlite3.connect(tmp_path / "run.db") as connection:
        connection.execute("CREATE TABLE recipes (cake TEXT)")
    connection.close()
    with pytest.raises(StoreError, match="not one of mergeopt"):
        optimize(Quadratic(), Climber(), budget=40, out=tmp_path)


def test_rows_that_cannot_be_read_are_named(finished: Path) -> None:
    """A trial whose stored fields are damaged, or that is missing, is named."""
    shutil.copytree(finished, finished.with_name("gap"))
    for folder, statement in (
        (finished, "UPDATE trials SET seconds='{' WHERE number=5"),
        (finished.with_name("gap"), "DELETE FROM trials WHERE number=5"),
    ):
        with sqlite3.connect(folder / "run.db") as connection:
            connection.execute(statement)
        connection.close()
        with pytest.raises(StoreError, match="trial 5 cannot be read"):
            Run.open(folder)


def test_a_run_that_ended_before_it_began_can_be_begun_again(tmp_path: Path) -> None:
    """An empty store, as a process killed at once leaves it, counts as no run, for new and resumed runs alike."""
    for resume in (True, False):
        folder = tmp_path / str(resume)
        Store(folder).close()
        with pytest.raises(StoreError, match="ended before it began"):
            Run.open(folder)
        assert optimize(Quadratic(), Climber(), budget=3, out=folder, resume=resume).evaluations == 3


def test_a_log_left_by_a_killed_writer_is_read(finished: Path, tmp_path: Path) -> None:
    """What a killed process committed is read from its log, also when only file and log were copied."""
    store = Store(finished)
    store.set({"note": "in the log only"})
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("run.db", "run.db-wal"):
        shutil.copyfile(finished / name, copy / name)
    store.close()
    assert Run.open(copy).header["note"] == "in the log only"
    assert facts(Run.open(copy)) == facts(Run.open(finished))


def test_a_journal_left_by_a_killed_writer_is_rolled_back(finished: Path, tmp_path: Path) -> None:
    """A run killed while its log was being folded into the file leaves a hot journal; it is read as it was before, and can be resumed."""
    whole = read_run(finished)
    connection = sqlite3.connect(finished / DATABASE, isolation_level=None)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA cache_size=1")  # so that the changed pages go to the file before anything is committed
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE trials SET name = name || 'x'")
    connection.execute("UPDATE records SET columns = zeroblob(5000)")
    (tmp_path / "killed").mkdir()
    for file in finished.glob(DATABASE + "*"):
        shutil.copyfile(file, tmp_path / "killed" / file.name)
    connection.close()
    assert (tmp_path / "killed" / (DATABASE + "-journal")).stat().st_size > 0
    header, trials = read_run(tmp_path / "killed")
    assert header == whole[0]
    assert [trial.name for trial in trials] == [trial.name for trial in whole[1]]
    store = Store(tmp_path / "killed")
    assert [trial.name for trial in store.trials()] == [trial.name for trial in whole[1]]
    store.close()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A run folder that cannot be made is a StoreError that names it."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=r"file.* give another"):
            optimize(Quadratic(), Climber(), budget=3, out=place)
        with pytest.raises(StoreError, match="holds no run"):
            Run.open(place)


def test_opening_a_run_writes_nothing(finished: Path) -> None:
    """Reading leaves folder and file as they were."""
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    Run.open(finished).front_json()
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_records_of_trials_that_do_not_exist_are_refused(finished: Path) -> None:
    """Asking for the records of an unknown trial says which there are."""
    with pytest.raises(StoreError, match="has no trial 99; it has 0 to 33"):
        Run.open(finished).records(99, "search", "distance")
    assert Run.open(finished).records(0, "search", "closeness") == {}
