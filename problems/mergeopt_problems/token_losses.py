"""What predicted tokens cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mergeopt.task import Part
from mergeopt_problems.refusals import check_finite
from mergeopt_problems.text_items import IGNORED

__all__ = ["token_losses"]

ELEMENTS = 1 << 24  # float32 logits of one chunk of the cross-entropy: 64 MiB, whatever the vocabulary


def token_losses(logits: torch.Tensor, labels: torch.Tensor, task: str, part: Part) -> torch.Tensor:
    """Return the cross-entropy at each position, float32 [n, t], 0 where none is asked for; never all logits in float32 at once.

    Args:
        logits: in any type, [n, t, V].
        labels: token ids, `IGNORED` where none is asked for; int64 [n, t], on the same device.
        task: its name, for messages.
        part: which data, for messages.

    Raises:
        CandidateError: a logit is not finite.
    """
    flat, targets = logits.flatten(0, 1), labels.flatten()
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    for rows in torch.split((targets != IGNORED).nonzero().squeeze(1), max(1, ELEMENTS // flat.shape[1])):
        own = flat[rows].to(torch.float32)
        check_finite(own, task, part)
        losses[rows] = F.cross_entropy(own, targets[rows], reduction="none")
    return losses.view(labels.shape)
