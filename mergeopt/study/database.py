"""The SQLite file of a run folder: its schema, how it is opened, and what its errors mean to a user."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergeopt.errors import StoreError

__all__ = ["DATABASE", "database_errors", "open_reader", "open_writer", "transaction"]

DATABASE = "run.db"
APPLICATION = 0x6D6F7074  # "mopt", in SQLite's application_id
SCHEMA_VERSION = 1
LOGS = ("-wal", "-journal")  # of write-ahead logging, and of a run killed while it folded that log into the file
MAGIC = b"SQLite format 3\x00"
NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "afs")
SCHEMA = """
CREATE TABLE header (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE trials (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, genome BLOB, recipe TEXT, key TEXT NOT NULL,
    status TEXT NOT NULL, error TEXT, duplicate_of INTEGER REFERENCES trials(number), charged INTEGER NOT NULL,
    seconds TEXT NOT NULL, created REAL NOT NULL
);
CREATE TABLE scores (
    trial INTEGER NOT NULL REFERENCES trials(number), part TEXT NOT NULL, objective TEXT NOT NULL,
    value REAL NOT NULL, standard_error REAL, items INTEGER NOT NULL, PRIMARY KEY (trial, part, objective)
) WITHOUT ROWID;
CREATE TABLE records (
    trial INTEGER NOT NULL REFERENCES trials(number), part TEXT NOT NULL, objective TEXT NOT NULL, columns BLOB NOT NULL,
    PRIMARY KEY (trial, part, objective)
);
CREATE TABLE rescores (
    trial INTEGER NOT NULL REFERENCES trials(number), part TEXT NOT NULL, error TEXT, seconds TEXT NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (trial, part)
) WITHOUT ROWID;
"""
LATER = """
CREATE TABLE IF NOT EXISTS censored (
    trial INTEGER PRIMARY KEY REFERENCES trials(number), by INTEGER NOT NULL, estimates TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS learner (
    one INTEGER PRIMARY KEY CHECK (one = 1), trials INTEGER NOT NULL, steps INTEGER NOT NULL, plain TEXT NOT NULL, arrays BLOB NOT NULL
);
"""


def open_writer(folder: Path) -> sqlite3.Connection:
    """Open or create the database of a folder for its one writer; every commit reaches the disk before it returns.

    Write-ahead logging lets others read meanwhile; where it cannot be had (network file systems) a rollback journal and an exclusive
    lock are used instead.

    Raises:
        StoreError: the file is damaged or foreign, or the folder cannot be written.
    """
    path = folder / DATABASE
    with database_errors(folder):
        _check_magic(path)
        connection = sqlite3.connect(path, isolation_level=None, timeout=10.0)
        try:
            _check_schema(connection, path)
            _set_journal(connection, folder)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            if _tables(connection) == 0:
                _create(connection)
            elif connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise StoreError(_damaged(path, "SQLite's quick_check failed"))
            connection.executescript(LATER)
        except (StoreError, sqlite3.Error):
            connection.close()
            raise
        return connection


@contextmanager
def open_reader(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open the database read-only, also while it is written and in folders that cannot be written.

    Raises:
        StoreError: there is no run, or its file is damaged, foreign or locked.
    """
    path = folder / DATABASE
    if not path.is_file():
        raise StoreError(f"{folder} holds no run (expected the file {DATABASE} in it); give the folder that `mergeopt run` wrote to")
    with database_errors(folder), tempfile.TemporaryDirectory(prefix="mergeopt-") as scratch:
        _check_magic(path)
        try:
            connection = _connect_read_only(path)
        except sqlite3.OperationalError:
            if not any(path.with_name(DATABASE + log).exists() for log in LOGS):
                raise
            connection = sqlite3.connect(_copy(path, Path(scratch)), isolation_level=None, timeout=10.0)
        try:
            _check_schema(connection, path)
            connection.execute("BEGIN")  # one snapshot, whatever a writer does meanwhile
            yield connection
        finally:
            connection.close()


@contextmanager
def transaction(connection: sqlite3.Connection, folder: Path) -> Iterator[None]:
    """Commit what happens inside, all or nothing."""
    with database_errors(folder):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors into a `StoreError` that names the folder and says what to do."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise StoreError(_operational(folder, error)) from error
    except sqlite3.DatabaseError as error:
        raise StoreError(_damaged(folder / DATABASE, str(error))) from error


def _operational(folder: Path, error: sqlite3.OperationalError | OSError) -> str:
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if "is full" in text or "disk I/O error" in text or code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"cannot write to the run folder {folder}: {text} (the disk is full, a quota is reached, or it failed); "
            "all earlier trials are kept: free space, then go on with --resume"
        )
    if "readonly" in text or code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write to the run folder {folder}: {text}; make it writable, or give another folder"
    if "locked" in text:
        return f"the run folder {folder} is held by a process that writes it ({text}); read its front.json, or wait for it to end"
    return f"cannot open the run folder {folder}: {text}; check that it is a folder that can be read and written, or give another"


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}); restore it from a copy, try `sqlite3 {path.name} .recover`, or start again in another folder"


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
    except FileNotFoundError:
        return
    if head and head != MAGIC:
        raise StoreError(_damaged(path, f"expected an SQLite file, got one that begins with {head[:8]!r}"))


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    if _tables(connection) == 0:
        return
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION:
        raise StoreError(f"{path} is an SQLite database, but not one of mergeopt (application_id {application:#x}); give another folder")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has the layout version {version}, this mergeopt reads version {SCHEMA_VERSION}; "
            "use the mergeopt version that wrote it (named in its header), or start again in another folder"
        )


def _set_journal(connection: sqlite3.Connection, folder: Path) -> None:
    mode = "delete"
    if not _on_network(folder):
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=DELETE")


def _create(connection: sqlite3.Connection) -> None:
    connection.executescript(
        f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id={APPLICATION}; PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
    )


def _tables(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _connect_read_only(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10.0)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _copy(path: Path, scratch: Path) -> Path:
    """Copy a database with its logs to where they can be played: what a killed run left, in a folder that cannot or must not be written."""
    for name in (DATABASE, *(DATABASE + log for log in LOGS)):
        if path.with_name(name).exists():
            shutil.copyfile(path.with_name(name), scratch / name)
    return scratch / DATABASE


def _on_network(folder: Path) -> bool:
    """Whether the folder lies on a network file system, as far as Linux tells; write-ahead logging needs shared memory."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    place, best, kind = os.fspath(folder.resolve()) + "/", "", ""
    for line in lines:
        fields = line.split(" ")
        mount = fields[1].replace("\\040", " ").rstrip("/") + "/"
        if place.startswith(mount) and len(mount) >= len(best):
            best, kind = mount, fields[2]
    return kind.startswith(NETWORK)
