"""The recipe dialect: what is accepted, and that every mistake becomes one RecipeError with a line and a way out."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlmerge.errors import RecipeError
from rlmerge.methods.base import Arity, Method, Parameter
from rlmerge.recipe import MAX_BYTES, Recipe, load_recipe, parse_recipe
from rlmerge.recipe_checks import TOP_KEYS
from rlmerge.recipe_flags import parse_settings, recipe_from_parts

GOLDEN = Path(__file__).parent / "golden" / "recipes"


class Ties(Method):
    name = "ties"
    summary = formula = source = "words"
    parameters = (
        Parameter("weight", "number", 1.0, "weight", per_model=True),
        Parameter("density", "number", 1.0, "kept share", per_model=True, above=0, maximum=1),
        Parameter("lambda", "number", 1.0, "scale", late=True),
        Parameter("normalize", "flag", True, "divide by the weights"),
        Parameter("scope", "choice", "tensor", "where to rank", choices=("tensor", "model")),
        Parameter("rounds", "integer", 1, "rounds", minimum=1, maximum=9),
    )

    def check(self, values, per_model):
        return ["the weights sum to 0"] if np.sum(per_model.get("weight", 1.0)) == 0 else []

    def merge(self, block, task, results):
        raise NotImplementedError


class Linear(Ties):
    name = "linear"
    parameters = (Parameter("weight", "number", None, "share", per_model=True),)
    arity = Arity(minimum=2, maximum=3, base="optional")


class Pair(Ties):
    name = "pair"
    parameters = (Parameter("t", "number", None, "place", minimum=0, maximum=1),)
    arity = Arity(minimum=1, maximum=1)
    symmetric = False


class Ordered(Ties):
    name = "ordered"
    parameters = ()
    symmetric = False


METHODS: dict[str, Method] = {method.name: method for method in (Ties(), Linear(), Pair(), Ordered())}

GOOD = """\
merge_method: ties
base_model: base
models:
  - model: b
    parameters:
      density: 0.5
  - model: a
    fisher: fisher/a
parameters:
  lambda: 0.8
dtype: bfloat16
"""


def parse(text: str, **kwargs) -> Recipe:
    return parse_recipe(text, "r.yml", methods=METHODS, **kwargs)


def fail(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    return str(caught.value)


# ---- Accepted ---------------------------------------------------------------------------------------------------


def test_a_recipe():
    recipe = parse(GOOD)
    assert (recipe.merge_method, recipe.base_model, recipe.dtype) == ("ties", "base", "bfloat16")
    assert [entry.key for entry in recipe.models] == ["b", "a"]
    assert [entry.key for entry in recipe.experts] == ["a", "b"], "a symmetric method: in the order of keys"
    assert recipe.models[0].parameters == {"density": 0.5}
    assert recipe.models[1].fisher == "fisher/a"
    assert recipe.parameters == {"lambda": 0.8}
    assert (recipe.rounding, recipe.min_change, recipe.on_mismatch, recipe.seed) == ("nearest", 0.0, "error", 0)
    assert recipe.warnings == ()


def test_the_order_is_kept_where_it_means_something():
    text = "merge_method: ordered\nbase_model: x\nmodels: [{model: b}, {model: a}]"
    assert [entry.key for entry in parse(text).experts] == ["b", "a"]


@pytest.mark.parametrize(
    "name", ["linear", "linear_unnormalized", "task_arithmetic", "ties", "ties_weighted_lambda", "ram"]
)
def test_golden_recipes(name):
    recipe = load_recipe(GOLDEN / f"{name}.yml")
    assert recipe.output_dtype == "float32"
    assert len(recipe.models) == 3
    assert parse_recipe(recipe.to_yaml()).to_dict() == recipe.to_dict()


@pytest.mark.parametrize("name", ["linear", "ram"])
def test_golden_paths(name, monkeypatch):
    monkeypatch.chdir(GOLDEN.parent)
    paths = load_recipe(GOLDEN / f"{name}.yml").model_paths
    assert list(paths.values()) == [GOLDEN.parent / f"expert{k}" for k in range(3)]


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-5", 1e-5), ("1E3", 1000.0), (".5", 0.5), ("-2", -2.0), ('"1e-5"', 1e-5), ("+1.", 1.0), ("010", 10.0)],
)
def test_numbers(written, value):
    found = parse(GOOD.replace("0.8", written)).parameters["lambda"]
    assert found == value
    assert isinstance(found, float)


def test_integers():
    for written in ("3", '"3"', "3.0", "3e0"):
        found = parse(GOOD.replace("lambda: 0.8", f"rounds: {written}")).parameters["rounds"]
        assert found == 3
        assert isinstance(found, int)


@pytest.mark.parametrize(
    ("key", "dtype"), [("float32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("torch.float16", "float16")]
)
def test_dtypes(key, dtype):
    assert parse(GOOD.replace("dtype: bfloat16", f"dtype: {key}")).output_dtype == dtype
    assert parse(f"{GOOD}out_dtype: {key}\n").output_dtype == dtype
    assert parse(GOOD.replace("dtype: bfloat16", "")).output_dtype is None


def test_top_level_keys():
    recipe = parse(
        GOOD + "rounding: stochastic\nmin_change: 1e-3\ninclude: mlp\nexclude: [lm_head, 'layers\\.1\\.']\n"
        "on_mismatch: base\nallow_nonfinite: yes\nname: mine\nseed: 7\n"
    )
    assert recipe.rounding == "stochastic"
    assert recipe.min_change == 1e-3
    assert recipe.include == ("mlp",)
    assert recipe.exclude == ("lm_head", "layers\\.1\\.")
    assert (recipe.on_mismatch, recipe.allow_nonfinite, recipe.name, recipe.seed) == ("base", True, "mine", 7)


@pytest.mark.parametrize("nothing", ["null", "{}", "", "~"])
def test_empty_parameters(nothing):
    recipe = parse(f"merge_method: ties\nbase_model: x\nmodels: [{{model: a, parameters: {nothing}}}]\nparameters:")
    assert recipe.models[0].parameters == {}
    assert recipe.parameters == {}


def test_a_per_model_parameter_may_be_global():
    assert parse(GOOD.replace("lambda: 0.8", "weight: 2")).parameters == {"weight": 2.0}


def test_references_as_mergekit_dumps_them():
    recipe = parse(GOOD.replace("model: b\n", "model: {model: {path: b}}\n").replace("model: a", "model: {path: a}"))
    assert [entry.model for entry in recipe.models] == ["b", "a"]
    both = "{model: {path: o/b, revision: v1}, lora: {path: l, revision: null}}"
    assert parse(GOOD.replace("model: b\n", f"model: {both}\n")).models[0].model == "o/b@v1+l"
    both = "{model: b, lora: {path: o/l, revision: v2}}"
    assert parse(GOOD.replace("model: b\n", f"model: {both}\n")).models[0].model == "b+o/l@v2"
    for wrong, part in [
        ("{model: {path: b, override: c}}", "'override' of a model"),
        ("{model: {path: b}, adapter: c}", "'adapter' of a model"),
        ("{lora: {path: b}}", "expected text"),
    ]:
        with pytest.raises(RecipeError, match=part):
            parse(GOOD.replace("model: b\n", f"model: {wrong}\n"))


def test_merge_keys_and_aliases():
    text = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: &p {density: 0.5, weight: 2}
  - model: b
    parameters: {<<: *p, weight: 3}
  - model: c
    parameters: *p
"""
    assert [entry.parameters for entry in parse(text).models] == [
        {"weight": 2.0, "density": 0.5},
        {"weight": 3.0, "density": 0.5},
        {"weight": 2.0, "density": 0.5},
    ]


