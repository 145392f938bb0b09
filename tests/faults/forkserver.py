"""Run as a process of its own by the tests: a command line whose imports are done, forking one `mergeopt` process per request.

Requests and answers are JSON lines. A request has `arguments`, `cwd`, `out` and `err` (files for the standard streams) and may have
`limit`, the largest size in bytes that a file may grow to, and `memory`, by how many bytes its allocations may grow. The answers are the
child's `pid`, at once, and its `status` when it ends.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any, NoReturn

import mergeopt.__main__

sys.excepthook = mergeopt.__main__._defect  # before typer is imported, as in a process of its own

import torch  # noqa: E402
from transformers import AutoConfig, AutoImageProcessor, ViTForImageClassification  # noqa: E402

import mergeopt.cli.listing  # noqa: E402
import mergeopt.cli.models  # noqa: E402
import mergeopt.cli.search  # noqa: E402
import mergeopt.report.plot  # noqa: E402
from mergeopt import registry  # noqa: E402
from mergeopt.memory import status_bytes  # noqa: E402

LOADED = (AutoConfig, AutoImageProcessor, ViTForImageClassification)  # transformers imports them when they are first named
PLUGINS = [registry.load(kind, name) for kind in registry.GROUPS for name in registry.names(kind)]


def child(request: dict[str, Any]) -> NoReturn:
    """Be the `mergeopt` process of a request, to the end."""
    for stream, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY)):
        os.dup2(os.open(path, flags | (os.O_CREAT if stream else 0), 0o644), stream)
    os.chdir(request["cwd"])
    if request.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    if request.get("memory") is not None:
        most = (status_bytes("VmData") or 0) + request["memory"]
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        status = mergeopt.__main__.main(request["arguments"])
    except BaseException as error:  # noqa: BLE001 (what the interpreter does at the end of a program)
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Answer requests until standard input ends."""
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
