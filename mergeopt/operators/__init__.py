"""Merge rules, each in a file of its own, and the contract they keep."""

from mergeopt.operators.contract import Arguments, Dense, Elementwise, Linear, MergeOperator, Param, Plan, Requires, Static, declare
from mergeopt.operators.function import merge_operator

__all__ = [
    "Arguments",
    "Dense",
    "Elementwise",
    "Linear",
    "MergeOperator",
    "Param",
    "Plan",
    "Requires",
    "Static",
    "declare",
    "merge_operator",
]