def test_dates_and_times_are_text():
    assert [m.key for m in parse(GOOD.replace("model: b", "model: 2024-01-01").replace(": a", ": 1:30")).models] == [
        "2024-01-01",
        "1:30",
    ]


# ---- Warnings ---------------------------------------------------------------------------------------------------


def test_int8_mask_has_no_effect():
    recipe = parse(GOOD.replace("lambda: 0.8", "int8_mask: true"))
    assert recipe.parameters == {}
    assert recipe.warnings == (
        "r.yml:10: parameters.int8_mask: has no effect here (in mergekit it changes no bit of the result either).",
    )
    assert recipe.with_settings({"lambda": 2}).warnings == recipe.warnings


def test_the_base_among_the_models_of_a_delta_method():
    recipe = parse(GOOD.replace("model: a", "model: ./base"))
    assert [entry.key for entry in recipe.models] == ["b"]
    assert recipe.warnings[0].startswith("r.yml:7: models[1]: this is the base")


def test_the_base_among_the_models_of_linear_is_an_input():
    recipe = parse("merge_method: linear\nbase_model: a\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]")
    assert [entry.key for entry in recipe.models] == ["a", "b"]
    assert recipe.warnings == ()


def test_filter_entries_after_a_catch_all():
    recipe = parse(GOOD.replace("0.8", "[{value: 1}, {filter: mlp, value: 2}]"))
    assert "r.yml:10: parameters.lambda: the entries after" in recipe.warnings[0]


# ---- Mistakes ---------------------------------------------------------------------------------------------------

HEAD = "merge_method: ties\nbase_model: base\n"

