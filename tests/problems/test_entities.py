from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopt import registry
from mergeopt.errors import DataError
from mergeopt.task import Metric, Records
from mergeopt_problems.entities import OUTSIDE, EntityCounts, TagScheme, count_entities
from mergeopt_problems.entity_metrics import EntityF1

TAGS = ["O", "B-A", "I-A", "B-B", "I-B"]
Sentence = list[str]


def count(predicted: list[Sentence], gold: list[Sentence]) -> EntityCounts:
    left, right = (np.asarray([TAGS.index(tag) for sentence in side for tag in sentence], dtype=np.int64) for side in (predicted, gold))
    return count_entities(TagScheme(TAGS, "tags"), left, right, np.asarray([len(sentence) for sentence in gold], dtype=np.int64))


def records(counts: EntityCounts) -> Records:
    return {"true_positives": counts.right, "predicted_entities": counts.predicted, "gold_entities": counts.gold}


def entities(tags: Sentence) -> set[tuple[int, int, str]]:
    """Return (first, last, type) of a sentence's entities, word by word as seqeval's default mode goes."""
    found, begin, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        if kind and (tag[0] != "I" or tag[2:] != kind):
            found.add((begin, place - 1, kind))
            kind = ""
        if not kind and tag != "O":
            begin, kind = place, tag[2:]
    return found


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-B", {(0, 1, "A"), (3, 3, "B")}),
        ("B-A B-A", {(0, 0, "A"), (1, 1, "A")}),
        ("I-A I-A O I-B", {(0, 1, "A"), (3, 3, "B")}),
        ("B-A I-B I-B", {(0, 0, "A"), (1, 2, "B")}),
        ("I-A B-A I-A", {(0, 0, "A"), (1, 2, "A")}),
        ("O O", set()),
    ],
)
def test_rules_of_seqeval(tags: str, expected: set[tuple[int, int, str]]) -> None:
    """Cases by hand: which entities seqeval finds, also where tags begin with I; each is right against itself and only then."""
    sentence = tags.split()
    assert entities(sentence) == expected
    counts = count([sentence], [sentence])
    assert [int(side[0]) for side in (counts.right, counts.predicted, counts.gold)] == [len(expected)] * 3


def test_hand_value() -> None:
    """Of three entities said and two there one is right: F1 is 2 / 5; a right span of another type, or a longer one, is not."""
    gold = [["B-A", "I-A", "O"], ["B-B", "I-B", "O"]]
    made = records(count([["B-A", "I-A", "B-B"], ["B-B", "I-B", "I-B"]], gold))
    assert [column.tolist() for column in made.values()] == [[1, 0], [2, 1], [1, 1]]
    assert EntityF1().aggregate(made) == pytest.approx(0.4)
    # residuals 2 - .4 * 3 and 0 - .4 * 2, over a mean of 2.5
    assert EntityF1().standard_error(made) == pytest.approx(math.sqrt((0.8**2 + 0.8**2) / 2) / 2.5)
    assert EntityF1().aggregate(records(count([["B-B", "I-B", "O"], ["O"] * 3], gold))) == 0.0


sentences = st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=8), min_size=1, max_size=6)


@given(sentences)
def test_agrees_with_sets_of_entities(pairs: list[list[tuple[str, str]]]) -> None:
    """Whatever the tags, counts of each sentence are those of sets of entities; no entity crosses from one sentence into the next."""
    predicted, gold = ([[pair[side] for pair in sentence] for sentence in pairs] for side in (0, 1))
    counts = count(predicted, gold)
    for row, (said, there) in enumerate(zip(predicted, gold, strict=True)):
        left, right = entities(said), entities(there)
        assert (counts.right[row], counts.predicted[row], counts.gold[row]) == (len(left & right), len(left), len(right))
    together = sum(2 * len(entities(a) & entities(b)) for a, b in zip(predicted, gold, strict=True))
    total = sum(len(entities(sentence)) for sentence in itertools.chain(predicted, gold))
    assert EntityF1().aggregate(records(counts)) == pytest.approx(together / total if total else 0.0)


def test_outside() -> None:
    """A word that no token stands for is outside, whatever tags there are."""
    scheme = TagScheme(["B-A", "I-A"], "tags")
    counts = count_entities(scheme, np.asarray([0, OUTSIDE, 1]), np.asarray([0, 1, 1]), np.asarray([3]))
    assert (counts.right.tolist(), counts.predicted.tolist(), counts.gold.tolist()) == ([0], [2], [1])


def test_error_is_that_of_resampling() -> None:
    """On sentences of many lengths the delta method's error is near the bootstrap's."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 6, 400)
    right = rng.binomial(gold, 0.7)
    made: Records = {"true_positives": right, "predicted_entities": right + rng.integers(0, 3, 400), "gold_entities": gold}
    again = [EntityF1().aggregate({key: column[draw] for key, column in made.items()}) for draw in rng.integers(0, 400, size=(1000, 400))]
    assert EntityF1().standard_error(made) == pytest.approx(np.std(again, ddof=1), rel=0.1)


def test_contract() -> None:
    """The metric is found by name and keeps the contract; no sentences have no value, no entities no error."""
    metric = registry.load("metrics", "entity_f1")()
    assert isinstance(metric, Metric)
    assert (metric.name, metric.direction, metric.decomposable, metric.worst) == ("entity_f1", "maximize", False, 0.0)
    nothing = records(count([["O"], ["O"]], [["O"], ["O"]]))
    assert metric.aggregate(nothing) == 0.0
    assert metric.standard_error(nothing) is None
    assert math.isnan(metric.aggregate({key: column[:0] for key, column in nothing.items()}))


@pytest.mark.parametrize("tag", ["E-A", "PER", "B-", "", "b-A"])
def test_tags_of_other_schemes(tag: str) -> None:
    """Tags that are not BIO are refused by name."""
    with pytest.raises(DataError, match=f"mine: expected the BIO tags O, B-TYPE and I-TYPE, got '{tag}'"):
        TagScheme(["O", tag], "mine")
