"""Coefficients, weights and gradients: six strategies on three problems, from run files that differ in `strategy:` alone.

`make study-kinds` runs it (about half an hour on two quiet cores) and rewrites `studies/results/three_kinds.json`. `problem: digits`
needs nothing; the other two need `MERGEOPT_ZOO` and `MERGEOPT_DATA`. Each run is a process of its own, so that its peak memory is its own.

    python studies/three_kinds.py [--problems digits ...] [--strategies evolver ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import mergeopt as mo
from mergeopt.genomes.preferences import spread_preferences
from mergeopt.report.plot import draw
from mergeopt.report.summary import summarise
from mergeopt.study.front import hypervolume

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "three_kinds.json"
PROBLEMS = ("digits", "vit_images", "gpt_bytes")
STRATEGIES: dict[str, Any] = {
    "random": "random",
    "nsga2": {"name": "nsga2", "pop_size": 20},
    "evolver": {"name": "evolver", "fitness": "mean"},
    "evolver-joint": {"name": "evolver-joint", "fitness": "mean"},
    "adamerging": {"name": "adamerging"},
    "pareto-set": {"name": "pareto-set"},
}
SEED = 0
SOUPS = 20


def main() -> None:
    """Run what was asked for, and write what is known of all runs in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--out", type=Path, default=Path("runs/three_kinds"))
    asked = parser.parse_args()
    rows = []
    for problem in asked.problems:
        for strategy in asked.strategies:
            run = _run(problem, strategy, asked.out)
            rows.append(_row(problem, strategy, run))
            print(json.dumps(rows[-1]), flush=True)
    _merge(rows)


def _run(problem: str, strategy: str, out: Path) -> mo.Run:
    """Run one run file in a process of its own, or take the run as it is where it has finished."""
    out.mkdir(parents=True, exist_ok=True)
    folder, file = out / f"{problem}-{strategy}", out / f"{problem}-{strategy}.yaml"
    text = (HERE / "three_kinds" / f"{problem}.yaml").read_text(encoding="utf-8")
    for name, variable in (("ZOO/", "MERGEOPT_ZOO"), ("DATA/", "MERGEOPT_DATA")):
        if name in text and variable not in os.environ:
            raise SystemExit(f"{problem} needs {variable}: the folder of the models or data that it is made of")
        text = text.replace(name, f"{os.environ.get(variable, '')}/")
    file.write_text(text + yaml.safe_dump({"strategy": STRATEGIES[strategy], "seed": SEED}), encoding="utf-8")
    resume = ["--resume"] if (folder / "run.db").is_file() else []
    subprocess.run(
        [sys.executable, "-m", "mergeopt", "run", str(file), "--out", str(folder), *resume], check=True, stdout=subprocess.DEVNULL
    )
    run = mo.Run.open(folder)
    draw(summarise(run), folder / "front.png")
    return run


def _row(problem: str, strategy: str, run: mo.Run) -> dict[str, Any]:
    segments = run.header["segments"]
    return {
        "problem": problem,
        "strategy": strategy,
        "search": run.front.hypervolume("search"),
        "report": run.front.hypervolume("report"),
        "points": len(run.front),
        "still_nondominated_on_report": run.front.still_nondominated_on_report(),
        "evaluations": run.evaluations,
        "gradient_steps": run.gradient_steps,
        "seconds": round(sum(segment["ended"] - segment["began"] for segment in segments), 1),
        "peak_memory_mib": round(max(segment["peak_memory"] for segment in segments) / 2**20),
        "baselines": {name: [value["hypervolume"], value["report_hypervolume"]] for name, value in run.front_json()["baselines"].items()},
        "reference": list(run.reference or ()),
        "warnings": list(run.warnings),
        **({"rewarded_soups": _soups(run)} if strategy == "pareto-set" else {}),
    }


def _soups(run: mo.Run) -> list[float]:
    """Return the hypervolumes, search and report, of rewarded soups: the experts' weights mixed as 20 spread preferences say."""
    problem = run.problem
    if not isinstance(problem, mo.MergeProblem):
        raise SystemExit("rewarded soups are of models")
    shares = {"weight": {"simplex": True}}
    soups = mo.MergeProblem(problem.pool, "linear", problem.objectives, parameters=shares, device="cpu", threads=problem.threads)
    experts = problem.pool.expert_names
    proposals = [
        mo.Proposal("soup", soups.coefficients.weighted(dict(zip(experts, row, strict=True))))
        for row in spread_preferences(len(experts), SOUPS).tolist()
    ]
    volumes = []
    for part in problem.parts:
        rows = [[e.scores[o.name].value for o in run.objectives] for e in soups.evaluate(proposals, part)]
        volumes.append(hypervolume(rows, run.objectives, run.reference or ()))
    return volumes


def _merge(rows: list[dict[str, Any]]) -> None:
    """Write the rows beside those that other calls measured."""
    before = json.loads(RESULT.read_text(encoding="utf-8"))["runs"] if RESULT.is_file() else []
    known = {(row["problem"], row["strategy"]): row for row in [*before, *rows]}
    order = [(problem, strategy) for problem in PROBLEMS for strategy in STRATEGIES]
    document = {
        "command": "make study-kinds",
        "seed": SEED,
        "budgets": {problem: yaml.safe_load((HERE / "three_kinds" / f"{problem}.yaml").read_text())["budget"] for problem in PROBLEMS},
        "strategies": STRATEGIES,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("mergeopt", "torch", "transformers", "pymoo")}
        | {"python": platform.python_version()},
        "runs": [known[key] for key in order if key in known],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
