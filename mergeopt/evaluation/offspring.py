"""Makes offspring of whole models, tensor by tensor and in place, and replays lineages.

A child takes each parameter (or tensor, or layer) from the mutant where its hash is below Cr, and from its parent elsewhere (binomial
crossover without a forced index). The bits depend on the step and on the tensors alone: not on chunks, threads or the order of tensors,
nor on whether the arithmetic was compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergeopt.evaluation.blend import Mask, eager, fused
from mergeopt.evaluation.compiled import How
from mergeopt.evaluation.crossover import keys, threshold
from mergeopt.evaluation.mutation import Mixture, mixture
from mergeopt.lineage import Lineage, Step, Version

__all__ = ["mutate", "replay"]


@torch.no_grad()
def mutate(
    child: torch.Tensor,
    references: Sequence[torch.Tensor],
    step: Step,
    *,
    name: str,
    layer: str,
    start: int = 0,
    u: torch.Tensor | None = None,
    how: How = "auto",
) -> None:
    """Turn one tensor of a parent into its child's, in place.

    Needs some buffers of 2^16 elements beside the tensors, whatever their size.

    Args:
        child: the parent's tensor or a slice of it, flat, float32 [S]; overwritten with the child's.
        references: the same of the step's references, in its order.
        step: what is mixed, how, and with which seed.
        name: stored name of the tensor.
        layer: label of its layer.
        start: flat index of the slice's first element in the tensor.
        u: numbers in [0, 1) in place of the hash, float [S], for comparison with other implementations; crossover is then per parameter.
        how: which twin of the arithmetic.

    Raises:
        Failure: `how` is `compiled`, and there is no compiler or it failed.
    """
    form, scales = mixture(step)
    operands = [child, *references]
    if u is not None:
        eager(form, operands, scales, u < step.rate)
    elif form.is_parent or threshold(step.rate) == 0:
        return
    elif step.unit != "parameter":
        if keys(step.seed, step.unit, layer if step.unit == "layer" else name)[0] < threshold(step.rate):
            eager(form, operands, scales, None)
    elif step.rate == 1.0:
        eager(form, operands, scales, None)
    else:
        mask = Mask(step.seed, name, step.rate, start)
        if not _blend_compiled(form, operands, scales, mask, how):
            eager(form, operands, scales, mask)


def replay(lineage: Lineage, experts: torch.Tensor, *, name: str, layer: str, how: How = "auto") -> torch.Tensor:
    """Return one tensor of the newest version of every member.

    Older versions are kept only as long as a later step refers to them.

    Args:
        lineage: how the members came to be; `Lineage.ancestors` leaves out what is not wanted.
        experts: the tensor of every expert, float32 [K, S]; overwritten with the newest versions, and returned.
        name: stored name of the tensor.
        layer: label of its layer.
        how: which twin of the arithmetic.
    """
    last = {version: index for index, step in enumerate(lineage.steps) for version in step.references}
    newest = [0] * len(lineage.members)
    kept: dict[Version, torch.Tensor] = {}
    for index, step in enumerate(lineage.steps):
        parent = (step.slot, newest[step.slot])
        if last.get(parent, -1) > index:
            kept[parent] = experts[step.slot].clone()
        references = [experts[slot] if newest[slot] == version else kept[slot, version] for slot, version in step.references]
        mutate(experts[step.slot], references, step, name=name, layer=layer, how=how)
        newest[step.slot] += 1
        for version in step.references:
            if last[version] == index:
                kept.pop(version, None)
    return experts


def _blend_compiled(form: Mixture, operands: Sequence[torch.Tensor], scales: Sequence[float], mask: Mask, how: How) -> bool:
    """Make the child with compiled code where that is asked for or pays; False when nothing was done."""
    child = operands[0]
    # Compiled code is made for operands in different places, and would be made anew for other forms and for single numbers.
    alone = all(operand.data_ptr() != child.data_ptr() for operand in operands[1:])
    return bool(form.terms) and alone and child.numel() > 1 and fused(form, operands, scales, mask, how)
