"""Learn once, then ask for a model of any preference: no search, no data, one low-rank product per weight."""

from __future__ import annotations

from transformers import AutoModelForImageClassification

import mergeopt as mo

if __name__ == "__main__":
    digits = mo.load("problems", "digits")(tasks=["upright", "turned"])
    pool = mo.Pool(digits.base, digits.experts)
    problem = mo.MergeProblem(pool, "task_arithmetic", digits.objectives, groups="layer", device="cpu")

    budget = mo.Budget(evaluations=9, gradient_steps=60)  # nine preferences are scored at the end
    run = mo.optimize(problem, "pareto-set", budget=budget, seed=0, out="runs/any_preference")
    for point in run.front.points:
        asked = point.recipe.learned.preference if point.recipe and point.recipe.learned else {}
        print({name: round(share, 2) for name, share in asked.items()}, point.values)

    answers = mo.LearnedFront(next((run.folder / "learned").iterdir()))
    model = AutoModelForImageClassification.from_pretrained(digits.base)
    answers.apply(model, {"upright": 0.9, "turned": 0.1})  # in place, into a live model
    answers.export([0.2, 0.8], "merged/mostly_turned")  # a model folder, with a recipe that makes it again
    print(len(answers.front(15, problem)), "of 15 models are non-dominated")
