"""What was measured of experts on data, as files: diagonal Fisher information, and Gram matrices of the inputs of linear layers.

A folder holds the statistics of all experts of one merge: `statistics.json` (all but the tensors, with the content hash of the whole) and
for every kind and expert one safetensors file, `fisher-0.safetensors` say. It is read tensor by tensor.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mergeopt.errors import RecipeError, SourceError, StoreError
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.operators.contract import StatisticKind, Statistics
from mergeopt.partial import partial_folder
from mergeopt.recipe import STATISTICS, Measured, Source, content_hash, ordered_json

__all__ = ["ExpertStatistics", "Gram", "Measurement", "find_statistics", "measured_like", "open_statistics", "write_statistics"]

FORMAT = 1
DESCRIPTION = "statistics.json"
LONGEST = 1 << 26  # bytes of a description that are read
HASH_DIGITS = 32  # of the content hash, that a folder is called after
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gram:
    """Where the Gram matrix of a weight's inputs is.

    Args:
        stored: name of its tensor; weights with the same inputs share one.
        inputs: axis of the weight along which inputs lie.
    """

    stored: str
    inputs: int


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """One kind of statistic of one expert.

    Args:
        kind: what was measured.
        expert: place of the expert.
        tensors: `fisher`: by stored name of a trainable tensor, [*shape]; `gram`: by the names that `grams` gives, [d, d]. Float32.
        grams: of `gram`: by stored name of a weight.
    """

    kind: StatisticKind
    expert: int
    tensors: Mapping[str, torch.Tensor]
    grams: Mapping[str, Gram] = field(default_factory=dict)


class ExpertStatistics:
    """The statistics of all experts of a merge, in a folder.

    Args:
        folder: as `write_statistics` leaves it.

    Raises:
        RecipeError: it is not there, is no folder of statistics, or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        data = _read_description(self.folder)
        try:
            self.experts = tuple(_text(expert) for expert in data["experts"])
            self.kinds: tuple[StatisticKind, ...] = tuple(_kind(kind) for kind in data["kinds"])
            self.norms = [float(norm) for norm in data["norms"]]
            self._grams = [{_text(name): Gram(_text(a), int(b)) for name, (a, b) in grams.items()} for grams in data["grams"]]
            self.info, promised = dict(data["info"]), data["hash"]
            if not len(self.experts) == len(self.norms) == len(self._grams) or not all(map(math.isfinite, self.norms)):
                raise ValueError("expected a finite norm and the places of Gram matrices for every expert")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecipeError(f"damaged statistics {self.folder}: {DESCRIPTION}: {type(error).__name__}: {error}") from error
        self._files = {kind: [self._open(kind, expert) for expert in range(len(self.experts))] for kind in self.kinds}
        self._shared: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        if self.hash != promised:
            raise RecipeError(f"damaged statistics {self.folder}: its contents are not those of its content hash {str(promised)[:12]}...")

    @property
    def hash(self) -> str:
        """Content hash of all that a merge uses: experts by content hash, and what was measured of them; not how. Reads all bytes."""
        files = {kind: [file.hash for file in files] for kind, files in self._files.items()}
        return content_hash(_identity(self.experts, self.norms, self._grams, files))

    def of(self, name: str, device: torch.device | str = "cpu") -> Statistics:
        """Return what was measured for one tensor.

        Args:
            name: its stored name.
            device: where it is wanted.

        Raises:
            RecipeError: a number is not finite, or Fisher information is negative.
        """
        fisher = norms = gram = None
        if "fisher" in self.kinds and all(name in file.names for file in self._files["fisher"]):
            fisher = torch.stack([self._read(file, name, device) for file in self._files["fisher"]])
            norms = torch.tensor(self.norms, dtype=torch.float64, device=device)
            if bool((fisher < 0).any()):
                raise RecipeError(f"damaged statistics {self.folder}: the Fisher information of {name} is negative in places")
        places = [grams.get(name) for grams in self._grams]
        if "gram" in self.kinds and all(places):
            gram = self._gram([place for place in places if place is not None], device)
        inputs = next((place.inputs for place in places if place is not None), 1)
        return Statistics(fisher, norms, gram, inputs)

    def check(self, experts: Sequence[Source], shapes: Mapping[str, Sequence[int]]) -> None:
        """Hold it against a merge.

        Args:
            experts: of the merge, in order.
            shapes: of the merged tensors, by stored name.

        Raises:
            RecipeError: it is of other experts, or of tensors of other shapes.
        """
        if self.experts != tuple(source.hash for source in experts):
            raise RecipeError(
                f"{self.folder} holds statistics of other experts than {', '.join(source.name for source in experts)}; name the right "
                f"folder with --map {STATISTICS}=PATH"
            )
        for name, shape in shapes.items():
            for kind, expert, found, wanted in self._sizes(name, tuple(shape)):
                if found != wanted:
                    where = f"{self.folder}: {_file(kind, expert)}: {name}"
                    raise RecipeError(f"{where}: expected a tensor of shape {list(wanted)}, got {list(found)}")

    def _sizes(self, name: str, shape: tuple[int, ...]) -> Iterable[tuple[str, int, tuple[int, ...], tuple[int, ...]]]:
        for expert, file in enumerate(self._files.get("fisher", [])):
            if name in file.names:
                yield "fisher", expert, file.spec(name).shape, shape
        for expert, file in enumerate(self._files.get("gram", [])):
            place = self._grams[expert].get(name)
            if place is not None:
                width = shape[place.inputs] if len(shape) == 2 and place.inputs in (0, 1) else -1
                yield "gram", expert, file.spec(place.stored).shape, (width, width)

    def _gram(self, places: Sequence[Gram], device: torch.device | str) -> torch.Tensor:
        """Return Gram matrices [K, d, d], the same object for weights with the same inputs while any of them is in use."""
        key = json.dumps([[place.stored for place in places], str(device)])
        found = self._shared.get(key)
        if found is None:
            found = torch.stack([self._read(file, p.stored, device) for file, p in zip(self._files["gram"], places, strict=True)])
            self._shared[key] = found
        return found

    def _open(self, kind: StatisticKind, expert: int) -> Checkpoint:
        file = self.folder / _file(kind, expert)
        try:
            found = Checkpoint(file)
        except SourceError as error:
            raise RecipeError(f"damaged statistics {self.folder}: {error}") from error
        missing = {place.stored for place in self._grams[expert].values()} - set(found.names) if kind == "gram" else set()
        if missing or any(found.spec(name).dtype != torch.float32 for name in found.names):
            raise RecipeError(f"damaged statistics {self.folder}: {file.name} {f'lacks {min(missing)}' if missing else 'is not float32'}")
        return found

    def _read(self, file: Checkpoint, name: str, device: torch.device | str) -> torch.Tensor:
        tensor = file.read(name, device)
        if not bool(torch.isfinite(tensor).all()):
            raise RecipeError(f"damaged statistics {self.folder}: {name} in {Path(file.path).name} holds numbers that are not finite")
        return tensor


