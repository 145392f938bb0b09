"""Operators work where their tensors are: on torch's device without storage, which no other device's tensors can be mixed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergeopt.errors import ConfigError
from mergeopt.operators.contract import MergeOperator, Param, Statistics
from mergeopt.registry import load, names
from mergeopt.testing.operators import made_up

META = torch.device("meta")
EXPERTS, SHAPE, CANDIDATES = 2, (5, 9), 3
UNREADABLE = ("cannot be called on meta tensors", "data-independent")
"""What torch says where a number is read, which is no mixing, but which is not there."""


def operators() -> list[MergeOperator]:
    """Return every registered operator, in every variant."""
    rules = [load("operators", name) for name in names("operators")]
    return [rule(variant) for rule in rules for variant in rule.variants]


def one(param: Param) -> Any:
    return param.default if param.kind == "choice" or not param.per_expert else torch.full((EXPERTS,), param.default, dtype=torch.float64)


def batch(param: Param) -> Any:
    if param.kind == "choice":
        return param.default
    shape = (CANDIDATES, EXPERTS) if param.per_expert else (CANDIDATES,)
    return torch.full(shape, param.default, dtype=torch.float64, device=META)


def statistics(operator: MergeOperator) -> Statistics | None:
    given = made_up(operator, SHAPE, EXPERTS)
    if given is None:
        return None
    fisher, norms, gram = (None if value is None else value.to(META) for value in (given.fisher, given.norms, given.gram))
    return Statistics(fisher, norms, gram)


def run(operator: MergeOperator, fixed: set[str]) -> torch.Tensor:
    """Take an operator's whole way, from a tensor of the models to that of the candidates."""
    base, experts = torch.empty(SHAPE, device=META), torch.empty((EXPERTS, *SHAPE), device=META)
    static = {param.name: one(param) for param in operator.params if param.name in fixed}
    overall = operator.finish([operator.survey(base, experts, static)])
    rows = torch.empty((operator.rows(static, EXPERTS), base.numel()), device=META)
    state = operator.prepare(base, experts, static, overall, rows, "w", statistics(operator))
    return operator.lower(state, {param.name: batch(param) for param in operator.params}).apply(rows)


@pytest.mark.parametrize("operator", operators(), ids=lambda operator: f"{operator.name}-{operator.variant}")
def test_tensors_stay_on_their_device(operator: MergeOperator) -> None:
    """With all parameters fixed, and with each one searched, no tensor of another device comes in, and the result is on the models'."""
    every = {param.name for param in operator.params}
    for fixed in (every, *(every - {name} for name in every)):
        try:
            assert run(operator, fixed).device == META
        except ConfigError:  # a parameter that this operator needs fixed
            continue
        except (RuntimeError, NotImplementedError) as error:
            if not any(reason in str(error) for reason in UNREADABLE):
                raise
