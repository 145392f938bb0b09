"""Experts of different tasks through the command line: a search over one body, models with each expert's head, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

from mergeopt.config import RunFile, build_problem
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.architecture import quiet_transformers
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.study.run import Run
from mergeopt.task import Objective
from tests.faults.commands import Commands, listing, refused
from tests.problems.tiny_text import VOCABULARY, wordpiece
from tests.tiny_models import tiny_bert, write_folder

EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
TAGS = ("O", *(f"{place}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for place in "BI"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A folder with a base without head, an expert for six emotions, one for BIO tags, and a run file over real sentences of both."""
    folder = tmp_path_factory.mktemp("heads")
    kinds: Mapping[str, tuple[type[PreTrainedModel], tuple[str, ...]]] = {
        "base": (BertModel, ()), "emotion": (BertForSequenceClassification, EMOTIONS), "ner": (BertForTokenClassification, TAGS)
    }  # fmt: skip
    for seed, (name, (kind, labels)) in enumerate(kinds.items()):
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
        write_folder(partial(tiny_bert, kind, labels, **sizes), folder / name, seed)
        wordpiece(folder / name)
    (folder / "body.py").write_text(
        "def norm(model, items, device): return float(model.classifier.weight.norm() + model.bert.pooler.dense.bias.sum())\n"
    )
    write(folder, data_dir)
    return folder


def run_file(data: Path) -> dict[str, Any]:
    emotion = {"path": str(data / "open/emotion/goemotions.parquet"), "search": "val", "report": "test", "labels": list(EMOTIONS)}
    ner = {"path": str(data / "open/ner/crossner_wnut.parquet"), "search": "val", "report": "test", "where": {"domain": "politics"}}
    text = {"task": "text_classification", "expert": "emotion", "data": emotion, "limit": 24, "max_length": 64}
    words = {"task": "token_classification", "expert": "ner", "data": ner, "limit": 12, "max_length": 64}
    return {
        "base": "base",
        "experts": {"ner": "ner", "emotion": "emotion"},
        "merge": {"operator": "task_arithmetic", "heads": "separate", "groups": {"blocks": 2}},
        "objectives": [
            {"name": "tags", "metric": "token_loss", **words},
            {"name": "feeling", "metric": "cross_entropy", **text},
            {"name": "sure", "metric": "entropy", **text},
            {"name": "norm", "function": "body.py:norm", "direction": "minimize", "expert": "emotion"},
        ],
        "strategy": {"name": "nsga2", "pop_size": 4},
        "budget": 8,
        "device": "cpu",
        "out": "run",
    }


def write(folder: Path, data: Path, name: str = "run.yaml", **changes: Any) -> Path:
    (folder / name).write_text(yaml.safe_dump(run_file(data) | changes, sort_keys=False))
    return folder / name


@pytest.fixture(scope="module")
def searched(mergeopt: Commands, sources: Path) -> Path:
    """The folder of sources, with a finished run, and a model folder of its knee for each head."""
    done = mergeopt(sources, "run", "run.yaml")
    assert done.status == 0, done.err
    assert "--knee --head all --to merged/" in done.out
    done = mergeopt(sources, "export", "run", "--knee", "--head", "all", "--to", "knee")
    assert done.status == 0, done.err
    assert "equal bit for bit" in done.out
    assert "7 of the head of" not in done.out
    return sources


@pytest.fixture(scope="module")
def labelled(mergeopt: Commands, sources: Path, data_dir: Path) -> Path:
    """A folder with experts for three and for four emotions that share one, and a run that merged their heads by label."""
    folder = sources / "labelled"
    folder.mkdir()
    table = Dataset.from_parquet(str(data_dir / "open/emotion/goemotions.parquet"), cache_dir=str(folder / "cache")).to_list()
    wanted: dict[str, Any] = {"base": sources / "base", "experts": {}, "objectives": []}
    for seed, (name, own) in enumerate({"loud": ("joy", "surprise", "anger"), "still": ("disgust", "fear", "joy", "sadness")}.items()):
        kind = partial(tiny_bert, BertForSequenceClassification, own, vocab_size=VOCABULARY, max_position_embeddings=64)
        wordpiece(write_folder(kind, folder / name, 10 + seed))
        rows = [{**row, "label": EMOTIONS[row["label"]]} for row in table if EMOTIONS[row["label"]] in own and row["split"] != "train"]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = {"task": "text_classification", "expert": name, "limit": 16, "max_length": 64}
        data = {"path": f"{name}.jsonl", "search": "val", "report": "test"}
        wanted["experts"][name] = name
        wanted["objectives"] += [{"name": f"{name} {metric}", "metric": metric, "data": data, **task} for metric in ("cross_entropy", "kl")]
    merge = {"operator": "task_arithmetic", "heads": "by_label", "groups": {"head": "classifier", "body": "."}}
    write(folder, data_dir, **wanted | {"base": str(sources / "base")}, merge=merge, budget=4)
    done = mergeopt(folder, "run", "run.yaml")
    assert done.status == 0, done.err
    assert "--head" not in done.out
    return folder


