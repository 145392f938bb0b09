"""The contract suite of search strategies, and small analytic problems with known optima to run it on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import moocore
import numpy as np
import numpy.typing as npt
import pytest

from mergeopt.errors import ConfigError
from mergeopt.genomes.space import Choice, Float, Space
from mergeopt.problem import ObjectiveInfo, ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, Status, Strategy

__all__ = ["Bowls", "Raced", "StrategyContract", "drive", "tiny"]

Genome = npt.NDArray[np.float64]
Evaluate = Callable[[Candidate], Result]
TURNS = 10_000  # a search of a test that takes more turns than this hangs


@dataclass(frozen=True, slots=True)
class Bowls:
    """Squared distances from m centres on the cube's diagonal, all minimised.

    loss_j(x) = mean_i (x_i - c_j)^2, c_j evenly from 0.2 to 0.8. One objective: the optimum is 0 at x = (0.2, ..., 0.2). Two: the Pareto
    set is the segment between the centres, the front is {(0.36 t^2, 0.36 (1 - t)^2)}.

    Args:
        objectives: number m.
        dim: length d of a genome.
        digits: losses are rounded to so many decimals, which makes ties; None leaves them exact.
        fails: share of the cube, by a hash of the genome, where evaluation fails.
        constrained: feasible only where x_0 <= 0.4.
    """

    objectives: int = 2
    dim: int = 4
    digits: int | None = None
    fails: float = 0.0
    constrained: bool = False

    @property
    def info(self) -> ProblemInfo:
        """The problem as data."""
        space = Space([Float(f"x{i}", 0.0, 1.0) for i in range(self.dim)])
        objectives = [ObjectiveInfo(f"f{j}", "minimize", worst=1.0) for j in range(self.objectives)]
        if self.constrained:
            objectives[0] = ObjectiveInfo("f0", "minimize", worst=1.0, constraint=(None, 0.4))
        return ProblemInfo("bowls", space, tuple(objectives), "bowls")

    def __call__(self, candidate: Candidate) -> Result:
        """Evaluate a candidate."""
        genome = candidate.genome
        if _share(genome) < self.fails:
            return Result(candidate, Status.FAILED, None)
        centres = np.linspace(0.2, 0.8, self.objectives)
        losses: Genome = np.mean((genome[None, :] - centres[:, None]) ** 2, axis=1)
        if self.digits is not None:
            losses = losses.round(self.digits)
        return Result(candidate, Status.OK, losses, np.round(genome[:1] - 0.4, 1) if self.constrained else None)

    def distance(self, genome: Genome) -> float:
        """Return how far a genome [d] is from the Pareto set without constraints, as a root mean square over the coordinates."""
        nearest = np.clip(genome.mean(), 0.2, np.linspace(0.2, 0.8, self.objectives)[-1])
        return float(np.sqrt(np.mean((genome - nearest) ** 2)))


class Raced:
    """An evaluation in which a race drops candidates: those that an earlier one beats in everything are told as CENSORED.

    Their estimates are off by up to a tenth, but worse in everything than what beat them.

    Args:
        problem: what is evaluated in full.
    """

    def __init__(self, problem: Bowls) -> None:
        self.problem = problem
        self.dropped = 0
        self._archive: list[Genome] = []

    def __call__(self, candidate: Candidate) -> Result:
        """Evaluate a candidate."""
        result = self.problem(candidate)
        if result.losses is None:
            return result
        for better in self._archive:
            if bool((better < result.losses).all()):
                self.dropped += 1
                estimates = np.maximum(result.losses + 0.2 * (_share(candidate.genome) - 0.5), np.nextafter(better, np.inf))
                return Result(candidate, Status.CENSORED, estimates, result.violations)
        self._archive.append(result.losses)
        return result


def tiny(objectives: int) -> tuple[ProblemInfo, Evaluate]:
    """Return a space of 2 x 2 choices and its evaluation; only four different candidates exist.

    Args:
        objectives: number m; the best loss is 0.
    """
    space = Space([Choice("left", (0, 1)), Choice("right", (0, 1))])
    infos = tuple(ObjectiveInfo(f"f{j}", "minimize", worst=3.0) for j in range(objectives))

    def evaluate(candidate: Candidate) -> Result:
        values = space.decode(candidate.genome)
        code = 2 * int(values["left"]) + int(values["right"])
        return Result(candidate, Status.OK, np.array([float((code + j) % 4) for j in range(objectives)]))

    return ProblemInfo("tiny", space, infos, "tiny"), evaluate


def drive(strategy: Strategy, evaluate: Evaluate, count: int, *, ask: int | None = None, rounds: Sequence[int] = ()) -> list[list[Result]]:
    """Ask and tell until `count` candidates are evaluated or nothing more comes; return the results, one list for each telling.

    Args:
        strategy: set up already.
        evaluate: of a candidate.
        count: candidates to evaluate at least.
        ask: number of candidates asked for at a time, None as many as suit the strategy.
        rounds: candidates to gather before each telling; without it each answer is told at once.
    """
    told: list[list[Result]] = []
    for _ in range(TURNS):
        if sum(map(len, told)) >= count:
            return told
        wanted = rounds[len(told)] if len(told) < len(rounds) else None
        batch = _gather(strategy, ask, wanted)
        if not batch:
            return told
        results = [evaluate(candidate) for candidate in batch]
        strategy.tell(results)
        told.append(results)
    raise AssertionError(f"{strategy.info.name} took more than {TURNS} turns for {count} candidates")


def _gather(strategy: Strategy, ask: int | None, wanted: int | None) -> list[Candidate]:
    batch: list[Candidate] = []
    while True:
        answer = strategy.ask(ask if wanted is None else min(ask or wanted, wanted - len(batch)))
        batch += answer.candidates
        if wanted is None or len(batch) == wanted or not answer.candidates:
            return batch


def _share(genome: Genome) -> float:
    digest = hashlib.blake2b(np.ascontiguousarray(genome).tobytes(), digest_size=8, person=b"bowls").digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _genomes(told: Sequence[Sequence[Result]]) -> Genome:
    return np.array([result.candidate.genome for batch in told for result in batch])


def _hypervolume(results: Sequence[Result]) -> float:
    losses = np.array([result.losses for result in results if result.losses is not None])
    if losses.shape[1] == 1:
        return float(1.0 - losses.min())
    return float(moocore.hypervolume(losses, ref=np.ones(losses.shape[1])))


class StrategyContract:
    """What every strategy keeps, as tests; inherit it, name the class `Test...`, and define `make`.

    Attributes:
        batch: `setup`'s batch.
        evaluations: candidates of the longer tests; give a strategy of large generations more than three of them.
        learns: whether results are used, so that it must come closer to an optimum than its first batch.
        replays: whether the same seed and results give the same candidates; a strategy that says False is resumed by a warm start.
    """

    batch = 8
    evaluations = 120
    learns = True
    replays = True

    def make(self) -> Strategy:
        """Return a new strategy that has not been set up."""
        raise NotImplementedError("a contract class defines make()")

    def problem(self, *, digits: int | None = None, fails: float = 0.0, constrained: bool = False) -> Bowls:
        """Return an analytic problem with a number of objectives that the strategy accepts: two where it can."""
        info = self.make().info
        most = 2 if info.max_objectives is None else min(2, info.max_objectives)
        return Bowls(max(info.min_objectives, most), digits=digits, fails=fails, constrained=constrained)

    def ready(self, problem: ProblemInfo, *, seed: int = 1, batch: int | None = None) -> Strategy:
        """Return a new strategy that has been set up."""
        strategy = self.make()
        strategy.setup(problem, seed=seed, budget=Budget(self.evaluations), batch=self.batch if batch is None else batch)
        return strategy

    def _same(self, first: Genome, second: Genome) -> None:
        if not self.replays:
            pytest.skip("the strategy declares that its choices cannot be replayed")
        np.testing.assert_array_equal(first, second)

    def test_candidates_are_points_of_the_cube(self) -> None:
        """Every candidate is a float64 vector of the space's length inside [0, 1]."""
        problem = self.problem()
        for result in chain.from_iterable(drive(self.ready(problem.info), problem, self.evaluations)):
            genome = result.candidate.genome
            assert genome.dtype == np.float64
            np.testing.assert_array_equal(problem.info.space.check(genome), genome)

    def test_an_ask_gives_at_most_what_was_asked(self) -> None:
        """An answer has at most n candidates, is READY exactly when it has some, and WAITING only while results are outstanding."""
        problem = self.problem()
        strategy, asked = self.ready(problem.info), 0
        for n in (1, 3, 2, None, 1, 500):
            answer: Ask = strategy.ask(n)
            asked += len(answer.candidates)
            assert n is None or len(answer.candidates) <= n
            assert (answer.state is AskState.READY) == bool(answer.candidates)
            assert answer.state is not AskState.WAITING or asked > 0

    def test_the_same_seed_gives_the_same_candidates(self) -> None:
        """Two searches with one seed propose the same candidates over at least five batches."""
        problem = self.problem()
        first, second = (drive(self.ready(problem.info), problem, self.evaluations, ask=self.batch) for _ in range(2))
        assert len(first) >= 5
        self._same(_genomes(first), _genomes(second))

    def test_ties_do_not_break_reproducibility(self) -> None:
        """With many equal losses, failures and equal violations, one seed still gives one sequence."""
        problem = self.problem(digits=1, fails=0.2, constrained=True)
        first, second = (_genomes(drive(self.ready(problem.info), problem, self.evaluations)) for _ in range(2))
        self._same(first, second)

    def test_another_seed_gives_other_candidates(self) -> None:
        """Two seeds give two different searches."""
        problem = self.problem()
        first, second = (_genomes(drive(self.ready(problem.info, seed=seed), problem, self.evaluations)) for seed in (1, 2))
        assert first.shape != second.shape or not np.array_equal(first, second)

    def test_the_global_generator_is_neither_used_nor_touched(self) -> None:
        """Numpy's global generator keeps its state, and what others draw from it changes nothing."""
        problem = self.problem()

        def noisy(candidate: Candidate) -> Result:
            np.random.random()  # noqa: NPY002 - an evaluator may do so
            return problem(candidate)

        before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
        first = _genomes(drive(self.ready(problem.info), problem, self.evaluations))
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index] # noqa: NPY002
        self._same(first, _genomes(drive(self.ready(problem.info), noisy, self.evaluations)))

    def test_ask_sizes_do_not_matter(self) -> None:
        """Asking for 1, 3 or 8 at a time gives the candidates of asking for all, when results are told at the same points."""
        problem = self.problem()
        whole = drive(self.ready(problem.info), problem, self.evaluations)
        for size in (1, 3, 8):
            pieces = drive(self.ready(problem.info), problem, self.evaluations, ask=size, rounds=[len(batch) for batch in whole])
            self._same(_genomes(whole), _genomes(pieces))

    def test_the_order_of_results_does_not_matter(self) -> None:
        """Results of a batch told backwards, shuffled or one by one lead to the same continuation."""
        problem = self.problem()
        expected = _genomes(drive(self.ready(problem.info), problem, self.evaluations))
        shuffle = np.random.default_rng(0)
        for order in ("backwards", "shuffled", "singly"):
            strategy = self.ready(problem.info)
            seen: list[Genome] = []
            while len(seen) < len(expected):
                results = [problem(candidate) for candidate in strategy.ask().candidates]
                seen += [result.candidate.genome for result in results]
                if order == "backwards":
                    strategy.tell(results[::-1])
                else:
                    places = shuffle.permutation(len(results)) if order == "shuffled" else range(len(results))
                    for i in places:
                        strategy.tell([results[i]])
            self._same(expected, np.array(seen))

    def test_replay_after_a_stop_continues_the_search(self) -> None:
        """A new strategy that is re-asked and told the stored results of a stopped search goes on as if it had not been stopped."""
        problem = self.problem(digits=2, fails=0.1, constrained=True)
        start = self._starting_points(problem)
        strategy = self.ready(problem.info)
        strategy.tell(start)
        whole = drive(strategy, problem, self.evaluations, ask=self.batch)
        genomes = _genomes(whole)
        for stop in (0, 1, self.batch + 3, len(genomes) // 2 + 1, len(genomes)):
            stored = [result for batch in whole for result in batch][:stop]
            self._same(genomes, self._continued(problem, start, stored))

    def _continued(self, problem: Bowls, start: Sequence[Result], stored: Sequence[Result]) -> Genome:
        strategy, left, seen = self.ready(problem.info), list(stored), []
        strategy.tell(start)
        for _ in range(TURNS):
            answer = strategy.ask(self.batch)
            seen += [candidate.genome for candidate in answer.candidates]
            old, new = answer.candidates[: len(left)], answer.candidates[len(left) :]
            known, left = left[: len(old)], left[len(old) :]
            strategy.tell([Result(c, r.status, r.losses, r.violations) for c, r in zip(old, known, strict=True)])
            strategy.tell([problem(candidate) for candidate in new])
            if len(seen) >= self.evaluations or not answer.candidates:
                break
        return np.array(seen)

    def _starting_points(self, problem: Bowls) -> list[Result]:
        points = np.linspace(0.1, 0.9, 5)[:, None] * np.ones(problem.dim)
        exact = Bowls(problem.objectives, problem.dim, problem.digits, constrained=problem.constrained)
        return [*(exact(Candidate(point)) for point in points), Result(Candidate(np.full(problem.dim, 0.35)), Status.FAILED, None)]

    def test_failures_are_survived(self) -> None:
        """A search goes on when a third of all candidates fail, and when every one fails."""
        for share in (0.33, 1.0):
            problem = self.problem(fails=share)
            results = list(chain.from_iterable(drive(self.ready(problem.info), problem, self.evaluations)))
            assert len(results) >= self.evaluations
            assert all(np.all((r.candidate.genome >= 0) & (r.candidate.genome <= 1)) for r in results)

    def test_dropped_candidates_are_survived(self) -> None:
        """A search goes on when a race drops most candidates and tells estimates of them, and one seed still gives one sequence."""
        races = [Raced(self.problem(constrained=True)) for _ in range(2)]
        first, second = (_genomes(drive(self.ready(race.problem.info), race, self.evaluations, ask=self.batch)) for race in races)
        assert races[0].dropped > 0
        assert np.all((first >= 0) & (first <= 1))
        self._same(first, second)

    def test_results_it_did_not_ask_for_are_survived(self) -> None:
        """Starting points may be told before the first ask, within a batch and between batches."""
        problem = self.problem()
        strategy = self.ready(problem.info)
        strategy.tell(self._starting_points(problem))
        drive(strategy, problem, self.evaluations // 2)
        answer = strategy.ask(3)
        strategy.tell([*self._starting_points(problem), *(problem(candidate) for candidate in answer.candidates)])
        assert sum(map(len, drive(strategy, problem, self.evaluations))) >= self.evaluations

    def test_nothing_told_is_survived(self) -> None:
        """An empty telling changes nothing."""
        problem = self.problem()
        strategy = self.ready(problem.info)
        strategy.tell([])
        first = drive(strategy, problem, self.evaluations)
        self._same(_genomes(first), _genomes(drive(self.ready(problem.info), problem, self.evaluations)))

    def test_a_tiny_space_ends_or_repeats(self) -> None:
        """In a space of four candidates the search ends or repeats itself, without hanging."""
        info, evaluate = tiny(self.problem().objectives)
        told = drive(self.ready(info), evaluate, self.evaluations)
        assert told

    def test_batches_of_one(self) -> None:
        """A search works when one candidate is asked for and told at a time."""
        problem = self.problem()
        told = drive(self.ready(problem.info, batch=1), problem, 30, ask=1)
        assert [len(batch) for batch in told] == [1] * 30

    def test_it_comes_closer_to_the_optimum(self) -> None:
        """On an analytic problem the front gains hypervolume after the first batch, and later candidates lie nearer to the Pareto set."""
        if not self.learns:
            pytest.skip("the strategy declares that it does not learn")
        problem = self.problem()
        told = drive(self.ready(problem.info), problem, 3 * self.evaluations)
        assert _hypervolume(list(chain.from_iterable(told))) > _hypervolume(told[0])
        distances = [problem.distance(genome) for genome in _genomes(told)]
        third = len(distances) // 3
        assert np.median(distances[-third:]) < np.median(distances[:third])

    def test_constraints_are_sought(self) -> None:
        """Where constraints are supported, the last third of a search holds a larger feasible share than the first."""
        if not (self.learns and self.make().info.constraints):
            pytest.skip("the strategy does not use constraints")
        problem = self.problem(constrained=True)
        results = [result for batch in drive(self.ready(problem.info), problem, 3 * self.evaluations) for result in batch]
        feasible = [bool(result.violations is not None and np.all(result.violations <= 0)) for result in results]
        third = len(feasible) // 3
        assert np.mean(feasible[-third:]) > np.mean(feasible[:third])

    def test_other_numbers_of_objectives_are_refused(self) -> None:
        """A problem with fewer or more objectives than the strategy accepts is a ConfigError at setup."""
        info = self.make().info
        for count in (info.min_objectives - 1, None if info.max_objectives is None else info.max_objectives + 1):
            if count is not None and count >= 1:
                with pytest.raises(ConfigError, match="objective"):
                    self.ready(Bowls(count).info)
