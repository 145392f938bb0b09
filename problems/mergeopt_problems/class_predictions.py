"""What a classifier's logits say about each thing that it classifies."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["classified"]


def classified(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `loss` (cross-entropy), `entropy` (of the softmax; both in nats, float32) and `prediction` (int64), each [n], on the CPU.

    Args:
        logits: float32 [n, classes], finite.
        labels: int64 [n], on the same device.
    """
    log_shares = F.log_softmax(logits, dim=1)
    made = {
        "loss": F.nll_loss(log_shares, labels, reduction="none"),
        "entropy": -(log_shares.exp() * log_shares).sum(dim=1),
        "prediction": logits.argmax(dim=1),
    }
    return {name: column.cpu() for name, column in made.items()}
