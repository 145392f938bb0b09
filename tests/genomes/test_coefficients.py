from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopt.errors import ConfigError, RecipeError
from mergeopt.genomes.coefficients import CoefficientSpace, ParameterValues, parameter_values
from mergeopt.models.groups import grouping
from mergeopt.operators.contract import MergeOperator, Param
from mergeopt.operators.function import merge_operator
from mergeopt.operators.linear import LinearMerge
from mergeopt.operators.task_arithmetic import TaskArithmetic
from mergeopt.operators.ties import Ties
from mergeopt.recipe import Argument, Recipe, Source, canonical_json

NAMES = ("emb.w", "h.0.attn.w", "h.0.mlp.w", "h.1.attn.w", "h.1.mlp.w", "head.w")
EXPERTS = ("ann", "bob", "cem")
RANGE = {"low": 0.0, "high": 1.5}


@merge_operator(
    "many",
    weight=Param.real(1.0, search=(0.0, 2.0), per_expert=True),
    power=Param.whole(2, low=1, high=9, search=(1, 4)),
    mode=Param.choice("a", ["a", "b", True]),
)
def many(deltas: Any, *, weight: Any, power: int, mode: str) -> Any:
    """Stand for an operator with parameters of every kind."""
    return deltas[0]


def space(parameters: Mapping[str, Any] | None, operator: MergeOperator | None = None, **options: Any) -> CoefficientSpace:
    return CoefficientSpace(operator or TaskArithmetic(), parameters, NAMES, EXPERTS, **options)


def values(chosen: CoefficientSpace, name: str, genome: npt.ArrayLike, operator: MergeOperator | None = None) -> ParameterValues:
    argument = chosen.decode(genome)[name]
    param = next(p for p in (operator or TaskArithmetic()).params if p.name == name)
    return parameter_values(param, argument, grouping(argument.groups, NAMES, curve=argument.curve), EXPERTS)


