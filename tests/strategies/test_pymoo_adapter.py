"""pymoo behind ask and tell: the same search as pymoo's own, whatever the order of results, and no NaN."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.individual import Individual
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination

from mergeopt.errors import ConfigError, PluginError, StrategyError
from mergeopt.registry import load
from mergeopt.strategy import AskState, Budget, Candidate, Result, Status, Strategy
from mergeopt.testing import Bowls, drive
from mergeopt_strategies.pymoo_adapter import PymooStrategy, nsga2
from mergeopt_strategies.pymoo_catalogue import ALGORITHMS, UNUSABLE
from mergeopt_strategies.pymoo_values import Scale

BOWLS = Bowls(2)
DIRECT = {"NSGA2": 2, "SMSEMOA": 2, "GDE3": 2, "GA": 1, "DE": 1, "PSO": 1, "NelderMead": 1, "G3PCX": 1}
NOT_REPLAYED = {"CMOPSO", "PatternSearch"}  # they draw from unseeded generators
SLOW: dict[str, dict[str, Any]] = {"BRKGA": {"n_elites": 5, "n_offsprings": 10, "n_mutants": 5}, "ES": {"pop_size": 4, "n_offsprings": 28}}


def ready(strategy: Strategy, bowls: Bowls = BOWLS, *, seed: int = 7) -> Strategy:
    """Set a strategy up for bowls."""
    strategy.setup(bowls.info, seed=seed, budget=Budget(200), batch=8)
    return strategy


def direct(algorithm: Any, bowls: Bowls, generations: int) -> np.ndarray:
    """Run pymoo itself on bowls and return the genomes of its generations."""
    problem = Problem(n_var=bowls.dim, n_obj=bowls.objectives, xl=np.zeros(bowls.dim), xu=np.ones(bowls.dim))
    algorithm.setup(problem, termination=NoTermination(), seed=7)
    genomes = []
    for _ in range(generations):
        answer = algorithm.ask()
        for each in [answer] if isinstance(answer, Individual) else answer:
            if not each.evaluated:
                genomes.append(each.X.copy())
                each.F = bowls(Candidate(each.X)).losses
                each.evaluated.update({"F", "G", "H"})
        algorithm.tell(infills=answer)
    return np.array(genomes)


def genomes(told: list[list[Result]]) -> np.ndarray:
    """Return the genomes of a search."""
    return np.array([result.candidate.genome for batch in told for result in batch])


def test_nsga2_is_the_librarys_own() -> None:
    """Through the adapter NSGA-II proposes, candidate for candidate, what pymoo proposes by itself over five generations."""
    expected = direct(NSGA2(pop_size=12), BOWLS, 5)
    np.testing.assert_array_equal(genomes(drive(ready(nsga2(pop_size=12)), BOWLS, 60)), expected)


@pytest.mark.parametrize("name", DIRECT)
def test_an_algorithm_is_the_librarys_own(name: str) -> None:
    """The candidates of other algorithms are those of pymoo by itself, too."""
    bowls = Bowls(DIRECT[name])
    cls = getattr(importlib.import_module(f"pymoo.algorithms.{ALGORITHMS[name].module}"), name)
    options: dict[str, Any] = {} if name == "NelderMead" else {"pop_size": 12}
    expected = direct(cls(**options), bowls, 5)
    found = genomes(drive(ready(PymooStrategy(name, **options), bowls), bowls, len(expected)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [name for name, entry in ALGORITHMS.items() if entry.package is None])
def test_every_algorithm_of_the_catalogue_searches(name: str) -> None:
    """Each algorithm goes through failures, ties and constraints, and repeats itself for the same seed."""
    entry = ALGORITHMS[name]
    bowls = Bowls(2 if entry.objectives[1] is None else 1, digits=2, fails=0.1, constrained=True)
    options = SLOW.get(name, {})
    if "ref_points" in entry.required:
        options = {"ref_points": [[0.1, 0.1]], **({"pop_per_ref_point": 6} if name == "RNSGA3" else {"pop_size": 12})}
    first, second = (genomes(drive(ready(PymooStrategy(name, **options), bowls), bowls, 90)) for _ in range(2))
    assert np.all((first >= 0) & (first <= 1))
    assert len(first) >= 60
    if name not in NOT_REPLAYED:
        np.testing.assert_array_equal(first, second)


def test_a_generation_is_waited_for() -> None:
    """When a generation is handed out the answer is WAITING, and the next generation comes with the last result."""
    strategy = ready(nsga2(pop_size=4))
    first = [*strategy.ask(3).candidates, *strategy.ask(3).candidates]
    assert len(first) == 4
    assert strategy.ask(1).state is AskState.WAITING
    strategy.tell([BOWLS(candidate) for candidate in first[1:]])
    assert strategy.ask(1).state is AskState.WAITING
    strategy.tell([BOWLS(first[0])])
    assert strategy.ask().state is AskState.READY


def test_starting_points_take_the_first_seats() -> None:
    """Starting points told before the first ask join the initial population, and only the rest of it is asked."""
    strategy = ready(nsga2(pop_size=10))
    points = [BOWLS(Candidate(np.full(4, value))) for value in (0.2, 0.5, 0.5, 0.8)]
    strategy.tell(points)
    answer = strategy.ask()
    assert len(answer.candidates) == 7
    np.testing.assert_array_equal([c.genome for c in answer.candidates], direct(NSGA2(pop_size=10), BOWLS, 1)[3:])


def test_starting_points_may_fill_the_population() -> None:
    """More starting points than seats: the best are kept, in whatever order they were told, and the first ask gives offspring."""
    points = [BOWLS(Candidate(point)) for point in np.random.default_rng(0).random((30, 4))]
    forward, backward = ready(nsga2(pop_size=10)), ready(nsga2(pop_size=10))
    forward.tell(points)
    backward.tell(points[::-1])
    first, second = (genomes(drive(strategy, BOWLS, 30)) for strategy in (forward, backward))
    np.testing.assert_array_equal(first, second)
    assert not any(np.array_equal(genome, point.candidate.genome) for genome in first[:10] for point in points)


def test_a_failed_candidate_is_told_finite_and_infeasible() -> None:
    """A failure becomes the worst losses seen and a large violation, different for different genomes."""
    scale = Scale(2, constraints=True)
    scale.widen(
        [Result(Candidate(np.zeros(1)), Status.OK, np.array([1.0, 5.0])), Result(Candidate(np.ones(1)), Status.OK, np.array([3.0, 4.0]))]
    )
    told = [scale.values(Result(Candidate(np.full(1, value)), Status.FAILED, None)) for value in (0.1, 0.2)]
    assert all(np.all(losses >= [3.0, 5.0]) and np.all(losses < [3.1, 5.1]) and violation[0] >= 1e6 for losses, violation in told)
    assert told[0][1] != told[1][1]


def test_without_constraints_worse_is_further_out() -> None:
    """An algorithm without constraints is told losses beyond the worst: a small violation, a larger one, a failure, in this order."""
    scale = Scale(1, constraints=False)
    good = Result(Candidate(np.zeros(1)), Status.OK, np.array([2.0]), np.array([-1.0]))
    scale.widen([good])
    near, far = (Result(Candidate(np.zeros(1)), Status.OK, np.array([0.0]), np.array([size])) for size in (0.1, 0.9))
    failed = Result(Candidate(np.zeros(1)), Status.FAILED, None)
    values = [scale.values(result)[0][0] for result in (good, near, far, failed)]
    assert values == sorted(set(values))
    assert np.isfinite(values).all()


def test_losses_that_are_not_finite_are_refused() -> None:
    """A NaN among the losses is a StrategyError: pymoo would take it for the optimum."""
    strategy = ready(nsga2(pop_size=4))
    candidate = strategy.ask(1).candidates[0]
    with pytest.raises(StrategyError, match="2 finite losses"):
        strategy.tell([Result(candidate, Status.OK, np.array([0.0, np.nan]))])


def test_the_search_ends_when_the_algorithm_has_converged() -> None:
    """CMA-ES, which stops by itself on a plateau, answers DONE from then on."""
    bowls = Bowls(1, digits=0)
    strategy = ready(PymooStrategy("CMAES"), bowls)
    drive(strategy, bowls, 5000)
    assert strategy.ask().state is AskState.DONE
    assert strategy.ask().state is AskState.DONE


def test_directions_may_be_given_as_lists() -> None:
    """Reference directions can be plain data; their number is then the population's size."""
    strategy = ready(PymooStrategy("NSGA3", ref_dirs=[[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]))
    assert len(strategy.ask().candidates) == 4


def test_directions_are_made_for_any_number_of_objectives() -> None:
    """Without directions the finest even set that fits `pop_size` is made: 36 for three objectives and 40."""
    strategy = ready(PymooStrategy("CTAEA", pop_size=40), Bowls(3))
    assert len(strategy.ask().candidates) == 36


@pytest.mark.parametrize(
    ("name", "message"), [("NSGA4", "did you mean 'NSGA"), ("nsga2", "did you mean 'NSGA2'"), ("RVEA", "number of generations")]
)
def test_an_unknown_algorithm_is_refused(name: str, message: str) -> None:
    """A name that cannot be used says why, or which name is nearest."""
    with pytest.raises(PluginError, match=message):
        PymooStrategy(name)


def test_a_missing_package_is_named() -> None:
    """An algorithm of pymoo that needs numba says so where numba is missing."""
    if importlib.util.find_spec("numba") is not None:
        pytest.skip("numba is installed")
    with pytest.raises(PluginError, match="needs the package 'numba'"):
        PymooStrategy("AGEMOEA")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("NSGA2", {"popsize": 40}, "did you mean 'pop_size'"),
        ("NSGA2", {"seed": 3}, "unknown option 'seed'"),
        ("CMAES", {"n_sample_points": 5}, "unknown option"),
        ("DE", {"pop_size": 2}, "pop_size to be a whole number >= 4, got 2"),
        ("GA", {"pop_size": "many"}, "got 'many'"),
        ("RNSGA2", {}, "a value for ref_points"),
    ],
)
def test_a_wrong_option_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    """An unknown, missing or senseless option is an error when the strategy is made, not a silent default."""
    with pytest.raises(ConfigError, match=message):
        PymooStrategy(name, **options)


def test_options_that_pymoo_refuses_are_a_users_mistake() -> None:
    """What only pymoo can judge is reported as a ConfigError naming the algorithm and the options."""
    with pytest.raises(ConfigError, match="pymoo:DE refuses the options"):
        ready(PymooStrategy("DE", variant="DE/nonsense"), Bowls(1))


def test_options_reach_the_algorithm() -> None:
    """An option changes the search: with another crossover rate differential evolution takes another course."""
    first, second = (genomes(drive(ready(PymooStrategy("DE", pop_size=8, CR=rate), Bowls(1)), Bowls(1), 40)) for rate in (0.1, 0.9))
    assert not np.array_equal(first, second)


def test_the_catalogue_names_each_algorithm_once() -> None:
    """No algorithm is both usable and unusable."""
    assert not set(ALGORITHMS) & set(UNUSABLE)


def test_the_registry_finds_the_adapter() -> None:
    """`nsga2` and `pymoo:NAME` are found by name."""
    assert load("strategies", "nsga2") is nsga2
    assert load("strategies", "pymoo:NSGA3") is PymooStrategy
