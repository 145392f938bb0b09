"""The arithmetic of an offspring over flat tensors, in place, twice: eagerly, and compiled into one pass over memory.

Both give the same bits. The eager twin works in chunks that stay in a core's caches; the compiled one reads every operand once. Which is
used is a question of time alone.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType

import torch
from torch.utils.dlpack import from_dlpack

from mergeopt.evaluation.crossover import BLOCK, keys, threshold
from mergeopt.evaluation.mutation import Mixture, combine
from mergeopt.scramble import scramble, signed

__all__ = ["Compiled", "Mask", "compiled", "eager"]

CHUNK = 1 << 16  # elements; 8 memory copies per offspring at 2^16 and 2^17, 9 at 2^15, 10 at 2^18 (2 MiB of second-level cache)
PAYS = 2_000_000_000  # elements after which some seconds of compilation are earned back: the eager twin takes 3 to 4 ns more for each
SIGN = -(2**31)
log = logging.getLogger(__name__)

Fused = Callable[[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]], None]


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


class Compiled:
    """The compiled twin of `eager` for one form of mutant and hashed masks, which proves itself before it is used.

    Args:
        form: of the mutant.
        device: where offspring are made.
    """

    def __init__(self, form: Mixture, device: torch.device) -> None:
        self._form, self._device = form, device
        self._seen = 0
        self._run: Fused | None = None
        self.refusal: str | None = None

    def ready(self, elements: int, *, force: bool) -> bool:
        """Return whether to use this for so many more elements; compiles when that is worth its seconds, or when forced.

        Where it cannot be used, `refusal` says why, and one line of the log.
        """
        self._seen += elements
        if self._run is None and self.refusal is None and (force or self._seen >= PAYS):
            self._compile()
        return self._run is not None

    def __call__(self, operands: Sequence[torch.Tensor], scales: Sequence[float], mask: Mask) -> bool:
        """Overwrite the parent with the offspring as `eager` does; False where it could not, and nothing was changed.

        Args:
            operands: parent and references, float32 [n], n > 1, contiguous; no reference is the parent itself.
            scales: one per term.
            mask: what is taken.
        """
        return self._run is not None and self._apply(self._run, operands, scales, mask)

    def _compile(self) -> None:
        log.info("compiling the arithmetic of offspring")
        run: Fused = torch.compile(_fused(self._form), fullgraph=True, dynamic=True)
        scales = (0.3, -0.7)[: len(self._form.terms)]
        for seed, size in enumerate((4099, 37)):
            operands = _probe(1 + max(self._form.base, *(max(term) for term in self._form.terms)), size, self._device)
            expected = operands[0].clone()
            mask = Mask(seed, "probe", 0.5, 1000 * seed)
            eager(self._form, [expected, *operands[1:]], scales, mask)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler, about itself
                if not self._apply(run, operands, scales, mask):
                    return
            if not torch.equal(operands[0].view(torch.int32), expected.view(torch.int32)):
                self._refuse("the compiled code gives other bits")
                return
        self._run = run

    def _apply(self, run: Fused, operands: Sequence[torch.Tensor], scales: Sequence[float], mask: Mask) -> bool:
        from torch._dynamo.exc import FailOnRecompileLimitHit  # the compiler takes a second to import

        device = operands[0].device
        factors = torch.tensor(scales, dtype=torch.float32, device=device)
        for begin, end in mask.pieces(operands[0].numel(), BLOCK):
            words = torch.tensor(mask.words(begin), dtype=torch.int32, device=device)
            # A view drags the shape of what it is a view of into the conditions of compiled code; an exchanged tensor has none.
            parts = [from_dlpack(operand[begin:end]) for operand in operands]
            try:
                run(parts, list(factors.unbind()), list(words.unbind()))
            except (RuntimeError, OSError, ImportError, FailOnRecompileLimitHit) as error:  # no compiler, or one that failed
                self._refuse(" ".join(str(error).split())[:300] or type(error).__name__)
                return False
        return True

    def _refuse(self, reason: str) -> None:
        self._run, self.refusal = None, reason
        log.warning("offspring are made without compiled code, to the same bits: %s", reason)


_COMPILED: dict[tuple[Mixture, str], Compiled] = {}


def compiled(form: Mixture, device: torch.device) -> Compiled:
    """Return this process's compiled twin for a form of mutant on a device."""
    key = (form, str(device))
    if key not in _COMPILED:
        _COMPILED[key] = Compiled(form, device)
    return _COMPILED[key]


def _fused(form: Mixture) -> Fused:
    def blend(operands: list[torch.Tensor], scales: list[torch.Tensor], words: list[torch.Tensor]) -> None:
        child, (index, key0, key1, most) = operands[0], words
        x = torch.arange(child.shape[0], dtype=torch.int32, device=child.device)
        x.add_(index)
        scramble(x, key0, key1, torch.empty_like(x))
        v = torch.empty_like(child)
        combine(form, operands, scales, v, torch.empty_like(child))
        child.copy_(torch.where(x.bitwise_xor_(SIGN) <= most, v, child))

    # The compiler keeps a few variants (for settings of threads, say) per code object, and closures share one: give each form its own.
    return FunctionType(blend.__code__.replace(), blend.__globals__, closure=blend.__closure__)


def _probe(operands: int, size: int, device: torch.device) -> list[torch.Tensor]:
    """Make operands of all magnitudes: ordinary, subnormal, huge, and signed zeros."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((operands, size), generator=generator)
    for place, scale in enumerate((1e-39, 1e-20, 1e20, 0.0), start=1):
        rows[:, place::7] *= scale
    return list(rows.to(device))
