"""Fisher information of small models of every kind, held against one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergeopt.evaluation import diagonal_fisher as module
from mergeopt.evaluation.diagonal_fisher import Labels, diagonal_fisher
from mergeopt.task import DifferentiableTask
from tests.problems.batched import KINDS, Asked

CPU = torch.device("cpu")
CLASSIFIERS = [kind for kind in KINDS if kind.__name__ != "text_regression"]

pytestmark = pytest.mark.usefixtures("cache_dir")


def parameters_of(asked: Asked) -> list[torch.nn.Parameter]:
    for parameter in asked.model.parameters():
        parameter.requires_grad_(False)
    return list(asked.model.parameters())


def information(asked: Asked, items: list[int], labels: Labels, seed: int = 0) -> list[torch.Tensor]:
    assert isinstance(asked.task, DifferentiableTask)
    return diagonal_fisher(asked.model, parameters_of(asked), [(asked.task, item) for item in items], CPU, labels=labels, seed=seed)


def brute_force(asked: Asked, items: list[int], labels: Labels) -> list[torch.Tensor]:
    """Return the mean over items: of every label's squared gradient times its probability, or of the squared gradient of one sum."""
    parameters = parameters_of(asked)
    totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    for item in items:
        for parameter in parameters:
            parameter.requires_grad_(True)
        assert isinstance(asked.task, DifferentiableTask)
        predictions = asked.task.predict(asked.model, "search", [item], CPU)
        likelihoods = predictions.logits.log_softmax(dim=1)
        if labels == "model":
            terms = [(likelihood.exp().item(), likelihood) for row in likelihoods for likelihood in row]
        else:
            chosen = predictions.labels if labels == "data" else predictions.logits.argmax(dim=1)
            terms = [(1.0, sum(row[label] for row, label in zip(likelihoods, chosen.tolist(), strict=True)))]
        for share, likelihood in terms:
            gradients = torch.autograd.grad(likelihood, parameters, retain_graph=True, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += 0.0 if gradient is None else share / len(items) * gradient.double().square()
        for parameter in parameters:
            parameter.requires_grad_(False)
    return totals


@pytest.mark.parametrize("labels", ["model", "argmax", "data"])
@pytest.mark.parametrize("kind", CLASSIFIERS, ids=lambda kind: kind.__name__)
def test_it_is_the_mean_of_squared_gradients(kind: Callable[[Path], Asked], labels: Labels, tmp_path: Path) -> None:
    """For images, texts, tokens and windows of text, and for every kind of labels, it is what one gradient after the other adds up to."""
    asked = kind(tmp_path)
    if kind.__name__ in ("causal_lm", "seq2seq_lm") and labels == "model":
        pytest.skip("labels are drawn, see below")
    found = information(asked, [1, 4, 6], labels)
    assert any(float(one.max()) > 0 for one in found)
    for one, expected in zip(found, brute_force(asked, [1, 4, 6], labels), strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-3, atol=1e-6 * max(1.0, float(expected.max())))


def test_it_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Weights are what they were, and no parameter wants a gradient or holds one, whatever happens."""
    asked = CLASSIFIERS[0](tmp_path)
    before = [parameter.clone() for parameter in asked.model.parameters()]
    information(asked, [0, 1], "model")
    with pytest.raises(IndexError):
        information(asked, [10_000], "model")
    for parameter, kept in zip(asked.model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_drawn_labels_average_to_the_expectation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where labels are drawn, a seed gives the same information again, and the mean over many seeds is the exact expectation."""
    asked = next(kind for kind in KINDS if kind.__name__ == "token_classification")(tmp_path)
    with torch.no_grad():
        asked.model.get_parameter("classifier.weight").mul_(0.1)  # less sure of itself
    exact = information(asked, [2], "model")
    monkeypatch.setattr(module, "EXACT", 0)
    drawn = [information(asked, [2], "model", seed=seed) for seed in range(150)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[3], information(asked, [2], "model", seed=3), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(drawn[3], drawn[4], strict=True))
    total = sum(float(one.sum()) for seed in drawn for one in seed) / len(drawn)
    assert total == pytest.approx(sum(float(one.sum()) for one in exact), rel=0.15)
