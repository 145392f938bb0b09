"""Operators by name."""

from __future__ import annotations

from mergeopt.errors import ConfigError, nearest
from mergeopt.operators.contract import MergeOperator
from mergeopt.operators.function import OperatorFactory
from mergeopt.registry import load

__all__ = ["find_operator"]


def find_operator(operator: str | MergeOperator | OperatorFactory, variant: str = "paper") -> MergeOperator:
    """Return an operator by name, or the one given.

    Args:
        operator: registered name, operator, or decorated function.
        variant: which variant of a named one.

    Raises:
        PluginError: no operator has that name.
        ConfigError: it has no such variant.
    """
    factory = load("operators", operator) if isinstance(operator, str) else operator
    if not isinstance(factory, type | OperatorFactory):
        if variant not in (factory.variants[0], factory.variant):
            raise ConfigError(f"merge: variant {variant!r} was asked for, but the operator given is of variant {factory.variant!r}")
        return factory
    if variant not in factory.variants:  # type: ignore[union-attr]
        raise ConfigError(f"merge: operator {operator!r} has no variant {variant!r}; {nearest(variant, factory.variants)}")  # type: ignore[union-attr]
    found: MergeOperator = factory(variant=variant)
    return found
