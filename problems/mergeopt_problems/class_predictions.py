"""What a classifier's logits say about each thing that it classifies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

__all__ = ["classified"]


def classified(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, npt.NDArray[np.generic]]:
    """Return `loss` (cross-entropy), `entropy` (of the softmax; both in nats, float32), `prediction` and `label` (int64), each [n].

    Args:
        logits: float32 [n, classes], finite.
        labels: int64 [n], on any device.
    """
    log_shares = F.log_softmax(logits, dim=1)
    made = {
        "loss": F.nll_loss(log_shares, labels.to(logits.device), reduction="none"),
        "entropy": -(log_shares.exp() * log_shares).sum(dim=1),
        "prediction": logits.argmax(dim=1),
        "label": labels,
    }
    return {name: column.cpu().numpy() for name, column in made.items()}