MISTAKES = {
    "empty": ("", ["r.yml: the recipe is empty"]),
    "comment only": ("# nothing\n", ["the recipe is empty"]),
    "a list": ("- a\n- b\n", ["r.yml: a recipe is a mapping", "found a list"]),
    "a word": ("hello", ["found 'hello'"]),
    "null": ("null", ["found nothing"]),
    "not yaml": ("a: [1, 2\nb: 3\n", ["r.yml:2: this is no recipe in YAML"]),
    "tab": ("merge_method: ties\nparameters:\n\tlambda: 1\n", ["r.yml:3", "not with tabs"]),
    "key under the dash": (
        HEAD + "models:\n  - model: a\n  parameters:\n    density: 1\n",
        ["r.yml:5: this is no recipe in YAML", "further left than the keys of the entry", "the list from line 4: "],
    ),
    "key out of line": (HEAD + "models: [{model: a}]\n  dtype: bf16\n", ["r.yml:4: this is no recipe in YAML"]),
    "key too far right": (
        "parameters:\n    lambda: 1\n  density: 1\n",
        ["r.yml:3", "This line starts in column 3, the keys that it belongs to (from line 1) in another one."],
    ),
    "mergekit-moe": (
        "base_model: base\ngate_mode: hidden\nexperts:\n- source_model: a\n",
        ["r.yml:2: gate_mode: this is a recipe of mergekit-moe"],
    ),
    "control character": ("merge_method: \x01\n", ["this is no recipe in YAML"]),
    "two documents": (GOOD + "---\n" + GOOD, ["r.yml:13: a second document", "load_stages"]),
    "duplicate key": (GOOD + "dtype: float32\n", ["r.yml:12: dtype: the same key stands in line 11 already"]),
    "duplicate deep key": (
        GOOD.replace("density: 0.5", "density: 0.5\n      density: 0.6"),
        ["r.yml:7: models[0].parameters.density: the same key stands in line 6"],
    ),
    "number as key": (GOOD + "1: 2\n", ["r.yml:12", "a key must be text, found '1'"]),
    "flag as key": (GOOD + "yes: 2\n", ["r.yml:12", "a key must be text, found 'yes'"]),
    "list as key": (GOOD + "? [a]\n: 2\n", ["r.yml:12", "a key must be text, found a list"]),
    "python tag": (GOOD.replace("0.8", "!!python/object/apply:os.system ['true']"), ["r.yml:10", "is not allowed"]),
    "python name": (GOOD.replace("0.8", "!!python/name:os.system"), ["r.yml:10: parameters.lambda", "not allowed"]),
    "own tag": (GOOD.replace("0.8", "!mine 3"), ["r.yml:10", "'!mine' is not allowed"]),
    "binary": (GOOD.replace("0.8", "!!binary aGk="), ["r.yml:10", "not allowed"]),
    "set": (GOOD.replace("0.8", "!!set {a}"), ["r.yml:10", "not allowed"]),
    "lying tag": (GOOD.replace("0.8", "!!int x"), ["r.yml:10", "'x' is not a value of the tag"]),
    "unknown alias": (GOOD.replace("0.8", "*x"), ["r.yml:10", "undefined alias"]),
    "alias to itself": (GOOD + "name: &a [*a]\n", ["r.yml:12: name[0]: this alias refers to itself"]),
    "merge of a scalar": (GOOD.replace("lambda: 0.8", "<<: 3"), ["r.yml:10", "'<<' takes a mapping"]),
    "too deep": ("a: " + "[" * 1000, ["r.yml:1", "64 levels deep"]),
    "too deep blocks": ("- " * 3000, ["64 levels deep"]),
    "too long": ("#" * (MAX_BYTES + 1), ["longer than 1048576 bytes"]),
    "too many values": (GOOD + f"name: [{'1,' * 30000}]", ["r.yml:12", "more than 20000 values"]),
    "no method": ("base_model: x\nmodels: [{model: a}]\n", ["r.yml: merge_method is missing"]),
    "unknown method": (
        GOOD.replace(": ties", ": tise"),
        ["r.yml:1: merge_method: there is no merge method 'tise'", "Did you mean 'ties'?", "linear, ordered, pair, t"],
    ),
    "method of another type": (GOOD.replace(": ties", ": [ties]"), ["r.yml:1: merge_method: expected text"]),
    "unknown key": (GOOD + "dtpye: x\n", ["r.yml:12: dtpye: unknown key.", "Did you mean 'dtype'?", "merge_method,"]),
    "unknown null key": (GOOD + "dtpye:\n", ["r.yml:12: dtpye: unknown key."]),
    "parameter at the top": (GOOD + "lambda: 1\n", ["r.yml:12: lambda: 'lambda' is a parameter", "under parameters:"]),
    "strange key": (GOOD + '"a\\nb": 1\n', ["r.yml:12: 'a\\nb': unknown key"]),
    "parameter beside model": (
        HEAD + "models:\n- model: a\n  density: 0.5\n",
        ["r.yml:5: models[0].density: 'density' is a parameter of method 'ties'", "'parameters:' of this model"],
    ),
    "unknown key of a model": (HEAD + "models:\n- model: a\n  fsher: x\n", ["r.yml:5: models[0].fsher", "'fisher'?"]),
    "no models": (HEAD, ["r.yml: 'models' is missing"]),
    "models is text": (HEAD + "models: a\n", ["r.yml:3: models: expected a list, found 'a'"]),
    "models is empty": (HEAD + "models: []\n", ["r.yml:3: models:", "at least 1 model beside the base, found 0"]),
    "model is text": (HEAD + "models:\n- a\n", ["r.yml:4: models[0]: found 'a'", "'- model: path'"]),
    "model without model": (HEAD + "models:\n- name: a\n", ["r.yml:4: models[0]: 'model' is missing"]),
    "model is nothing": (HEAD + "models:\n- model:\n", ["r.yml:4: models[0].model: expected text, found nothing"]),
    "model is a number": (
        HEAD + "models:\n- model: 7\n",
        ["r.yml:4: models[0].model: ", "found 7; write it in quotes"],
    ),
    "model is empty": (HEAD + "models:\n- model: ''\n", ["r.yml:4: models[0].model: expected text"]),
    "model with lora": (
        HEAD + "models:\n- model: {path: a, lora: b}\n",
        ["r.yml:4: models[0].model", "'lora' of a model is not supported"],
    ),
    "fisher mapping": (
        HEAD + "models:\n- model: a\n  fisher: {data: x, source: y}\n",
        ["r.yml:5: models[0].fisher: source: 'y' is not one of: own, gold, sampled, policy"],
    ),
    "twice": (
        HEAD + "models:\n- model: a\n- model: a\n",
        ["r.yml:5: models[1]: 'a' is listed twice (also models[0]): give each its own 'name:'"],
    ),
    "same name": (HEAD + "models:\n- {model: a, name: x}\n- {model: b, name: x}\n", ["r.yml:5: models[1]: 'x' is"]),
    "no base": ("merge_method: ties\nmodels: [{model: a}]\n", ["r.yml: base_model is missing: method 'ties'"]),
    "base is a list": (GOOD.replace(": base", ": [base]"), ["r.yml:2: base_model: expected text, found a list"]),
    "only the base": (HEAD + "models: [{model: base}]\n", ["r.yml:3: models: method 'ties' takes at least 1 model"]),
    "too many": (
        "merge_method: pair\nbase_model: x\nparameters: {t: 1}\nmodels: [{model: a}, {model: b}]\n",
        ["r.yml:4: models: method 'pair' takes exactly 1 model beside the base, found 2."],
    ),
    "too few": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n",
        ["r.yml:2: models: method 'linear' takes 2 to 3 models, found 1."],
    ),
    "missing global": (
        "merge_method: pair\nbase_model: x\nmodels: [{model: a}]\n",
        ["r.yml:1: merge_method: parameter 't' is missing: method 'pair' needs a number >= 0 and <= 1.", "'t: ...'"],
    ),
    "missing per model": (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- model: b\n",
        ["r.yml:4: models[1]: parameter 'weight' is missing"],
    ),
    "missing, for [] is nothing": (
        "merge_method: pair\nbase_model: x\nparameters: {t: []}\nmodels: [{model: a}]\n",
        ["r.yml:3: parameters: parameter 't' is missing"],
    ),
    "parameters is a list": (GOOD.replace("lambda: 0.8", "- 1"), ["r.yml:9: parameters: expected a mapping"]),
    "unknown parameter": (
        GOOD.replace("density: 0.5", "densty: 0.5"),
        [
            "r.yml:6: models[0].parameters.densty: unknown parameter of method 'ties'.\n  Did you mean 'density'? "
            "'ties' takes: weight, density (per model); lambda, normalize, scope, rounds (global)."
        ],
    ),
    "global under a model": (
        GOOD.replace("density: 0.5", "lambda: 0.5"),
        ["r.yml:6: models[0].parameters.lambda: 'lambda' is a global parameter", "move it to the top-level 'par"],
    ),
    "out of range": (GOOD.replace("0.5", "1.5"), ["r.yml:6: ", "expected a number > 0 and <= 1, found 1.5"]),
    "at the open bound": (GOOD.replace("0.5", "0"), ["expected a number > 0 and <= 1, found 0"]),
    "gradient out of range": (GOOD.replace("0.5", "[0.1, 2]"), ["r.yml:6: ", "found 2"]),
    "filter out of range": (GOOD.replace("0.5", "[{value: 0.1}, {value: 3}]"), ["r.yml:6: ", "entry 2: expected"]),
    "nan": (GOOD.replace("0.8", ".nan"), ["r.yml:10: parameters.lambda: expected a finite number"]),
    "inf": (GOOD.replace("0.8", "-.inf"), ["r.yml:10: parameters.lambda: expected a finite number"]),
    "overflow": (GOOD.replace("0.8", "1e999"), ["r.yml:10: parameters.lambda: expected a finite number"]),
    "very long integer": (GOOD.replace("0.8", "9" * 5000), ["r.yml:10: parameters.lambda: expected a finite number"]),
    "long integer": (GOOD.replace("0.8", "9" * 500), ["r.yml:10: parameters.lambda: expected a finite number"]),
    "text": (GOOD.replace("0.8", "much"), ["r.yml:10: parameters.lambda: expected a number, found 'much'"]),
    "text nan": (GOOD.replace("0.8", "'nan'"), ["expected a number, found 'nan'"]),
    "flag for a number": (GOOD.replace("0.8", "true"), ["expected a number, found true"]),
    "nothing": (GOOD.replace("0.8", ""), ["r.yml:10: parameters.lambda: there is no value; expected a number"]),
    "nested list": (GOOD.replace("0.8", "[[1]]"), ["expected a number, found a list"]),
    "mixed list": (GOOD.replace("0.8", "[1, {value: 1}]"), ["either numbers (a gradient) or {filter, value} entries"]),
    "filter key": (GOOD.replace("0.8", "[{filtre: a, value: 1}]"), ["entry 1: unknown key 'filtre'"]),
    "filter without value": (GOOD.replace("0.8", "[{filter: a}]"), ["entry 1: 'value' is missing"]),
    "filter is a number": (GOOD.replace("0.8", "[{filter: 1, value: 1}]"), ["filter: expected part of a tensor"]),
    "filter with []": (GOOD.replace("0.8", "[{filter: a, value: []}]"), ["entry 1: an empty list has no value"]),
    "fraction": (GOOD.replace("lambda: 0.8", "rounds: 2.5"), ["r.yml:10: parameters.rounds: expected an integer"]),
    "integer out of range": (GOOD.replace("lambda: 0.8", "rounds: 0"), ["expected an integer >= 1 and <= 9, found 0"]),
    "integer gradient": (GOOD.replace("lambda: 0.8", "rounds: [1, 2]"), ["an integer cannot be a gradient"]),
    "number for a flag": (GOOD.replace("lambda: 0.8", "normalize: 2"), ["expected true or false, found 2"]),
    "choice": (
        GOOD.replace("lambda: 0.8", "scope: modle"),
        ["r.yml:10: parameters.scope: 'modle' is not one of: tensor, model. Did you mean 'model'?"],
    ),
    "choice type": (GOOD.replace("lambda: 0.8", "scope: 3"), ["3 is not one of: tensor, model."]),
    "float64": (GOOD.replace("bfloat16", "float64"), ["r.yml:11: dtype: float64 is not written"]),
    "dtype": (GOOD.replace("bfloat16", "bfloat61"), ["r.yml:11: dtype: 'bfloat61' is not", "Did you mean 'bfloat16'?"]),
    "rounding": (GOOD + "rounding: stocastic", ["r.yml:12: rounding: 'stocastic' is", "Did you mean 'stochastic'?"]),
    "rounding type": (GOOD + "rounding: 3", ["r.yml:12: rounding: 3 is not one of: nearest, stochastic."]),
    "on_mismatch": (GOOD + "on_mismatch: ignore", ["r.yml:12: on_mismatch: 'ignore' is not one of: error, base."]),
    "min_change": (GOOD + "min_change: -1", ["r.yml:12: min_change: expected a number >= 0, found -1"]),
    "seed": (GOOD + "seed: 1.5", ["r.yml:12: seed: expected an integer, found 1.5"]),
    "negative seed": (GOOD + "seed: -1", ["r.yml:12: seed: expected an integer from 0"]),
    "allow_nonfinite": (GOOD + "allow_nonfinite: 1", ["r.yml:12: allow_nonfinite: expected true or false, found 1"]),
    "include": (GOOD + "include: [a, '(']", ["r.yml:12: include: '(' is not a regular expression"]),
    "include type": (GOOD + "include: 3", ["r.yml:12: include: expected a regular expression"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    text, wanted = MISTAKES[case]
    message = fail(text)
    for part in wanted:
        assert part in message
    assert "pydantic" not in message
    assert len(message) < 2000


def test_the_methods_own_check():
    assert "r.yml:9: parameters: the weights sum to 0" in fail(GOOD.replace("lambda: 0.8", "weight: 0"))


def test_mistakes_that_only_tensors_show_get_file_and_line():
    recipe = parse(GOOD + "exclude:\n- norm\n- absent\n")
    with pytest.raises(RecipeError, match=r"^r\.yml:14: exclude: 'absent' is found in none"), recipe.located():
        raise RecipeError("exclude: 'absent' is found in none", ("exclude", 1))
    with pytest.raises(RecipeError, match=r"^r\.yml: something"), recipe.located():
        raise RecipeError("r.yml: something")
    flags = recipe.with_settings({"min_change": 0.5})
    with pytest.raises(RecipeError, match=r"^--set min_change: too much"), flags.located():
        raise RecipeError("too much", ("min_change",))


def test_lines_are_right_when_the_base_among_the_models_is_ignored():
    recipe = parse("merge_method: ties\nbase_model: x\nmodels:\n- model: x\n- model: absent\n- model: b\n")
    assert [entry.model for entry in recipe.models] == ["absent", "b"]
    with pytest.raises(RecipeError, match=r"^r\.yml:5: "):
        _ = recipe.model_paths
    with pytest.raises(RecipeError, match=r"^r\.yml:5: "):
        _ = recipe.with_settings({"seed": 1}).model_paths


def test_all_mistakes_at_once_by_line():
    message = fail(GOOD.replace("0.5", "7").replace("lambda", "lamda").replace("bfloat16", "int8"))
    assert [line.split(":")[1] for line in message.splitlines() if line.startswith("r.yml")] == ["6", "10", "11"]


def test_alias_bomb():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    assert "more than 20000 values" in fail("\n".join(lines))


def test_no_constructor_runs(tmp_path):
    target = tmp_path / "owned"
    fail(GOOD.replace("0.8", f"!!python/object/apply:pathlib.Path.touch [!!python/object:pathlib.Path {target}]"))
    assert not target.exists()


TOKENS = """
merge_method ties models model parameters density lambda filter value base_model 1e-5 &a *a << !!int !!x --- null .nan
{ } [ ] : - , # ' " | > ? % @ name dtype float32 true fisher seed include (
"""
WORDS = st.sampled_from([*TOKENS.split(), ": ", "- ", "\n", "\n  ", "\n    ", "9" * 30])


@given(st.one_of(st.text(), st.lists(WORDS).map("".join), st.lists(WORDS).map(lambda words: GOOD + "".join(words))))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example("\ud800")
@example("a: \x85")
@example("%YAML 9.9\n---\na: 1")
@example("!<tag:yaml.org,2002:map> x")
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    with contextlib.suppress(RecipeError):
        parse(text)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["a", "b"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["filter", "value", "model", "path", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)
KEYS = st.sampled_from([*TOP_KEYS, "x"])
PARAMETERS = st.dictionaries(st.sampled_from([spec.name for spec in Ties.parameters] + ["int8_mask", "x"]), VALUES)


@given(
    st.dictionaries(KEYS, VALUES, max_size=4),
    PARAMETERS,
    st.lists(
        st.fixed_dictionaries({"model": VALUES}, optional={"parameters": PARAMETERS, "name": VALUES, "fisher": VALUES})
    ),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_data_is_a_recipe_or_a_recipe_error(top, parameters, models):
    data = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": parameters} | top
    text = yaml.safe_dump(data, allow_unicode=True)
    try:
        recipe = parse(text)
    except RecipeError:
        return
    assert parse(recipe.to_yaml()).to_dict() == recipe.to_dict()


# ---- Python's mappings --------------------------------------------------------------------------------------------

MAPPING = {
    "merge_method": "ties",
    "base_model": Path("base"),
    "models": ({"model": Path("a"), "parameters": {"weight": np.float32(0.5)}}, {"model": "b"}),
    "parameters": {"density": np.array([0.25, 0.5]), "rounds": np.int64(2), "normalize": np.bool_(False)},
}


def test_a_mapping_is_a_recipe():
    """As it comes from a notebook: with paths, tuples and NumPy's numbers."""
    text = """
merge_method: ties
base_model: base
models: [{model: a, parameters: {weight: 0.5}}, {model: b}]
parameters: {density: [0.25, 0.5], rounds: 2, normalize: false}
"""
    assert parse_recipe(MAPPING, methods=METHODS).to_dict() == parse(text).to_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"paramters": {}}, "recipe: paramters: unknown key.\n  Did you mean 'parameters'?"),
        ({"parameters": {"density": 2}}, "recipe: parameters.density: expected a number > 0"),
        ({"parameters": {1: 2}}, "recipe: parameters: a key must be text, found 1"),
        ({"models": [{"model": "\ud800"}]}, "recipe: models[0].model: '\\ud800' holds characters"),
        ({"models": {"model": "a"}}, "recipe: models: expected a list, found a mapping"),
    ],
)
def test_mistakes_in_a_mapping(change, said):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MAPPING | change, methods=METHODS)
    assert said in str(caught.value)