def test_heads_merged_by_label(mergeopt: Commands, labelled: Path) -> None:
    """A search over one head for all labels, each objective judged on its expert's, is exported as it was scored, under all names."""
    done = mergeopt(labelled, "check", "run.yaml")
    assert "head        one, with 6 labels of those that know them: joy (loud, still); surprise (loud); anger (loud)" in done.out
    done = mergeopt(labelled, "export", "run", "--knee", "--to", "model")
    assert done.status == 0, done.err
    assert "equal bit for bit" in done.out
    point = Run.open(labelled / "run").front.knee()
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(labelled / "model")
    assert list(model.config.id2label.values()) == ["joy", "surprise", "anger", "disgust", "fear", "sadness"]
    assert scores(labelled, model, *point.values) == point.values
    baselines = {trial.name: trial.scores["search"] for trial in Run.open(labelled / "run").baselines}
    for name in ("loud", "still"):
        assert baselines[f"expert:{name}"][f"{name} kl"].value == pytest.approx(0.0, abs=1e-6)
    refused(mergeopt(labelled, "export", "run", "--knee", "--head", "loud", "--to", "other"), "these models share one head")


def objectives(folder: Path) -> Mapping[str, Objective]:
    problem = build_problem(RunFile.load(folder / "run.yaml"), folder)
    assert isinstance(problem, MergeProblem)
    return {objective.info.name: objective for objective in problem.objectives}


def scores(folder: Path, model: PreTrainedModel, *names: str) -> dict[str, float]:
    """Return what a model scores by some of the run's objectives, on the search part."""
    known = objectives(folder)
    model.train(False)
    return {name: known[name].score(model, "search", CPU, {}).value for name in names}


def test_every_head_is_written_and_scores_what_was_stored(searched: Path) -> None:
    """Each folder loads as the class of its expert, with its labels, and scores what the store says of its objectives, bit for bit."""
    point = Run.open(searched / "run").front.knee()
    with quiet_transformers():
        emotion = AutoModelForSequenceClassification.from_pretrained(searched / "knee" / "emotion")
        ner = AutoModelForTokenClassification.from_pretrained(searched / "knee" / "ner")
    assert tuple(emotion.config.id2label.values()) == EMOTIONS
    assert tuple(ner.config.id2label.values()) == TAGS
    assert scores(searched, emotion, "feeling", "sure", "norm") | scores(searched, ner, "tags") == point.values
    body = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(emotion.get_parameter(body), ner.get_parameter(body))
    assert torch.equal(emotion.classifier.weight, Checkpoint(searched / "emotion").read("classifier.weight"))
    assert "feeling" in (searched / "knee/emotion/README.md").read_text()
    assert "feeling" not in (searched / "knee/ner/README.md").read_text()


def test_an_expert_alone_is_that_expert(searched: Path) -> None:
    """The baseline of one expert scores, by its own objectives, exactly what the expert itself does."""
    baseline = next(trial for trial in Run.open(searched / "run").baselines if trial.name == "expert:emotion")
    with quiet_transformers():
        expert = AutoModelForSequenceClassification.from_pretrained(searched / "emotion")
    found = {name: score.value for name, score in baseline.scores["search"].items() if name in ("feeling", "sure", "norm")}
    assert found == scores(searched, expert, *found)


def test_a_recipe_makes_any_head(mergeopt: Commands, searched: Path, tmp_path: Path) -> None:
    """The recipe of a folder makes it again; asked for another head, it makes the other folder."""
    recipe = searched / "knee/emotion/recipe.json"
    assert mergeopt(tmp_path, "merge", recipe, "--out", "again").status == 0
    assert mergeopt(tmp_path, "merge", recipe, "--head", "ner", "--out", "other").status == 0
    for made, exported in (("again", "emotion"), ("other", "ner")):
        assert (tmp_path / made / "model.safetensors").read_bytes() == (searched / "knee" / exported / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / made / "recipe.json").read_text())["heads"]["written"] == exported


