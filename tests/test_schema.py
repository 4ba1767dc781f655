"""The JSON schema of recipes: valid itself, made of every key, and never stricter than the checks of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.test_recipe import METHODS, MISTAKES

import rlmerge
from rlmerge import schema
from rlmerge.errors import RecipeError
from rlmerge.in_json import JSON_OF
from rlmerge.methods.base import Parameter
from rlmerge.parameters import check_value
from rlmerge.recipe_checks import ENTRY_KEYS, ENTRY_VALUES, FISHER_VALUES, TOP_KEYS, TOP_VALUES
from rlmerge.yaml_lines import read_documents, read_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
WHOLE = rlmerge.recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(WHOLE)
SMALL = jsonschema.Draft202012Validator(rlmerge.recipe_schema(METHODS))


def recipes() -> dict[str, str]:
    """Every recipe of the golden files, the examples and the pages, by where it stands."""
    files = [*(ROOT / "tests" / "golden" / "recipes").glob("*.yml"), *(ROOT / "examples").glob("*.yml")]
    found = {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8") for path in files}
    for page in PAGES:
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        found |= {f"{page.name} {k}": block for k, block in enumerate(blocks) if "merge_method" in block}
    return found


RECIPES = recipes()


# ---- What it is made of -----------------------------------------------------------------------------------------


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(WHOLE)
    jsonschema.Draft202012Validator.check_schema(SMALL.schema)


def test_no_key_is_without_a_schema_and_a_meaning():
    """Whoever adds a key notes beside its check what it accepts (`in_json`), and in `schema` what it means."""
    checks = {**TOP_VALUES, **ENTRY_VALUES, **FISHER_VALUES}
    assert [key for key, check in checks.items() if check not in JSON_OF] == []
    assert set(schema.TOP_MEANINGS) == set(TOP_KEYS) == set(WHOLE["properties"])
    assert set(schema.ENTRY_MEANINGS) == set(ENTRY_KEYS) == set(WHOLE["properties"]["models"]["items"]["properties"])
    for key, value in WHOLE["properties"].items():
        assert value.keys() & {"anyOf", "enum", "type"}, f"{key} takes anything"


def test_defaults_are_those_of_the_recipe():
    recipe = rlmerge.recipe_from_parts("b", ["a"], "ram")
    given = {key: value["default"] for key, value in WHOLE["properties"].items() if "default" in value}
    assert given == {key: getattr(recipe, key) for key in given}
    assert {"rounding", "seed", "on_mismatch", "allow_nonfinite", "min_change"} <= given.keys()


@pytest.mark.parametrize("name", rlmerge.method_names())
def test_every_parameter_is_there_with_its_default_and_meaning(name):
    method = rlmerge.get_method(name)
    (then,) = (part["then"] for part in WHOLE["allOf"] if part["if"]["properties"]["merge_method"]["const"] == name)
    for place, specs in (
        (then["properties"]["parameters"], method.parameters),
        (
            then["properties"]["models"]["items"]["properties"]["parameters"],
            [s for s in method.parameters if s.per_model],
        ),
    ):
        assert set(place["properties"]) == {*(spec.name for spec in specs), "int8_mask"}
        for spec in specs:
            assert place["properties"][spec.name].get("default") == spec.default
            assert spec.doc[1:] in place["properties"][spec.name]["description"]


def test_parameters_that_share_a_definition_take_the_same():
    made: dict[str, Any] = {}
    for name in rlmerge.method_names():
        for spec in rlmerge.get_method(name).parameters:
            assert made.setdefault(schema._name_of(spec), schema._value(spec)) == schema._value(spec)


# ---- What it says -----------------------------------------------------------------------------------------------


def accepted(text: str, methods: Any = None) -> bool:
    try:
        rlmerge.parse_recipe(text, methods=methods)
    except RecipeError:
        return False
    return True


@pytest.mark.parametrize("place", RECIPES)
def test_recipes_of_golden_files_and_pages(place):
    """Those that this version of rlmerge does not read are refused by both."""
    documents = [data for data, _ in read_documents(RECIPES[place], place)]
    problems = [f"{error.json_path}: {error.message}" for data in documents for error in VALIDATOR.iter_errors(data)]
    assert (problems == []) == all(accepted(yaml.safe_dump(data)) for data in documents), problems


UNSEEN = {
    "only the base", "twice", "same name", "missing, for [] is nothing", "too many", "include",
    "nan", "inf", "overflow", "very long integer", "long integer",
}  # fmt: skip
"""What a schema cannot see: what a value means beside another one, what is no number to JSON, regular expressions."""


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    try:
        data, _ = read_yaml(MISTAKES[case][0], "r.yml")
    except RecipeError:
        return  # no YAML, so nothing that a schema could judge
    assert SMALL.is_valid(data) == (case in UNSEEN)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]\n", "$"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]\n", "$"),
        ("merge_method: nearswap\nbase_model: b\nmodels: [{model: a}]\n", "$"),
        ("merge_method: ram\nmodels: [{model: a}]\n", "$"),
        ("merge_method: sar\nbase_model: b\nmodels: [{model: a, parameters: {power: 1}}]\n", "$.models[0].parameters"),
        ("merge_method: sar\nbase_model: b\nmodels: [{model: a}]\nparameters: {density: [2]}", "$.parameters.density"),
        ("merge_method: sar\nbase_model: b\nmodels: [{model: a}]\nparameters: {power: -1}", "$.parameters.power"),
        ("merge_method: tise\nbase_model: b\nmodels: [{model: a}]\n", "$.merge_method"),
        ("merge_method: model_stock\nbase_model: b\nmodels: [{model: a}]\n", "$.models"),
    ],
)  # fmt: skip
def test_a_mistake_is_shown_where_it_stands(text, place):
    data, _ = read_yaml(text, "r.yml")
    assert not accepted(text)
    assert [error.json_path for error in VALIDATOR.iter_errors(data)] == [place]


def test_the_base_may_be_listed_without_parameters():
    """As in mergekit's recipes for ties: the entry is ignored, and needs no weight."""
    text = "merge_method: ties\nbase_model: b\nmodels: [{model: b}, {model: a, parameters: {weight: 1}}]\n"
    assert accepted(text)
    assert VALIDATOR.is_valid(read_yaml(text, "r.yml")[0])


