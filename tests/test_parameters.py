"""How a parameter resolves at a tensor: precedence, gradients, filters, and the groups that `explain` shows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlmerge.errors import RecipeError
from rlmerge.methods.base import Method, Parameter
from rlmerge.parameters import (
    Resolver,
    count_layers,
    explain,
    fold_names,
    interpolate,
    layer_of,
    stack_depths,
    stack_of,
)
from rlmerge.recipe import Recipe, parse_recipe


class Fake(Method):
    name = "fake"
    parameters = (
        Parameter("weight", "number", 1.0, "weight", per_model=True),
        Parameter("keep", "flag", True, "keep", per_model=True),
        Parameter("kind", "choice", "x", "kind", per_model=True, choices=("x", "y")),
        Parameter("lambda", "number", 0.5, "scale"),
        Parameter("flag", "flag", False, "a flag"),
        Parameter("word", "choice", "one", "a choice", choices=("one", "two", "three")),
        Parameter("times", "integer", 1, "an integer"),
    )

    def check(self, values, per_model):
        return ["lambda is 13"] if values.get("lambda") == 13 else []

    def merge(self, block, task, results):
        raise NotImplementedError


class Needy(Fake):
    name = "needy"
    parameters = (Parameter("weight", "number", None, "weight", per_model=True),)


METHODS: dict[str, Method] = {"fake": Fake(), "needy": Needy()}
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def recipe(parameters: str = "{}", b: str = "{}", a: str = "{}", method: str = "fake") -> Recipe:
    """Two models, 'b' before 'a'; processing is in the order of keys: a, b."""
    text = f"""
merge_method: {method}
base_model: base
models:
- {{model: b, parameters: {b}}}
- {{model: a, parameters: {a}}}
parameters: {parameters}
"""
    return parse_recipe(text, methods=METHODS)


def resolver(*args: str, layers: int = 5, **kwargs: str) -> Resolver:
    made = recipe(*args, **kwargs)
    return Resolver(made, made.method, layers)


def tensor(layer: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{layer}.{part}.weight"


# ---- Layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (EMBED, None),
        (HEAD, None),
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("model.layers.3.mlp.experts.17.up_proj.weight", 3),
        ("transformer.h.0.attn.weight", 0),
        ("model.layers.٣.weight", None),
        ("model.layer12.weight", None),
        ("a." + "9" * 5000, None),
        ("", None),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(name) == layer


def test_count_layers():
    names = [EMBED, tensor(0), tensor(6)]
    assert count_layers(names, {"num_hidden_layers": 4}) == 4
    assert count_layers(names, {"text_config": {"num_hidden_layers": 3}}) == 3
    assert count_layers(names, {}) == 7
    assert count_layers(names, {"num_hidden_layers": None, "text_config": 3}) == 7
    assert count_layers([EMBED], {}) == 0
    assert count_layers([], {"num_hidden_layers": True}) == 0


def test_the_depth_of_every_stack():
    """A vision tower that is deeper than the text model, a list with gaps, and a layer beyond the config's count."""
    text = [f"model.layers.{k}.mlp.experts.9.weight" for k in range(4)]
    tower = [f"visual.blocks.{k}.norm.weight" for k in range(6)]
    config = {"text_config": {"num_hidden_layers": 3}}
    found = stack_depths([*tower, *text, "visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", EMBED], config)
    assert found == {"visual.blocks.": 6, "model.layers.": 3, "visual.merger.mlp.": 0}
    assert stack_depths([text[0], text[2]], {}) == {"model.layers.": 3}
    assert stack_depths(text, config) == {"model.layers.": 3}
    assert stack_depths([*tower, *text], {}) == {"visual.blocks.": 6, "model.layers.": 4}
    assert stack_depths([EMBED], config) == {}
    assert stack_of(text[0]) == "model.layers."
    assert stack_of(EMBED) == ""


# ---- Interpolation ----------------------------------------------------------------------------------------------

NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6)


@given(NUMBERS, st.integers(1, 40))
@example([0.1, 0.1], 7)
@example([-1e308, 1.7e308], 3)
def test_a_gradient_starts_and_ends_at_its_ends(values, layers):
    assert interpolate(values, None, layers) == values[0]
    assert interpolate(values, layers - 1, layers) == values[-1]
    assert interpolate(values, layers + 3, layers) == values[-1], "layers beyond the config's count, as in MTP heads"
    if layers > 1:
        assert interpolate(values, 0, layers) == values[0]


@given(NUMBERS, st.integers(1, 40))
def test_a_gradient_stays_within_its_values(values, layers):
    for layer in range(layers):
        assert min(values) <= interpolate(values, layer, layers) <= max(values)


