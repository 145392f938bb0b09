"""Weight genomes as lineages: a population of whole models told by how each member came to be, in kilobytes.

Member `slot` begins as the slot-th expert, which is its version 0; each accepted offspring is its next version. A step says which
versions were mixed, how, and with which seed. Masks are a hash of (seed, tensor, flat index), so a lineage replays to the same bits
tensor by tensor, in any order of tensors and in any chunks.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from mergeopt.errors import RecipeError, nearest

__all__ = ["MUTATIONS", "UNITS", "Lineage", "Mutation", "Step", "Unit", "Version"]

Mutation = Literal["evolver", "rand-diff", "rand/1", "current-to-best"]
Unit = Literal["parameter", "tensor", "layer"]
Version = tuple[int, int]
"""One member at one time: (slot, version)."""
MUTATIONS: Mapping[str, int] = {"evolver": 1, "rand-diff": 2, "rand/1": 3, "current-to-best": 3}
"""Mutation -> how many references it takes."""
UNITS: tuple[str, ...] = ("parameter", "tensor", "layer")

FORMAT = 1  # of the JSON, and of what a step means: the mixtures and the hash behind the masks
SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Step:
    """One offspring: the next version of a member.

    Args:
        slot: the member that changes; the parent is the version before.
        references: (slot, version) pairs, in the mutation's order.
        scale: f, the differential weight.
        rate: Cr, the crossover rate, in [0, 1].
        seed: of the crossover mask, 0 to 2^63 - 1.
        mutation: what is mixed.
        unit: what is kept or taken together.
    """

    slot: int
    references: tuple[Version, ...]
    scale: float
    rate: float
    seed: int
    mutation: Mutation = "evolver"
    unit: Unit = "parameter"


@dataclass(frozen=True, slots=True)
class Lineage:
    """How the members of a population came to be.

    Args:
        members: names of the experts they began as, in the pool's order.
        steps: each after those that made its parent and its references; the i-th step of a slot makes that slot's version i, from 1.
    """

    members: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the lineage as JSON-able data; `from_json` is the way back."""
        return {"format": FORMAT, "members": list(self.members), "steps": [_step_json(step) for step in self.steps]}

    @classmethod
    def from_json(cls, data: Any) -> Lineage:
        """Read a lineage back, checked.

        Raises:
            RecipeError: it is damaged: a key is missing, a reference has not been made yet, a number is out of its range.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"expected a lineage (a JSON object), got {type(data).__name__}")
        if data.get("format") != FORMAT:
            raise RecipeError(f"expected a lineage of format {FORMAT}, got format {data.get('format')!r}")
        if set(data) != {"format", "members", "steps"}:
            raise RecipeError(f"damaged lineage: expected the keys format, members, steps, got {', '.join(map(str, data))}")
        members, steps = data["members"], data["steps"]
        if not isinstance(members, list) or not all(isinstance(name, str) for name in members) or not 0 < len(set(members)) == len(members):
            raise RecipeError(f"damaged lineage: expected members to be a list of different names, got {members!r}")
        if not isinstance(steps, list):
            raise RecipeError(f"damaged lineage: expected steps to be a list, got {type(steps).__name__}")
        versions = [0] * len(members)
        made = []
        for index, entry in enumerate(steps):
            step = _step(entry, index)
            _check(step, versions, index)
            versions[step.slot] += 1
            made.append(step)
        return cls(tuple(members), tuple(made))

    def version(self, slot: int) -> int:
        """Return the newest version of a slot; 0 is the expert itself."""
        return sum(step.slot == slot for step in self.steps)

    def child(self, step: Step) -> Lineage:
        """Return this lineage with one more step.

        Raises:
            RecipeError: the step refers to what has not been made.
        """
        _check(step, self._versions(), len(self.steps))
        return Lineage(self.members, (*self.steps, step))

    def ancestors(self, slots: Sequence[int]) -> Lineage:
        """Return what the newest versions of some slots need and no more; version numbers stay what they are."""
        versions = self._versions()
        needed = {(slot, versions[slot]) for slot in slots}
        kept: list[Step] = []
        for step in reversed(self.steps):
            if (step.slot, versions[step.slot]) in needed:
                kept.append(step)
                needed |= {(step.slot, versions[step.slot] - 1), *step.references}
            versions[step.slot] -= 1
        return Lineage(self.members, tuple(reversed(kept)))

    def identity(self, slot: int, version: int) -> str:
        """Return a hash of how a version came to be; equal for equal weights, given the experts.

        Raises:
            RecipeError: there is no such version.
        """
        known = self.identities()
        if (slot, version) not in known:
            raise RecipeError(f"this lineage has no version {version} of slot {slot}; it has {_made(self._versions())}")
        return known[slot, version]

    def identities(self) -> dict[Version, str]:
        """Return the identity of every version, in the order they were made.

        An expert's is the SHA-256 of its name, an offspring's that of its step with identities in place of parent and references. So it
        says what a version came from and nothing else: not what else was made meanwhile, nor in which order.
        """
        known: dict[Version, str] = {(slot, 0): _hash([name]) for slot, name in enumerate(self.members)}
        versions = [0] * len(self.members)
        for step in self.steps:
            parent = known[step.slot, versions[step.slot]]
            versions[step.slot] += 1
            _, _, *how = _step_json(step)
            known[step.slot, versions[step.slot]] = _hash([FORMAT, parent, [known[version] for version in step.references], *how])
        return known

    def _versions(self) -> list[int]:
        versions = [0] * len(self.members)
        for step in self.steps:
            versions[step.slot] += 1
        return versions


def _step_json(step: Step) -> list[Any]:
    # A list, not an object: a lineage is mostly steps, and a run stores one per trial.
    references = [list(version) for version in step.references]
    return [step.slot, references, float(step.scale), float(step.rate), step.seed, step.mutation, step.unit]


def _step(entry: Any, index: int) -> Step:
    """Read a step whose numbers may still be out of range."""
    if not isinstance(entry, list) or len(entry) != 7:
        raise RecipeError(f"damaged lineage: step {index}: expected [slot, references, scale, rate, seed, mutation, unit], got {entry!r}")
    slot, references, scale, rate, seed, mutation, unit = entry
    if not isinstance(references, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in references):
        raise RecipeError(f"damaged lineage: step {index}: expected references to be [slot, version] pairs, got {references!r}")
    for key, value in (("scale", scale), ("rate", rate)):
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise RecipeError(f"damaged lineage: step {index}: expected {key} to be a finite number, got {value!r}")
    for key, value in (("mutation", mutation), ("unit", unit)):
        if not isinstance(value, str):
            raise RecipeError(f"damaged lineage: step {index}: expected {key} to be text, got {value!r}")
    pairs = tuple((pair[0], pair[1]) for pair in references)
    return Step(slot, pairs, float(scale), float(rate), seed, cast(Mutation, mutation), cast(Unit, unit))


def _check(step: Step, versions: Sequence[int], index: int) -> None:
    """Raise RecipeError unless a step can follow when the slots are at these versions."""
    where = f"step {index} of the lineage"
    if not _whole(step.slot, 0, len(versions)):
        raise RecipeError(f"{where}: expected slot to be one of 0..{len(versions) - 1}, got {step.slot!r}")
    if step.mutation not in MUTATIONS:
        raise RecipeError(f"{where}: unknown mutation {step.mutation!r}; {nearest(str(step.mutation), MUTATIONS)}")
    if step.unit not in UNITS:
        raise RecipeError(f"{where}: unknown unit {step.unit!r}; {nearest(str(step.unit), UNITS)}")
    if len(step.references) != MUTATIONS[step.mutation]:
        raise RecipeError(
            f"{where}: expected {MUTATIONS[step.mutation]} reference(s) for mutation {step.mutation!r}, got {len(step.references)}"
        )
    for slot, version in step.references:
        if not _whole(slot, 0, len(versions)) or not _whole(version, 0, versions[slot] + 1):
            raise RecipeError(f"{where}: version {version!r} of slot {slot!r} has not been made yet; there is {_made(versions)}")
    if step.mutation == "evolver" and step.references[0][0] == step.slot:
        raise RecipeError(f"{where}: mutation 'evolver' mixes with another member, got a reference to slot {step.slot} itself")
    if not math.isfinite(step.scale):
        raise RecipeError(f"{where}: expected scale to be a finite number, got {step.scale!r}")
    if not 0.0 <= step.rate <= 1.0:
        raise RecipeError(f"{where}: expected rate to be in [0, 1], got {step.rate!r}")
    if not _whole(step.seed, 0, SEEDS):
        raise RecipeError(f"{where}: expected seed to be a whole number in 0..2^63-1, got {step.seed!r}")


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high


def _made(versions: Sequence[int]) -> str:
    return ", ".join(f"slot {slot}: 0..{version}" for slot, version in enumerate(versions))


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
