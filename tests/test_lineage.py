from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopt.errors import RecipeError
from mergeopt.lineage import Lineage, Step
from tests.lineages import MEMBERS, lineages, random_lineage, random_step

START = Lineage(MEMBERS)
STEP = Step(0, ((1, 0),), 0.5, 0.5, 7)


@settings(deadline=None)
@given(lineages())
def test_json_leads_back(lineage: Lineage) -> None:
    """A lineage survives JSON text, every float to the bit and every identity."""
    back = Lineage.from_json(json.loads(json.dumps(lineage.to_json(), allow_nan=False)))
    assert back == lineage
    assert back.identities() == lineage.identities()


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_json_keeps_every_number(scale: float, rate: float, seed: int) -> None:
    """Any finite scale, any rate and any seed come back as they were."""
    lineage = START.child(replace(STEP, scale=scale, rate=rate, seed=seed))
    assert Lineage.from_json(json.loads(json.dumps(lineage.to_json()))) == lineage


def test_a_step_takes_a_few_dozen_bytes() -> None:
    """A hundred steps are less than ten kilobytes of JSON."""
    lineage = random_lineage(np.random.default_rng(0), 100)
    assert len(json.dumps(lineage.to_json(), separators=(",", ":"))) < 10_000


def test_versions_count_steps_of_a_slot() -> None:
    """The i-th step of a slot makes its version i; other slots stay what they were."""
    lineage = START.child(STEP).child(replace(STEP, slot=2)).child(STEP)
    assert [lineage.version(slot) for slot in range(3)] == [2, 0, 1]


@settings(deadline=None)
@given(lineages(), st.sets(st.integers(0, 2)))
def test_ancestors_are_what_is_needed_and_no_more(lineage: Lineage, slots: set[int]) -> None:
    """Ancestors give wanted versions the same identities, are ancestors of themselves, and lose something with every step taken out."""
    wanted = sorted(slots)
    needed = lineage.ancestors(wanted)
    for slot in wanted:
        assert needed.version(slot) == lineage.version(slot)
        assert needed.identity(slot, needed.version(slot)) == lineage.identity(slot, lineage.version(slot))
    assert needed.ancestors(wanted) == needed
    positions = [lineage.steps.index(step) for step in needed.steps]
    assert positions == sorted(positions)
    assert Lineage.from_json(needed.to_json()) == needed  # so each step's parent and references are there
    reached = {(slot, needed.version(slot)) for slot in wanted}
    versions = [needed.version(slot) for slot in range(3)]
    for step in reversed(needed.steps):
        assert (step.slot, versions[step.slot]) in reached
        versions[step.slot] -= 1
        reached |= {(step.slot, versions[step.slot]), *step.references}


def test_ancestors_by_hand() -> None:
    """Of three steps the first and last made slot 0, the second is seen by nobody."""
    first, other, last = STEP, replace(STEP, slot=1, references=((0, 0),)), replace(STEP, references=((2, 0),))
    lineage = Lineage(MEMBERS, (first, other, last))
    assert lineage.ancestors((0,)).steps == (first, last)
    assert lineage.ancestors((1,)).steps == (other,)
    assert lineage.ancestors((2,)).steps == ()
    assert lineage.ancestors((0, 1)) == lineage


@settings(deadline=None)
@given(lineages(), st.integers(0, 2**32))
def test_identity_is_history(lineage: Lineage, seed: int) -> None:
    """What is made later does not change identities; versions made differently have different ones."""
    longer = lineage.child(random_step(lineage, np.random.default_rng(seed)))
    assert longer.identities().items() >= lineage.identities().items()
    assert len(set(longer.identities().values())) == len(longer.steps) + len(MEMBERS)


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.25}, {"rate": 0.25}, {"seed": 8}, {"unit": "tensor"}, {"references": ((2, 0),)}, {"slot": 2}, {"references": ((1, 1),)}],
)
def test_identity_sees_every_part_of_a_step(change: dict[str, Any]) -> None:
    """Another number, unit, parent or reference is another identity; so is another order of references, or another mutation."""
    made = START.child(replace(STEP, slot=1, references=((0, 0),)))
    other = replace(STEP, **change)
    assert made.child(STEP).identity(0, 1) != made.child(other).identity(other.slot, 1)
    pair = Step(0, ((1, 0), (2, 0)), 0.5, 0.5, 7, mutation="rand-diff")
    assert START.child(pair).identity(0, 1) != START.child(replace(pair, references=pair.references[::-1])).identity(0, 1)
    three = Step(0, ((1, 0), (2, 0), (2, 0)), 0.5, 0.5, 7, mutation="rand/1")
    assert START.child(three).identity(0, 1) != START.child(replace(three, mutation="current-to-best")).identity(0, 1)


