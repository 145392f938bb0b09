from __future__ import annotations

import numpy as np
import pytest
import torch

from mergeopt.errors import ConfigError
from mergeopt.operators.contract import Linear, MergeOperator, Param, check_plan, declare
from mergeopt.operators.linear import LinearMerge
from mergeopt.operators.task_arithmetic import TaskArithmetic


def merged(operator: MergeOperator, base: torch.Tensor, experts: torch.Tensor, weight: list[float], **others: object) -> torch.Tensor:
    arguments = {p.name: others.get(p.name, p.default) for p in operator.params} | {"weight": torch.tensor([weight], dtype=torch.float64)}
    arguments = {k: v if isinstance(v, torch.Tensor | bool) else torch.tensor([v], dtype=torch.float64) for k, v in arguments.items()}
    rows = torch.zeros(operator.rows({}, len(experts)), base.numel())
    plan = operator.lower(operator.prepare(base, experts, {}, None, rows), arguments)
    assert isinstance(plan, Linear)
    check_plan(plan, 1, len(rows), operator.name)
    return plan.apply(rows)[0].reshape(base.shape)


@pytest.mark.parametrize("experts", [1, 2, 4, 9])
@pytest.mark.parametrize("kind", [LinearMerge, TaskArithmetic])
def test_an_expert_alone_comes_back_bit_for_bit(kind: type[LinearMerge | TaskArithmetic], experts: int) -> None:
    """Weight one for one expert and zero for the others gives that expert exactly, whatever the sizes of the numbers."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-20, 20, (experts + 1, 300), generator=generator)
    both = torch.randn(experts + 1, 300, generator=generator) * sizes
    for k in range(experts):
        weight = [0.0] * experts
        weight[k] = 1.0
        assert torch.equal(merged(kind(), both[0], both[1:], weight), both[k + 1])


def test_no_weight_is_the_base_for_task_arithmetic() -> None:
    """Task arithmetic with weights zero gives the base exactly; so does scale zero."""
    both = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(merged(TaskArithmetic(), both[0], both[1:], [0.0, 0.0, 0.0]), both[0])
    assert torch.equal(merged(TaskArithmetic(), both[0], both[1:], [0.3, 0.2, 0.1], scale=0.0), both[0])


def test_no_weight_has_no_average() -> None:
    """The normalised average of weights that are all zero is not a number, the plain sum is zero."""
    both = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    assert torch.isnan(merged(LinearMerge(), both[0], both[1:], [0.0, 0.0])).all()
    assert (merged(LinearMerge(), both[0], both[1:], [0.0, 0.0], normalize=False) == 0).all()


def test_equal_experts_average_to_themselves() -> None:
    """The average of copies of one expert is that expert up to rounding, whatever the weights."""
    both = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    copies = both[1].expand(3, -1).contiguous()
    torch.testing.assert_close(merged(LinearMerge(), both[0], copies, [0.2, 0.9, 1.3]), both[1], rtol=1e-6, atol=0)


def test_a_plan_of_another_size_is_named() -> None:
    """A plan that does not fit the batch or the rows is reported as the operator's defect."""
    plan = Linear(torch.zeros(2, 3))
    check_plan(plan, 2, 3, "mine")
    with pytest.raises(ConfigError, match=r"operator 'mine': expected coefficients of shape \(N, R\) = \(3, 3\), got \(2, 3\)"):
        check_plan(plan, 3, 3, "mine")


@pytest.mark.parametrize(
    ("param", "good", "bad"),
    [
        (Param.real(1.0, low=0.0), [0, 0.5, 1e9, np.float64(2)], [-0.1, float("nan"), float("inf"), True, "1", None]),
        (Param.real(1.0, low=0.0, high=1.0), [0, 1.0], [1.0001, -1]),
        (Param.whole(2, low=1, high=3), [1, 3, 2.0], [0, 4, 1.5, False]),
        (Param.choice("a", ["a", 1, False]), ["a", 1, False], ["b", True, 0, None]),
    ],
)
def test_values_are_checked(param: Param, good: list[object], bad: list[object]) -> None:
    """A parameter accepts its own values and refuses all others by name, truth values never pass for numbers."""
    (named,) = declare(mine=param)
    for value in good:
        named.check(value)
    for value in bad:
        with pytest.raises(ConfigError, match="mine: expected"):
            named.check(value)
