from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from mergeopt import registry
from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.task import Items, Task
from mergeopt_problems.image_classification import ImageClassification
from mergeopt_problems.image_data import ImageSource
from mergeopt_problems.metrics import Accuracy

CPU = torch.device("cpu")
PLAIN = {"mean": 0.5, "std": 0.5}
Rows = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures("cache")


def picture(seed: int, *shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8), dtype=np.uint8)


def table(count: int = 12, *, splits: tuple[str, ...] = ("val", "test")) -> Rows:
    return [{"image": picture(i).tolist(), "label": i % 3, "split": splits[i % len(splits)]} for i in range(count)]


def write(folder: Path, rows: Rows, name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def classifier(*, labels: int = 3, size: int = 8, channels: int = 1) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=size, patch_size=4, num_channels=channels, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, id2label={i: str(i) for i in range(labels)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
    model.train(False)
    return model


def task(path: Any, **options: Any) -> ImageClassification:
    data = {"path": path, "search": "val", "report": "test", **options.pop("data", {})}
    return ImageClassification(data=data, **{"preprocess": PLAIN, **options})


def test_base_of_the_zoo(data_dir: Path, zoo_dir: Path) -> None:
    """The base of vit_images reaches its documented accuracy of .653 on the MNIST test split, judged on its own ten logits."""
    mnist = registry.load("tasks", "image_classification")(
        data={
            "path": str(data_dir / "open/images/mnist.parquet"), "search": "val", "report": "test", "image": "pixels", "shape": [28, 28],
        },
        classes="mnist:.*",
        preprocess={"mean": 0.3, "std": 0.35},
    )  # fmt: skip
    model = AutoModelForImageClassification.from_pretrained(zoo_dir / "vit_images/base", dtype=torch.float32).eval()
    objective = TaskObjective("mnist", mnist, Accuracy())
    objective.check(model)
    score = objective.score(model, "report", CPU, {})
    assert score.value == pytest.approx(0.653, abs=0.003)
    assert score.items == 1000
    again = mnist.records(model, "report", CPU)
    assert all(np.array_equal(again[key], score.records[key]) for key in ("loss", "prediction", "label"))


def test_records_are_those_of_the_model(tmp_path: Path) -> None:
    """Records equal cross-entropy, argmax and label computed by hand on (x / 255 - mean) / std, in the order of the rows."""
    rows = table()
    made = task(write(tmp_path, rows), batch=4)
    assert isinstance(made, Task)
    assert isinstance(made.items("search"), Items)
    model = classifier()
    made.check(model)
    kept = [row for row in rows if row["split"] == "val"]
    pixels = (torch.tensor([row["image"] for row in kept], dtype=torch.float32)[:, None] / 255 - 0.5) / 0.5
    labels = torch.tensor([row["label"] for row in kept])
    with torch.inference_mode():
        logits = model(pixel_values=pixels).logits
    records = made.records(model, "search", CPU)
    assert records["label"].tolist() == labels.tolist()
    assert records["prediction"].tolist() == logits.argmax(1).tolist()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(records["loss"], expected.numpy(), rtol=1e-5)
    assert records["loss"].dtype == np.float32
    assert not model.training


def test_every_form_of_one_picture(tmp_path: Path) -> None:
    """The same pictures as nested lists, flat values, image files named in a table, split files and image folders are the same items."""
    rows = table()
    expected = task(write(tmp_path, rows))
    flat = [{**row, "image": np.asarray(row["image"]).reshape(-1).tolist()} for row in rows]
    forms = [task(write(tmp_path, flat, "flat.jsonl"), data={"shape": [8, 8]})]
    lines = ["image,label,split"]
    for i, row in enumerate(rows):
        file = tmp_path / "folder" / row["split"] / f"class{row['label']}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(row["image"], dtype=np.uint8)).save(file)
        lines.append(f"{file.relative_to(tmp_path)},{row['label']},{row['split']}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    forms.append(task(tmp_path / "data.csv"))
    files = {split: write(tmp_path, [row for row in rows if row["split"] == split], f"{split}.jsonl") for split in ("val", "test")}
    forms.append(task(files))
    for form in forms:
        assert form.items("search").hash == expected.items("search").hash
        assert form.items("report").hash == expected.items("report").hash
    folder = task(tmp_path / "folder").items("search")
    by_class = torch.argsort(expected.items("search").labels, stable=True)
    assert torch.equal(folder.pixels, expected.items("search").pixels[by_class])


def test_class_names(tmp_path: Path) -> None:
    """Labels that are names need their order, and follow it."""
    names = ["cat", "ant", "bee"]
    path = write(tmp_path, [{**row, "label": names[row["label"]]} for row in table()])
    with pytest.raises(DataError, match=r"labels are names .* give `labels:`"):
        task(path)
    with pytest.raises(DataError, match="label 'bee' is not among `labels`"):
        task(path, data={"labels": ["cat", "ant"]})
    assert task(path, data={"labels": names}).items("search").labels.tolist() == [0, 2, 1, 0, 2, 1]


def test_classes_pick_logits(tmp_path: Path) -> None:
    """Indices and a regex over label names judge a model on the same logits; those that match nothing are errors."""
    path = write(tmp_path, table())
    model = classifier(labels=6)
    model.config.id2label = {i: f"{'first' if i < 3 else 'second'}:{i % 3}" for i in range(6)}
    by_name, by_index = task(path, classes="second:.*"), task(path, classes=[3, 4, 5])
    by_name.check(model)
    left, right = by_name.records(model, "search", CPU), by_index.records(model, "search", CPU)
    assert np.array_equal(left["loss"], right["loss"])
    assert left["prediction"].max() < 3
    with pytest.raises(DataError, match=r"'third:.*' matches none of the model's 6 label names"):
        task(path, classes="third:.*").check(model)
    with pytest.raises(DataError, match="names the logit 6, but the model has 6"):
        task(path, classes=[4, 5, 6]).check(model)
    with pytest.raises(ConfigError, match="distinct indices"):
        task(path, classes=[1, 1])


def test_hash_follows_content(tmp_path: Path) -> None:
    """The hash of the items changes with a pixel, a label and the preprocessing, and with nothing else."""
    rows = table()
    expected = task(write(tmp_path, rows)).items("search").hash
    assert task(write(tmp_path, rows, "copy.jsonl"), batch=3).items("search").hash == expected
    assert task(write(tmp_path, rows), preprocess={"mean": 0.4, "std": 0.5}).items("search").hash != expected
    for key, value in (("label", 2), ("image", picture(99).tolist())):
        changed = [{**rows[0], key: value}, *rows[1:]]
        assert task(write(tmp_path, changed, f"{key}.jsonl")).items("search").hash != expected


def test_limit_is_stratified_and_seeded(tmp_path: Path) -> None:
    """A limit keeps each class in its share, the same images each time, and other images under another seed."""
    rows = [{"image": picture(i).tolist(), "label": int(i % 4 == 0), "split": ("val", "test")[i >= 80]} for i in range(120)]
    path = write(tmp_path, rows)
    first, again, other = (task(path, limit=20, seed=seed).items("search") for seed in (0, 0, 1))
    assert len(first) == 20
    assert int(first.labels.sum()) == 5
    assert first.hash == again.hash != other.hash


def test_folder_processor(tmp_path: Path) -> None:
    """A model folder's image processor resizes and normalizes, and grey pictures reach a three-channel model as RGB."""
    rows = [{**row, "image": picture(i, 10, 6 + i).tolist()} for i, row in enumerate(table(6))]
    path = write(tmp_path, rows)
    with pytest.raises(DataError, match="different shapes"):
        task(path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "model")
    made = task(path, preprocess=None, processor=tmp_path / "model")
    assert made.items("search").pixels.shape == (3, 3, 8, 8)
    made.check(classifier(channels=3))
    with pytest.raises(DataError, match=r"does not take images \[n, 3, 8, 8\]"):
        made.check(classifier(channels=1))
    with pytest.raises(DataError, match=r"holds no preprocessor_config\.json"):
        task(path, preprocess=None, processor=tmp_path)
    for options in ({"preprocess": None}, {"processor": tmp_path / "model"}):
        with pytest.raises(ConfigError, match="either `preprocess"):
            task(path, **options)


def test_model_that_does_not_fit(tmp_path: Path) -> None:
    """Too few logits and another image size are found before anything is scored."""
    made = task(write(tmp_path, table()))
    with pytest.raises(DataError, match="has the label 2, but is judged on 2 logits"):
        made.check(classifier(labels=2))
    with pytest.raises(DataError, match=r"does not take images \[n, 1, 8, 8\]"):
        made.check(classifier(size=16))


def test_broken_model_fails_alone(tmp_path: Path) -> None:
    """Logits that are not finite fail the candidate instead of counting as predictions."""
    model = classifier()
    with torch.no_grad():
        dict(model.named_parameters())["classifier.bias"].fill_(torch.nan)
    with pytest.raises(CandidateError, match="logits on the search part are not finite"):
        task(write(tmp_path, table())).records(model, "search", CPU)


def test_copies_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture of the search part that also stands in the report part is left out of the search part, and said so."""
    rows = table()
    rows.append({**rows[1], "split": "val"})
    with caplog.at_level(logging.WARNING):
        made = task(write(tmp_path, rows))
    assert len(made.items("search")) == 6
    assert "left 1 of 7 pictures out of 'val'" in caplog.text
    copied = [{**row, "split": split} for row in rows for split in ("val", "test")]
    with pytest.raises(DataError, match="every picture of the split 'val' also stands in 'test'"):
        task(write(tmp_path, copied, "copied.jsonl"))


def test_search_part_alone(tmp_path: Path) -> None:
    """Without a report split there is one part, and asking for the other is an error."""
    made = ImageClassification(data={"path": write(tmp_path, table()), "search": "val"}, preprocess=PLAIN)
    assert made.parts == ("search",)
    with pytest.raises(DataError, match="has no report part"):
        made.items("report")


def test_empty_split(tmp_path: Path) -> None:
    """A split without rows is an error that names its file or folder."""
    files = {"val": write(tmp_path, table(), "val.jsonl"), "test": str(tmp_path / "test.csv")}
    (tmp_path / "test.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=r"test\.csv holds no rows"):
        task(files)
    full = datasets.Dataset.from_list(table())
    (tmp_path / "saved").mkdir()
    full.to_parquet(tmp_path / "saved" / "val.parquet")
    full.select([]).to_parquet(tmp_path / "saved" / "test.parquet")
    with pytest.raises(DataError, match="saved holds no rows, or has a split without any"):
        task(tmp_path / "saved")


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (dict, {"report": "tset"}, "no split 'tset'; did you mean 'test'"),
        (dict, {"image": "imgae"}, r"no column 'imgae' \(image\); did you mean 'image'"),
        (dict, {"label": "lable"}, r"no column 'lable' \(label\); did you mean 'label'"),
        (dict, {"split_column": "part"}, "no column 'part'"),
        (dict, {"shape": [7, 8]}, r"row 0: 64 values cannot have the shape \[7, 8\]"),
        (lambda row: {**row, "image": [1, 2, 3]}, {}, r"expected a picture \[height, width\]"),
        (lambda row: {**row, "image": [[0, 256]]}, {}, r"pixels in 0..255, got 0..256"),
        (lambda row: {**row, "image": [[0.5, 1.5]]}, {}, "expected a picture"),
        (lambda row: {**row, "image": "missing.png"}, {}, "no readable image"),
        (lambda row: {**row, "label": -1}, {}, "class numbers from 0, got the label -1"),
        (lambda row: {**row, "label": 0.5}, {}, "labels that are whole numbers or names"),
    ],
)  # fmt: skip
def test_data_that_is_not_what_it_says(tmp_path: Path, change: Change, data: dict[str, Any], message: str) -> None:
    """Each flaw of the data is one error that says where it is and what was expected."""
    with pytest.raises(DataError, match=message):
        task(write(tmp_path, [change(row) for row in table()]), data=data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.parquet", "junk", "cannot read .*bad.parquet: "),
        ("bad.jsonl", "{", "cannot read .*bad.jsonl: "),
        ("bad.txt", "x", "cannot tell what .*bad.txt is"),
        ("org/name", None, "no such file or folder: org/name; for a data set of the hub write hf://org/name"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    """A file that is missing, damaged or of no known kind is an error that names it; nothing is looked up on a hub."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        task(name if content is None else tmp_path / name)


def test_malformed_options(tmp_path: Path) -> None:
    """Unknown keys, a missing key and the same split twice are errors that say what would have done."""
    with pytest.raises(ConfigError, match="unknown key 'serach'; did you mean 'search'"):
        ImageSource.of({"path": "x", "serach": "val"})
    with pytest.raises(ConfigError, match="key 'search' is missing"):
        ImageSource.of({"path": "x"})
    with pytest.raises(ConfigError, match="search and report are both 'val'"):
        ImageSource.of({"path": "x", "search": "val", "report": "val"})
    with pytest.raises(ConfigError, match="unknown key 'mena'; did you mean 'mean'"):
        task(write(tmp_path, table()), preprocess={"mena": 0.1})
    with pytest.raises(ConfigError, match="limit: expected a whole number at least 1, got 0"):
        task(write(tmp_path, table()), limit=0)
