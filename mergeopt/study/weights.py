"""All tensors of a recipe's model, made one at a time: the model may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mergeopt.errors import CandidateError
from mergeopt.evaluation.correction import corrected, open_learned
from mergeopt.evaluation.device import pick_dtype
from mergeopt.evaluation.expert_statistics import recipe_statistics
from mergeopt.evaluation.materialize import Stack, stream
from mergeopt.evaluation.offspring import replay
from mergeopt.evaluation.recipe_values import recipe_values
from mergeopt.models.checkpoint import TensorSpec
from mergeopt.models.layout import Layout, Segment
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import MergeOperator
from mergeopt.operators.find import find_operator
from mergeopt.recipe import Recipe

__all__ = ["make_tensors", "tensor_specs"]

CPU = torch.device("cpu")


def tensor_specs(pool: Pool, recipe: Recipe, head: str | None = None) -> dict[str, TensorSpec]:
    """Return shape and type of all tensors of a recipe's model by stored name, in the model's order; tied copies are left out.

    Args:
        pool: the recipe's models.
        recipe: the candidate.
        head: where heads are separate, the expert whose head the model has; names are then that expert's.
    """
    dtype = pick_dtype(recipe.dtype)
    stored = {pool.stored(head or "base", name): pool.spec(name) for name in pool.tensors.live}
    stored |= {} if head is None else {name: pool.heads[head].checkpoint.spec(name) for name in pool.heads[head].own}
    return {name: TensorSpec(spec.shape, dtype if spec.dtype.is_floating_point else spec.dtype) for name, spec in stored.items()}


def make_tensors(
    pool: Pool, recipe: Recipe, operator: MergeOperator | None = None, head: str | None = None, device: torch.device = CPU
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a recipe's model with its stored name, on the CPU and in the recipe's type: the bits that were scored.

    Memory: one tensor times the rows that the operator needs, and for an evolved member all versions of it that are still referred to.

    Args:
        pool: the recipe's models.
        recipe: the candidate.
        operator: the recipe's operator, None to find it by name.
        head: where heads are separate, the expert whose head the model has.
        device: where they are made; on another than the search's, rules that are not linear may give other last bits.

    Raises:
        CandidateError: a weight is not finite, or does not fit into the type.
        SourceError: a tensor left as it is in the base holds NaN or infinities.
    """
    layout, dtype = Layout(pool), pick_dtype(recipe.dtype)
    rule = operator or find_operator(recipe.operator, recipe.variant)
    values = recipe_values(rule, recipe, layout, {})
    learned = None if recipe.learned is None else corrected(layout, open_learned(recipe.learned), recipe.learned, device)
    statistics = recipe_statistics(rule, recipe, layout, device)
    with torch.no_grad():
        for segment, tensor in stream(layout, rule, values, device, _members(pool, recipe, device), statistics):
            correction = None if learned is None else learned(segment)
            made = tensor if correction is None else tensor + correction
            yield pool.stored(head or "base", segment.name), _finite(made, dtype, segment.name).cpu()
    for name in pool.coverage.excluded:
        floats = pool.spec(name).dtype.is_floating_point
        kept = _finite(pool.read_base(name), dtype, name) if floats else pool.base.read(pool.stored("base", name))
        yield pool.stored(head or "base", name), kept
    for name in pool.coverage.copied:
        yield pool.stored(head or "base", name), pool.copied(name)
    if head is not None:
        for name in pool.heads[head].own:
            own = pool.heads[head].checkpoint.read(name)
            yield name, _finite(own, dtype, name) if own.is_floating_point() else own


def _finite(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise CandidateError(f"the recipe's weights are not finite (in {name}); nothing was written")
    made = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(made).all()):
        raise CandidateError(f"the recipe's weights overflow float16 (in {name}); use bfloat16 or float32; nothing was written")
    return made


def _members(pool: Pool, recipe: Recipe, device: torch.device) -> Stack | None:
    """Return what gives the members that evolved from the experts, replayed tensor by tensor; None where there are none."""
    lineage = recipe.lineage
    if lineage is None:
        return None

    def members(segment: Segment) -> torch.Tensor:
        experts = pool.stack(segment.name, device)
        return replay(lineage, experts.view(len(experts), -1), name=segment.name, layer=segment.layer).view(experts.shape)

    return members
