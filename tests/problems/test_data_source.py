"""Where items come from, whatever the task: splits, folders, configurations, training data and draws."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mergeopt.config import RunFile, build_problem
from mergeopt.errors import ConfigError, DataError
from mergeopt.merge_problem import MergeProblem
from mergeopt.study.optimize import optimize
from mergeopt.study.run import Run
from mergeopt_problems.data_source import Data, DataSource
from mergeopt_problems.image_data import ImageSource
from mergeopt_problems.image_data import read as read_images
from mergeopt_problems.labelled_text import LabelledTextSource, ScoredTextSource, read_labelled, read_scored
from mergeopt_problems.overlap import normalised
from mergeopt_problems.tagged_text import TaggedTextSource
from mergeopt_problems.tagged_text import read as read_tagged
from mergeopt_problems.text_data import TextSource
from mergeopt_problems.text_data import read as read_documents
from mergeopt_problems.token_classification import TokenClassification
from tests.problems.tiny_text import Rows, wordpiece, write
from tests.tiny_models import tiny_gpt2, write_folders

pytestmark = pytest.mark.usefixtures("cache")


def documents(data: dict[str, Any]) -> Data[Any]:
    return read_documents(TextSource.of(data))


def labelled(data: dict[str, Any]) -> Data[Any]:
    return read_labelled(LabelledTextSource.of({**data, "text_b": "text"}))


def scored(data: dict[str, Any]) -> Data[Any]:
    return read_scored(ScoredTextSource.of({**data, "target": "label"}))


def tagged(data: dict[str, Any]) -> Data[Any]:
    return read_tagged(TaggedTextSource.of(data))


def images(data: dict[str, Any]) -> Data[Any]:
    return read_images(ImageSource.of(data))


def row(i: int, split: str, text: str | None = None) -> dict[str, Any]:
    text = text or f"text number {i}"
    words = text.split()
    return {"text": text, "label": i % 3, "tokens": words, "tags": ["O"] * len(words), "image": [[i, 0], [0, i]], "split": split}


def table() -> Rows:
    """Return six rows to search on, four to report on and six to train on, of which two search rows and one report row are copies."""
    rows = [row(i, "val") for i in range(6)] + [row(i, "test") for i in range(6, 10)]
    return [*rows, row(0, "train"), row(1, "train", " Text  NUMBER\n1"), row(6, "train"), *(row(i, "train") for i in range(20, 23))]


SAID = "2 of 6 {0}s of the search part and 1 of 4 {0}s of the report part of {1} also stand in the training data ({2})"


@pytest.mark.parametrize(
    ("read", "what"), [(documents, "document"), (labelled, "text"), (scored, "text"), (tagged, "sentence"), (images, "picture")]
)
def test_items_that_models_were_trained_on_are_counted(read: Callable[..., Data[Any]], what: str, tmp_path: Path) -> None:
    """Each kind of task says how many of its items stand in the training data, be it a split or a file, and nothing where none does."""
    path = write(tmp_path, table())
    data = {"path": path, "search": "val", "report": "test"}
    assert read(data).warnings == ()
    (said,) = read({**data, "train": "train"}).warnings
    assert said.startswith(SAID.format(what, path, "train"))
    other = write(tmp_path, [{**own, "split": "dev"} for own in table() if own["split"] == "train"], "other.jsonl")
    (said,) = read({**data, "train": other}).warnings
    assert said.startswith(SAID.format(what, path, other))
    fresh = write(tmp_path, [row(i, "train") for i in range(30, 33)], "fresh.jsonl")
    assert read({**data, "train": fresh}).warnings == ()
    with pytest.raises(DataError, match="no split 'trian', and there is no such file or folder; did you mean 'train'"):
        read({**data, "train": "trian"})


def test_training_data_may_have_splits_of_its_own(tmp_path: Path) -> None:
    """Of training data that has a split `train` only that one counts; a part that is trained on is no part to report on."""
    path = write(tmp_path, [row(i, "val") for i in range(4)])
    other = write(tmp_path, [row(0, "train"), row(1, "test"), row(2, "test")], "other.jsonl")
    (said,) = documents({"path": path, "search": "val", "train": other}).warnings
    assert said.startswith("1 of 4 documents of the search part")
    with pytest.raises(ConfigError, match="train and report are both 'test'"):
        DataSource.of({"path": path, "search": "val", "report": "test", "train": "test"})


words = st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1), min_size=1, max_size=4)


@given(words, st.lists(st.sampled_from([" ", "\t", "\n ", "  "]), min_size=5, max_size=5))
def test_white_space_makes_no_other_text(parts: list[str], spaces: list[str]) -> None:
    """Texts are the same however their words stand apart, and pairs of texts when both are."""
    spaced = spaces[0] + "".join(part + space for part, space in zip(parts, spaces[1:], strict=False))
    assert normalised(spaced) == normalised(" ".join(parts))
    assert normalised((spaced, "a")) == normalised((" ".join(parts), "A"))
    assert normalised((spaced, "a")) != normalised((spaced, "b"))


def test_a_folder_with_configurations(tmp_path: Path) -> None:
    """`subset` chooses among the configurations of a data set, as the hub lays it out; one that is not there is an error."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for split in ("validation", "test"):
            file = tmp_path / name / f"{split}.jsonl"
            file.write_text(json.dumps({"text": f"{name} {split}"}))
    files = {n: [{"split": s, "path": f"{n}/{s}.jsonl"} for s in ("validation", "test")] for n in ("first", "second")}
    head = {"configs": [{"config_name": name, "data_files": own} for name, own in files.items()]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n")
    found = documents({"path": str(tmp_path), "search": "val", "report": "test", "subset": "second"})
    assert found.parts == {"search": ["second validation"], "report": ["second test"]}
    with pytest.raises(DataError, match="cannot read"):
        documents({"path": str(tmp_path), "search": "val", "subset": "third"})


@pytest.mark.parametrize("splits", [True, False])
def test_a_folder_that_datasets_saved(tmp_path: Path, splits: bool) -> None:
    """Folders written by `save_to_disk` are read, with splits or with a column of them; they have no configurations."""
    rows = datasets.Dataset.from_list(table())
    saved = datasets.DatasetDict({"val": rows.select(range(6)), "test": rows.select(range(6, 10))}) if splits else rows
    saved.save_to_disk(tmp_path / "saved")
    data = {"path": str(tmp_path / "saved"), "search": "val", "report": "test"}
    assert len(documents(data).parts["search"]) == 6
    with pytest.raises(DataError, match="has no configurations"):
        documents({**data, "subset": "first"})
    with pytest.raises(DataError, match="has no configurations"):
        documents({**data, "path": write(tmp_path, table()), "subset": "first"})


def test_images_may_be_chosen_by_column(tmp_path: Path) -> None:
    """`where` keeps rows of images as of any other data, and paths in training data start from its own folder."""
    (tmp_path / "other").mkdir()
    for place, value in ((tmp_path, 1), (tmp_path / "other", 1)):
        Image.new("L", (2, 2), value).save(place / "a.png")
    Image.new("L", (2, 2), 7).save(tmp_path / "b.png")
    path = write(tmp_path, [{"image": f"{n}.png", "label": 0, "split": "val", "kind": n} for n in "ab"])
    other = write(tmp_path / "other", [{"image": "a.png"}])
    assert len(images({"path": path, "search": "val", "where": {"kind": "b"}}).parts["search"].pictures) == 1
    (said,) = images({"path": path, "search": "val", "train": other}).warnings
    assert said.startswith("1 of 2 pictures of the search part")


def test_sentences_are_drawn_in_the_shares_of_their_rarest_entities(tmp_path: Path) -> None:
    """A seeded subset of sentences holds each type of entity in its share, and those without any."""
    kinds = ["O"] * 40 + ["PER"] * 40 + ["LOC"] * 20
    rows = []
    for i, kind in enumerate(np.random.default_rng(0).permutation(kinds)):
        tags = ["O" if kind == "O" else f"B-{kind}", "O", "B-PER" if kind == "LOC" else "O"]
        rows.append({"tokens": ["the", "cat", f"a{i}"], "tags": tags, "split": "val"})
    data, tokenizer = {"path": write(tmp_path, rows), "search": "val"}, wordpiece(tmp_path)
    for seed in range(3):
        items = TokenClassification(data=data, tokenizer=tokenizer, limit=20, seed=seed).items("search")
        firsts = Counter(items.names[items.tags[start]] for start in range(0, 60, 3))
        assert firsts == {"O": 8, "B-PER": 8, "B-LOC": 4}


def test_warnings_are_stored_with_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run file's `train` is relative to it, and what it leads to is said once, stored with the run and said no more on resuming."""
    base, experts = write_folders(tiny_gpt2, tmp_path)
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"text": "\x01\x02\x03" + c, "split": "val"}) for c in "\x04\x05\x06"))
    (tmp_path / "seen.jsonl").write_text(json.dumps({"text": "\x01\x02\x03\x05"}))
    shared = {"task": "causal_lm", "tokenizer": "bytes", "window": 4, "data": {"path": "ids.jsonl", "search": "val", "train": "seen.jsonl"}}
    objectives = [{"name": "one", **shared}, {"name": "two", **shared, "metric": "perplexity"}]
    given = {"base": str(base), "experts": {n: str(p) for n, p in experts.items()}, "objectives": objectives, "device": "cpu"}
    problem = build_problem(RunFile.parse(given), tmp_path)
    assert isinstance(problem, MergeProblem)
    run = optimize(problem, "random", budget=2, out=tmp_path / "run")
    (said,) = run.warnings
    assert said.startswith("1 of 3 documents of the search part")
    assert Run.open(tmp_path / "run").warnings == (said,)
    assert caplog.text.count(said) == 1
    assert optimize(problem, "random", budget=3, out=tmp_path / "run", resume=True).warnings == (said,)
    assert caplog.text.count(said) == 1