POOL: list[Any] = [
    True, False, None, -1, 0, 0.5, 1, 1.5, 2, 1e-3, 1e6, "0.5", "1", " 2e0 ", "-1", "x", "", "*",
    *(choice for name in rlmerge.method_names() for s in rlmerge.get_method(name).parameters for choice in s.choices),
]  # fmt: skip
SHAPES: list[Any] = [
    lambda value: value,
    lambda value: [value],
    lambda value: [value, value],
    lambda value: {"value": value},
    lambda value: [{"filter": "mlp", "value": value}, {"value": [value, value]}],
    lambda value: [{"filter": None, "value": value}],
    lambda value: [{"value": value}, value],
    lambda value: [[value]],
    lambda value: {"value": []},
    lambda value: {"filter": 1, "value": value},
    lambda value: {"filter": "mlp"},
    lambda value: {"filtre": "mlp", "value": value},
    lambda value: [],
]


def test_a_parameter_may_be_what_its_check_accepts():
    specs = [spec for name in rlmerge.method_names() for spec in rlmerge.get_method(name).parameters]
    for spec in {schema._name_of(spec): spec for spec in specs}.values():
        validator = jsonschema.Draft202012Validator(schema._value(spec))
        for value in POOL:
            for shape in SHAPES:
                try:
                    check_value(spec, shape(value))
                    good = True
                except ValueError:
                    good = False
                # the size of a number that is written as text is not seen
                if good or not (isinstance(value, str) and spec.kind in ("number", "integer")):
                    assert validator.is_valid(shape(value)) == good, (spec.name, shape(value))


# ---- Never stricter ---------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(["a", "b", "c", " ", "", "0.5", " 1e-3 ", "true", "x/y"])
ODD = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(-1, 2), TEXTS, st.just([]), st.just({}))


def scalars(spec: Parameter) -> st.SearchStrategy[Any]:
    """What a parameter may be, with a little that it may not."""
    if spec.kind == "flag":
        return st.sampled_from([True, False, 0, 1, "true", "True", "false"])
    if spec.kind == "choice":
        return st.one_of(st.sampled_from(spec.choices), st.booleans()) if spec.flags else st.sampled_from(spec.choices)
    low = spec.minimum if spec.minimum is not None else spec.above if spec.above is not None else 0
    numbers = st.sampled_from([low, low + 0.5, low + 1, spec.maximum if spec.maximum is not None else 2, 1e-3])
    numbers = numbers.map(round) if spec.kind == "integer" else numbers
    return st.one_of(numbers, numbers.map(str), numbers.map(lambda number: f" +{number} "))


def values(spec: Parameter) -> st.SearchStrategy[Any]:
    scalar = scalars(spec)
    value = st.one_of(scalar, st.lists(scalar, min_size=1, max_size=3))
    filters = st.one_of(st.none(), TEXTS, st.just("*"))
    entry = st.fixed_dictionaries({"value": value}, optional={"filter": filters})
    return st.one_of(scalar, scalar, value, entry, st.lists(entry, max_size=2), st.integers(0, 9).flatmap(
        lambda number: ODD if number == 0 else scalar
    ))  # fmt: skip


def some_of(draw: Any, specs: list[Parameter], needed: bool) -> dict[str, Any]:
    chosen = [spec for spec in specs if (needed and spec.default is None) or draw(st.integers(0, 3)) == 0]
    return {spec.name: draw(values(spec)) for spec in chosen}


