"""Merge rules, each in a file of its own, and the contract they keep."""

from mergeopt.operators.contract import (
    Arguments,
    Dense,
    Elementwise,
    Linear,
    MergeOperator,
    Param,
    Plan,
    Rational,
    Requires,
    Static,
    Statistics,
    declare,
)
from mergeopt.operators.function import merge_operator

__all__ = [
    "Arguments",
    "Dense",
    "Elementwise",
    "Linear",
    "MergeOperator",
    "Param",
    "Plan",
    "Rational",
    "Requires",
    "Static",
    "Statistics",
    "declare",
    "merge_operator",
]
