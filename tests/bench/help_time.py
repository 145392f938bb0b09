"""CPU seconds of `mergeopt --help` in a fresh process, as JSON: the wait before every command."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys

RUNS = 5


def main() -> None:
    """Measure several times and print the fastest and all."""
    seconds = []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "mergeopt", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(json.dumps({"cpu_seconds": min(seconds), "all": seconds, "python": platform.python_version(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