TOKENS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "source": st.sampled_from(
                [
                    None, "a", {"path": "a"}, {"kind": "zero"}, {"kind": "model_token", "model": "a", "token": ""},
                    {"kind": "model_token", "model": {"path": "a"}, "token_id": "3", "token": None},
                    {"kind": "model_token", "model": "a", "token_id": -1}, {"kind": "x"}, {"kind": "zero", "a": 1},
                ]
            ),
            "force": st.sampled_from([True, False, None]),
        },
    ),
)  # fmt: skip
TOP: dict[str, st.SearchStrategy[Any]] = {
    "name": TEXTS,
    "dtype": st.sampled_from(["float32", "bf16", "torch.float16", "torch.fp32", "float64", 3]),
    "out_dtype": st.sampled_from(["bfloat16", "fp16", None]),
    "rounding": st.sampled_from(["nearest", "stochastic", "up"]),
    "min_change": st.sampled_from([0, 0.5, "1e-3", -1]),
    "pre_weights": st.sampled_from(["a", ["b"], 3]),
    "post_weights": st.sampled_from(["a", [], None]),
    "include": st.sampled_from(["a", ["a", "b"], [], 3]),
    "exclude": st.sampled_from(["a", ["a"], None, [1]]),
    "on_mismatch": st.sampled_from(["error", "base", "other"]),
    "allow_nonfinite": st.sampled_from([True, False, 1]),
    "seed": st.sampled_from([0, "7", 3.0, -1, 2**63 - 1, 2**63]),
    "tokenizer_source": st.sampled_from(["union", "a", {"path": "a"}, 3]),
    "tokenizer": st.fixed_dictionaries(
        {},
        optional={
            "source": st.sampled_from(["base", {"model": {"path": "a"}}, 3]),
            "tokens": st.one_of(st.none(), st.dictionaries(st.sampled_from(["x", "<y>", ""]), TOKENS, max_size=2)),
            "pad_to_multiple_of": st.sampled_from([1, "64", 8.0, None, 0, 1.5]),
            "z": st.just(1),
        },
    ),
    "chat_template": st.sampled_from(["auto", "llama3", "{{ x }}", "a {% if x %}", "llama", None, 3]),
}
FISHERS = st.one_of(
    st.none(),
    TEXTS,
    st.fixed_dictionaries(
        {"data": TEXTS},
        optional={
            "source": st.sampled_from(["own", "gold", "sampled", "policy", "x"]),
            "sequences": st.sampled_from([1, "8", 0]),
            "temperature": st.sampled_from([0, 0.5, "1", -1]),
            "reduce": st.sampled_from(["sum", "mean"]),
            "compute": st.sampled_from(["fp32", "bf16", 3]),
        },
    ),
)
REFERENCES = st.sampled_from(["a", "b", "c", {"path": "d"}, {"model": {"path": "e"}}])


@st.composite
def drafts(draw: Any) -> dict[str, Any]:
    """A recipe, good more often than not."""
    method = rlmerge.get_method(draw(st.sampled_from(rlmerge.method_names())))
    specs = list(method.parameters)
    own = [spec for spec in specs if spec.per_model]
    once = draw(st.booleans())  # what models need stands in the global parameters
    data: dict[str, Any] = {"merge_method": method.name, "models": []}
    high = method.arity.maximum or method.arity.minimum + 2
    for _ in range(draw(st.integers(method.arity.minimum, high))):
        entry: dict[str, Any] = {"model": draw(REFERENCES), "parameters": some_of(draw, own, not once)}
        if draw(st.integers(0, 3)) == 0:
            entry["fisher"] = draw(FISHERS)
        if draw(st.integers(0, 2)) < 2:
            entry["name"] = f"m{len(data['models'])}"
        data["models"].append(entry)
    if method.arity.base == "required" or draw(st.booleans()):
        data["base_model"] = draw(st.one_of(st.just("base"), st.just("base"), REFERENCES, st.none()))
    data["parameters"] = some_of(draw, specs if once else [spec for spec in specs if not spec.per_model], True)
    for key in draw(st.lists(st.sampled_from([*TOP, "int8_mask", "x"]), max_size=2, unique=True)):
        data[key] = draw(TOP.get(key, ODD))
    return data if draw(st.booleans()) else rearranged(draw, data)


def rearranged(draw: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The same models in slices, or in modules."""
    entries, ranges = data.pop("models"), st.sampled_from([[0, 2], [1, 3], ["0", 2.0], [2], [3, 1], None])
    layers = draw(ranges)
    piece: dict[str, Any] = {"sources": [{**entry, "layer_range": layers} for entry in entries]}
    if draw(st.booleans()):
        piece |= {"parameters": {}, "base_model": draw(REFERENCES)}
    ways = [{"slices": [piece]}, {"modules": {"default": {"slices": [piece]}}}]
    ways += [{"modules": {"a": {"models": entries, "slices": None}, "b": {"models": entries, "parameters": {}}}}]
    return data | draw(st.sampled_from(ways))


def test_drafts_know_every_key():
    assert set(TOP) | {"merge_method", "models", "slices", "modules", "base_model", "parameters"} == set(TOP_KEYS)


def test_what_the_checks_accept_the_schema_accepts():
    good = 0

    @given(drafts())
    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def compare(data):
        nonlocal good
        text = yaml.safe_dump(data, allow_unicode=True)
        if accepted(text):
            good += 1
            read, _ = read_yaml(text, "r.yml")
            assert [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(read)] == []

    compare()
    assert good > 100
