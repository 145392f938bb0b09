"""The model card of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from huggingface_hub import ModelCardData

from mergeopt.models.checkpoint import HUB_PREFIX
from mergeopt.recipe import Recipe
from mergeopt.registry import names

__all__ = ["model_card"]


def model_card(recipe: Recipe, scores: Mapping[str, float], report: Mapping[str, float] | None = None) -> str:
    """Return the card's text: how the model was made, of what, and what it scored on the search part.

    Args:
        recipe: of the model.
        scores: objective -> value on the search part; may be empty.
        report: objective -> value on the report part, where it was scored there.
    """
    hub = [source.path.removeprefix(HUB_PREFIX) for source in (recipe.base, *recipe.experts) if source.path.startswith(HUB_PREFIX)]
    data = ModelCardData(base_model=hub or None, tags=["merge", "mergeopt"], library_name="transformers")
    lines = ["---", data.to_yaml(), "---", "", "# Merged model", ""]
    lines += [f"Made by mergeopt {version('mergeopt')} with the operator `{recipe.operator}` (variant `{recipe.variant}`). "]
    lines += ["`recipe.json` holds all that is needed to make it again: `mergeopt merge recipe.json --out DIR`"]
    if recipe.operator not in names("operators"):
        lines += [f"(and the file that defines `{recipe.operator}`, named with `--operator FILE.py:NAME`)"]
    if recipe.heads is not None and recipe.heads.mode == "by_label":
        lines += ["", "Its head has the labels of all experts; a label's row is merged of those that know it."]
    elif recipe.heads is not None:
        lines += ["", f"It has the head of `{recipe.heads.written}`; every expert kept its own, only what they share is merged. "]
        lines += ["`mergeopt merge recipe.json --head NAME --out DIR` makes the model with another's head."]
    if recipe.lineage is not None:
        lines += ["", f"The experts evolved before they were merged, in {len(recipe.lineage.steps)} steps that the recipe holds."]
    if recipe.learned is not None:
        asked = ", ".join(f"{name} {share:.3g}" for name, share in recipe.learned.preference.items())
        lines += ["", f"A learned set (content hash `{recipe.learned.hash[:16]}`) corrects the merge for the preference {asked}."]
    if recipe.statistics is not None:
        stale = " as they were before they evolved" if recipe.lineage is not None else ""
        lines += ["", f"It uses what was measured of the experts{stale} (statistics of content hash `{recipe.statistics.hash[:16]}`)."]
    lines += [""]
    lines += ["| source | content hash |", "|---|---|"]
    lines += [f"| {source.name} | `{source.hash[:16]}` |" for source in (recipe.base, *recipe.experts)]
    if scores:
        lines += ["", "The search selected by the scores of the search part; it never saw the report part.", ""]
        lines += ["| objective | search |" + (" report |" if report else ""), "|---|---|" + ("---|" if report else "")]
        lines += [f"| {name} | {value:.4f} |" + (f" {report[name]:.4f} |" if report else "") for name, value in scores.items()]
    return "\n".join([*lines, ""])
