"""Every strategy of ours keeps the strategy contract."""

from __future__ import annotations

from mergeopt.strategy import Strategy
from mergeopt.testing import StrategyContract
from mergeopt_strategies.pymoo_adapter import PymooStrategy, nsga2
from mergeopt_strategies.random_search import RandomSearch
from mergeopt_strategies.sobol import Sobol


class TestRandomSearch(StrategyContract):
    """Random search keeps the contract."""

    learns = False

    def make(self) -> Strategy:
        return RandomSearch()


class TestSobol(StrategyContract):
    """Sobol points keep the contract."""

    learns = False

    def make(self) -> Strategy:
        return Sobol()


class TestNsga2(StrategyContract):
    """NSGA-II keeps the contract."""

    def make(self) -> Strategy:
        return nsga2(pop_size=20)


class TestNsga3(StrategyContract):
    """NSGA-III keeps the contract."""

    def make(self) -> Strategy:
        return PymooStrategy("NSGA3", pop_size=20)


class TestSmsEmoa(StrategyContract):
    """SMS-EMOA keeps the contract."""

    def make(self) -> Strategy:
        return PymooStrategy("SMSEMOA", pop_size=20)


class TestParallelMoead(StrategyContract):
    """MOEA/D, which knows no constraints of its own, keeps the contract."""

    def make(self) -> Strategy:
        return PymooStrategy("ParallelMOEAD", pop_size=20)


class TestMoead(StrategyContract):
    """Sequential MOEA/D, whose generations are single candidates, keeps the contract."""

    def make(self) -> Strategy:
        return PymooStrategy("MOEAD", pop_size=20)


class TestGa(StrategyContract):
    """The genetic algorithm keeps the contract."""

    def make(self) -> Strategy:
        return PymooStrategy("GA", pop_size=20)


class TestDe(StrategyContract):
    """Differential evolution keeps the contract."""

    def make(self) -> Strategy:
        return PymooStrategy("DE", pop_size=20)


class TestCmaes(StrategyContract):
    """CMA-ES keeps the contract."""

    def make(self) -> Strategy:
        return PymooStrategy("CMAES")