def test_a_mapping_that_contains_itself():
    endless = dict(MAPPING)
    endless["parameters"] = endless
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse_recipe(endless, methods=METHODS)


@pytest.mark.parametrize("given", [MAPPING, None, 3, [MAPPING]])
def test_what_is_no_path(given):
    with pytest.raises(
        RecipeError, match=r"expected a recipe or the path of one, found .* parse_recipe takes a mapping"
    ):
        load_recipe(given)
    if given is not MAPPING:
        with pytest.raises(RecipeError, match="expected the text of a recipe or a mapping of its keys, found "):
            parse_recipe(given)


def test_parts_take_a_single_path_and_paths():
    one = recipe_from_parts(Path("base"), "math", "ties", {"weight": np.float32(0.5)}, fishers="f", methods=METHODS)
    many = recipe_from_parts("base", [Path("math")], "ties", {"weight": 0.5}, fishers=["f"], methods=METHODS)
    assert one.to_dict() == many.to_dict()
    assert [entry.model for entry in one.models] == ["math"]


# ---- Canonical form ---------------------------------------------------------------------------------------------


def test_to_dict_resolves_defaults_in_a_fixed_order():
    one = parse(GOOD).to_dict()
    two = parse("dtype: bf16\n" + GOOD.replace("dtype: bfloat16\n", "").replace("0.8", '"8e-1"')).to_dict()
    assert list(one.items()) == list(two.items())
    assert one["parameters"] == {
        "weight": 1.0, "density": 1.0, "lambda": 0.8, "normalize": True, "scope": "tensor", "rounds": 1,
    }  # fmt: skip
    assert one["models"] == [{"model": "b", "parameters": {"density": 0.5}}, {"model": "a", "fisher": "fisher/a"}]


