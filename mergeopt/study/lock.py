"""One writer per run folder: a lock that the system takes back when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from mergeopt.errors import StoreError

__all__ = ["FolderLock", "is_locked"]

NAME = "run.lock"
PATIENCE = 0.5  # seconds; a reader that asks whether a run is alive holds a shared lock for some microseconds


class FolderLock:
    """An exclusive lock on a run folder, held until `release`.

    Args:
        folder: an existing folder.

    Raises:
        StoreError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"cannot write to the run folder {folder}: {error.strerror}; give a folder that can be written") from error
        if not self._acquired():
            owner = os.pread(self._fd, 4096, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise StoreError(
                f"the run folder {folder} is being written by {_describe(owner)}; wait for it, stop it, or give another folder"
            )
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError as error:
            self.release()
            raise StoreError(f"cannot write to the run folder {folder}: {error.strerror}; free space, then try again") from error

    def release(self) -> None:
        """Let others write; the file stays, since removing it would open a race."""
        os.close(self._fd)

    def _acquired(self) -> bool:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.02)
            except OSError:  # file systems without flock: SQLite's own exclusive lock is what remains
                return True
            else:
                return True


def is_locked(folder: Path) -> bool:
    """Return whether some process is writing the run folder."""
    try:
        fd = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        return False
    finally:
        os.close(fd)


def _describe(owner: str) -> str:
    try:
        data = json.loads(owner)
        return f"process {data['pid']} on {data['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
