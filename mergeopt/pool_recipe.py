"""Recipes over a pool: its sources by content, and what it says of heads and of the files that are handed on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mergeopt.models.checkpoint import HUB_PREFIX
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import MergeOperator
from mergeopt.recipe import Argument, Heads, Measured, Recipe, Source

__all__ = ["Sources", "make_recipe", "sources_of"]

Sources = tuple[Source, tuple[Source, ...]]


def sources_of(pool: Pool) -> Sources:
    """Return base and experts of a pool with their content hashes; reads all their bytes.

    Paths are made absolute: a recipe outlives the working directory it was made in.
    """
    base, *experts = (
        Source(name, source.path if source.path.startswith(HUB_PREFIX) else str(Path(source.path).absolute()), source.hash)
        for name, source in {"base": pool.base, **pool.experts}.items()
    )
    return base, tuple(experts)


def make_recipe(
    pool: Pool,
    sources: Sources,
    operator: MergeOperator,
    arguments: Mapping[str, Argument],
    dtype: torch.dtype,
    statistics: Measured | None = None,
) -> Recipe:
    """Return the recipe of an operator with these arguments over a pool.

    Args:
        pool: the models.
        sources: as `sources_of` gives them.
        operator: the rule.
        arguments: one for each of its parameters.
        dtype: of the merged weights.
        statistics: what the operator knows of the experts besides their weights, None for nothing.
    """
    base, experts = sources
    return Recipe(
        base=base,
        experts=experts,
        operator=operator.name,
        operator_version=operator.version,
        variant=operator.variant,
        arguments=arguments,
        exclude=pool.exclude,
        dtype=str(dtype).removeprefix("torch."),
        carry=pool.carry.owners,
        heads=_heads(pool),
        statistics=statistics,
    )


def _heads(pool: Pool) -> Heads | None:
    if pool.head_mode == "shared":
        return None
    return Heads(pool.head_mode, pool.head_tensors, labels={} if pool.labelled is None else dict(pool.labelled.known))