@given(st.text(min_size=1, max_size=8), st.floats(0, 1, exclude_min=True))
@settings(deadline=None, max_examples=50)
@example("1e-5", 1e-300)
@example("no", 1.0)
@example("2024-01-01", 0.1)
@example("010", 0.1)
def test_to_yaml_round_trip(name, density):
    try:
        recipe = recipe_from_parts("base", ["x"], "ties", {"density": density}, methods=METHODS)
        recipe = parse(yaml.safe_dump(recipe.to_dict() | {"name": name}, allow_unicode=True))
    except RecipeError:
        return
    assert parse(recipe.to_yaml()).to_dict() == recipe.to_dict()
    again = yaml.safe_load(recipe.to_yaml())
    assert again["name"] == recipe.name, "another YAML 1.1 reader sees the same text"


def test_a_recipe_is_frozen_and_can_be_sent():
    recipe = parse(GOOD)
    with pytest.raises(AttributeError):
        recipe.seed = 3  # pyright: ignore
    assert pickle.loads(pickle.dumps(recipe)).to_dict() == recipe.to_dict()


# ---- Paths ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    for name in ("recipes/base", "recipes/a", "work/a", "work/b", "work/fisher/a", "home/m"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "recipes" / "r.yml").write_text(GOOD)
    return tmp_path


