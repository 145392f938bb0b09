from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mergeopt.errors import Failure
from mergeopt.evaluation import elementwise
from mergeopt.evaluation.compiled import same_bits
from mergeopt.evaluation.elementwise import run
from mergeopt.operators.contract import Elementwise

Function = Callable[..., Any]


def halves(rows: torch.Tensor, start: int, weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Weigh the first of two rows before an index, and the second from there on."""
    index = torch.arange(start, start + rows.shape[1], dtype=torch.int32, device=rows.device)
    return torch.where(index < before, rows[0] * weight[0], rows[1] * weight[1])


def plan(*weights: tuple[float, float], before: int = 1000) -> Elementwise:
    return Elementwise(halves, (torch.tensor(weights), torch.full((len(weights),), before, dtype=torch.int32)))


def rows(size: int) -> torch.Tensor:
    return torch.randn((2, size), generator=torch.Generator().manual_seed(size))


def made(of: Elementwise, candidate: int, given: torch.Tensor, how: Any = "auto", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(given.shape[1], dtype=dtype)
    run(of, candidate, given, out, how)
    return out


def uncompiled(function: Function, **options: Any) -> Function:
    return function


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is compiled yet, and what is, is Python."""
    monkeypatch.setattr(elementwise, "_COMPILED", {})
    monkeypatch.setattr(torch, "compile", uncompiled)
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 999, 70_000, 200_000])
def test_both_twins_are_the_plan(fresh: pytest.MonkeyPatch, size: int, dtype: torch.dtype) -> None:
    """Eagerly in chunks and in one piece, a candidate is what the plan says, rounded once to the weights' type."""
    given, both = rows(size), plan((0.3, -2.0), (1.5, 0.0))
    for candidate, expected in enumerate(both.apply(given).to(dtype)):
        assert same_bits(made(both, candidate, given, "eager", dtype), expected)
        assert same_bits(made(both, candidate, given, "compiled", dtype), expected)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiled kernel serves all candidates, places and sizes, under any mode of gradients, to the bits of its eager twin."""
    monkeypatch.setattr(elementwise, "_COMPILED", {})
    arena = rows(100_000)
    first = made(plan((0.3, -2.0)), 0, arena[:, :5000], "compiled")
    assert same_bits(first, made(plan((0.3, -2.0)), 0, arena[:, :5000], "eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for begin, end, cut in ((0, 2, 1), (64, 1000, 7), (5, 70_001, 69_000)):
            again, part = plan((0.1, 3.0), (7.0, 1e-3), before=cut), arena[:, begin:end]
            expected = made(again, 1, part, "eager")
            with torch.inference_mode():
                assert same_bits(made(again, 1, part, "compiled"), expected)
            assert same_bits(made(again, 1, part, "compiled"), expected)


def test_compilation_waits_until_it_pays(fresh: pytest.MonkeyPatch) -> None:
    """Small work is done eagerly; once enough elements were made, equal kernels are compiled, once."""
    compiled: list[Function] = []

    def note(function: Function, **options: Any) -> Function:
        compiled.append(function)
        return function

    fresh.setattr(torch, "compile", note)
    fresh.setattr(elementwise, "PAYS", 3000)
    given = rows(1000)
    for turn in range(5):
        assert same_bits(made(plan((0.5, 0.25)), 0, given), plan((0.5, 0.25)).apply(given)[0])
        assert len(compiled) == (turn >= 2)


def broken(function: Function, **options: Any) -> Function:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no compiler\nfound")

    return fail


def rounded_otherwise(function: Function, **options: Any) -> Function:
    def write(out: torch.Tensor, *arguments: Any) -> None:
        function(out, *arguments)
        out[7] = torch.nextafter(out[7], torch.tensor(9.0))

    return write


def without_index(function: Function, **options: Any) -> Function:
    def write(out: torch.Tensor, given: torch.Tensor, own: list[torch.Tensor]) -> None:
        function(out, given, [own[0], torch.tensor(10**6, dtype=torch.int32)])

    return write


@pytest.mark.parametrize(
    ("compiler", "reason"), [(broken, "no compiler found"), (rounded_otherwise, "other bits"), (without_index, "other bits")]
)
def test_without_good_compiled_code_work_goes_on(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: Function, reason: str
) -> None:
    """A compiler that fails, or whose code gives other bits, is given up with one line; candidates are the same; asking for it fails."""
    fresh.setattr(torch, "compile", compiler)
    fresh.setattr(elementwise, "PAYS", 0)
    given = rows(5000)
    with caplog.at_level(logging.WARNING, logger="mergeopt"):
        candidates = [made(plan((0.5, 0.25)), 0, given) for _ in range(3)]
    assert all(same_bits(candidate, made(plan((0.5, 0.25)), 0, given, "eager")) for candidate in candidates)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(Failure, match=reason):
        made(plan((0.5, 0.25)), 0, given, "compiled")
