from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergeopt.errors import CandidateError, ConfigError
from mergeopt.evaluation.materialize import Materializer, Values, stream
from mergeopt.genomes.coefficients import CoefficientSpace, parameter_values
from mergeopt.models.groups import grouping
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import Param
from mergeopt.operators.function import FunctionOperator, merge_operator

CPU = torch.device("cpu")


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(3, 4))
        self.b = torch.nn.Parameter(torch.zeros(5))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "e0", "e1")]
    for seed, file in enumerate(files):
        generator = torch.Generator().manual_seed(seed)
        save_file({"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}, file)
    return Layout(Pool(files[0], files[1:], module=Two))


def operator(function: Callable[..., Any]) -> FunctionOperator:
    return merge_operator("mine", size=Param.real(1.0, search=(0.0, 2.0)))(function)()


def candidates(layout: Layout, mine: FunctionOperator, sizes: list[float]) -> list[Values]:
    space = CoefficientSpace(mine, {"size": {"low": 0.0, "high": 2.0}}, layout.pool.names, layout.pool.expert_names)
    group = grouping("model", layout.pool.names)
    arguments = [space.decode([size / 2.0]) for size in sizes]
    return [{"size": parameter_values(mine.params[0], a["size"], group, layout.pool.expert_names)} for a in arguments]


def make(layout: Layout, mine: FunctionOperator, sizes: list[float]) -> tuple[torch.Tensor, list[str | None]]:
    made = candidates(layout, mine, sizes)
    out = torch.zeros(len(sizes), layout.size)
    return out, Materializer(layout, mine, made[0], CPU)(made, out)


def test_a_function_sees_task_vectors_in_their_shape(layout: Layout) -> None:
    """The function gets float32 deltas [K, *shape], and what it returns is added to the base."""
    shapes = []

    def mean(deltas: torch.Tensor, *, size: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(deltas.shape))
        assert deltas.dtype == size.dtype == torch.float32
        return size * deltas.mean(dim=0)

    out, errors = make(layout, operator(mean), [0.5])
    assert errors == [None]
    assert sorted(shapes) == [(2, 3, 4), (2, 5)]
    for segment in layout.segments:
        base, experts = layout.pool.read_base(segment.name), layout.pool.stack(segment.name)
        torch.testing.assert_close(out[0, segment.start : segment.end].view(segment.shape), base + 0.5 * (experts - base).mean(dim=0))


def test_a_function_that_raises_fails_its_candidate_only(layout: Layout) -> None:
    """What the function raises is that candidate's error, named; the others of the batch are made."""

    def picky(deltas: torch.Tensor, *, size: torch.Tensor) -> torch.Tensor:
        if size > 1:
            raise ValueError("too large")
        return size * deltas[0]

    mine = operator(picky)
    out, errors = make(layout, mine, [0.5, 1.5, 0.25])
    assert errors == [None, "operator 'mine' raised ValueError: too large", None]
    assert torch.equal(out[[0, 2]], make(layout, mine, [0.5, 0.25])[0])
    with pytest.raises(CandidateError, match="operator 'mine' raised ValueError: too large"):
        list(stream(layout, mine, candidates(layout, mine, [1.5])[0], CPU))


def test_weights_that_are_no_numbers_fail_their_candidate(layout: Layout) -> None:
    """A function that returns NaN or infinities makes no candidate, in the arena and tensor by tensor."""

    def divide(deltas: torch.Tensor, *, size: torch.Tensor) -> torch.Tensor:
        return deltas[0] / size

    mine = operator(divide)
    assert make(layout, mine, [0.0, 1.0])[1] == ["the merged weights are not finite", None]
    with pytest.raises(CandidateError, match=r"the merged weights are not finite \(in a\)"):
        list(stream(layout, mine, candidates(layout, mine, [0.0])[0], CPU))


def test_a_function_must_not_change_what_others_share(layout: Layout) -> None:
    """Changing the deltas in place would spoil the next candidate and is refused with the way out."""

    def careless(deltas: torch.Tensor, *, size: torch.Tensor) -> torch.Tensor:
        return deltas.mul_(size).sum(dim=0)

    with pytest.raises(ConfigError, match=r"operator 'mine' changed its deltas in place.*deltas\.clone\(\)"):
        make(layout, operator(careless), [0.5])


@pytest.mark.parametrize(("returned", "came"), [(torch.zeros(2), r"\(2,\)"), (3.0, "float"), (None, "NoneType")])
def test_a_delta_of_another_shape_is_refused(layout: Layout, returned: Any, came: str) -> None:
    """What is not a delta of the tensor's shape is refused with both shapes."""
    with pytest.raises(ConfigError, match=rf"operator 'mine': expected a delta of shape \((3, 4|5,)\), got {came}"):
        make(layout, operator(lambda deltas, *, size: returned), [0.5])


def test_declared_parameters_are_the_keywords() -> None:
    """A parameter without a keyword, a keyword without a parameter, and none at all are refused when the operator is declared."""
    with pytest.raises(ConfigError, match=r"the function's keywords are \['size'\], the declared parameters \['sise'\]"):

        @merge_operator("mine", sise=Param.real(1.0))
        def misspelt(deltas: torch.Tensor, *, size: torch.Tensor) -> torch.Tensor:
            return deltas[0]

    with pytest.raises(ConfigError, match="declare at least one numeric parameter"):

        @merge_operator("mine")
        def bare(deltas: torch.Tensor) -> torch.Tensor:
            return deltas[0]
