"""Does NSGA-II find better fronts than random search on the quickstart's problem? Paired seeds, equal budgets, the same
starting points.

`make study-nsga2` runs it (about five minutes on two quiet cores) and rewrites `studies/results/nsga2_vs_random.json`.
"""

from __future__ import annotations

import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy.stats import wilcoxon

import mergeopt as mo
from mergeopt.config import RunFile, build_problem
from mergeopt.study.launch import starting_points

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "nsga2_vs_random.json"
SEEDS = range(5)


def main() -> None:
    """Run both strategies for every seed and write the hypervolumes of both parts."""
    run_file = RunFile.load(ROOT / "examples" / "quickstart.yaml")
    if run_file.budget is None:
        raise SystemExit("the quickstart has no budget")
    problem = build_problem(run_file, ROOT / "examples")
    init = starting_points(problem, run_file.init, ROOT / "examples")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for strategy in (run_file.strategy, "random"):
                name = strategy if isinstance(strategy, str) else strategy["name"]
                out = Path(folder) / f"{name}-{seed}"
                budget = run_file.budget.evaluations
                run = mo.optimize(problem, strategy, budget=budget, seed=seed, out=out, init=init, batch=run_file.batch)
                rows.append(
                    {
                        "strategy": name,
                        "seed": seed,
                        "search": run.front.hypervolume("search"),
                        "report": run.front.hypervolume("report"),
                        "points": len(run.front),
                        "still_nondominated_on_report": run.front.still_nondominated_on_report(),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    baselines = {name: {"search": value["hypervolume"]} for name, value in run.front_json()["baselines"].items()}
    RESULT.write_text(json.dumps(_document(run_file, rows, baselines), indent=1) + "\n", encoding="utf-8")


def _document(run_file: RunFile, rows: list[dict[str, Any]], baselines: dict[str, Any]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for part in ("search", "report"):
        ours, theirs = ([row[part] for row in rows if (row["strategy"] == "random") is random] for random in (False, True))
        wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
        p = float(wilcoxon(ours, theirs, alternative="greater").pvalue)
        pairs[part] = {"wins": wins, "of": len(ours), "wilcoxon_p_one_sided": p}
    versions = {name: version(name) for name in ("mergeopt", "torch", "transformers", "pymoo")}
    return {
        "command": "make study-nsga2",
        "budget": run_file.budget.evaluations if run_file.budget else None,
        "strategy": run_file.strategy,
        "pairs": pairs,
        "baselines": baselines,
        "runs": rows,
        "versions": {**versions, "python": platform.python_version()},
    }


if __name__ == "__main__":
    main()
