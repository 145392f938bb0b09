"""Lineages drawn at random, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from mergeopt.lineage import MUTATIONS, UNITS, Lineage, Step

MEMBERS = ("e0", "e1", "e2")


def random_step(lineage: Lineage, rng: np.random.Generator, *, newest: bool = False, **fixed: Any) -> Step:
    """Draw a step that may follow; `newest` keeps references to newest versions, `fixed` fields stay as given."""
    slot = fixed.pop("slot", int(rng.integers(len(lineage.members))))
    mutation = fixed.pop("mutation", list(MUTATIONS)[rng.integers(len(MUTATIONS))])
    references = []
    for _ in range(MUTATIONS[mutation]):
        others = [other for other in range(len(lineage.members)) if mutation != "evolver" or other != slot]
        other = others[rng.integers(len(others))]
        references.append((other, lineage.version(other) if newest else int(rng.integers(lineage.version(other) + 1))))
    drawn: dict[str, Any] = {
        "scale": float(rng.choice([0.0, 0.25, 0.5, 0.8, 1.0, -0.3])),
        "rate": float(rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])),
        "seed": int(rng.integers(2**63)),
        "unit": UNITS[rng.integers(len(UNITS))],
    }
    return Step(slot, tuple(references), mutation=mutation, **drawn | fixed)


def random_lineage(rng: np.random.Generator, steps: int, *, newest: bool = False, **fixed: Any) -> Lineage:
    """Draw a lineage of `MEMBERS` with so many steps."""
    lineage = Lineage(MEMBERS)
    for _ in range(steps):
        lineage = lineage.child(random_step(lineage, rng, newest=newest, **fixed))
    return lineage


def lineages(most: int = 12) -> st.SearchStrategy[Lineage]:
    """Lineages of up to so many steps, for Hypothesis."""
    return st.builds(lambda seed, steps: random_lineage(np.random.default_rng(seed), steps), st.integers(0, 2**32), st.integers(0, most))
