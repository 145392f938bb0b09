"""A problem's evaluations as the loop takes them: one per proposal, in order, whatever the problem raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from mergeopt.errors import CandidateError, Failure
from mergeopt.evaluation.race import Race
from mergeopt.problem import Evaluation, Problem, Proposal, RacedProblem
from mergeopt.task import ObjectiveInfo, Part

__all__ = ["evaluations", "raced", "verdict"]


def evaluations(problem: Problem, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
    """Yield what becomes of proposals that are scored in full.

    Raises:
        Failure: the problem yields fewer evaluations than it was given proposals.
    """
    yield from _each(problem, len(proposals), lambda done: problem.evaluate(proposals[done:], part))


def raced(problem: Problem, race: Race, proposals: Mapping[int, Proposal], stored: int) -> Iterator[Evaluation]:
    """Race one ask's proposals and yield what becomes of those that are not stored yet.

    Candidates that race together do so again when a run is resumed amid them: what is stored does not say all that was decided by.

    Args:
        problem: that made the race.
        race: with its archive.
        proposals: by the numbers of their trials, in order.
        stored: trials from this number on are wanted.

    Raises:
        Failure: the problem yields fewer evaluations than it was given proposals.
    """
    assert isinstance(problem, RacedProblem)
    if not any(number >= stored for number in proposals):
        return
    numbers = [number for number in proposals if race.racing.together or number >= stored]
    chosen = [proposals[number] for number in numbers]
    stream = _each(problem, len(numbers), lambda done: problem.run_heat(chosen[done:], race.heat(numbers[done:])))
    yield from (evaluation for number, evaluation in zip(numbers, stream, strict=True) if number >= stored)


def verdict(evaluation: Evaluation, objectives: Sequence[ObjectiveInfo]) -> str | None:
    """Return why an evaluation counts as failed, None when it does not."""
    if evaluation.error is not None:
        return evaluation.error
    if evaluation.censored is not None:
        return None
    for objective in objectives:
        score = evaluation.scores.get(objective.name)
        if score is None:
            return f"objective {objective.name!r} was not scored"
        if not math.isfinite(score.value):
            return f"objective {objective.name!r} is {score.value}"
    return None


def _each(problem: Problem, count: int, evaluate: Callable[[int], Iterator[Evaluation]]) -> Iterator[Evaluation]:
    """Yield so many evaluations of a stream, which is begun anew behind a proposal that raises; `evaluate` returns it from one on."""
    done = 0
    while done < count:
        try:
            for evaluation in evaluate(done):
                done += 1
                yield evaluation
        except CandidateError as error:  # the problem's stream is over; the proposals behind this one are asked for again
            done += 1
            yield Evaluation({}, str(error))
        else:
            if done < count:
                raise Failure(f"the problem {problem.info.name!r} must yield an evaluation per proposal: {done} came for {count}")
