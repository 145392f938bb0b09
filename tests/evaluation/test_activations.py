"""What a batch takes besides weights, told before any weight is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.metrics import Accuracy
from tests.tiny_models import write_folders

TOKENS, WIDE, LAYERS = 17, 1024, 2


def vit() -> PreTrainedModel:
    """Return a ViT whose activations outweigh its weights."""
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=WIDE,
        id2label=dict(enumerate("abcde")),
    )
    return ViTForImageClassification(config)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process's peak")
def test_a_batch_is_found_out_without_weights(tmp_path: Path) -> None:
    """The memory of a batch grows with its size and holds the widest activation, a gradient keeps more, and no model is loaded for it."""
    generator = torch.Generator().manual_seed(0)
    items = ImageItems(torch.randn((600, 1, 16, 16), generator=generator), torch.zeros(600, dtype=torch.int64), settings={})
    pool = Pool(*write_folders(vit, tmp_path))
    found = []
    for batch in (60, 600):
        objective = TaskObjective("noise", ImageTask(name="noise", parts={"search": items}, batch=batch), Accuracy())
        problem = MergeProblem(pool, "linear", [objective], device="cpu", threads=1)
        found.append((problem.activations() or 0, problem.activations(learned=batch) or 0))
        assert "_live" not in problem.__dict__
    widest = 4 * 600 * TOKENS * WIDE
    scored, learned = found[1]
    reused = 0.9  # what the process had and was free is taken first, and is no growth
    assert reused * widest <= scored < 8 * widest
    assert reused * LAYERS * 2 * widest <= learned
    assert found[0][0] < scored
