"""Learned sets: one low-rank structure that answers any preference with a merged model.

For each target weight l, a matrix of shape c x d (Pareto Merging, arXiv 2408.12105, eq. 1, reimplemented from its published description):

    W_l(gamma) = W~_l + A_l (sum_f phi_f(gamma) G_{l,f}) B_l^T                                                              (1)

with A_l [c, r], B_l [d, r], core slices G_l [F, r, r], features phi of the preference gamma on the simplex of m objectives, and W~ the
merge of an ordinary operator. Every other tensor is that merge alone.

A folder holds a learned set: `learned.safetensors` (the tensors) and `learned.json` (all else, with the content hash of the whole).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergeopt.errors import ConfigError, RecipeError, StoreError, nearest
from mergeopt.recipe import Recipe, canonical_json, ordered_json

__all__ = ["DESCRIPTION", "FEATURES", "Factors", "Features", "LearnedSet"]

FORMAT = 1
TENSORS, DESCRIPTION = "learned.safetensors", "learned.json"
LONGEST = 1 << 26  # bytes of a description that are read
FEATURES = ("linear", "quadratic", "mlp")
MLP = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
ROUNDING = 1e-9  # a sum this near to one is one: normalising twice must not move a bit


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """phi(gamma) [F]: the preference itself, and what the kind puts behind it.

    `linear`: nothing, F = m, as in the paper. `quadratic`: the products gamma_i gamma_j, i <= j. `mlp`: W2 tanh(W1 gamma + b1) + b2. The
    latter two are ours: a correction that is linear in gamma cannot follow a curved Pareto set.

    Args:
        kind: one of `FEATURES`.
        tensors: of `mlp`: W1 [h, m], b1 [h], W2 [e, h], b2 [e], float32; else none.
    """

    kind: str = "linear"
    tensors: tuple[torch.Tensor, ...] = ()

    def count(self, objectives: int) -> int:
        """Return F for m objectives."""
        behind = {"linear": 0, "quadratic": objectives * (objectives + 1) // 2, "mlp": len(self.tensors[-1]) if self.tensors else 0}
        return objectives + behind[self.kind]

    def __call__(self, preference: torch.Tensor) -> torch.Tensor:
        """Return phi(gamma) [F] float32 of gamma [m], on its device; differentiable in the tensors."""
        gamma = preference.to(torch.float32)
        if self.kind == "quadratic":
            rows, columns = torch.triu_indices(len(gamma), len(gamma), device=gamma.device)
            return torch.cat([gamma, gamma[rows] * gamma[columns]])
        if self.kind == "mlp":
            inner, inner_bias, outer, outer_bias = (tensor.to(gamma.device) for tensor in self.tensors)
            return torch.cat([gamma, outer @ torch.tanh(inner @ gamma + inner_bias) + outer_bias])
        return gamma


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """What corrects one weight of shape [c, d].

    Args:
        left: A [c, r] float32.
        right: B [d, r] float32.
        core: G [F, r, r] float32.
    """

    left: torch.Tensor
    right: torch.Tensor
    core: torch.Tensor


class LearnedSet:
    """Low-rank corrections of a merge, as a function of a preference.

    Args:
        objectives: names, in the order of a preference's entries.
        factors: by stored name of the weight they correct, in the model's order.
        features: of the preference.
        merge: recipe of the merge W~ that is corrected, as JSON; None while it is still being learned.
        info: how it was learned; JSON-able, for people, no part of its identity.

    Raises:
        RecipeError: the parts do not fit together.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        factors: Mapping[str, Factors],
        features: Features | None = None,
        merge: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self.factors = dict(factors)
        self.features = features or Features()
        self.merge = None if merge is None else dict(merge)
        self.info = dict(info or {})
        _check_parts(self)

    @property
    def targets(self) -> tuple[str, ...]:
        """Stored names of the tensors it corrects, in the model's order."""
        return tuple(self.factors)

    @property
    def hash(self) -> str:
        """Content hash of all that determines the weights: tensors, objectives, features, targets and the merge; neither places nor `info`.

        Raises:
            RecipeError: it is still being learned, so there is no merge to be part of its identity.
        """
        identity = self._description() | {"merge": self._recipe().key}
        digest = hashlib.sha256(canonical_json(identity).encode())
        for name, tensor in self._tensors().items():
            digest.update(name.encode())
            digest.update(tensor.numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def parameters(self) -> list[torch.Tensor]:
        """Return what is learned, float32 leaves: A, B and G of every target in order, then the tensors of the features."""
        return [t for f in self.factors.values() for t in (f.left, f.right, f.core)] + list(self.features.tensors)

    def delta(self, name: str, preference: torch.Tensor) -> torch.Tensor:
        """Return A (sum_f phi_f G_f) B^T (eq. 1), differentiable in the parameters.

        Args:
            name: one of `targets`.
            preference: gamma [m], as `check_preference` gives it.

        Returns:
            [c, d] float32, on the preference's device.
        """
        factors, device = self.factors[name], preference.device
        core: torch.Tensor = torch.tensordot(self.features(preference), factors.core.to(device), dims=1)
        return factors.left.to(device) @ core @ factors.right.to(device).T

    def check_preference(self, preference: Mapping[str, float] | Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Return a preference as gamma [m] float64 with sum one, in the order of the objectives.

        Args:
            preference: share of each objective; only ratios count. A mapping may leave objectives out, whose share is then zero.

        Raises:
            ConfigError: an unknown name, a wrong number of shares, a share that is negative or no finite number, or all shares zero.
        """
        shares = self._shares(preference)
        for name, share in zip(self.objectives, shares, strict=True):
            if isinstance(share, bool) or not isinstance(share, Real) or not math.isfinite(share) or share < 0:
                raise ConfigError(f"the preference for {name!r} must be a finite number >= 0, got {share!r}")
        gamma = torch.tensor([float(share) for share in shares], dtype=torch.float64)
        if float(gamma.max()) == 0.0:
            raise ConfigError(f"expected a preference above 0 for one or more of {', '.join(self.objectives)}, got {preference}")
        if abs(float(gamma.sum()) - 1.0) <= ROUNDING:
            return gamma
        gamma = gamma / gamma.max()  # first, so that the sum is finite
        return gamma / gamma.sum()

    def finished(self, merge: Mapping[str, Any], info: Mapping[str, Any]) -> LearnedSet:
        """Return a copy that no longer learns, with the recipe (JSON) of the merge it corrects."""
        factors = {name: Factors(*(t.detach().clone() for t in (f.left, f.right, f.core))) for name, f in self.factors.items()}
        features = Features(self.features.kind, tuple(tensor.detach().clone() for tensor in self.features.tensors))
        return LearnedSet(self.objectives, factors, features, merge, info)

    def save(self, folder: str | Path) -> None:
        """Write a folder, which appears under its name only when it is whole.

        Args:
            folder: it must not exist, or be empty.

        Raises:
            StoreError: the folder is taken or cannot be written.
            RecipeError: it is still being learned.
        """
        place = Path(folder)
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise StoreError(f"{place} is already there and not empty; choose another folder for the learned set")
        description = self._description() | {"merge": self._recipe().to_json(), "info": self.info, "hash": self.hash}
        partial = place.parent / f".{place.name}.partial-{uuid.uuid4().hex[:8]}"
        try:
            partial.mkdir(parents=True)
            save_file(self._tensors(), partial / TENSORS)
            (partial / DESCRIPTION).write_text(ordered_json(description) + "\n", encoding="utf-8")
            (partial / TENSORS).chmod((partial / DESCRIPTION).stat().st_mode)  # safetensors makes it readable by its owner alone
            if place.exists():
                place.rmdir()
            partial.rename(place)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            reason = getattr(error, "strerror", None) or error
            raise StoreError(f"cannot write the learned set to {place}: {reason}; free space, or name another folder") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> LearnedSet:
        """Read a folder back, bit for bit.

        Raises:
            RecipeError: it is no learned set, or is damaged: its parts do not fit, a number is not finite, or the content hash is another.
        """
        place = Path(folder)
        description = _read_description(place / DESCRIPTION)
        try:
            objectives = [_text(name) for name in description["objectives"]]
            kind, targets = _text(description["features"]), [_target(entry) for entry in description["targets"]]
            merge, info, promised = Recipe.from_json(description["merge"]), description["info"], description["hash"]
            if not isinstance(info, dict):
                raise TypeError(f"expected info to be an object, got {info!r}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"damaged learned set {place}: {DESCRIPTION}: {type(error).__name__}: {error}") from error
        tensors = _read_tensors(place / TENSORS, [target[0] for target in targets], kind)
        factors = {name: Factors(*(tensors[f"{part}/{name}"] for part in "ABG")) for name, *_ in targets}
        features = Features(kind, tuple(tensors[f"phi/{part}"] for part in MLP) if kind == "mlp" else ())
        found = cls(objectives, factors, features, merge.to_json(), info)
        if found._description()["targets"] != [list(target) for target in targets] or found.hash != promised:
            raise RecipeError(f"damaged learned set {place}: its contents are not those of its content hash {str(promised)[:12]}...")
        return found

    def _shares(self, preference: Mapping[str, float] | Sequence[float] | torch.Tensor) -> list[Any]:
        if isinstance(preference, Mapping):
            for name in preference:
                if name not in self.objectives:
                    raise ConfigError(f"preference: unknown objective {name!r}; {nearest(str(name), self.objectives)}")
            return [preference.get(name, 0.0) for name in self.objectives]
        shares = preference.tolist() if isinstance(preference, torch.Tensor) else list(preference)
        if not isinstance(shares, list) or len(shares) != len(self.objectives):
            raise ConfigError(f"expected a preference of {len(self.objectives)} shares ({', '.join(self.objectives)}), got {preference}")
        return shares

    def _recipe(self) -> Recipe:
        if self.merge is None:
            raise RecipeError("this learned set is still being learned; finished(merge, info) gives one that can be kept")
        return Recipe.from_json(self.merge)

    def _description(self) -> dict[str, Any]:
        targets = [[name, len(f.left), len(f.right), f.left.shape[1]] for name, f in self.factors.items()]
        return {"format": FORMAT, "objectives": list(self.objectives), "features": self.features.kind, "targets": targets}

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = {f"{part}/{name}": t for name, f in self.factors.items() for part, t in zip("ABG", (f.left, f.right, f.core), strict=True)}
        named |= {f"phi/{part}": tensor for part, tensor in zip(MLP, self.features.tensors, strict=False)}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _check_parts(learned: LearnedSet) -> None:
    """Raise `RecipeError` when names repeat, shapes do not fit, or a number is not finite."""
    m, features = len(learned.objectives), learned.features
    if m == 0 or len(set(learned.objectives)) != m:
        raise RecipeError(f"learned set: expected one or more objectives with different names, got {list(learned.objectives)}")
    if not learned.factors:
        raise RecipeError("learned set: expected one or more tensors to correct, got none")
    if features.kind not in FEATURES or len(features.tensors) != (4 if features.kind == "mlp" else 0):
        raise RecipeError(
            f"learned set: unknown features {features.kind!r} with {len(features.tensors)} tensors; {nearest(features.kind, FEATURES)}"
        )
    if features.kind == "mlp":
        hidden, outputs = features.tensors[1].numel(), features.tensors[3].numel()
        for part, tensor, shape in zip(MLP, features.tensors, ((hidden, m), (hidden,), (outputs, hidden), (outputs,)), strict=True):
            _check_tensor(f"phi/{part}", tensor, shape)
    for name, f in learned.factors.items():
        rank = f.left.shape[-1] if f.left.ndim else 0
        _check_tensor(f"A/{name}", f.left, (f.left.numel() // max(1, rank), rank))
        _check_tensor(f"B/{name}", f.right, (f.right.numel() // max(1, rank), rank))
        _check_tensor(f"G/{name}", f.core, (features.count(m), rank, rank))


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.numel():
        raise RecipeError(f"learned set: expected {name} to be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise RecipeError(f"learned set: {name} holds numbers that are not finite")


def _read_description(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LONGEST:
            raise RecipeError(f"damaged learned set: {file} is longer than {LONGEST} bytes")
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise RecipeError(
            f"cannot read the learned set {file.parent}: {file.name}: {error.strerror}; if it lies elsewhere by now, a recipe is made with "
            "--map learned=PATH"
        ) from error
    except (ValueError, RecursionError) as error:  # no JSON, or not even text
        raise RecipeError(f"damaged learned set: {file} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise RecipeError(f"{file}: expected a learned set of format {FORMAT}, got {found!r}")
    return data


def _read_tensors(file: Path, targets: Sequence[str], kind: str) -> dict[str, torch.Tensor]:
    wanted = {f"{part}/{name}" for name in targets for part in "ABG"} | ({f"phi/{part}" for part in MLP} if kind == "mlp" else set())
    try:
        with safe_open(file, framework="pt") as handle:
            held = set(handle.keys())
            if held != wanted:
                odd = min(held ^ wanted)
                raise RecipeError(f"damaged learned set: {file} {'lacks' if odd in wanted else 'holds an unknown tensor'} {odd!r}")
            return {name: handle.get_tensor(name) for name in sorted(wanted)}
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"damaged learned set: {file} is no whole safetensors file: {error}") from error


def _target(entry: Any) -> tuple[str, int, int, int]:
    name, rows, columns, rank = entry
    return _text(name), int(rows), int(columns), int(rank)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value
