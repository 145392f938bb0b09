from __future__ import annotations

import itertools

import pytest
import torch

from mergeopt.evaluation import product as module
from mergeopt.evaluation.product import product


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 20])
def test_every_number_has_one_order_of_sums(rows: int) -> None:
    """For any number of candidates and elements, alone or part of more, numbers are those of fused additions in the rows' order."""
    generator = torch.Generator().manual_seed(rows)
    sources, coefficients = torch.randn((rows, 5000), generator=generator), torch.randn((8, rows), generator=generator)
    expected = coefficients[:, :1] * sources[:1]
    for r in range(1, rows):
        # A product of two numbers of 24 bits is exact in 53; the sum is rounded once more, which tells only where it falls on a tie.
        expected = (expected.double() + coefficients[:, r : r + 1].double() * sources[r : r + 1].double()).float()
    for n, size in itertools.product((1, 2, 3, 4, 7, 8), (1, 2, 15, 16, 33, 1000, 5000)):
        made = torch.full((8, 6000), -1.0)
        product(coefficients[:n], sources[:, :size], made[:n, 64 : 64 + size])
        assert torch.equal(made[:n, 64 : 64 + size], expected[:n, :size]), (n, size)
        assert (made[n:] == -1).all()
        assert (made[:, 64 + size :] == -1).all()


def test_matrix_products_that_sum_otherwise_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library's matrix products give other bits, they are found out, and the numbers are the same."""
    sources, coefficients = torch.randn((3, 100)), torch.randn((8, 3))
    expected, made = torch.empty((2, 8, 100))
    product(coefficients, sources, expected)

    def backwards(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
        out.copy_(torch.nextafter(a @ b, torch.tensor(9.0)))

    monkeypatch.setattr(torch, "mm", backwards)
    module._matrix_products_are_in_order.cache_clear()
    product(coefficients, sources, made)
    module._matrix_products_are_in_order.cache_clear()
    assert torch.equal(made, expected)