def test_paths(tree):
    recipe = load_recipe(tree / "recipes" / "r.yml", METHODS)
    assert recipe.base_path == tree / "recipes" / "base"
    assert list(recipe.model_paths.items()) == [("a", tree / "recipes" / "a"), ("b", tree / "work" / "b")]
    assert recipe.fisher_paths == {"a": tree / "work" / "fisher" / "a", "b": None}
    assert recipe.resolve("~/m") == tree / "home" / "m"
    assert recipe.resolve(str(tree / "work")) == tree / "work"
    assert parse(GOOD).resolve("a") == tree / "work" / "a"


def test_missing_paths(tree):
    recipe = load_recipe(tree / "recipes" / "r.yml", METHODS)
    with pytest.raises(RecipeError) as caught:
        recipe.resolve("bsae")
    assert str(caught.value) == (
        f"'bsae' does not exist: there is neither {tree}/recipes/bsae nor {tree}/work/bsae.\n  Did you mean 'base'?"
    )
    with pytest.raises(RecipeError, match="Hugging Face id: nothing is downloaded"):
        recipe.resolve("Qwen/Qwen2-0.5B")
    with pytest.raises(RecipeError, match="'bsae' does not exist"):
        _ = parse(GOOD.replace("model: a", "model: bsae+b")).model_paths
    with pytest.raises(RecipeError, match="'zzzz' does not exist"):
        _ = parse(GOOD.replace("model: a", "model: a+zzzz")).adapter_paths
    with pytest.raises(RecipeError, match="neither of these is there"):
        _ = parse(GOOD.replace("model: a", "model: y+z")).model_paths
    with pytest.raises(RecipeError, match="a folder has none"):
        _ = parse(GOOD.replace("model: a", "model: a@main")).model_paths
    for odd in ("x\0y", "~nobody-at-all/x", "x" * 5000, "/nowhere/at/all"):
        with pytest.raises(RecipeError, match="does not exist"):
            recipe.resolve(odd)
    (tree / "work" / "b").rmdir()
    with pytest.raises(RecipeError, match=r"r\.yml:4: models\[0\]\.model: 'b' does not exist"):
        _ = recipe.model_paths
    (tree / "work" / "fisher" / "a").rmdir()
    with pytest.raises(RecipeError, match=r"r\.yml:8: models\[1\]\.fisher: 'fisher/a' does not exist"):
        _ = recipe.fisher_paths


