"""Keys that mergekit reads and does not use are warnings where the method is mergekit's; all others are errors."""

from __future__ import annotations

import pytest

import rlmerge
from rlmerge.errors import RecipeError
from rlmerge.mergekit_dialect import PARAMETERS, without_effect

LACKING: set[tuple[str, str]] = set()
"""What mergekit uses and rlmerge does not have: an error, as the result would be another one."""

DECLARED = [(method, key) for method, keys in PARAMETERS.items() for key in keys]
FOREIGN = [
    (method, key)
    for method in PARAMETERS
    for key in ("weight", "density", "normalize", "t", "filter_wise", "select_topk")
    if key not in PARAMETERS[method]
]


def parse(method: str, top: str = "", own: str = "", beside: str = "", **extra: str):
    """A recipe of two models, or one where the method takes one; `own` are parameters of the first."""
    specs = rlmerge.get_method(method).parameters
    needed = ", ".join(
        f"{spec.name}: 1" for spec in specs if spec.default is None and f" {spec.name}:" not in f" {top}"
    )
    entries = [f"- model: a\n  parameters: {{{own}}}\n" + (f"  {beside}\n" if beside else "")]
    entries += ["- model: b\n"] if rlmerge.get_method(method).arity.maximum != 1 else []
    lines = "".join(f"{key}: {value}\n" for key, value in extra.items())
    parameters = ", ".join(part for part in (top, needed) if part)
    text = f"merge_method: {method}\nparameters: {{{parameters}}}\n{lines}models:\n{''.join(entries)}"
    needs_base = rlmerge.get_method(method).arity.base == "required"
    return rlmerge.parse_recipe(text + ("base_model: base\n" if needs_base else ""), "r.yml")


@pytest.mark.parametrize(("method", "key"), DECLARED)
def test_what_mergekit_declares_is_taken_ignored_or_known_to_be_lacking(method, key):
    ours = key in {spec.name for spec in rlmerge.get_method(method).parameters}
    ignored = bool(without_effect(method, key))
    assert ours + ignored + ((method, key) in LACKING) == 1


@pytest.mark.parametrize(("method", "key"), FOREIGN)
def test_a_parameter_of_other_methods_is_a_warning(method, key):
    if key in {spec.name for spec in rlmerge.get_method(method).parameters}:
        pytest.skip("rlmerge's method has it")
    (warning,) = parse(method, f"{key}: 0.5").warnings
    assert warning == (
        f"r.yml:2: parameters.{key}: has no effect: method {method!r} has no such parameter (mergekit ignores it, too)."
    )
    (warning,) = parse(method, own=f"{key}: 0.5").warnings
    assert warning.startswith(f"r.yml:5: models[0].parameters.{key}: has no effect")


def test_what_task_arithmetic_declares_and_does_not_use_is_a_warning():
    recipe = parse("task_arithmetic", "density: 0.5, rescale: true")
    assert [text.split(": ")[1] for text in recipe.warnings] == ["parameters.density", "parameters.rescale"]
    assert all("accepts it and does not use it" in text for text in recipe.warnings)
    assert recipe.parameters == {"weight": 1.0}


def test_outside_parameters_a_key_is_harmless_only_where_nothing_can_be_meant():
    assert parse("model_stock", normalize="true").warnings == (
        "r.yml:3: normalize: has no effect: it stands outside 'parameters:', and method 'model_stock' has no such "
        "parameter.",
    )
    assert "models[0].density" in parse("linear", beside="density: 0.5").warnings[0]
    for call in (lambda: parse("ties", normalize="false"), lambda: parse("linear", beside="weight: 2")):
        with pytest.raises(RecipeError, match="is a parameter of method"):
            call()
    with pytest.raises(RecipeError, match=r"'pad_to_multiple_of' is a key of 'tokenizer:': write it there"):
        parse("linear", pad_to_multiple_of="8")


@pytest.mark.parametrize(
    ("method", "key", "says"),
    [
        ("ties", "densty", "Did you mean 'density'"),
        ("sce", "normalise", "unknown parameter of method 'sce'"),
        ("ties", "smooth", "unknown parameter"),
        ("sar", "normalize", "unknown parameter"),  # not mergekit's method: there is nothing to agree with
        ("iso_c", "weight", "unknown parameter"),
    ],
)
def test_other_keys_are_errors(method, key, says):
    with pytest.raises(RecipeError, match=says):
        parse(method, f"{key}: 1")


def test_a_global_parameter_under_a_model_is_an_error_that_says_what_mergekit_makes_of_it():
    with pytest.raises(RecipeError, match=r"move it to the top-level 'parameters:' \(mergekit ignores it here\)"):
        parse("ties", own="lambda: 0.5")


def test_set_takes_only_what_the_method_has():
    recipe = parse("sce")
    with pytest.raises(RecipeError, match="--set normalize"):
        recipe.with_settings({"normalize": True})


@pytest.mark.parametrize(
    ("written", "flag"),
    [("true", True), ("1", True), ("1.0", True), ("0", False), ("0.0", False), ("'true'", True), ("'True'", True)],
)
def test_flags_may_be_numbers(written, flag):
    assert parse("linear", f"normalize: {written}").parameters["normalize"] is flag
    rescale = parse("dare_linear", f"rescale: {written}").parameters["rescale"]
    assert (rescale != "none") is flag


@pytest.mark.parametrize("written", ["2", "0.5", "'1'", "'yes'", "'false'", "-1", "[0, 2]"])
def test_other_numbers_are_no_flags(written):
    with pytest.raises(RecipeError, match="true or false"):
        parse("linear", f"normalize: {written}")


def test_a_base_that_is_the_only_model_is_told_how_to_be_written():
    text = "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: b, parameters: {weight: 1}}]\n"
    with pytest.raises(RecipeError, match=r"found 0\. The base is the only model: .* merge_method: passthrough"):
        rlmerge.parse_recipe(text)
