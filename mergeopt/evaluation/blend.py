"""The arithmetic of an offspring over flat tensors, in place, twice: eagerly, and compiled into one pass over memory.

Both give the same bits. The eager twin works in chunks that stay in a core's caches; the compiled one reads every operand once. Which is
used is a question of time alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mergeopt.evaluation.compiled import Compiled, How, Write, detached, probe, same_bits
from mergeopt.evaluation.crossover import BLOCK, keys, threshold
from mergeopt.evaluation.mutation import Mixture, combine
from mergeopt.scramble import scramble, signed

__all__ = ["Mask", "eager", "fused"]

CHUNK = 1 << 16  # elements; 8 memory copies per offspring at 2^16 and 2^17, 9 at 2^15, 10 at 2^18 (2 MiB of second-level cache)
PAYS = 2_000_000_000  # elements after which some seconds of compilation are earned back: the eager twin takes 3 to 4 ns more for each
SIGN = -(2**31)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which parameters of a tensor come from the mutant: those whose hash is below floor(Cr 2^32).

    Args:
        seed: of the step.
        name: of the tensor.
        rate: Cr.
        start: flat index of the first parameter.
    """

    seed: int
    name: str
    rate: float
    start: int

    def words(self, offset: int) -> tuple[int, int, int, int]:
        """Return what the hash needs from an offset on, as int32 reads it: index, k0, k1 and the largest hash taken, its sign turned."""
        index = self.start + offset
        key0, key1 = keys(self.seed, "parameter", self.name, index // BLOCK)
        return signed(index % BLOCK), signed(key0), signed(key1), threshold(self.rate) - 1 + SIGN

    def pieces(self, size: int, most: int) -> list[tuple[int, int]]:
        """Cut [0, size) into pieces of at most so many elements, none across a multiple of 2^32 of the flat index."""
        cuts = [0]
        while cuts[-1] < size:
            cuts.append(min(size, cuts[-1] + most, cuts[-1] + BLOCK - (self.start + cuts[-1]) % BLOCK))
        return list(itertools.pairwise(cuts))


def eager(form: Mixture, operands: Sequence[torch.Tensor], scales: Sequence[float], mask: Mask | torch.Tensor | None) -> None:
    """Overwrite the parent with the offspring.

    Args:
        form: of the mutant.
        operands: parent and references, float32 [n], contiguous.
        scales: one per term.
        mask: what is taken from the mutant: by hash, or bool [n]; None for everything.
    """
    child, device = operands[0], operands[0].device
    size = child.numel()
    pieces = (mask if isinstance(mask, Mask) else Mask(0, "", 1.0, 0)).pieces(size, CHUNK)
    factors = [torch.tensor(scale, dtype=torch.float32, device=device) for scale in scales]
    room = min(size, CHUNK)
    count = torch.arange(room, dtype=torch.int32, device=device)
    taken, spare = torch.empty_like(count), torch.empty_like(count)
    mutant, scratch = (torch.empty(room, dtype=torch.float32, device=device) for _ in range(2))
    for begin, end in pieces:
        n = end - begin
        part, v, t = child[begin:end], mutant[:n], taken[:n]
        combine(form, [operand[begin:end] for operand in operands], factors, v, scratch[:n])
        if mask is None:
            part.copy_(v)
            continue
        if isinstance(mask, Mask):
            index, key0, key1, most = mask.words(begin)
            torch.add(count[:n], index, out=t)
            scramble(t, key0, key1, spare[:n])
            t.bitwise_xor_(SIGN).le_(most)
        else:
            t.copy_(mask[begin:end])
        # torch.where branches on every element of a random mask, which takes eight times as long as mixing bits.
        bits, parent = v.view(torch.int32), part.view(torch.int32)
        parent.bitwise_xor_(bits.bitwise_xor_(parent).bitwise_and_(t.neg_()))


def fused(form: Mixture, operands: Sequence[torch.Tensor], scales: Sequence[float], mask: Mask, how: How) -> bool:
    """Overwrite the parent with the offspring as `eager` does, in compiled code; False where it could not, and nothing was changed.

    Args:
        form: of the mutant.
        operands: parent and references, float32 [n], n > 1, contiguous; no reference is the parent itself.
        scales: one per term.
        mask: what is taken.
        how: which twin is asked for.

    Raises:
        Failure: compiled code is asked for, where there is no compiler or it failed.
    """
    device = operands[0].device
    key = (form, str(device))
    if key not in _COMPILED:
        _COMPILED[key] = Compiled(_fused(form), "offspring", partial(_proves, form, device), pays=PAYS)
    twin = _COMPILED[key]
    return twin.ready(operands[0].numel(), how) and _apply(twin, operands, scales, mask)


_COMPILED: dict[tuple[Mixture, str], Compiled] = {}


def _apply(run: Callable[..., bool], operands: Sequence[torch.Tensor], scales: Sequence[float], mask: Mask) -> bool:
    device = operands[0].device
    factors = torch.tensor(scales, dtype=torch.float32, device=device)
    for begin, end in mask.pieces(operands[0].numel(), BLOCK):
        words = torch.tensor(mask.words(begin), dtype=torch.int32, device=device)
        parts = [detached(operand[begin:end]) for operand in operands]
        if not run(parts, list(factors.unbind()), list(words.unbind())):
            return False
    return True


def _proves(form: Mixture, device: torch.device, run: Callable[..., bool]) -> bool:
    scales = (0.3, -0.7)[: len(form.terms)]
    for seed, size in enumerate((4099, 37)):
        operands = list(probe(1 + max(form.base, *(max(term) for term in form.terms)), size, device))
        expected = operands[0].clone()
        mask = Mask(seed, "probe", 0.5, 1000 * seed)
        eager(form, [expected, *operands[1:]], scales, mask)
        if not _apply(run, operands, scales, mask) or not same_bits(operands[0], expected):
            return False
    return True


def _fused(form: Mixture) -> Write:
    def blend(operands: list[torch.Tensor], scales: list[torch.Tensor], words: list[torch.Tensor]) -> None:
        child, (index, key0, key1, most) = operands[0], words
        x = torch.arange(child.shape[0], dtype=torch.int32, device=child.device)
        x.add_(index)
        scramble(x, key0, key1, torch.empty_like(x))
        v = torch.empty_like(child)
        combine(form, operands, scales, v, torch.empty_like(child))
        child.copy_(torch.where(x.bitwise_xor_(SIGN) <= most, v, child))

    return blend