@pytest.mark.parametrize(
    ("given_as", "row"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        (1, [1, 1, 1]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ({"cem": 3, "ann": 1, "bob": 2}, [1, 2, 3]),
    ],
)
def test_fixed_values(given_as: Any, row: list[float]) -> None:
    """A number, a list and a mapping fix one value per expert, in the experts' order; nothing is searched."""
    chosen = space({"weight": given_as})
    assert chosen.space.dim == 0
    fixed = values(chosen, "weight", [])
    assert fixed.static
    np.testing.assert_array_equal(fixed.spread(), [row] * len(NAMES))


def test_what_is_not_named_has_its_default() -> None:
    """A mapping leaves unnamed parameters at their defaults; None searches those that declare a range."""
    chosen = space({"weight": RANGE})
    assert values(chosen, "scale", [0.3] * 3).spread().tolist() == [1.0] * len(NAMES)
    assert space({}).space.dim == 0
    everything = CoefficientSpace(Ties(), None, NAMES, EXPERTS)
    assert everything.space.names == ("weight/model/ann", "weight/model/bob", "weight/model/cem", *(f"density/model/{e}" for e in EXPERTS))


def test_a_range_is_searched_per_expert() -> None:
    """A range has one dimension per expert and group, in the experts' order."""
    chosen = space({"weight": RANGE})
    assert chosen.space.names == tuple(f"weight/model/{expert}" for expert in EXPERTS)
    np.testing.assert_array_equal(values(chosen, "weight", [0.0, 1.0, 0.5]).spread()[3], [0.0, 1.5, 0.75])
    assert not values(chosen, "weight", [0.0, 1.0, 0.5]).static


def test_groups_are_chosen_per_parameter() -> None:
    """The default grouping applies where a parameter names none; each parameter may name its own."""
    chosen = CoefficientSpace(
        Ties(), {"weight": RANGE, "density": {"low": 0.1, "high": 0.9, "groups": "model", "tie": True}}, NAMES, EXPERTS, groups="layer"
    )
    assert chosen.space.dim == 4 * 3 + 1
    weights = values(chosen, "weight", np.linspace(0, 1, 13), Ties()).spread()
    assert weights.shape == (len(NAMES), 3)
    np.testing.assert_array_equal(weights[1], weights[2])
    assert len(np.unique(weights, axis=0)) == 4
    assert np.unique(values(chosen, "density", np.linspace(0, 1, 13), Ties()).spread()).tolist() == [0.9]


def test_regex_groups() -> None:
    """Groups by regex give each group's tensors its value."""
    chosen = space({"weight": {**RANGE, "tie": True, "groups": {"attention": "attn", "rest": "."}}})
    assert chosen.space.names == ("weight/attention", "weight/rest")
    assert values(chosen, "weight", [0.0, 1.0]).spread()[:, 0].tolist() == [1.5, 0.0, 1.5, 0.0, 1.5, 1.5]


def test_a_curve_is_linear_in_depth() -> None:
    """A curve has its control points as dimensions and interpolates between them, whatever the default grouping."""
    chosen = space({"weight": {**RANGE, "tie": True, "curve": 2}}, groups="layer")
    assert chosen.space.names == ("weight/depth.0", "weight/depth.1")
    np.testing.assert_allclose(values(chosen, "weight", [0.0, 1.0]).spread()[:, 2], [0, 0, 0, 1.5, 1.5, 1.5])


def test_ties_share_a_dimension() -> None:
    """`tie: true` gives all experts one value, lists tie those that they name."""
    assert space({"weight": {**RANGE, "tie": True}}).space.names == ("weight/model",)
    some = space({"weight": {**RANGE, "tie": [["ann", "cem"]]}})
    assert some.space.names == ("weight/model/ann+cem", "weight/model/bob")
    assert values(some, "weight", [1.0, 0.0]).spread()[0].tolist() == [1.5, 0.0, 1.5]
    assert space({"weight": {**RANGE, "tie": False}}).space.dim == 3


def test_a_simplex_is_searched_in_shares() -> None:
    """`simplex: true` has one dimension less than experts per group, and its weights sum to one exactly."""
    chosen = space({"weight": {"simplex": True, "groups": "layer"}}, LinearMerge())
    assert chosen.space.dim == 4 * 2
    shares = values(chosen, "weight", np.linspace(0, 1, 8), LinearMerge()).spread()
    assert shares.sum(axis=1).tolist() == [1.0] * len(NAMES)


def test_logarithmic_ranges() -> None:
    """`log: true` searches the logarithm."""
    chosen = space({"scale": {"low": 0.01, "high": 1.0, "log": True}})
    np.testing.assert_allclose(values(chosen, "scale", [0.5]).spread(), 0.1)


def test_some_experts_fixed_others_searched() -> None:
    """A mapping of experts may mix numbers and ranges, per group."""
    chosen = space(
        {"weight": {"ann": 1.0, "bob": RANGE, "cem": {"low": 0.1, "high": 10.0, "log": True}, "groups": {"a": "attn", "b": "."}}}
    )
    assert chosen.space.names == ("weight/a/bob", "weight/a/cem", "weight/b/bob", "weight/b/cem")
    np.testing.assert_allclose(values(chosen, "weight", [1.0, 0.5, 0.0, 0.0]).spread()[1], [1.0, 1.5, 1.0])


def test_choices_and_whole_numbers() -> None:
    """A choice is searched among the options named, a whole number over a range, and what comes out has their types."""
    operator = many()
    chosen = space({"mode": {"choices": ["b", "a"]}, "power": {"low": 1, "high": 4, "groups": "layer"}}, operator)
    assert chosen.space.names == ("power/embeddings", "power/layer.0", "power/layer.1", "power/head", "mode/model")
    arguments = chosen.decode([0.0, 0.3, 0.6, 1.0, 0.0])
    assert arguments["mode"].values == {"model": "b"}
    assert list(arguments["power"].values.values()) == [1, 2, 3, 4]
    assert values(chosen, "mode", [0.0] * 5, operator).spread() == "b"
    assert space({"mode": "b"}, operator).decode([])["mode"].values == {"model": "b"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"wieght": 1.0}, "operator 'task_arithmetic' has no parameter 'wieght'; did you mean 'weight'"),
        ({"weight": {"lo": 0.0, "high": 1.0}}, "weight: unknown key 'lo'; did you mean 'low'"),
        ({"weight": {"ann": 1.0, "bop": 1.0, "cem": 1.0}}, "weight: unknown key '(ann|bop)'"),
        ({"weight": {"low": 0.0}}, "weight: expected low and high"),
        ({"weight": {"groups": "layer"}}, "weight: expected low and high"),
        ({"weight": {"low": 1.0, "high": 0.0}}, "low < high"),
        ({"weight": {"low": 0.0, "high": "much"}}, "weight: high: .*expected a finite number, got 'much'"),
        ({"weight": {"low": 0.0, "high": 1.0, "log": True}}, "logarithmic range needs low > 0"),
        ({"weight": {"low": 0.0, "high": float("nan")}}, "expected a finite number, got nan"),
        ({"weight": [1.0, 2.0]}, r"expected 3 numbers, one per expert, got \[1.0, 2.0\]"),
        ({"weight": "much"}, "weight: expected a finite number, got 'much'"),
        ({"weight": float("nan")}, "weight: expected a finite number, got nan"),
        ({"weight": True}, "weight: expected a finite number, got True"),
        ({"weight": {"ann": 1.0, "bob": 1.0}}, "weight: no value or range for cem"),
        ({"weight": {"ann": 1.0, "bob": 1.0, "cem": {"low": 0.0}}}, "weight: expected low and high"),
        ({"weight": {**RANGE, "tie": "all"}}, "tie: expected true or lists of expert names"),
        ({"weight": {**RANGE, "tie": 3}}, "tie: expected true or lists of expert names"),
        ({"weight": {**RANGE, "tie": [["ann", "dan"]]}}, "tie: expected true or lists of expert names"),
        ({"weight": {**RANGE, "tie": [["ann", "bob"], ["bob", "cem"]]}}, "each named at most once"),
        ({"weight": {**RANGE, "curve": 1}}, "curve: expected two or more control points"),
        ({"weight": {**RANGE, "curve": 3, "groups": "layer"}}, "curve: .*groups must be 'model'"),
        ({"weight": {**RANGE, "groups": "layers"}}, "groups: expected model"),
        ({"weight": {"choices": [1.0, 2.0]}}, "weight: expected low and high"),
        ({"weight": {"simplex": True, "low": 0.0, "high": 1.0}}, "a simplex lie between 0 and 1; drop low, high"),
        ({"scale": [1.0, 1.0, 1.0]}, "scale: expected one value, got"),
        ({"scale": {"simplex": True}}, "scale: a simplex needs a value per expert"),
    ],
)
def test_what_cannot_be_meant_is_refused(parameters: dict[str, Any], message: str) -> None:
    """Every malformed parameter is refused with its name and what was expected."""
    with pytest.raises(ConfigError, match=message):
        space(parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mode": "c"}, r"mode: expected one of \['a', 'b', True\], got 'c'"),
        ({"mode": 1}, "mode: expected one of"),
        ({"mode": {"choices": ["a", "c"]}}, "mode: expected one of"),
        ({"mode": {"choices": ["a"]}}, "two or more different options"),
        ({"mode": {"choices": "ab"}}, "mode: expected choices"),
        ({"mode": {"low": 0, "high": 1}}, "mode: expected choices"),
        ({"power": 2.5}, "power: expected a whole number, got 2.5"),
        ({"power": 10}, r"power: expected a value in \[1, 9\], got 10"),
        ({"power": {"low": 0, "high": 4}}, r"power: low: .*expected a value in \[1, 9\], got 0"),
        ({"power": {"low": 1, "high": 4, "curve": 2}}, "power: only a float can follow a curve"),
    ],
)
def test_kinds_are_checked(parameters: dict[str, Any], message: str) -> None:
    """Choices and whole numbers accept only their own values."""
    with pytest.raises(ConfigError, match=message):
        space(parameters, many())


