"""A plain function of a live model as an objective; `custom_objective.yaml` uses the same function from a run file."""

from __future__ import annotations

import torch

import mergeopt as mo


def brier_score(model: torch.nn.Module, items: mo.Items | None, device: torch.device) -> torch.Tensor:
    """Return the Brier score of each item, [items]: how far predicted probabilities are from the truth. Lower is better.

    One number per item gives the mean a standard error; one number for all items would do as well.
    """
    rows = [] if items is None else [items[i] for i in range(len(items))]
    pixels = torch.stack([row["pixel_values"] for row in rows]).to(device)
    labels = torch.tensor([int(row["label"]) for row in rows], device=device)
    probabilities: torch.Tensor = model(pixel_values=pixels).logits.softmax(dim=-1)
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return (probabilities - truth).square().sum(dim=-1)


if __name__ == "__main__":
    digits = mo.load("problems", "digits")(tasks=["upright", "turned"])
    upright, turned = digits.objectives
    brier = mo.FunctionObjective("brier", brier_score, items=upright.task, direction="minimize", worst=2.0, constraint=(None, 1.0))

    pool = mo.Pool(digits.base, digits.experts)
    problem = mo.MergeProblem(pool, "ties", [turned, brier])  # searches every parameter that ties declares a range for
    run = mo.optimize(problem, "random", budget=8, seed=0, out="runs/custom_objective_py")

    best = run.front.where(["brier<=0.9"], best="turned")
    print(f"trial {best.trial}: {best.values}, standard errors {best.standard_errors['search']}")