def write_statistics(
    parent: Path, experts: Sequence[Source], kinds: Sequence[StatisticKind], measurements: Iterable[Measurement], info: Mapping[str, Any]
) -> ExpertStatistics:
    """Write statistics as they are measured, into a folder that appears under the first half of its content hash when it is whole.

    Args:
        parent: folder of that folder.
        experts: of the merge, in order.
        kinds: what is measured.
        measurements: one of every kind of every expert, in any order; each is written before the next is asked for.
        info: how it is measured; JSON-able, no part of its identity.

    Raises:
        StoreError: it cannot be written.
    """
    norms, grams = [0.0] * len(experts), [dict[str, Gram]() for _ in experts]
    try:
        with partial_folder(parent) as partial:
            for one in measurements:
                save_file({name: t.cpu().contiguous() for name, t in one.tensors.items()}, partial / _file(one.kind, one.expert))
                if one.kind == "fisher":
                    norms[one.expert] = math.sqrt(sum(float(t.double().square().sum()) for t in one.tensors.values()))
                grams[one.expert] |= one.grams
            hashes = [source.hash for source in experts]
            files = {kind: [Checkpoint(partial / _file(kind, expert)).hash for expert in range(len(experts))] for kind in kinds}
            identity = _identity(hashes, norms, grams, files)
            description = {"format": FORMAT, **identity, "kinds": list(kinds), "info": dict(info), "hash": content_hash(identity)}
            (partial / DESCRIPTION).write_text(ordered_json(description) + "\n", encoding="utf-8")
            for file in partial.glob("*.safetensors"):  # safetensors makes them readable by their owner alone
                file.chmod((partial / DESCRIPTION).stat().st_mode)
            place = parent / str(description["hash"])[:HASH_DIGITS]
            if _is_damaged(place):
                shutil.rmtree(place)
            if not place.exists():
                partial.rename(place)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot write statistics to {parent}: {reason}; free space, or write the run elsewhere") from error
    return ExpertStatistics(place)