def test_everything_that_is_missing_is_said_at_once(tree):
    text = """\
merge_method: ties
base_model: owner/base
models:
- model: nowhere+owner/lora
- {model: c, fisher: no-fisher}
- model: b
"""
    (tree / "b").mkdir(exist_ok=True)
    recipe = parse(text, folder=tree)
    with pytest.raises(RecipeError) as caught:
        recipe.check_paths()
    said = [line for line in str(caught.value).splitlines() if not line.startswith(" ")]
    assert [line.split(" does not")[0] for line in said] == [
        "r.yml:2: base_model: 'owner/base'",
        "r.yml:4: models[0].model: 'nowhere'",
        "r.yml:4: models[0].model: 'owner/lora'",
        "r.yml:5: models[1].model: 'c'",
        "r.yml:5: models[1].fisher: 'no-fisher'",
    ]


def test_files_that_are_no_recipes(tmp_path):
    (tmp_path / "latin.yml").write_bytes(b"name: \xe9\n")
    (tmp_path / "bom.yml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    (tmp_path / "long.yml").write_bytes(b"#" * (MAX_BYTES + 10))
    for name, part in [("latin.yml", "not UTF-8"), ("bmo.yml", "Did you mean 'bom.yml'"), ("long.yml", "longer than")]:
        with pytest.raises(RecipeError, match=part):
            load_recipe(tmp_path / name)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"cannot be read|no such"):
        load_recipe("x\0y")
    assert load_recipe(tmp_path / "bom.yml", METHODS).merge_method == "ties"


