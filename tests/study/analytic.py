"""A small analytic problem and strategies that the tests of the study share; nothing here stands in for code under test."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import CandidateError
from mergeopt.genomes.space import Float, Space
from mergeopt.problem import Evaluation, ProblemInfo, Proposal
from mergeopt.recipe import Recipe, content_hash
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, Status, StrategyInfo
from mergeopt.study.run import Run
from mergeopt.task import ObjectiveInfo, Part, Score

Genome = npt.NDArray[np.float64]
NEAR = np.array([0.2, 0.2, 0.2])
FAR = np.array([0.7, 0.7, 0.7])


@dataclass(frozen=True)
class Quadratic:
    """Minimize |x - a|^2 and maximize 1 - |x - b|^2 in [0, 1]^3; the optimal genomes are the segment from a to b.

    The report part shifts values by a deterministic amount of at most 0.01. `fail` and `nan` are first-coordinate limits above which
    candidates fail, `raises` makes them raise, `seconds` is slept per evaluation.
    """

    fail: float = 2.0
    nan: float = 2.0
    raises: bool = False
    seconds: float = 0.0
    with_baselines: bool = True
    parts: tuple[Part, ...] = ("search", "report")
    worst: tuple[float | None, float | None] = (1.5, -0.5)
    constraint: tuple[float | None, float | None] | None = None
    label: str = "quadratic"

    @property
    def info(self) -> ProblemInfo:
        space = Space([Float(f"x{i}", 0.0, 1.0) for i in range(3)])
        objectives = (
            ObjectiveInfo("distance", "minimize", self.worst[0], self.constraint),
            ObjectiveInfo("closeness", "maximize", self.worst[1]),
        )
        return ProblemInfo(self.label, space, objectives, content_hash([self.label, self.fail, self.nan]))

    def decode(self, genome: Genome) -> Recipe | None:
        return None

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        for proposal in proposals:
            time.sleep(self.seconds)
            assert proposal.genome is not None
            yield self._one(proposal.genome, part)

    def baselines(self) -> list[Proposal]:
        named = {"base": np.zeros(3), "uniform": np.full(3, 0.45), "expert:a": NEAR, "expert:b": FAR}
        return [Proposal(name, genome.copy()) for name, genome in named.items()] if self.with_baselines else []

    def provenance(self) -> Mapping[str, Any]:
        return {"made": "analytically"}

    def _one(self, x: Genome, part: Part) -> Evaluation:
        if x[0] > self.fail:
            if self.raises:
                raise CandidateError("too far to the right")
            return Evaluation({}, error="too far to the right")
        shift = 0.0 if part == "search" else 0.01 * float(np.sin(1e3 * x.sum()))
        near = float(((x - NEAR) ** 2).sum()) + shift
        far = 1.0 - float(((x - FAR) ** 2).sum()) - shift
        column = np.linspace(near, far, 4)
        scores = {
            "distance": Score(
                float("nan") if x[0] > self.nan else near, 0.01, 4, {"loss": column, "label": np.array(["a", "b", "c", "d"])}
            ),
            "closeness": Score(far),
        }
        return Evaluation(scores, seconds={"score": self.seconds})


class Climber:
    """Generations of eight mutants of the best told points; what it asks depends on every bit of what it was told."""

    def __init__(self, *, stop_after: int | None = None, name: str = "climber") -> None:
        self.info = StrategyInfo(name, "1")
        self.told: list[Result] = []
        self.unasked: list[Result] = []
        self.asked: dict[int, Candidate] = {}
        self._buffer: list[Genome] = []
        self._stop_after = stop_after

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._dim = problem.space.dim

    def ask(self, n: int | None = None) -> Ask:
        if self._stop_after is not None and len(self.asked) >= self._stop_after:
            return Ask((), AskState.DONE)
        if not self._buffer:
            scored = [(float(r.losses.sum()), r.candidate.genome) for r in self.told if r.losses is not None]
            centre = min(scored, key=lambda pair: pair[0])[1] if scored else np.full(self._dim, 0.5)
            self._buffer = list(np.clip(centre + 0.2 * self._rng.standard_normal((8, self._dim)), 0.0, 1.0))
        taken, self._buffer = self._buffer[:n], self._buffer[n:] if n is not None else []
        candidates = tuple(Candidate(genome) for genome in taken)
        self.asked.update({id(candidate): candidate for candidate in candidates})
        return Ask(candidates)

    def tell(self, results: Sequence[Result]) -> None:
        for result in results:
            assert (result.losses is None) == (result.status is Status.FAILED)
            (self.told if id(result.candidate) in self.asked else self.unasked).append(result)
            if id(result.candidate) not in self.asked:
                self.told.append(result)


class Listed:
    """Asks for given genomes in order, then says that it is done."""

    def __init__(self, genomes: Sequence[Genome], *, cycle: bool = False, at_end: AskState = AskState.DONE) -> None:
        self.info = StrategyInfo("listed", "1")
        self.results: list[Result] = []
        self._genomes = list(genomes)
        self._next = 0
        self._cycle = cycle
        self._at_end = at_end

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        self._next = 0

    def ask(self, n: int | None = None) -> Ask:
        taken: list[Genome] = []
        while len(taken) < (n or 1) and (self._cycle or self._next < len(self._genomes)):
            taken.append(self._genomes[self._next % len(self._genomes)])
            self._next += 1
        return Ask(tuple(Candidate(genome) for genome in taken), AskState.READY if taken else self._at_end)

    def tell(self, results: Sequence[Result]) -> None:
        self.results.extend(results)


def facts(run: Run) -> list[tuple[Any, ...]]:
    """Return all of a run's trials that must not depend on when, and in how many pieces, it ran."""
    return [
        (
            trial.number,
            trial.kind,
            trial.name,
            None if trial.genome is None else trial.genome.tobytes(),
            trial.status,
            trial.error,
            trial.duplicate_of,
            trial.charged,
            trial.values("search"),
        )
        for trial in run.trials
    ]
