"""A search strategy of one's own: mutate a random member of the non-dominated set, keep what is not dominated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import mergeopt as mo


class Mutate:
    """Gaussian mutation of an archive; proposes points of the unit cube and is told minimised losses."""

    info = mo.StrategyInfo(name="mutate", version="1")

    def setup(self, problem: mo.ProblemInfo, *, seed: int, budget: mo.Budget, batch: int) -> None:
        self.rng, self.dim = np.random.default_rng(seed), problem.space.dim
        self.archive: list[tuple[np.ndarray, np.ndarray]] = []
        self.waiting = False

    def ask(self, n: int | None = None) -> mo.Ask:
        if self.waiting:  # one at a time: what follows depends on what it is told
            return mo.Ask((), mo.AskState.WAITING)
        self.waiting = True
        return mo.Ask((mo.Candidate(self.propose()),))

    def propose(self) -> np.ndarray:
        if not self.archive:
            return self.rng.random(self.dim)
        parent, _ = self.archive[self.rng.integers(len(self.archive))]
        return np.clip(parent + 0.15 * self.rng.standard_normal(self.dim), 0.0, 1.0)

    def tell(self, results: Sequence[mo.Result]) -> None:
        self.waiting = False
        for result in results:
            if result.losses is None or any((losses <= result.losses).all() for _, losses in self.archive):
                continue  # it failed, or something at least as good is known
            self.archive = [(g, losses) for g, losses in self.archive if not (result.losses <= losses).all()]
            self.archive.append((result.candidate.genome, result.losses))


if __name__ == "__main__":
    digits = mo.load("problems", "digits")(tasks=["upright", "turned"])
    problem = mo.MergeProblem(mo.Pool(digits.base, digits.experts), "task_arithmetic", digits.objectives, groups="layer")
    run = mo.optimize(problem, Mutate(), budget=12, seed=0, out="runs/new_strategy")
    print(f"{len(run.front)} points, hypervolume {run.front.hypervolume():.4f}")
