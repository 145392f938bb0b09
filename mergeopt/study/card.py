"""The model card of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from huggingface_hub import ModelCardData

from mergeopt.models.checkpoint import HUB_PREFIX
from mergeopt.recipe import Recipe

__all__ = ["model_card"]


def model_card(recipe: Recipe, scores: Mapping[str, float]) -> str:
    """Return the card's text: how the model was made, of what, and what it scored on the search part.

    Args:
        recipe: of the model.
        scores: objective -> value on the search part; may be empty.
    """
    hub = [source.path.removeprefix(HUB_PREFIX) for source in (recipe.base, *recipe.experts) if source.path.startswith(HUB_PREFIX)]
    data = ModelCardData(base_model=hub or None, tags=["merge", "mergeopt"], library_name="transformers")
    lines = ["---", data.to_yaml(), "---", "", "# Merged model", ""]
    lines += [f"Made by mergeopt {version('mergeopt')} with the operator `{recipe.operator}` (variant `{recipe.variant}`). "]
    lines += ["`recipe.json` holds all that is needed to make it again: `mergeopt merge recipe.json --out DIR`.", ""]
    lines += ["| source | content hash |", "|---|---|"]
    lines += [f"| {source.name} | `{source.hash[:16]}` |" for source in (recipe.base, *recipe.experts)]
    if scores:
        lines += [
            "",
            "Scores on the data the search selected by; expect somewhat less on other data.",
            "",
            "| objective | value |",
            "|---|---|",
        ]
        lines += [f"| {name} | {value:.4f} |" for name, value in scores.items()]
    return "\n".join([*lines, ""])
