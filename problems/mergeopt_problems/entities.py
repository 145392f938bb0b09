"""Entities in sequences of BIO tags, as conlleval and seqeval's default mode find them.

An entity starts at B-X, and also at an I-X that no entity of type X goes on to: at a sentence's start, after O, or after another type. It
ends before the next O, the next start, or the sentence's end. An entity counts as found when start, end and type are all right.

Source: Tjong Kim Sang and De Meulder (2003), Introduction to the CoNLL-2003 shared task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError

__all__ = ["OUTSIDE", "EntityCounts", "TagScheme", "count_entities"]

OUTSIDE = -1
"""Stands for the tag O among places of tags."""


class TagScheme:
    """What the tags of a model mean.

    Args:
        tags: names, each `O`, `B-` and a type, or `I-` and a type.
        where: whose they are, for messages.

    Raises:
        DataError: a tag is none of these.
    """

    def __init__(self, tags: Sequence[str], where: str) -> None:
        for tag in tags:
            if tag != "O" and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
                raise DataError(f"{where}: expected the BIO tags O, B-TYPE and I-TYPE, got {tag!r}")
        kinds = sorted({tag[2:] for tag in tags if tag != "O"})
        # one more of each at the end, which OUTSIDE finds
        self._begins = np.asarray([tag.startswith("B-") for tag in tags] + [False], dtype=np.bool_)
        self._kinds = np.asarray([kinds.index(tag[2:]) if tag != "O" else -1 for tag in tags] + [-1], dtype=np.int64)

    def starts_and_kinds(
        self, tags: npt.NDArray[np.int64], firsts: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Return where entities start, bool [words], and the type at each word, -1 for none.

        Args:
            tags: places in the names, or `OUTSIDE`; int64 [words], sentence after sentence.
            firsts: whether a word is its sentence's first, [words].
        """
        kinds = self._kinds[tags]
        before = np.where(firsts, -1, np.roll(kinds, 1))
        return (kinds >= 0) & (self._begins[tags] | (kinds != before)), kinds


@dataclass(frozen=True, slots=True, eq=False)
class EntityCounts:
    """Entities of each sentence, int64 [sentences].

    Args:
        right: found with start, end and type.
        predicted: said to be there.
        gold: there.
    """

    right: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    gold: npt.NDArray[np.int64]


def count_entities(
    scheme: TagScheme, predicted: npt.NDArray[np.int64], gold: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> EntityCounts:
    """Count the entities of sentences.

    Args:
        scheme: of both.
        predicted: places of tags, or `OUTSIDE`; int64 [words], sentence after sentence.
        gold: the same.
        lengths: words of each sentence, one or more; [sentences].
    """
    sentence = np.repeat(np.arange(len(lengths)), lengths)
    firsts = np.zeros(len(sentence), dtype=np.bool_)
    firsts[np.cumsum(lengths) - lengths] = True
    starts, kinds, ends = [], [], []
    for tags in (predicted, gold):
        start, kind = scheme.starts_and_kinds(tags, firsts)
        # the word after an entity's last is another's first or outside; that of the next sentence is, too
        stop = np.append((start | (kind < 0))[1:], True)
        end = np.full(len(tags), -1, dtype=np.int64)
        end[start] = np.flatnonzero(stop & (kind >= 0))
        starts.append(start)
        kinds.append(kind)
        ends.append(end)
    right = starts[0] & starts[1] & (kinds[0] == kinds[1]) & (ends[0] == ends[1])
    return EntityCounts(*(np.bincount(sentence[which], minlength=len(lengths)) for which in (right, *starts)))
