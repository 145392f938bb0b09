"""The quickstart from Python: search merge weights for two of the digits experts, look at the front, export a point of it."""

from __future__ import annotations

import mergeopt as mo

if __name__ == "__main__":
    digits = mo.load("problems", "digits")(tasks=["upright", "turned"])  # trained on first use, then kept
    pool = mo.Pool(digits.base, digits.experts)
    problem = mo.MergeProblem(
        pool,
        "task_arithmetic",
        digits.objectives,
        groups="layer",
        parameters={"weight": {"low": 0.0, "high": 1.0}},
    )
    run = mo.optimize(problem, {"name": "nsga2", "pop_size": 6}, budget=18, seed=0, out="runs/quickstart_py")

    for point in run.front.points:
        print(point.trial, point.values, point.report)
    print("hypervolume", run.front.hypervolume(), "on held-out data", run.front.hypervolume("report"))

    report = run.front.pick({"upright": 0.7, "turned": 0.3}).export("merged/quickstart_py")
    print("exported to", report.folder, "and scored again:", report.scores)
