"""Writes a candidate as an ordinary model folder, loads it back, and holds its scores against what was promised."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergeopt.errors import ExportError, RecipeError, StoreError
from mergeopt.evaluation.device import pick_device, pick_dtype
from mergeopt.evaluation.score import score_model
from mergeopt.evaluation.threads import computing_threads, pick_threads
from mergeopt.memory import room, size_text
from mergeopt.models.architecture import Architecture, HubArchitecture
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.pool import ALL_HEADS, IN_HEADS, Pool
from mergeopt.models.writer import TensorWriter
from mergeopt.operators.contract import MergeOperator
from mergeopt.recipe import Recipe
from mergeopt.study.card import model_card
from mergeopt.study.weights import make_tensors, tensor_specs
from mergeopt.task import Objective

__all__ = ["ExportReport", "export_model", "open_pool"]

ROUNDING = 1e-5
"""Largest relative difference of a score that counts as rounding: another machine or thread count may sum in another order."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how its scores compare with the stored ones.

    Args:
        folder: of the model, or of one model for each head.
        coverage: how many stored tensors were merged, copied, excluded and tied, and how many the heads hold that were written.
        scores: objective -> score of the reloaded folder; empty when nothing was scored. Where heads are separate, of the objectives that
            are measured with one that was written.
        promised: objective -> score that the store holds.
        exact: whether all scores are equal bit for bit.
        unscored: why the folder was not scored though there are objectives; None when it was.
    """

    folder: Path
    coverage: Mapping[str, int]
    scores: Mapping[str, float]
    promised: Mapping[str, float]
    exact: bool
    unscored: str | None = None


@dataclass(frozen=True, slots=True)
class _Held:
    """What a written model is held against: objectives, what the store says of them, and where they are measured."""

    objectives: Sequence[Objective]
    promised: Mapping[str, float]
    reported: Mapping[str, float]
    device: torch.device

    def of(self, pool: Pool, head: str | None) -> _Held:
        """Return what concerns one head: all of it where heads are shared."""
        if head is None:
            return self
        own = [objective for objective in self.objectives if pool.head_of(objective.info.expert) == head]
        names = [objective.info.name for objective in own]
        promised, reported = ({n: v for n, v in values.items() if n in names} for values in (self.promised, self.reported))
        return replace(self, objectives=own, promised=promised, reported=reported)


def export_model(
    pool: Pool,
    recipe: Recipe,
    to: str | Path,
    *,
    operator: MergeOperator | None = None,
    objectives: Sequence[Objective] = (),
    promised: Mapping[str, float] | None = None,
    reported: Mapping[str, float] | None = None,
    device: str = "auto",
    threads: int | None = None,
    head: str | None = None,
) -> ExportReport:
    """Make a recipe's model, write it as a folder, load the folder back and score it.

    The folder appears under its name only when all of that has gone well. The model is made and written one tensor at a time, and read
    back as it was written. Scoring alone needs it in memory: where it does not fit, the report says so.

    Args:
        pool: the recipe's models.
        recipe: the candidate.
        to: folder to write; it must not exist, or be empty.
        operator: the recipe's operator, None to find it by name.
        objectives: what to score the reloaded model by, on the search part.
        promised: objective -> value the reloaded model must score.
        reported: objective -> value on the report part, for the model card.
        device: where the model is made and scored: the search's, for the bits that it scored.
        threads: that torch computes with, None to choose by the model's size; other threads than the search's may give other last bits.
        head: where heads are separate, the expert whose head to write, `all` for a folder each, named after the experts; None for the one
            that the recipe names, or the only one.

    Raises:
        ConfigError: there is no such head, or several and none was named.
        StoreError: the folder is taken or cannot be written.
        RecipeError: the models are not the recipe's.
        ExportError: the reloaded model scores something else than promised.
    """
    folder = Path(to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is already there and not empty; choose another folder")
    _check_sources(pool, recipe)
    asked = head if head is not None or recipe.heads is None else recipe.heads.written
    heads = pool.heads_asked(asked)
    held = _Held(objectives, promised or {}, reported or {}, pick_device(device))
    threads = pick_threads(threads, sum(pool.spec(name).elements for name in pool.names))
    partial = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    scores: dict[str, float] = {}
    expected: dict[str, float] = {}
    try:
        for one in heads:
            place, own = partial / str(one) if asked == ALL_HEADS else partial, held.of(pool, one)
            place.mkdir(parents=True)
            written = recipe if recipe.heads is None else replace(recipe, heads=replace(recipe.heads, written=one))
            (place / "README.md").write_text(model_card(written, own.promised, own.reported), encoding="utf-8")
            with computing_threads(threads):
                _write(pool, written, operator, place, held.device)
                found, unscored = _rescore(pool, place, written, own)
            scores, expected = {**scores, **found}, {**expected, **own.promised}
        report = replace(_compare(folder, _counts(pool, heads), scores, expected), unscored=unscored)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise StoreError(
            f"cannot write the model to {folder}: {error.strerror or error}; free space, or name a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def open_pool(recipe: Recipe, module: Callable[[], torch.nn.Module] | None = None) -> Pool:
    """Open the models of a recipe, checked against its hashes.

    Args:
        recipe: names them.
        module: for bare safetensors files, what builds the module they are the weights of.

    Raises:
        SourceError: a model is not where the recipe says; `Recipe.relocated` gives another place.
        RecipeError: a model has other contents than the recipe's.
    """
    experts = {source.name: source.path for source in recipe.experts}
    mode, tensors = ("shared", ()) if recipe.heads is None else (recipe.heads.mode, recipe.heads.tensors)
    pool = Pool(recipe.base.path, experts, exclude=recipe.exclude, module=module, carry=recipe.carry, heads=mode, head_tensors=tensors)
    _check_sources(pool, recipe)
    return pool


def _check_sources(pool: Pool, recipe: Recipe) -> None:
    for source, checkpoint in [(recipe.base, pool.base), *((s, pool.experts[s.name]) for s in recipe.experts)]:
        if checkpoint.hash != source.hash:
            raise RecipeError(
                f"{source.name} ({checkpoint.path}) is not the model this recipe was made with: content hash {checkpoint.hash[:12]}..., "
                f"the recipe says {source.hash[:12]}...; name the right one with --map {source.name}=PATH"
            )
    if pool.labelled is not None and recipe.heads is not None:
        for name, own in pool.labelled.known.items():
            if own != recipe.heads.labels.get(name):
                raise RecipeError(
                    f"expert {name!r} names its labels {', '.join(own)}, this recipe was made when they were "
                    f"{', '.join(recipe.heads.labels.get(name, ('not named',)))}; put back id2label in its config.json"
                )


def _architecture(pool: Pool, recipe: Recipe) -> Architecture:
    head = _head(recipe)
    return pool.architecture if head is None else pool.heads[head].architecture


def _head(recipe: Recipe) -> str | None:
    return None if recipe.heads is None else recipe.heads.written


def _write(pool: Pool, recipe: Recipe, operator: MergeOperator | None, folder: Path, device: torch.device) -> None:
    """Write everything but the card into a folder, one tensor at a time, and read the tensors back."""
    writer = TensorWriter(folder, tensor_specs(pool, recipe, _head(recipe)))
    for name, tensor in make_tensors(pool, recipe, operator, _head(recipe), device):
        writer.write(name, tensor)
    writer.check()
    _architecture(pool, recipe).write_config(folder, pick_dtype(recipe.dtype))
    for name, source in pool.carry.files.items():
        shutil.copyfile(source, folder / name)
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json(), indent=2) + "\n", encoding="utf-8")


def _rescore(pool: Pool, folder: Path, recipe: Recipe, held: _Held) -> tuple[dict[str, float], str | None]:
    """Return what the model in a folder scores, or why it could not be scored."""
    if not held.objectives:
        return {}, None
    written, place = Checkpoint(folder), held.device
    needed, there = sum(written.spec(name).bytes for name in written.names), room(place)
    if needed > there.bytes:
        return {}, f"its weights take {size_text(needed)}, and there are {size_text(there.bytes)} ({there.bound})"
    architecture = _architecture(pool, recipe)
    if isinstance(architecture, HubArchitecture):
        architecture = HubArchitecture(folder)
    model = architecture.load(written, pick_dtype(recipe.dtype)).to(place)
    return {name: score.value for name, score in score_model(lambda _: model, held.objectives, "search", place).items()}, None


def _counts(pool: Pool, heads: Sequence[str | None]) -> dict[str, int]:
    shared = {kind: count for kind, count in pool.coverage.counts.items() if kind != IN_HEADS}
    return shared | {f"of the head of {head}": len(pool.heads[head].own) for head in heads if head is not None}


def _compare(folder: Path, counts: Mapping[str, int], scores: Mapping[str, float], promised: Mapping[str, float]) -> ExportReport:
    wrong = [
        f"{name}: stored {promised[name]!r}, reloaded {scores[name]!r}"
        for name in promised
        if name in scores and abs(scores[name] - promised[name]) > ROUNDING * max(1.0, abs(promised[name]))
    ]
    if wrong:
        raise ExportError(f"the model written for {folder} does not score what the store says ({'; '.join(wrong)}); nothing was kept")
    compared: dict[str, Any] = {name: scores[name] for name in promised if name in scores}
    exact = bool(compared) and all(compared[name] == promised[name] for name in compared)
    return ExportReport(folder, counts, scores, dict(promised), exact)
