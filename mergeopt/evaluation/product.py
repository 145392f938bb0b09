"""Linear combinations of rows: eagerly, in pieces that stay in a core's caches, or compiled, every row read once for several candidates.

    out_n = (..((c_n0 x_0 + c_n1 x_1) + c_n2 x_2) + ..), with every product and every sum rounded to float32

Both twins give the same bits, whatever is made together and on whatever device. Matrix products do not: libraries choose order and fused
additions by shapes and processors (MKL on AMD's with AVX-512 does below four rows or sixteen columns), so that a candidate alone would
differ from the same one in a batch. They are slower than compiled code, too, where few rows are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mergeopt.evaluation.compiled import Compiled, How, detached, probe, same_bits
from mergeopt.evaluation.elementwise import chunk

__all__ = ["product"]

MOST = 8  # candidates of one pass: each then moves 1.4 models (K = 3), and with more hardly fewer
SHORT = 1 << 14  # elements below which calling compiled code takes longer than computing eagerly
PAYS = 2_000_000_000  # elements after which seconds of compilation are earned back: the eager twin takes 1 ns more for each


@torch.no_grad()
def product(coefficients: torch.Tensor, rows: torch.Tensor, outs: Sequence[torch.Tensor], how: How = "auto") -> None:
    """Write coefficients @ rows.

    Args:
        coefficients: [n, R] float32.
        rows: [R, S], float32 or narrower.
        outs: n times [S], of any float type; rounded once more where it is narrower.
        how: which twin is used.

    Raises:
        Failure: compiled code is asked for, where there is no compiler or it failed.
    """
    start = 0
    while start < len(outs):
        count = min(MOST, 1 << (len(outs) - start).bit_length() - 1)  # a power of two, so that few forms are compiled
        own, part = coefficients[start : start + count].contiguous(), outs[start : start + count]
        if not _compiled(own, rows, part, how):
            _eagerly(own, rows, part)
        start += count


def _eagerly(coefficients: torch.Tensor, rows: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
    size = rows.shape[1]
    step = min(size, chunk(rows.device))
    sums, products = torch.empty((2, len(outs), step), dtype=torch.float32, device=rows.device)
    factors = coefficients[:, :, None]
    for start in range(0, size, step):
        given = rows[:, start : start + step].to(torch.float32)
        total, term = sums[:, : given.shape[1]], products[:, : given.shape[1]]
        torch.mul(factors[:, 0], given[:1], out=total)
        for place in range(1, len(given)):
            total.add_(torch.mul(factors[:, place], given[place : place + 1], out=term))
        for out, made in zip(outs, total, strict=True):
            out[start : start + step] = made


_Key = tuple[int, int, torch.dtype, torch.dtype, str]
_COMPILED: dict[_Key, Compiled] = {}


def _compiled(coefficients: torch.Tensor, rows: torch.Tensor, outs: Sequence[torch.Tensor], how: How) -> bool:
    """Write what `_eagerly` writes, in compiled code; False where nothing was written."""
    size = rows.shape[1]
    if how == "eager" or size < (2 if how == "compiled" else SHORT):
        return False
    key = (*coefficients.shape, rows.dtype, outs[0].dtype, str(rows.device))
    if key not in _COMPILED:
        prove = partial(_proves, coefficients.clone(), rows[:, :0], outs[0][:0])
        _COMPILED[key] = Compiled(_fused, "linear combinations", prove, pays=PAYS)
    twin = _COMPILED[key]
    return twin.ready(len(outs) * size, how) and twin(detached(coefficients), detached(rows), [detached(out) for out in outs])


def _fused(coefficients: torch.Tensor, rows: torch.Tensor, outs: list[torch.Tensor]) -> None:
    for candidate, out in enumerate(outs):
        total = rows[0].to(torch.float32) * coefficients[candidate, 0]
        for place in range(1, rows.shape[0]):
            total = total + rows[place].to(torch.float32) * coefficients[candidate, place]
        out.copy_(total)


def _proves(coefficients: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, run: Callable[..., bool]) -> bool:
    """Compare the twins on rows of all magnitudes."""
    for size in (4099, 37):
        # Wider than it is long, as rows of an arena are: other code is made for rows that end where the next begin.
        given = probe(coefficients.shape[1], size + 64, rows.device).to(rows.dtype)[:, :size]
        expected, made = (torch.empty((len(coefficients), size), dtype=out.dtype, device=out.device) for _ in range(2))
        _eagerly(coefficients, given, list(expected))
        if not run(detached(coefficients), detached(given), [detached(one) for one in made]) or not same_bits(made, expected):
            return False
    return True
