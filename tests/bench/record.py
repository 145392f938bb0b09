"""Runs the benchmark scripts and keeps what they say, in one file per device: tests/bench/results/cpu-NAME.json or cuda-NAME.json.

    python tests/bench/record.py [--device cuda] [--force]

A file is written only when all scripts have measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from mergeopt.evaluation.device import hardware, pick_device

SCRIPTS: dict[str, dict[str, list[str]]] = {
    "cpu": {"materialize": [], "score": [], "race": [], "end_to_end": []},
    "cuda": {
        "materialize": ["--parameters", "1000000000", "--dtype", "bfloat16"],
        "score": ["--size", "base", "--dtype", "bfloat16"],
        "end_to_end": ["--size", "base", "--dtype", "bfloat16"],
    },
}
"""What is run on a kind of device, with its arguments."""
TIMELESS = ("race",)
"""Scripts that count and measure no time, so that device and load do not matter."""
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run all scripts and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--force", action="store_true", help="report on a busy machine, too")
    asked = parser.parse_args()
    device = pick_device(asked.device)
    timed = ["--device", asked.device, *(["--force"] if asked.force else [])]
    measured = {
        script: _run(script, ["--json", *([] if script in TIMELESS else timed), *own]) for script, own in SCRIPTS[device.type].items()
    }
    place = HERE / "results" / f"{device.type}-{_name(device)}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {place}")


def _run(script: str, arguments: list[str]) -> object:
    print(f"{script} ...", flush=True)
    done = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script}: {done.stderr.strip() or done.stdout.strip()}\nnothing was written")
    return json.loads(done.stdout.splitlines()[-1])


def _name(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(hardware(device)["name"]).lower()).strip("-")


if __name__ == "__main__":
    main()
