"""One operator, one strategy and one problem, as a package of somebody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import qmc

from mergeopt.genomes.space import Float, Space
from mergeopt.operators import Param, merge_operator
from mergeopt.problem import Evaluation, ObjectiveInfo, Part, ProblemInfo, Proposal, Score
from mergeopt.strategy import Ask, Budget, Candidate, Result, StrategyInfo


@merge_operator("acme_median", scale=Param.real(1.0, search=(0.0, 2.0), differentiable=True, doc="of the median task vector"))
def acme_median(deltas: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
    """Add the element-wise median of the task vectors to the base."""
    return scale * deltas.median(dim=0).values


class Halton:
    """The scrambled Halton sequence: fills the space, learns nothing."""

    info = StrategyInfo(name="acme_halton", version="1")

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        self.sequence = qmc.Halton(problem.space.dim, rng=np.random.default_rng(seed))

    def ask(self, n: int | None = None) -> Ask:
        return Ask(tuple(Candidate(genome) for genome in self.sequence.random(n or 1)))

    def tell(self, results: Sequence[Result]) -> None:
        return None


class Bowl:
    """Two opposing distances in the unit square: a problem that makes no model."""

    parts: tuple[Part, ...] = ("search",)
    info = ProblemInfo(
        "acme_bowl",
        Space([Float("x", 0, 1), Float("y", 0, 1)]),
        (ObjectiveInfo("left", "minimize", 2.0), ObjectiveInfo("right", "minimize", 2.0)),
        "1",
    )

    def decode(self, genome: npt.NDArray[np.float64]) -> None:
        return None

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        for proposal in proposals:
            x, y = np.asarray(proposal.genome)
            yield Evaluation({"left": Score(float(x**2 + y**2)), "right": Score(float((x - 1) ** 2 + y**2))})

    def baselines(self) -> list[Proposal]:
        return [Proposal("middle", np.array([0.5, 0.5]))]

    def provenance(self) -> dict[str, str]:
        return {}