@given(NUMBERS, st.integers(1, 40))
def test_a_rising_gradient_rises(values, layers):
    found = [interpolate(sorted(values), layer, layers) for layer in range(layers)]
    assert found == sorted(found)


@given(NUMBERS, st.integers(1, 6))
def test_a_gradient_meets_its_values(values, step):
    layers = (len(values) - 1) * step + 1
    if layers > 1:
        assert [interpolate(values, step * k, layers) for k in range(len(values))] == values


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(1, 40))
def test_a_gradient_is_numpys(values, layers):
    for layer in range(layers):
        place = 1.0 if layers == 1 else layer / (layers - 1)
        wanted = np.interp(place * (len(values) - 1), np.arange(len(values)), values)
        # both round a handful of times at magnitude 10
        assert interpolate(values, layer, layers) == pytest.approx(wanted, abs=1e-12)


def test_a_gradient_over_layers():
    found = resolver("{lambda: [0, 1]}")
    assert [found.resolve(tensor(k)).values["lambda"] for k in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [found.resolve(name).values["lambda"] for name in (EMBED, NORM, HEAD)] == [0, 0, 0]


def test_one_layer_takes_the_last_value():
    found = resolver("{lambda: [0, 1]}", layers=1)
    assert found.resolve(tensor(0)).values["lambda"] == 1
    assert found.resolve(EMBED).values["lambda"] == 0


def test_flags_and_choices_do_not_interpolate():
    found = resolver("{flag: [true, false], word: [one, two, three]}")
    assert [found.resolve(tensor(k)).values["flag"] for k in range(5)] == [True] * 4 + [False]
    assert [found.resolve(tensor(k)).values["word"] for k in range(5)] == ["one", "one", "two", "two", "three"]


# ---- Precedence and filters -------------------------------------------------------------------------------------


def test_precedence():
    found = resolver("{weight: 2}", b="{weight: 3}").resolve(EMBED)
    assert found.per_model["weight"].tolist() == [2, 3], "in the order of keys: a, b"
    assert found.values == {"lambda": 0.5, "flag": False, "word": "one", "times": 1}
    assert resolver().resolve(EMBED).per_model["weight"].tolist() == [1, 1]


def test_flags_and_choices_per_model():
    found = resolver("{keep: false}", b="{keep: true, kind: y}").resolve(EMBED)
    assert found.per_model["keep"].tolist() == [0, 1]
    assert found.per_model["kind"].tolist() == [0, 1]
    assert all(values.dtype == np.float64 and not values.flags.writeable for values in found.per_model.values())


def test_the_first_matching_filter_wins():
    found = resolver("{lambda: [{filter: layers.1, value: 1}, {filter: mlp, value: 2}, {filter: MLP, value: 3}]}")
    assert found.resolve(tensor(1)).values["lambda"] == 1
    assert found.resolve(tensor(10)).values["lambda"] == 1, "a substring: layers.1 is in layers.10 too"
    assert found.resolve(tensor(2)).values["lambda"] == 2
    assert found.resolve(tensor(2, "self_attn")).values["lambda"] == 0.5, "no match: the default"


@pytest.mark.parametrize(
    "anything", ["filter: '*', value: 7", "filter: '', value: 7", "value: 7", "filter: , value: 7"]
)
def test_filters_that_match_everything(anything):
    found = resolver(f"{{lambda: [{{filter: mlp, value: 1}}, {{{anything}}}]}}")
    assert found.resolve(tensor(0)).values["lambda"] == 1
    assert found.resolve(EMBED).values["lambda"] == 7


def test_a_single_entry_needs_no_list():
    found = resolver("{lambda: {filter: mlp, value: 1}}")
    assert [found.resolve(name).values["lambda"] for name in (tensor(0), EMBED)] == [1, 0.5]


def test_without_a_match_the_next_scope_is_asked():
    found = resolver("{weight: [{filter: mlp, value: 5}]}", b="{weight: [{filter: attn, value: 6}]}", a="{weight: []}")
    assert found.resolve(tensor(0, "self_attn")).per_model["weight"].tolist() == [1, 6]
    assert found.resolve(tensor(0, "mlp")).per_model["weight"].tolist() == [5, 5]
    assert found.resolve(EMBED).per_model["weight"].tolist() == [1, 1]


def test_gradients_inside_filters():
    found = resolver("{lambda: [{filter: mlp, value: [0, 1]}, {value: [4, 2]}]}", layers=3)
    assert [found.resolve(tensor(k)).values["lambda"] for k in range(3)] == [0, 0.5, 1]
    assert [found.resolve(tensor(k, "attn")).values["lambda"] for k in range(3)] == [4, 3, 2]


def test_a_required_parameter_without_a_match():
    found = resolver(b="{weight: [{filter: mlp, value: 1}]}", a="{weight: 1}", method="needy")
    assert found.resolve(tensor(0)).per_model["weight"].tolist() == [1, 1]
    with pytest.raises(RecipeError, match=r"recipe:5: models\[0\]\.parameters\.weight: model\.norm\.weight: no value"):
        found.resolve(NORM)


def test_the_methods_check_sees_every_outcome():
    found = resolver("{lambda: [{filter: mlp, value: 13}]}")
    found.resolve(EMBED)
    for _ in range(2):
        with pytest.raises(
            RecipeError, match=r"recipe:7: parameters at model\.layers\.0\.mlp\.up_proj\.weight: lambda is 13"
        ):
            found.resolve(tensor(0))


def test_equal_outcomes_are_one_object():
    found = resolver("{lambda: [{filter: mlp, value: [0, 0, 0, 1]}]}", layers=9)
    assert len({id(found.resolve(tensor(k))) for k in range(9)}) == 4
    assert found.resolve(tensor(0, "attn")) is found.resolve(tensor(7, "attn"))
    assert resolver().constant
    assert not found.constant


# ---- Explanation ------------------------------------------------------------------------------------------------

LLAMA = [EMBED] + [
    tensor(k, part)
    for k in range(4)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
] + [NORM, HEAD]  # fmt: skip


def test_explain_one_group():
    made = recipe("{lambda: 0.25}", b="{keep: false, weight: 2}")
    [group] = explain(made, made.method, LLAMA, 4)
    assert group == {
        "tensors": ["*"],
        "count": 23,
        "values": {"lambda": 0.25, "flag": False, "word": "one", "times": 1},
        "models": {
            "a": {"weight": 1.0, "keep": True, "kind": "x"},
            "b": {"weight": 2.0, "keep": False, "kind": "x"},
        },
    }
    assert json.loads(json.dumps(group)) == group


def test_explain_filters():
    made = recipe("{lambda: [{filter: mlp, value: 1}, {filter: layers.3, value: 2}]}")
    rest, mlp, last = explain(made, made.method, LLAMA, 4)
    assert mlp["tensors"] == ["model.layers.{0-3}.mlp.*"]
    assert last["tensors"] == ["model.layers.3.self_attn.*", "model.layers.3.input_layernorm.weight"]
    assert rest["tensors"] == [
        EMBED,
        "model.layers.{0-2}.self_attn.*",
        "model.layers.{0-2}.input_layernorm.weight",
        NORM,
        HEAD,
    ]
    assert [group["count"] for group in (rest, mlp, last)] == [12, 8, 3]


def test_explain_gradient():
    made = recipe("{lambda: [0, 1]}")
    groups = explain(made, made.method, LLAMA, 4)
    assert [group["tensors"] for group in groups] == [
        [EMBED, "model.layers.0.*", NORM, HEAD], ["model.layers.1.*"], ["model.layers.2.*"], ["model.layers.3.*"],
    ]  # fmt: skip


def test_ranges_of_layers():
    names = [tensor(k) for k in range(8)]
    assert fold_names([names[k] for k in (0, 1, 2, 5, 7)], names) == ["model.layers.{0-2,5,7}.mlp.up_proj.weight"]
    assert fold_names(["x"], ["x"]) == ["x"]


def matches(pattern: str, name: str) -> bool:
    """A slow reading of a pattern."""
    head, star = (pattern[:-1], True) if pattern.endswith("*") else (pattern, False)
    if "{" in head:
        before, rest = head.split("{")
        inner, after = rest.split("}")
        ends = [(part.split("-")[0], part.split("-")[-1]) for part in inner.split(",")]
        heads = [f"{before}{layer}{after}" for low, high in ends for layer in range(int(low), int(high) + 1)]
    else:
        heads = [head]
    return any(name.startswith(text) if star else name == text for text in heads)


PARTS = st.lists(st.sampled_from(["a", "b", "c", "0", "1", "2"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(st.tuples(PARTS, st.integers(0, 1)), min_size=1, max_size=25, unique_by=lambda pair: pair[0]))
@settings(max_examples=300)
def test_patterns_cover_exactly_the_members(marked):
    names = [name for name, _ in marked]
    members = [name for name, mark in marked if mark]
    patterns = fold_names(members, names)
    assert [name for name in names if any(matches(pattern, name) for pattern in patterns)] == members
    assert len(patterns) <= len(members)