def test_a_search_starts_from_an_exported_recipe_and_goes_on(mergeopt: Commands, searched: Path, data_dir: Path) -> None:
    """A recipe with a chosen head is a starting point like any candidate; a longer budget goes on where the run ended, racing or not."""
    judged = [objective for objective in run_file(data_dir)["objectives"] if "task" in objective]
    write(searched, data_dir, "more.yaml", init=["knee/ner/recipe.json"], objectives=judged, racing="sequential", budget=5, out="more")
    for budget in (5, 9):
        done = mergeopt(searched, "run", "more.yaml", "--budget", budget, *(["--resume"] if budget > 5 else []))
        assert done.status == 0, done.err
    run, knee = Run.open(searched / "more"), Run.open(searched / "run").front.knee()
    start = next(trial for trial in run.trials if trial.kind == "init")
    assert {name: score.value for name, score in start.scores["search"].items()} == {
        name: knee.values[name] for name in start.scores["search"]
    }
    assert run.evaluations == 9


def test_one_merge_without_a_search(mergeopt: Commands, sources: Path, tmp_path: Path) -> None:
    """A merge file may have separate heads too."""
    merge = {"operator": "task_arithmetic", "heads": "separate", "head_tensors": ["^classifier", "pooler"], "parameters": {"weight": 0.5}}
    models = {"base": str(sources / "base"), "experts": {name: str(sources / name) for name in ("ner", "emotion")}}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({**models, "merge": merge}))
    done = mergeopt(tmp_path, "merge", "merge.yaml", "--head", "ner", "--out", "model")
    assert done.status == 0, done.err
    assert "37 merged, 2 of the head of ner" in done.out


def test_check_shows_the_heads(mergeopt: Commands, sources: Path) -> None:
    """`mergeopt check` names every head with its tensors, its labels and what it measures, and what of the base is not used."""
    done = mergeopt(sources, "check", "run.yaml")
    assert done.status == 0, done.err
    assert "head        ner: classifier.weight, classifier.bias; 9 labels (O, B-PER, I-PER, B-ORG" in done.out
    assert "(anger, disgust, fear, joy, sadness, surprise); measures feeling, sure, norm" in done.out
    assert "2 tensors of the base's own head are not used: pooler.dense.bias, pooler.dense.weight" in done.out
    assert not (sources / "check").exists()


def test_what_is_missing_or_unknown_is_refused(mergeopt: Commands, sources: Path, data_dir: Path) -> None:
    """A pattern without tensors, an objective without expert and an unknown mode end the run with status 2 before anything is written."""
    plain = run_file(data_dir)
    by_label = plain["merge"] | {"heads": "by_label"}
    headless = [{key: value for key, value in objective.items() if key != "expert"} for objective in plain["objectives"]]
    for changes, text in (
        ({"merge": plain["merge"] | {"head_tensors": ["score"]}}, "head_tensors: the pattern 'score' matches no tensor"),
        ({"merge": plain["merge"] | {"head_tensors": ["("]}}, "head_tensors: no regular expression among"),
        ({"merge": plain["merge"] | {"heads": "apart"}}, "known: by_label, separate, shared; got 'apart'"),
        ({"merge": {"operator": "linear"}}, "where their heads alone differ, merge: {heads: separate} keeps them"),
        ({"merge": by_label}, "expert 'emotion' is of class BertForSequenceClassification, expert 'ner' of BertForTokenClassification"),
        (
            {"objectives": headless},
            "objectives: tags: heads are separate, so it needs `expert:`, the one whose head it is measured with: ner, emotion",
        ),
    ):
        write(sources, data_dir, "bad.yaml", **changes, out="bad")
        for command in ("run", "check"):
            refused(mergeopt(sources, command, "bad.yaml"), text)
        assert not (sources / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--head", "emotoin"), "there is no head 'emotoin'; did you mean 'emotion'"),
        ((), "this merge has a head per expert; say whose to write: ner, emotion, or all (a folder each)"),
    ],
)
def test_a_head_must_be_named(mergeopt: Commands, searched: Path, tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    """An export without a head, where there are several, and one of an unknown head end with status 2 and write nothing."""
    refused(mergeopt(tmp_path, "export", searched / "run", "--knee", *arguments, "--to", "model"), text)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(Run.open(searched / "run").front.knee().recipe.to_json()))  # type: ignore[union-attr]
    refused(mergeopt(tmp_path, "merge", recipe, *arguments, "--out", "model"), text)
    assert listing(tmp_path) == ["recipe.json"]