FORMS: list[Any] = [
    RANGE,
    {**RANGE, "groups": "layer"},
    {**RANGE, "groups": {"z": "attn", "a": "mlp", "m": "."}},
    {**RANGE, "groups": {"blocks": 2}, "tie": [["bob", "cem"]]},
    {**RANGE, "curve": 3, "tie": True},
    {"low": 0.01, "high": 3.0, "log": True, "groups": "tensor"},
    {"simplex": True, "groups": "layer"},
    {"ann": 0.4, "bob": RANGE, "cem": 1, "groups": {"z": "attn", "a": "."}},
    {"ann": 0.4, "bob": 0.1, "cem": 1},
    0.7,
]
SCALES: list[Any] = [1.0, {"low": 0.5, "high": 2.0}, {"low": 0.5, "high": 2.0, "curve": 2}]


@settings(max_examples=60)
@given(
    data=st.data(),
    form=st.sampled_from(FORMS),
    scale=st.sampled_from([1.0, {"low": 0.5, "high": 2.0}, {"low": 0.5, "high": 2.0, "curve": 2}]),
)
def test_a_recipes_arguments_lead_back_to_the_genome(data: st.DataObject, form: Any, scale: Any) -> None:
    """Decoded arguments survive JSON with sorted keys, encode to a genome, and that genome decodes to the same arguments."""
    chosen = space({"weight": form, "scale": scale})
    genome = data.draw(st.lists(st.floats(0, 1), min_size=chosen.space.dim, max_size=chosen.space.dim))
    source = Source("base", "somewhere", "0")
    recipe = Recipe(source, (source,), "task_arithmetic", 1, "paper", chosen.decode(genome))
    back = Recipe.from_json(json.loads(canonical_json(recipe.to_json())))
    assert back == recipe
    assert back.key == recipe.key
    for name, argument in recipe.arguments.items():
        again = back.arguments[name]
        assert not isinstance(argument.groups, dict) or list(again.groups) == list(argument.groups)
        for one, other in zip((argument, again), (again, argument), strict=True):
            np.testing.assert_array_equal(
                grouping(one.groups, NAMES, curve=one.curve).weights, grouping(other.groups, NAMES, curve=other.curve).weights
            )
    assert chosen.decode(chosen.encode(back.arguments)) == recipe.arguments


