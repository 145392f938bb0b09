"""What a learned set adds to a merge: the set that a recipe names, and its correction of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mergeopt.errors import RecipeError
from mergeopt.learned import LearnedSet
from mergeopt.models.layout import Layout, Segment
from mergeopt.recipe import LEARNED, Learned

__all__ = ["corrected", "open_learned"]


def open_learned(learned: Learned) -> LearnedSet:
    """Load the learned set of a recipe.

    Raises:
        RecipeError: it is not there, is damaged, or is another one than the recipe's.
    """
    found = LearnedSet.load(Path(learned.path))
    if found.hash != learned.hash:
        raise RecipeError(
            f"{learned.path} is not the learned set this recipe was made with: content hash {found.hash[:12]}..., the recipe says "
            f"{learned.hash[:12]}...; name the right one with --map {LEARNED}=PATH"
        )
    return found


def corrected(
    layout: Layout, learned: LearnedSet, asked: Learned, device: torch.device | str = "cpu"
) -> Callable[[Segment], torch.Tensor | None]:
    """Return what gives a learned set's addition to a tensor for a preference, float32 [*shape], None where there is none.

    Raises:
        RecipeError: the set corrects a tensor that is not merged here, or of another shape.
    """
    shapes = {segment.name: segment.shape for segment in layout.segments}
    preference = learned.check_preference(asked.preference).to(device)
    for name, factors in learned.factors.items():
        shape = (len(factors.left), len(factors.right))
        if shapes.get(name) != shape:  # before a product that may be of any size is made
            there = "none" if name not in shapes else str(list(shapes[name]))
            raise RecipeError(
                f"the learned set corrects {name} of shape {list(shape)}, the model's merged tensors hold {there}; give the models it was "
                "learned for"
            )

    @torch.no_grad()
    def correction(segment: Segment) -> torch.Tensor | None:
        return learned.delta(segment.name, preference) if segment.name in learned.factors else None

    return correction
