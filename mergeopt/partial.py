"""Folders that are written under another name until they are whole, and what processes that died have left of theirs."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

__all__ = ["partial_folder"]

PREFIX = ".partial-"
DIGITS = 8


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder to write in, which is removed in the end unless it was renamed; those of dead writers are removed first.

    A writer keeps its folder locked, and the system takes the lock back however the process dies. Where the file system has no locks,
    nothing that was left is removed.

    Args:
        parent: folder of that folder, made where it is missing.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f"{PREFIX}{uuid.uuid4().hex[:DIGITS]}"
    with ExitStack() as held:
        with ExitStack() as door, suppress(OSError):  # one at a time: a folder that is made but not locked yet is nobody's leftover
            door.callback(os.close, _locked(parent, fcntl.LOCK_EX))
            _remove_abandoned(parent)
            partial.mkdir()
            held.callback(os.close, _locked(partial, fcntl.LOCK_EX))
        partial.mkdir(exist_ok=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for left in sorted(parent.glob(PREFIX + "[0-9a-f]" * DIGITS)):
        with suppress(OSError), ExitStack() as held:  # locked: its writer lives
            held.callback(os.close, _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB))
            shutil.rmtree(left, ignore_errors=True)


def _locked(folder: Path, how: int) -> int:
    """Lock a folder, and return the descriptor that holds the lock until it is closed.

    Raises:
        OSError: another process holds it, or it cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