def find_statistics(parent: Path, info: Mapping[str, Any], *, pass_over: bool = False) -> ExpertStatistics | None:
    """Return statistics that were measured like this, None where a folder holds none.

    Args:
        parent: folder of their folders.
        info: how they are measured, as it was written.
        pass_over: log what is damaged and look on, in place of raising.

    Raises:
        RecipeError: they are damaged, or what is there cannot be told.
    """
    for description in sorted(parent.glob(f"[!.]*/{DESCRIPTION}")):
        try:
            if _read_description(description.parent).get("info") == json.loads(ordered_json(dict(info))):
                return ExpertStatistics(description.parent)
        except RecipeError as error:
            if not pass_over:
                raise
            log.warning("%s; it is passed over", error)
    return None


def open_statistics(measured: Measured, experts: Sequence[Source], shapes: Mapping[str, Sequence[int]]) -> ExpertStatistics:
    """Open the statistics of a recipe.

    Args:
        measured: as the recipe names them.
        experts: of the recipe.
        shapes: of the merged tensors, by stored name.

    Raises:
        RecipeError: they are not there, are damaged, or are others than the recipe's.
    """
    found = ExpertStatistics(_place(measured))
    if found.hash != measured.hash:
        raise RecipeError(
            f"{measured.path} does not hold the statistics this recipe was made with: content hash {found.hash[:12]}..., the recipe says "
            f"{measured.hash[:12]}...; name the right folder with --map {STATISTICS}=PATH"
        )
    found.check(experts, shapes)
    return found


def measured_like(measured: Measured) -> dict[str, Any]:
    """Return how the statistics of a recipe were measured, as it was written; tensors are not read.

    Raises:
        RecipeError: they are not there, are damaged, or are others than the recipe's.
    """
    place = _place(measured)
    data = _read_description(place)
    if data.get("hash") != measured.hash or not isinstance(data.get("info"), dict):
        raise RecipeError(f"{place} does not hold the statistics this recipe was made with, {measured.hash[:12]}...")
    found: dict[str, Any] = data["info"]
    return found


def _place(measured: Measured) -> Path:
    """Return the folder of a recipe's statistics, in the named one where that is the folder `statistics` of a run or the cache."""
    below = Path(measured.path) / measured.hash[:HASH_DIGITS]
    return below if (below / DESCRIPTION).exists() else Path(measured.path)


def _identity(
    experts: Sequence[str], norms: Sequence[float], grams: Sequence[Mapping[str, Gram]], files: Mapping[StatisticKind, Sequence[str]]
) -> dict[str, Any]:
    places = [{name: [place.stored, place.inputs] for name, place in own.items()} for own in grams]
    return {
        "experts": list(experts),
        "norms": list(norms),
        "grams": places,
        "files": {str(kind): list(hashes) for kind, hashes in files.items()},
    }


def _is_damaged(folder: Path) -> bool:
    """Return whether a folder is there that holds no whole statistics."""
    if not folder.exists():
        return False
    try:
        ExpertStatistics(folder)
    except RecipeError:
        return True
    return False


def _file(kind: str, expert: int) -> str:
    return f"{kind}-{expert}.safetensors"


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    try:
        if file.stat().st_size > LONGEST:
            raise RecipeError(f"damaged statistics: {file} is longer than {LONGEST} bytes")
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise RecipeError(
            f"cannot read the statistics {folder}: {file.name}: {error.strerror}; if they lie elsewhere by now, a recipe is made with "
            f"--map {STATISTICS}=PATH, where PATH is their folder, called after their content hash, or the one above it"
        ) from error
    except (ValueError, RecursionError) as error:  # no JSON, or not even text
        raise RecipeError(f"damaged statistics: {file} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise RecipeError(f"{file}: expected statistics of format {FORMAT}, got {found!r}")
    return data


def _kind(value: Any) -> StatisticKind:
    for known in get_args(StatisticKind):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"unknown kind {value!r}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value
