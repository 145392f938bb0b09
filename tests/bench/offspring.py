"""Time of an offspring of a whole model in copies of its weights, and memory of a population: a table, or JSON with --json.

Copies, eager and compiled offspring take turns, so that whatever else the machine does meets all of them; the figures are medians of each
turn's ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mergeopt.evaluation.compiled import How
from mergeopt.evaluation.offspring import mutate
from mergeopt.lineage import Step

TENSOR = 2_359_296  # 768 x 3072: the largest matrices of a base-size transformer
SMALL = 768  # and as many biases and norms
SPREAD = 0.3  # of the copies' times, beyond which the machine is too busy to measure on
ROUNDS = 7


def main() -> int:
    """Measure and print; exit status 1 where the machine is too busy."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    shapes = _tensors(arguments.parameters)
    size = sum(shapes)
    before = _peak()
    rows = torch.empty((arguments.members, size), dtype=torch.float32, device=device).normal_(
        generator=torch.Generator(device).manual_seed(0)
    )
    spare = torch.empty(size, dtype=torch.float32, device=device).copy_(rows[0])
    population = _peak()
    took = time.perf_counter()
    _offspring(rows, shapes, 0, "compiled")
    warm = time.perf_counter() - took
    work: dict[str, Callable[[int], object]] = {
        "copy": lambda _: spare.copy_(rows[0]),
        "eager": lambda seed: _offspring(rows, shapes, seed, "eager"),
        "compiled": lambda seed: _offspring(rows, shapes, seed, "compiled"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(-1, arguments.rounds):
        for name, run in work.items():
            taken = _time(run, turn + 1, device)
            if turn >= 0:  # the first turn warms up
                seconds[name].append(taken)
    report = _report(seconds) | {
        "parameters": size,
        "tensors": len(shapes),
        "members": arguments.members,
        "rounds": arguments.rounds,
        "compile_seconds": warm,
        "population_mib": population - before,
        "peak_mib": _peak(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if report["copy_spread"] > SPREAD and not arguments.force:
        print(
            f"too busy to measure: copies differ by {report['copy_spread']:.0%} (more than {SPREAD:.0%}); --force reports anyway",
            file=sys.stderr,
        )
        return 1
    print(json.dumps(report) if arguments.json else "\n".join(f"{key:18} {value}" for key, value in report.items()))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--parameters", type=int, default=27_000_000, help="of one member")
    parser.add_argument("--members", type=int, default=3, help="of the population, two or more")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns, seven or more")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch; its own choice when not given")
    parser.add_argument("--force", action="store_true", help="report on a busy machine, too")
    arguments = parser.parse_args()
    if arguments.members < 2 or arguments.rounds < ROUNDS:
        parser.error(f"expected two or more members and {ROUNDS} or more rounds")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return arguments


def _tensors(parameters: int) -> list[int]:
    """Cut a model into matrices, a small tensor after each, and what is left."""
    shapes: list[int] = []
    while parameters - sum(shapes) > TENSOR + SMALL:
        shapes += [TENSOR, SMALL]
    return [*shapes, parameters - sum(shapes)]


def _offspring(rows: torch.Tensor, shapes: list[int], seed: int, how: How) -> None:
    step = Step(0, ((1, 0),), 0.5, 0.5, seed)
    start = 0
    for index, size in enumerate(shapes):
        mutate(rows[0, start : start + size], [rows[1, start : start + size]], step, name=str(index), layer="0", how=how)
        start += size


def _time(run: Callable[[int], object], seed: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _report(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    copies = seconds["copy"]
    report: dict[str, Any] = {"copy_seconds": statistics.median(copies), "copy_spread": _spread(copies)}
    for name in ("eager", "compiled"):
        ratios = [taken / copy for taken, copy in zip(seconds[name], copies, strict=True)]
        report |= {f"{name}_copies": statistics.median(ratios), f"{name}_spread": _spread(ratios)}
    return report


def _spread(values: list[float]) -> float:
    """Return the distance between the quartiles over the median."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def _peak() -> float:
    """Return the most memory that this process has held, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    sys.exit(main())
