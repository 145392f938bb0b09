"""What tasks predict for losses, against what they record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from mergeopt.models.architecture import quiet_transformers
from mergeopt.task import DifferentiableTask
from mergeopt_problems.causal_lm import CausalLM
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from tests.problems.tiny_text import entropy

CPU = torch.device("cpu")
CHOSEN = [3, 0, 4]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    return found


def images() -> ImageTask:
    pixels = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageTask(name="images", parts={"search": ImageItems(pixels, torch.tensor([0, 1, 2, 1, 0]), settings={})}, classes=[4, 2, 1])


def classifier(dtype: torch.dtype) -> torch.nn.Module:
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, id2label={i: str(i) for i in range(5)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: torch.nn.Module = ViTForImageClassification(config)
    return model.to(dtype).eval()


def text(folder: Path) -> CausalLM:
    documents = ["a window of eight", "short", "né à Malmö", "and one more"]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": document, "split": "val"}) for document in documents))
    return CausalLM(data={"path": folder / "text.jsonl", "search": "val"}, tokenizer="bytes", window=8, stride=5)


def language_model(dtype: torch.dtype) -> torch.nn.Module:
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        model: torch.nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    return model.to(dtype).eval()


def test_images_as_recorded(dtype: torch.dtype) -> None:
    """Losses of predicted images are the recorded ones, in the order asked for, over the task's own classes."""
    task, model = images(), classifier(dtype)
    assert isinstance(task, DifferentiableTask)
    with torch.no_grad():
        made = task.predict(model, "search", CHOSEN, CPU)
    assert (made.logits.dtype, made.logits.shape, made.labels.tolist()) == (torch.float32, (3, 3), [1, 0, 0])
    records = task.records(model, "search", CPU)
    losses = F.cross_entropy(made.logits, made.labels, reduction="none")
    np.testing.assert_allclose(losses.numpy(), records["loss"][CHOSEN], rtol=1e-5 if dtype == torch.float32 else 2e-2)
    np.testing.assert_allclose(entropy(made.logits), records["entropy"][CHOSEN], rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_tokens_as_recorded(tmp_path: Path, dtype: torch.dtype) -> None:
    """Losses of predicted tokens sum to the recorded ones, window after window, with neither padding nor context among them."""
    task, model = text(tmp_path), language_model(dtype)
    assert isinstance(task, DifferentiableTask)
    records = task.records(model, "search", CPU)
    with torch.no_grad():
        made = task.predict(model, "search", CHOSEN, CPU)
    tokens = records["tokens"][CHOSEN]
    assert len(set(tokens)) > 1
    assert (made.logits.dtype, made.logits.shape) == (torch.float32, (tokens.sum(), 256))
    losses = F.cross_entropy(made.logits, made.labels, reduction="none").double()
    sums = [part.sum().item() for part in torch.split(losses, tokens.tolist())]
    np.testing.assert_allclose(sums, records["nll"][CHOSEN], rtol=1e-5 if dtype == torch.float32 else 2e-2)
    one = task.items("search")[CHOSEN[0]]["label"]
    assert made.labels[: tokens[0]].tolist() == one[one >= 0].tolist()


def test_gradients_reach_the_weights(tmp_path: Path) -> None:
    """A prediction keeps the model's graph where gradients are on, and none where they are off."""
    for task, model in ((images(), classifier(torch.float32)), (text(tmp_path), language_model(torch.float32))):
        assert isinstance(task, DifferentiableTask)
        task.records(model, "search", CPU)  # leaves nothing behind that autograd refuses
        made = task.predict(model, "search", [0, 1], CPU)
        loss = F.cross_entropy(made.logits, made.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 5
        with torch.no_grad():
            assert not task.predict(model, "search", [0], CPU).logits.requires_grad