def encoded(chosen: CoefficientSpace, other: CoefficientSpace) -> None:
    chosen.encode(other.decode(np.full(other.space.dim, 0.9)))


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        ({"weight": RANGE}, {"weight": {"low": 0.0, "high": 3.0}}, "weight/model/ann: expected a value in"),
        ({"weight": RANGE}, {"weight": {**RANGE, "groups": "layer"}}, "weight: the recipe's groups are not this search's"),
        ({"weight": RANGE}, {"weight": {**RANGE, "curve": 2}}, "weight: the recipe's groups are not this search's"),
        ({"weight": {**RANGE, "tie": True}}, {"weight": [0.1, 0.2, 0.3]}, "weight/model is one value in this search"),
        ({"weight": 0.5}, {"weight": RANGE}, "weight: fixed at 0.5 in this search"),
        ({"weight": {"ann": 0.5, "bob": RANGE, "cem": RANGE}}, {"weight": RANGE}, "weight: fixed at 0.5 in this search"),
        ({"weight": {"simplex": True}}, {"weight": RANGE}, "non-negative shares with sum 1"),
        (
            {"weight": {**RANGE, "groups": {"a": "attn", "m": "mlp|attn", "rest": "."}}},
            {"weight": {**RANGE, "groups": {"m": "mlp", "a": "attn", "rest": "."}}},
            "weight: the recipe's groups are not this search's",
        ),
    ],
)
def test_recipes_outside_the_space_are_refused(here: Any, there: Any, message: str) -> None:
    """A recipe of other groups, other fixed values, unequal tied values or out of range has no genome."""
    with pytest.raises(ConfigError, match=message):
        encoded(space(here), space(there))


def test_the_order_of_regexes_counts() -> None:
    """The same patterns tried in another order are other groups: another recipe key, and no genome here."""
    first = {"a": "attn", "all": "h|attn|mlp", "rest": "."}
    second = {key: first[key] for key in ("all", "rest")} | {"a": "attn"}
    source = Source("base", "p", "0")
    arguments = [Argument(groups, None, dict.fromkeys(first, 1.0), False) for groups in (first, second)]
    assert arguments[0] == arguments[1]
    recipes = [Recipe(source, (source,), "x", 1, "paper", {"w": argument}) for argument in arguments]
    assert recipes[0].key != recipes[1].key
    assert recipes[0].to_json() != recipes[1].to_json()


def test_starting_points() -> None:
    """Equal weights and single experts have genomes where the space holds them, other parameters at their defaults."""
    chosen = CoefficientSpace(Ties(), None, NAMES, EXPERTS, groups="layer")
    arguments = chosen.decode(chosen.weighted({"ann": 1.0, "bob": 0.0, "cem": 0.0}))
    assert all(knot == {"ann": 1.0, "bob": 0.0, "cem": 0.0} for knot in arguments["weight"].values.values())
    assert all(float(v) == pytest.approx(0.2) for knot in arguments["density"].values.values() for v in knot.values())
    with pytest.raises(ConfigError, match="expected a value in"):
        space({"weight": {"low": 0.1, "high": 1.0}}).weighted({"ann": 1.0, "bob": 0.0, "cem": 0.0})
    with pytest.raises(ConfigError, match=r"weight: ann is fixed at 0\.5, the starting point needs 1\.0"):
        space({"weight": 0.5, "scale": RANGE}).weighted({"ann": 1.0, "bob": 0.0, "cem": 0.0})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (Argument("model", None, {"other": dict.fromkeys(EXPERTS, 1.0)}, True), r"expected values for \['model'\]"),
        (Argument("model", None, {"model": {"ann": 1.0}}, True), "expected a value for each of"),
        (Argument("model", None, {"model": 1.0}, True), "expected a value for each of"),
        (
            Argument("model", None, {"model": {"ann": 1.0, "bob": 1.0, "cem": "x"}}, True),
            "damaged recipe: weight: expected a finite number",
        ),
        (
            Argument("model", None, {"model": {"ann": 1.0, "bob": 1.0, "cem": float("inf")}}, True),
            "weight: expected a finite number, got inf",
        ),
    ],
)
def test_damaged_arguments_are_refused(argument: Argument, message: str) -> None:
    """Arguments whose knots, experts or values do not fit the model are a RecipeError."""
    with pytest.raises(RecipeError, match=message):
        parameter_values(TaskArithmetic.params[0], argument, grouping("model", NAMES), EXPERTS)
