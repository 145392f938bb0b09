"""Products of few coefficients with long rows, whose bits depend on neither how many candidates nor how many elements are made together.

Every number is c_0 x_0, and then one fused multiply-add per further row, in their order. Matrix products sum so where they are large; small
ones are summed in other ways by some libraries on some processors (MKL on AMD's with AVX-512, below four rows or sixteen columns). The
sign of a sum of zeros alone is not told.
"""

from __future__ import annotations

from functools import cache

import torch

from mergeopt.evaluation.compiled import probe

__all__ = ["product"]

TALL, BROAD = 4, 16  # candidates and elements from which on a matrix product may sum in order


def product(coefficients: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Write coefficients @ rows.

    Args:
        coefficients: [n, R] float32.
        rows: [R, s] float32.
        out: [n, s] float32, contiguous along s.
    """
    if len(out) >= TALL and out.shape[1] >= BROAD and _matrix_products_are_in_order(len(rows), str(rows.device)):
        torch.mm(coefficients, rows, out=out)
    else:
        _in_order(coefficients, rows, out)


def _in_order(coefficients: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Write the product row by row: slower for several candidates, since rows are read for each."""
    for made, own in zip(out, coefficients.tolist(), strict=True):
        torch.mul(rows[0], own[0], out=made)
        for row, coefficient in zip(rows[1:], own[1:], strict=True):
            made.add_(row, alpha=coefficient)


@cache
def _matrix_products_are_in_order(rows: int, device: str) -> bool:
    """Whether matrix products with so many rows give the bits of `_in_order` on a device; found by trying."""
    for n, size in ((TALL, BROAD), (TALL, 1000), (8, BROAD), (8, 4099)):
        values = probe(rows, size, torch.device(device))
        coefficients = probe(n, 7 * rows, torch.device(device))[:, ::7].contiguous()  # ordinary numbers
        made, expected = torch.empty((2, n, size), dtype=torch.float32, device=device)
        torch.mm(coefficients, values, out=made)
        _in_order(coefficients, values, expected)
        if not torch.equal(made, expected):
            return False
    return True
