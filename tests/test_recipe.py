from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopt.errors import RecipeError
from mergeopt.lineage import Lineage, Step
from mergeopt.recipe import Argument, Heads, Learned, Recipe, Source, canonical_json, content_hash, ordered_json

RECIPE = Recipe(
    base=Source("base", "models/base", "b" * 64),
    experts=(Source("zoe", "models/zoe", "c" * 64), Source("ann", "models/ann", "d" * 64)),
    operator="ties",
    operator_version=1,
    variant="paper",
    arguments={
        "weight": Argument({"z": "attn", "a": "."}, None, {"z": {"zoe": 0.1, "ann": 1 / 3}, "a": {"zoe": 1.5, "ann": 0.0}}, False),
        "density": Argument("model", 3, {"depth.0": 0.2, "depth.1": 0.3, "depth.2": 5e-324}, False),
        "scale": Argument({"blocks": 2}, None, {"block.0": 1.0, "block.1": 1.0}, True),
        "vote": Argument("model", None, {"model": "sum"}, True),
    },
    exclude=("head", r"bias$"),
    dtype="bfloat16",
    carry={"tokenizer": "zoe"},
)


EVOLVED = replace(RECIPE, lineage=Lineage(("zoe", "ann"), (Step(1, ((0, 0),), 0.5, 1 / 3, 2**63 - 1),)))
LEARNED = replace(RECIPE, learned=Learned("runs/x/learned/ee", "e" * 64, {"up": 0.25, "down": 0.75}))
APART = replace(RECIPE, heads=Heads("separate", ("^score", "pooler"), "ann"))
LABELLED = replace(RECIPE, heads=Heads("by_label", labels={"zoe": ("joy", "fear"), "ann": ("fear",)}))


def test_evolved_and_learned_models_are_recipes_too(tmp_path: Path) -> None:
    """A lineage and a learned set survive a file, change the key, and but for the set's place nothing of them is left out of it."""
    for recipe in (EVOLVED, LEARNED, replace(EVOLVED, learned=LEARNED.learned)):
        file = tmp_path / "recipe.json"
        file.write_text(canonical_json(recipe.to_json()))
        assert Recipe.load(file) == recipe
        assert recipe.key != RECIPE.key
    moved = LEARNED.relocated({"learned": "/elsewhere"})
    assert moved.learned is not None
    assert moved.learned.path == "/elsewhere"
    assert moved.key == LEARNED.key
    assert replace(LEARNED, learned=replace(moved.learned, preference={"up": 0.5, "down": 0.5})).key != LEARNED.key
    assert replace(LEARNED, learned=replace(moved.learned, hash="f" * 64)).key != LEARNED.key
    assert "lineage" not in RECIPE.to_json()
    assert "learned" not in RECIPE.to_json()


def test_what_becomes_of_heads_is_in_the_recipe(tmp_path: Path) -> None:
    """How heads were found, whose is written and what their rows stand for survive a file and are part of the key."""
    assert "heads" not in RECIPE.to_json()
    others = [replace(APART, heads=Heads("separate", ("^score", "pooler"), written)) for written in ("zoe", None)]
    others += [replace(LABELLED, heads=Heads("by_label", labels={"zoe": ("fear", "joy"), "ann": ("fear",)}))]
    for recipe in (APART, LABELLED, *others):
        file = tmp_path / "recipe.json"
        file.write_text(canonical_json(recipe.to_json()))
        assert Recipe.load(file) == recipe
    assert len({recipe.key for recipe in (RECIPE, APART, LABELLED, *others)}) == 6


def test_json_leads_back(tmp_path: Path) -> None:
    """A recipe survives JSON in the user's order and with sorted keys, and a file, with every float to the bit."""
    for text in (ordered_json(RECIPE.to_json()), canonical_json(RECIPE.to_json()), json.dumps(RECIPE.to_json(), indent=2)):
        back = Recipe.from_json(json.loads(text))
        assert back == RECIPE
        assert list(back.arguments["weight"].groups) == ["z", "a"]
        assert back.key == RECIPE.key
    file = tmp_path / "recipe.json"
    file.write_text(canonical_json(RECIPE.to_json()))
    assert Recipe.load(file) == RECIPE


def test_a_mapping_of_groups_is_read_too() -> None:
    """Groups that a person wrote as a mapping are taken in the order they stand in."""
    data = RECIPE.to_json()
    data["arguments"]["weight"]["groups"] = {"z": "attn", "a": "."}
    assert Recipe.from_json(data) == RECIPE


