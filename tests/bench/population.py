"""Peak memory of a search that evolves a population of large models, in a process of its own: JSON.

    python tests/bench/population.py [--layers 12] [--members 4] [--evaluations 10]

The models are GPT-2's architecture (12 layers: 124 million parameters) with random weights; the search is `evolver`, batch 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import mergeopt as mo


def main() -> None:
    """Write the models, search, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pool = _pool(Path(folder), asked.layers, asked.members)
        norm = mo.FunctionObjective("norm", _norm, items=None, direction="minimize", source="")
        problem = mo.MergeProblem(pool, "task_arithmetic", [norm], device="cpu", batch=1, threads=1)
        began = time.perf_counter()
        run = mo.optimize(problem, "evolver", budget=asked.evaluations, out=Path(folder) / "run", batch=1)
        seconds = time.perf_counter() - began
        made = [trial.seconds["make"] for trial in run.trials if trial.recipe is not None and trial.recipe.lineage is not None]
        peak = run.header["segments"][-1]["peak_memory"]
    report = {
        "parameters": problem.layout.elements,
        "members": asked.members,
        "evaluations": run.evaluations,
        "peak_gib": round(peak / 2**30, 2),
        "seconds": round(seconds, 1),
        "seconds_to_make_an_offspring": round(sorted(made)[len(made) // 2], 3),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(report))


def _pool(folder: Path, layers: int, members: int) -> mo.Pool:
    for index in range(members + 1):
        torch.manual_seed(index)
        GPT2LMHeadModel(GPT2Config(n_layer=layers)).save_pretrained(folder / f"m{index}")
    return mo.Pool(folder / "m0", {f"m{index}": folder / f"m{index}" for index in range(1, members + 1)})


def _norm(model: torch.nn.Module, items: object, device: torch.device) -> float:
    return float(torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum())


if __name__ == "__main__":
    main()