def test_identity_goes_back_to_the_beginning() -> None:
    """The same step is another version where its reference, or its parent, has another history."""
    one, two = (START.child(replace(STEP, slot=1, references=((0, 0),), seed=seed)) for seed in (1, 2))
    later = replace(STEP, references=((1, 1),))
    assert one.child(later).identity(0, 1) != two.child(later).identity(0, 1)
    same = replace(STEP, slot=1, references=((2, 0),))
    assert one.child(same).identity(1, 2) != two.child(same).identity(1, 2)


def test_identity_does_not_see_the_order_of_independent_steps() -> None:
    """Two steps that do not refer to each other make the same versions in either order."""
    a, b = STEP, replace(STEP, slot=2)
    assert START.child(a).child(b).identities().items() == START.child(b).child(a).identities().items()


def test_identity_of_what_is_not_there() -> None:
    """A version that was never made has no identity."""
    with pytest.raises(RecipeError, match=r"no version 2 of slot 0; it has slot 0: 0\.\.1"):
        START.child(STEP).identity(0, 2)


def test_members_are_told_apart() -> None:
    """Experts of other names are other versions, and so is all that comes of them."""
    other = Lineage(("x", "e1", "e2")).child(STEP)
    assert not set(other.identities().values()) & {START.identity(0, 0), START.child(STEP).identity(0, 1)}
    assert other.identity(1, 0) == START.identity(1, 0)


ENTRY = [0, [[1, 0]], 0.5, 0.5, 7, "evolver", "parameter"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 3, r"slot to be one of 0\.\.2, got 3"),
        (0, True, "slot to be one of"),
        (0, -1, "slot to be one of"),
        (1, [[1, 1]], "version 1 of slot 1 has not been made yet"),
        (1, [[3, 0]], "version 0 of slot 3 has not"),
        (1, [["1", 0]], "has not been made"),
        (1, [[1, 0], [2, 0]], "expected 1 reference"),
        (1, [[0, 0]], "mixes with another member"),
        (1, [1], "pairs"),
        (1, None, "pairs"),
        (2, float("nan"), "scale to be a finite number"),
        (2, float("inf"), "scale to be a finite number"),
        (2, 10**400, "scale to be a finite number"),
        (2, "0.5", "scale to be a finite number"),
        (3, -0.1, "rate to be in"),
        (3, 1.1, "rate to be in"),
        (3, None, "rate to be a finite number"),
        (4, -1, "seed to be a whole number"),
        (4, 2**63, "seed to be a whole number"),
        (4, 7.0, "seed to be a whole number"),
        (5, "evolve", "did you mean 'evolver'"),
        (5, ["evolver"], "mutation to be text"),
        (6, "tensors", "did you mean 'tensor'"),
        (6, None, "unit to be text"),
    ],
)
def test_a_damaged_step_is_refused(place: int, value: Any, message: str) -> None:
    """Each field of a step is checked; the message names the step."""
    entry = [*ENTRY[:place], value, *ENTRY[place + 1 :]]
    assert Lineage.from_json({"format": 1, "members": list(MEMBERS), "steps": [ENTRY]}).steps == (STEP,)
    with pytest.raises(RecipeError, match=f"step 1.*{message}"):
        Lineage.from_json({"format": 1, "members": list(MEMBERS), "steps": [ENTRY, entry]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1, got format 2"),
        ({"extra": 1}, "expected the keys"),
        ({"members": []}, "members"),
        ({"members": ["a", "a"]}, "members"),
        ({"members": ["a", 1]}, "members"),
        ({"members": "ab"}, "members"),
        ({"steps": {}}, "steps to be a list"),
        ({"steps": [[0]]}, r"step 0: expected \[slot"),
        ({"steps": [None]}, r"step 0: expected \[slot"),
    ],
)
def test_a_damaged_lineage_is_refused(change: dict[str, Any], message: str) -> None:
    """Another format, unknown or missing keys, and lists that are none are told."""
    data = START.to_json() | change
    with pytest.raises(RecipeError, match=message):
        Lineage.from_json(data)
    with pytest.raises(RecipeError, match="expected a lineage"):
        Lineage.from_json([data])
    with pytest.raises(RecipeError, match="expected the keys"):
        Lineage.from_json({"format": 1, "members": ["a"]})


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_is_read_or_refused(data: Any) -> None:
    """Whatever stands in place of the members or the steps, or of all, the only error is a RecipeError."""
    for candidate in (data, START.to_json() | {"members": data}, START.to_json() | {"steps": data}, START.to_json() | {"steps": [data]}):
        try:
            Lineage.from_json(candidate)
        except RecipeError:
            continue


def test_a_child_must_fit() -> None:
    """A step is checked against the lineage that it is to follow."""
    later = replace(STEP, references=((1, 1),))
    with pytest.raises(RecipeError, match=r"step 0.*version 1 of slot 1 has not been made yet; there is slot 0: 0\.\.0"):
        START.child(later)
    assert START.child(replace(STEP, slot=1, references=((0, 0),))).child(later).version(0) == 1