def test_the_key_is_about_weights_alone() -> None:
    """Places and what is carried along do not change the key; everything that changes weights does."""
    argument = RECIPE.arguments["weight"]
    same = [
        replace(RECIPE, base=replace(RECIPE.base, path="elsewhere")),
        RECIPE.relocated({"ann": "/moved"}),
        replace(RECIPE, carry={}),
    ]
    assert all(recipe.key == RECIPE.key for recipe in same)
    turned = Argument({"a": ".", "z": "attn"}, None, argument.values, False)
    others = [
        replace(RECIPE, base=replace(RECIPE.base, hash="e" * 64)),
        replace(RECIPE, experts=RECIPE.experts[::-1]),
        replace(RECIPE, operator="linear"),
        replace(RECIPE, operator_version=2),
        replace(RECIPE, variant="author"),
        replace(RECIPE, exclude=()),
        replace(RECIPE, dtype="float32"),
        replace(RECIPE, arguments={**RECIPE.arguments, "weight": turned}),
        replace(RECIPE, arguments={**RECIPE.arguments, "weight": replace(argument, static=True)}),
        replace(RECIPE, arguments={**RECIPE.arguments, "vote": replace(RECIPE.arguments["vote"], values={"model": "count"})}),
    ]
    assert len({RECIPE.key, *(recipe.key for recipe in others)}) == len(others) + 1


def test_relocation_knows_its_sources() -> None:
    """Sources move by name; an unknown name is refused with those there are."""
    moved = RECIPE.relocated({"base": "/b", "zoe": "/z"})
    assert [source.path for source in (moved.base, *moved.experts)] == ["/b", "/z", "models/ann"]
    with pytest.raises(RecipeError, match="no source 'bob'; it has base, zoe, ann"):
        RECIPE.relocated({"bob": "/b"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "expected a recipe of format 1, got format 2"),
        ({"format": None}, "expected a recipe of format 1, got format None"),
        ({"base": None}, "damaged recipe"),
        ({"base": {"name": "base", "path": "x"}}, "the key 'hash' is missing"),
        ({"base": {"name": "base", "path": 3, "hash": "0"}}, "expected text, got 3"),
        ({"experts": 3}, "damaged recipe"),
        ({"operator": {"name": "ties", "version": "new", "variant": "paper"}}, "damaged recipe"),
        ({"arguments": []}, "damaged recipe"),
        ({"arguments": {"weight": {"groups": "model", "curve": None, "static": True}}}, "the key 'values' is missing"),
        ({"arguments": {"weight": {"groups": [["a"]], "curve": None, "static": True, "values": {}}}}, "damaged recipe"),
        ({"exclude": [3]}, "expected text, got 3"),
        ({"carry": {"tokenizer": None}}, "expected text, got None"),
        ({"lineage": Lineage(("ann", "zoe")).to_json()}, "its lineage is of ann, zoe, its experts are zoe, ann"),
        ({"lineage": None}, "expected a lineage"),
        ({"heads": {"mode": "separate", "tensors": []}}, "the key 'written' is missing"),
        ({"heads": {"mode": "separate", "tensors": [], "written": "bob"}}, "it writes the head of 'bob', its experts are zoe, ann"),
        ({"heads": {"mode": "by_label", "tensors": [], "written": None, "labels": {"zoe": [1]}}}, "expected text, got 1"),
        ({"lineage": {**EVOLVED.to_json()["lineage"], "steps": [[0, [[1, 4]], 0.5, 0.5, 1, "evolver", "parameter"]]}}, "not been made yet"),
        ({"learned": {"path": "x", "hash": "y"}}, "the key 'preference' is missing"),
        ({"learned": {"path": "x", "hash": "y", "preference": {"up": float("nan")}}}, "shares with sum one"),
        ({"learned": {"path": "x", "hash": "y", "preference": {"up": 0.5}}}, "shares with sum one"),
    ],
)
def test_damaged_recipes_are_refused(change: dict[str, Any], message: str) -> None:
    """Missing keys and wrong types are a RecipeError that says which."""
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json({**RECIPE.to_json(), **change})


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    """A missing file, one that is no JSON and one that is another JSON are told apart."""
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.json: No such file"):
        Recipe.load(tmp_path / "none.json")
    file = tmp_path / "recipe.json"
    file.write_text("{")
    with pytest.raises(RecipeError, match=r"recipe\.json is no JSON"):
        Recipe.load(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"recipe\.json"):
        Recipe.load(file)
    file.write_text("[1]")
    with pytest.raises(RecipeError, match=r"expected a recipe \(a JSON object\), got list"):
        Recipe.load(file)


def test_numbers_that_json_does_not_have_are_refused() -> None:
    """NaN and infinities never reach a file."""
    for bad in (float("nan"), float("inf")):
        for write in (canonical_json, ordered_json, content_hash):
            with pytest.raises(ValueError, match="Out of range float"):
                write({"x": bad})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(data=st.dictionaries(st.text(), JSON, max_size=6))
def test_content_hashes_ignore_the_order_of_keys(data: dict[str, Any]) -> None:
    """The same data written in another order of keys has the same hash, and canonical JSON leads back to it."""
    assert content_hash(dict(reversed(data.items()))) == content_hash(data)
    assert json.loads(canonical_json(data)) == data
