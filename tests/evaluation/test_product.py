from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest
import torch

from mergeopt.evaluation import product as module
from mergeopt.evaluation.compiled import same_bits
from mergeopt.evaluation.product import product

NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(rows: int, size: int = 5000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coefficients of eight candidates, and rows."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn((8, rows), generator=generator), torch.randn((rows, size), generator=generator)


def made(coefficients: torch.Tensor, rows: torch.Tensor, how: Any = "auto", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((len(coefficients), rows.shape[1] + 128), -1.0, dtype=dtype)
    product(coefficients, rows, [one[64:-64] for one in out], how)
    assert (out[:, :64] == -1).all()
    assert (out[:, -64:] == -1).all()
    return out[:, 64:-64]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 20])
def test_every_number_has_one_order_of_sums(rows: int) -> None:
    """For any number of candidates and elements, alone or part of more, numbers are sums of products in the rows' order."""
    coefficients, sources = numbers(rows)
    expected = coefficients[:, :1] * sources[:1]
    for r in range(1, rows):
        expected = expected + coefficients[:, r : r + 1] * sources[r : r + 1]
    for n, size in itertools.product(range(1, 9), (1, 2, 15, 16, 33, 1000, 5000)):
        assert same_bits(made(coefficients[:n], sources[:, :size], "eager"), expected[:n, :size]), (n, size)
        assert same_bits(made(coefficients[8 - n :], sources[:, 5000 - size :], "eager"), expected[8 - n :, 5000 - size :]), (n, size)


def test_pieces_give_the_same_bits() -> None:
    """More elements than are computed at a time, and more candidates than one pass takes, give what each gives alone."""
    coefficients, sources = numbers(4, 150_000)
    many = torch.cat([coefficients, coefficients.flip(0), coefficients[:3]])
    together = made(many, sources)
    for candidate in (0, 7, 11, 18):
        assert same_bits(together[candidate], made(many[candidate : candidate + 1], sources)[0])


@pytest.mark.parametrize(("stored", "dtype"), list(itertools.product(TYPES, TYPES)))
def test_types_are_rounded_once(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Narrow rows are added up in float32, and the sum is rounded once where the weights are narrow."""
    coefficients, sources = numbers(4)
    wide = made(coefficients, sources.to(stored).to(torch.float32))
    assert same_bits(made(coefficients, sources.to(stored), dtype=dtype), wide.to(dtype))


@NEEDS_COMPILER
@pytest.mark.parametrize(("rows", "dtype", "counts"), [(4, torch.float32, (1, 8, 9)), (2, torch.bfloat16, (1,))])
def test_compiled_code_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    """Compiled once for one and for eight candidates, it gives the eager twin's bits at all places and sizes, in any mode of gradients."""
    monkeypatch.setattr(module, "_COMPILED", {})
    coefficients, sources = numbers(rows, 70_000)
    for n in counts:
        many = torch.cat([coefficients, coefficients])[:n]
        assert same_bits(made(many, sources, "compiled", dtype), made(many, sources, "eager", dtype))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for begin, end in ((0, 2), (64, 1000), (5, 69_999)):
            for n in counts:
                many = torch.cat([coefficients + begin, coefficients])[:n]
                expected = made(many, sources[:, begin:end], "eager", dtype)
                with torch.inference_mode():
                    assert same_bits(made(many, sources[:, begin:end], "compiled", dtype), expected)
                assert same_bits(made(many.requires_grad_(), sources[:, begin:end], "compiled", dtype), expected)


def test_compilation_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows are never worth compiled code; long ones are, once enough elements were made."""
    compiled: list[object] = []

    def uncompiled(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(module, "_COMPILED", {})
    monkeypatch.setattr(module, "PAYS", 400_000)
    monkeypatch.setattr(torch, "compile", uncompiled)
    coefficients, sources = numbers(4, 20_000)
    expected = made(coefficients, sources, "eager")
    for _ in range(60):
        assert same_bits(made(coefficients, sources[:, :1000]), expected[:, :1000])
    assert not compiled
    for turn in range(5):
        assert same_bits(made(coefficients, sources), expected)
        assert len(compiled) == int(turn >= 2)
