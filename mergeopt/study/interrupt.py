"""SIGINT and SIGTERM as a wish to stop: the first lets the candidate at hand finish, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupt", "Interrupted"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run after everything was stored; `Run.open(folder)` has it, resuming goes on.

    It is a KeyboardInterrupt, so that a script that runs several searches stops, and not only the first of them.

    Args:
        folder: of the run.
        reason: name of the signal.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{reason} stopped the run in {folder}; what it found is stored, and it resumes from there")
        self.folder, self.reason = folder, reason


class Interrupt:
    """Context in which `requested` tells whether a signal came; previous handlers are restored on leaving.

    Outside the main thread Python gives no handlers; signals are then left to whoever owns it.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
