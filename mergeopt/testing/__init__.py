"""Contract suites that plug-ins inherit.

A strategy or an operator is held to its contract by one class in a test file:

    from mergeopt.testing import OperatorContract, StrategyContract

    class TestMyStrategy(StrategyContract):
        def make(self) -> Strategy:
            return MyStrategy()

    class TestMyOperator(OperatorContract):
        def make(self) -> MergeOperator:
            return MyOperator()
"""

from mergeopt.testing.operators import OperatorContract
from mergeopt.testing.strategies import Bowls, StrategyContract, drive, tiny

__all__ = ["Bowls", "OperatorContract", "StrategyContract", "drive", "tiny"]
