"""Looks whether a learned set answers preferences with a range of trade-offs, or with little else than the extremes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mergeopt_strategies.scalarizers import scalarize

__all__ = ["coverage_warning", "largest_gap", "misplaced_share"]

Points = npt.NDArray[np.float64]
WIDEST = 5.0  # steps of an even walk that a single step may span
MARGIN = 0.05  # by which the answer to another preference must be better, in normalised losses, and
MOST = 0.15  # the share of answers of which that may be so
FLAT = 1e-3  # relative change of every loss below which the preference has no effect worth the name


def largest_gap(losses: Points) -> float:
    """Return the longest step of a walk through loss space, in steps of an even walk in a straight line from end to end.

    Args:
        losses: [points, m], at evenly spaced preferences along an edge of the simplex; the walk's range counts as 1 in each.
    """
    spans = np.ptp(losses, axis=0)
    steps = np.linalg.norm(np.diff(losses / np.where(spans > 0, spans, 1.0), axis=0), axis=1)
    return float(steps.max() / np.sqrt(losses.shape[1]) * len(steps))


def misplaced_share(losses: Points, preferences: Points, scalarizer: str, smoothing: float) -> float:
    """Return the share of preferences for which the answer to another one is better by more than `MARGIN`, as the scalarizer sees it.

    Args:
        losses: [points, m], normalised to ideal 0 and nadir 1.
        preferences: [points, m] that they answer.
        scalarizer: that was learned with.
        smoothing: of it.
    """
    seen = np.array([[scalarize(scalarizer, row, gamma, smoothing) for row in losses] for gamma in preferences])
    return float(np.mean(np.diag(seen) - seen.min(axis=1) > MARGIN))


def coverage_warning(names: tuple[str, str], losses: Points, misplaced: float, scalarizer: str) -> str | None:
    """Return a sentence for people about a walk from one objective's preference to another's, None when it is fine.

    Args:
        names: of the objectives that the walk leads from and to.
        losses: [points, 2] of these two.
        misplaced: what `misplaced_share` says.
        scalarizer: that was learned with.
    """
    between = f"between {names[0]!r} and {names[1]!r}"
    if bool((np.ptp(losses, axis=0) <= FLAT * np.abs(losses).max(axis=0)).all()):
        return (
            f"the preference {between} changes their losses by less than {FLAT:.1%}: they hardly conflict, or learning has not told them "
            "apart yet; if they should conflict, give more gradient_steps or a higher learning_rate"
        )
    if largest_gap(losses) <= WIDEST and misplaced <= MOST:
        return None
    what = (
        f"{misplaced:.0%} of the preferences {between} are answered worse than by the answer to another one"
        if misplaced > MOST
        else f"the answers to preferences {between} skip a part of the front"
    )
    if scalarizer == "linear":
        return (
            f"{what}: linear scalarization reaches only the ends of a front that bulges, and learning may have been too short; use "
            "scalarizer: stch, or give more gradient_steps"
        )
    return f"{what}: give more gradient_steps or a higher rank, unless the front is in pieces"
