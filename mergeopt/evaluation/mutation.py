"""What the mutations mix, p being the parent, f the scale and r the references:

    evolver           v = p + f (r - p)
    rand-diff         v = p + f (r1 - r2)
    rand/1            v = r0 + f (r1 - r2)
    current-to-best   v = p + f (best - p) + f (r1 - r2)

Sources: Storn and Price, J. Global Optimization 11 (1997) for `rand/1`; Price, Storn and Lampinen, Differential Evolution (2005) for
`current-to-best`; Du et al., Knowledge Fusion by Evolving Weights of Language Models (arXiv 2406.12208) for evolving the weights of
models, whose published code mixes as `evolver` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergeopt.lineage import Step

__all__ = ["Mixture", "combine", "mixture"]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The form of a mutant, without its numbers: v = o[base] + sum over (x, y) of a scale times (o[x] - o[y]).

    Args:
        base: index of an operand: 0 is the parent, then come the references.
        terms: pairs of indices of operands.
    """

    base: int
    terms: tuple[tuple[int, int], ...]

    @property
    def is_parent(self) -> bool:
        """Whether the mutant is the parent."""
        return self.base == 0 and not self.terms


def mixture(step: Step) -> tuple[Mixture, tuple[float, ...]]:
    """Return the form of a step's mutant, and a scale per term; terms of scale zero are left out, so that they change no bit."""
    f = step.scale
    # From the nearer end: within the two ends for f in [0, 1] to the bit, and the other end itself for f = 1.
    base, toward = (0, (f, 1, 0)) if f < 0.5 else (1, (f - 1.0, 1, 0))
    match step.mutation:
        case "evolver":
            terms = [toward]
        case "rand-diff":
            base, terms = 0, [(f, 1, 2)]
        case "rand/1":
            base, terms = 1, [(f, 2, 3)]
        case "current-to-best":
            terms = [toward, (f, 2, 3)]
    kept = [term for term in terms if term[0] != 0.0]
    return Mixture(base, tuple((x, y) for _, x, y in kept)), tuple(scale for scale, _, _ in kept)


def combine(
    form: Mixture, operands: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], out: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Write the mutant.

    One rounding per operation, from left to right: no step may be contracted into a fused multiply-add, which would give other bits.

    Args:
        form: of the mutant.
        operands: parent and references, float32 [n].
        scales: one per term, float32, no dimensions.
        out: float32 [n].
        scratch: float32 [n], overwritten.
    """
    if not form.terms:
        out.copy_(operands[form.base])
        return
    total = operands[form.base]
    for scale, (x, y) in zip(scales, form.terms, strict=True):
        torch.sub(operands[x], operands[y], out=scratch)
        scratch.mul_(scale)
        torch.add(total, scratch, out=out)
        total = out