# ---- The command line -------------------------------------------------------------------------------------------


def test_parts_equal_the_file():
    recipe = recipe_from_parts(
        "base",
        ["b", "a"],
        "ties",
        {"lambda": 0.8, "density": "5e-1", "dtype": "bf16"},
        fishers=["f", "g"],
        methods=METHODS,
    )
    text = GOOD.replace("lambda: 0.8", "lambda: 0.8\n  density: 0.5").replace(
        "    parameters:\n      density: 0.5", "    fisher: f"
    )
    assert recipe.to_dict() == parse(text.replace("fisher/a", "g")).to_dict()


@pytest.mark.parametrize(
    ("base", "experts", "method", "chosen", "part"),
    [
        (None, ["a"], "ties", {}, "the command line: base_model is missing"),
        ("base", [], "ties", {}, "--expert: method 'ties' takes at least 1 model"),
        ("base", ["a", "a"], "ties", {}, "--expert a: 'a' is listed twice"),
        ("base", ["a"], "tise", {}, "--method: there is no merge method 'tise'"),
        ("base", ["a"], "ties", {"densty": 1}, "--set densty: unknown parameter of method 'ties'.\n  Did you mean 'd"),
        ("base", ["a"], "ties", {"dtpye": 1}, "--set dtpye: unknown parameter of method 'ties'.\n  Did you mean 'dt"),
        ("base", ["a"], "ties", {"density": 2}, "--set density: expected a number > 0"),
        ("base", ["a"], "ties", {"dtype": "int8"}, "--set dtype: 'int8' is not"),
        ("", ["a"], "ties", {}, "--base: expected text, found nothing"),
    ],
)  # fmt: skip
def test_parts_name_the_flag(base, experts, method, chosen, part):
    with pytest.raises(RecipeError) as caught:
        recipe_from_parts(base, experts, method, chosen, methods=METHODS)
    assert part in str(caught.value)


def test_one_fisher_an_expert():
    with pytest.raises(RecipeError, match="--fisher is given 1 times and --expert 2 times"):
        recipe_from_parts("base", ["a", "b"], "ties", fishers=["f"], methods=METHODS)


def test_with_settings():
    recipe = parse(GOOD)
    changed = recipe.with_settings({"density": 0.3, "dtype": "float32", "seed": 3})
    assert [entry.parameters for entry in changed.models] == [{}, {}]
    assert changed.parameters["density"] == 0.3
    assert changed.parameters["lambda"] == 0.8
    assert (changed.dtype, changed.seed) == ("float32", 3)
    assert recipe.to_dict() == parse(GOOD).to_dict(), "the first one is as it was"
    assert changed.with_settings({}).to_dict() == changed.to_dict()
    with pytest.raises(RecipeError, match="--set density: expected a number > 0"):
        recipe.with_settings({"density": 0})
    with pytest.raises(RecipeError, match="--set densty: unknown parameter"):
        recipe.with_settings({"densty": 0})


def test_with_settings_keeps_the_folder(tree):
    recipe = load_recipe(tree / "recipes" / "r.yml", METHODS).with_settings({"lambda": 2})
    assert recipe.base_path == tree / "recipes" / "base"


def test_parse_settings():
    assert parse_settings([]) == [{}]
    assert parse_settings(["lambda=0.3,0.5,1", "density=5e-1"]) == [
        {"lambda": value, "density": 0.5} for value in (0.3, 0.5, 1)
    ]
    assert parse_settings(["a=1,2", "b=x,true"]) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": True}, {"a": 2, "b": "x"}, {"a": 2, "b": True},
    ]  # fmt: skip
    assert parse_settings(["t=[0, 1]"]) == [{"t": [0, 1]}]


@pytest.mark.parametrize("bad", [["a"], ["a="], ["=1"], ["a=1", "a=2"], ["a=1,,2"], ["a=]"], ["a=*x"], ["a=1], [2"]])
def test_bad_settings(bad):
    with pytest.raises(RecipeError, match="--set"):
        parse_settings(bad)


def test_endless_sweeps():
    many = ",".join(map(str, range(200)))
    with pytest.raises(RecipeError, match="more than 10000 points"):
        parse_settings([f"a={many}", f"b={many}"])


@given(st.lists(st.text(max_size=12), max_size=3))
@settings(deadline=None)
def test_any_settings(texts):
    with contextlib.suppress(RecipeError):
        assert parse_settings(texts)
