"""The `mergeopt` command: turns errors into one or two lines and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from mergeopt.errors import MergeoptError, UserError

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 the work failed, 2 a user's mistake, 130 interrupted.

    Args:
        arguments: without the program's name; the process's own by default. `--debug` may stand anywhere and shows tracebacks.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not debug:
        sys.excepthook = _defect
    try:
        from mergeopt.cli import app  # here, so that an interrupt while it is imported is one too

        status = app(args=given, prog_name="mergeopt", standalone_mode=True)
    except MergeoptError as error:
        if debug:
            raise
        print(f"mergeopt: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except (MemoryError, RuntimeError, OSError) as error:
        from mergeopt.evaluation.shortage import is_out_of_memory

        if debug or not is_out_of_memory(error):
            raise
        print(f"mergeopt: memory ran out ({' '.join(str(error).split()) or 'no more to be had'}); what was stored is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        print("mergeopt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return status if isinstance(status, int) else 0


def _defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line what no part of mergeopt foresaw."""
    print(f"mergeopt: unexpected {kind.__name__}: {error}; run it again with --debug for the traceback", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
