"""Scalarizations: how the losses of several objectives and a preference become one number, and the weights of their gradients.

S [m] are losses normalised to ideal 0 and nadir 1, gamma [m] is a preference with sum one. The gradient of a scalarization g is
sum_k w_k dS_k with w_k = dg/dS_k, so a learner needs the weights w alone, and can take one objective's gradient at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["SCALARIZERS", "gradient_weights", "scalarize"]

Vector = npt.NDArray[np.float64]
SCALARIZERS = ("linear", "chebyshev", "stch")


def scalarize(name: str, losses: Vector, preference: Vector, smoothing: float) -> float:
    """Return g(S, gamma).

    Args:
        name: `linear`: sum_k gamma_k S_k. `chebyshev`: max_k gamma_k S_k. `stch`, smooth Chebyshev (arXiv 2402.19078): mu log sum_k
            exp(gamma_k S_k / mu) with the ideal point at zero.
        losses: S [m].
        preference: gamma [m].
        smoothing: mu > 0 of `stch`.
    """
    weighted = preference * losses
    if name == "linear":
        return float(weighted.sum())
    if name == "chebyshev":
        return float(weighted.max())
    top = weighted.max()
    return float(top + smoothing * np.log(np.exp((weighted - top) / smoothing).sum()))


def gradient_weights(name: str, losses: Vector, preference: Vector, smoothing: float) -> Vector:
    """Return w [m], w_k = dg/dS_k; of `chebyshev` that of the first of the worst objectives. Arguments as of `scalarize`."""
    if name == "linear":
        return preference.copy()
    weighted = preference * losses
    if name == "chebyshev":
        return np.where(np.arange(len(weighted)) == weighted.argmax(), preference, 0.0)
    shares = np.exp((weighted - weighted.max()) / smoothing)
    return np.asarray(shares / shares.sum() * preference)
