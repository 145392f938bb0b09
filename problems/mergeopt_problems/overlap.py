"""Items that stand in more than one part of the data: copies, and items that the models were trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeopt.errors import DataError
from mergeopt.task import Part
from mergeopt_problems.data_source import DataSource

__all__ = ["Kept", "normalised", "separated"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of the parts of a source.

    Args:
        rows: of each part, in order.
        warnings: what a run over them has to say, a sentence each.
    """

    rows: Mapping[Part, Sequence[int]]
    warnings: tuple[str, ...] = ()


def separated(keys: Mapping[Part, Sequence[Any]], training: Sequence[Any] | None, source: DataSource, what: str) -> Kept:
    """Leave search items out that also stand in the report part, counted in the log, and warn of items that models were trained on.

    Copies of report items are exact ones. An item counts as trained on when `normalised` makes it equal to one of the training data.

    Args:
        keys: what identifies each item of a part: text, a tuple of texts, or anything else that can be hashed.
        training: the same of the training data; None where that is not known.
        source: where they are from.
        what: what to call an item.

    Raises:
        DataError: no search item is left.
    """
    rows: dict[Part, Sequence[int]] = {part: range(len(own)) for part, own in keys.items()}
    if "report" in keys:
        rows["search"] = _without_copies(keys["search"], set(keys["report"]), source, what)
    trained = set() if training is None else {normalised(item) for item in training}
    counts = {part: sum(normalised(keys[part][row]) in trained for row in own) for part, own in rows.items()}
    told = [f"{count} of {len(rows[part])} {what}s of the {part} part" for part, count in counts.items() if count]
    if not told:
        return Kept(rows)
    warning = (
        f"{' and '.join(told)} of {source.path} also stand in the training data ({source.train}): scores on them say little of new ones"
    )
    return Kept(rows, (warning,))


def normalised(item: Any) -> Any:
    """Return what two copies of an item share: of text, its words without regard to case and white space; of texts, that of each."""
    if isinstance(item, str):
        return " ".join(item.split()).casefold()
    return tuple(normalised(one) for one in item) if isinstance(item, tuple) else item


def _without_copies(search: Sequence[Any], reported: set[Any], source: DataSource, what: str) -> list[int]:
    kept = [row for row, item in enumerate(search) if item not in reported]
    if not kept:
        raise DataError(
            f"data: {source.path}: every {what} of the split {source.search!r} also stands in {source.report!r}; they must be disjoint"
        )
    if len(kept) < len(search):
        message = "%s: left %d of %d %ss out of %r, which also stand in %r"
        log.warning(message, source.path, len(search) - len(kept), len(search), what, source.search, source.report)
    return kept
