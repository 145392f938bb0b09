"""How offspring of whole models are made: which members are mixed, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergeopt.errors import ConfigError, nearest
from mergeopt.lineage import MUTATIONS, UNITS, Lineage, Mutation, Step, Unit

__all__ = ["NEEDED", "Variation"]

NEEDED: Mapping[str, int] = {"evolver": 2, "rand-diff": 3, "rand/1": 4, "current-to-best": 3}
"""Mutation -> members it needs, the parent included."""


@dataclass(frozen=True, slots=True)
class Variation:
    """Mutation and crossover of members.

    With parent p, f = scale and references r: `evolver` p + f (r - p), the published code's interpolation; `rand-diff` p + f (r1 - r2),
    the form its paper is said to have; `rand/1` r0 + f (r1 - r2); `current-to-best` p + f (best - p) + f (r1 - r2). Each unit of the child
    is the mutant's with probability `rate`, else the parent's.

    Source: Du et al. 2024, Knowledge fusion by evolving weights of language models (arXiv 2406.12208); Storn and Price 1997, Journal of
    Global Optimization 11.

    Args:
        mutation: one of these.
        scale: f, finite.
        rate: Cr in [0, 1].
        unit: of the crossover: `parameter`, `tensor` or `layer`.

    Raises:
        ConfigError: a name is unknown or a number out of its range.
    """

    mutation: Mutation
    scale: float
    rate: float
    unit: Unit

    def __post_init__(self) -> None:
        if not isinstance(self.mutation, str) or self.mutation not in MUTATIONS:
            raise ConfigError(f"mutation: unknown {self.mutation!r}; {nearest(str(self.mutation), MUTATIONS)}")
        if self.unit not in UNITS:
            raise ConfigError(f"unit: unknown {self.unit!r}; {nearest(str(self.unit), UNITS)}")
        for name, value, low, high in (("scale", self.scale, -10.0, 10.0), ("rate", self.rate, 0.0, 1.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"{name}: expected a number in [{low:g}, {high:g}], got {value!r}")

    def check(self, members: Sequence[str]) -> None:
        """Raise `ConfigError` when there are too few members to choose references from."""
        needed = NEEDED[self.mutation]
        if len(members) < needed:
            raise ConfigError(
                f"mutation {self.mutation!r} mixes {needed} different members, and there are {len(members)}: {', '.join(members)}; "
                "add experts, or use mutation: evolver"
            )

    def step(
        self, lineage: Lineage, slot: int, rng: np.random.Generator, *, guide: Callable[[], int | None], fittest: Callable[[], int]
    ) -> Step:
        """Return the step that makes an offspring of a member out of the newest versions of others.

        Args:
            lineage: of the population.
            slot: the parent.
            rng: draws references and the seed of the mask.
            guide: returns the member that `evolver` refers to, None for a random other one.
            fittest: returns the fittest member other than the parent, for `current-to-best`.
        """
        others = [member for member in range(len(lineage.members)) if member != slot]
        if self.mutation == "evolver":
            guided = guide()
            chosen = [int(rng.choice(others)) if guided is None else guided]
        elif self.mutation == "current-to-best":
            chosen = [fittest(), *_distinct(rng, others, 2)]
        else:
            chosen = _distinct(rng, others, MUTATIONS[self.mutation])
        return Step(
            slot=slot,
            references=tuple((member, lineage.version(member)) for member in chosen),
            scale=float(self.scale),
            rate=float(self.rate),
            seed=int(rng.integers(2**63 - 1)),
            mutation=self.mutation,
            unit=self.unit,
        )


def _distinct(rng: np.random.Generator, others: Sequence[int], count: int) -> list[int]:
    return [int(member) for member in rng.permutation(np.array(others))[:count]]
