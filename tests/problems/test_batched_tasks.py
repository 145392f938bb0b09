from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mergeopt.batched_task import BatchedTask
from tests.problems.batched import KINDS, Asked

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Asked:
    make: Callable[[Path], Asked] = request.param
    return make(tmp_path)


def test_records_of_some_items_are_those_of_all(asked: Asked) -> None:
    """Whichever items are asked for, and in whichever order, each one's record is what it is among all items, but for rounding."""
    task, model = asked.task, asked.model
    assert isinstance(task, BatchedTask)
    whole = task.records(model, "search", CPU)
    count = len(task.items("search"))
    assert {len(column) for column in whole.values()} == {count}
    generator = np.random.default_rng(0)
    for items in ([count - 1], generator.permutation(count)[: count // 2].tolist(), list(range(count))[::-1]):
        some = task.records(model, "search", CPU, items)
        assert {name: column.dtype for name, column in some.items()} == {name: column.dtype for name, column in whole.items()}
        for name, column in some.items():
            np.testing.assert_allclose(column, whole[name][items], rtol=1e-4, atol=1e-5, err_msg=name)
    first = whole.get("loss", whole.get("prediction"))
    assert first is not None
    assert len(set(first.tolist())) == count


def test_batches_hold_each_item_once(asked: Asked) -> None:
    """All items, or those asked for, stand in batches once each; one asked for twice is refused."""
    task, model = asked.task, asked.model
    count = len(task.items("search"))
    for items in (None, [3, 0, 5]):
        batches = list(task.batches(model, "search", items))
        assert sorted(np.concatenate([batch.items for batch in batches]).tolist()) == sorted(range(count) if items is None else items)
        assert all(len(tensor) == len(batch.items) for batch in batches for tensor in batch.inputs.values())
    with pytest.raises(ValueError, match="distinct items"):
        task.records(model, "search", CPU, [1, 2, 1])


def test_the_model_keeps_its_mode(asked: Asked) -> None:
    """Records are made in evaluation mode, and a model that was training goes on training."""
    expected = asked.task.records(asked.model, "search", CPU)
    asked.model.train()
    made = asked.task.records(asked.model, "search", CPU)
    assert asked.model.training
    assert all(np.array_equal(made[name], column) for name, column in expected.items())
