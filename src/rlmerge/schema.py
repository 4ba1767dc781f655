"""The JSON schema of a recipe, for editors: made from what the checks are made of, keys and methods' parameters.

A schema sees one document and no file, so it accepts some recipes that rlmerge refuses; it refuses none that rlmerge
accepts (a test draws recipes at random).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from rlmerge.in_json import FLAG, JSON_OF, Schema, either, items, mapping, number
from rlmerge.mergekit_dialect import mergekit_names, without_effect
from rlmerge.methods.base import Method, Parameter
from rlmerge.parameters import expected
from rlmerge.recipe import Recipe
from rlmerge.recipe_checks import ENTRY_VALUES, TOP_KEYS, TOP_VALUES
from rlmerge.version import VERSION

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NOTHING: Schema = {"type": "null"}
NO_EFFECT: Schema = {"description": "mergekit's; has no effect here.", "deprecated": True}
ANY_PARAMETERS: Schema = {"type": ["object", "null"]}

TOP_MEANINGS = {
    "name": "Title of the model card.",
    "merge_method": "How the models are merged.",
    "base_model": "Folder of the common ancestor of the models.",
    "models": "The models to merge, each trained from the base.",
    "slices": "Instead of models: which layers of which models follow each other.",
    "modules": "Instead of models: slices or models for each module, by the beginning of its tensors' names.",
    "pre_weights": "Regular expressions: tensors outside of the layers that belong to the first slice.",
    "post_weights": "Regular expressions: tensors outside of the layers that belong to the last slice.",
    "parameters": "Parameters of the method, for all models.",
    "dtype": "Dtype of the output, where `out_dtype` is not given. Arithmetic is always wide.",
    "out_dtype": "Dtype of the output. Without it (and `dtype`) each tensor keeps its own.",
    "rounding": "How the output is rounded, once.",
    "min_change": "Updates up to this size, relative to the larger of both weights, count as none.",
    "include": "Regular expressions: which tensors are merged. The others are copied from the base.",
    "exclude": "Regular expressions: which tensors are copied from the base.",
    "on_mismatch": "What to do with tensors that do not fit: stop, or take the base's.",
    "allow_nonfinite": "Lets NaN and infinity in inputs pass where the result stays finite.",
    "seed": "Of random choices and ties.",
    "tokenizer_source": "Whose tokenizer the output has: base, union of all, or one of the models.",
    "tokenizer": "The same, with sources of single tokens and the number of rows.",
    "chat_template": "Chat template of the output: auto (what most models have), a name, or the template itself.",
}
"""What an editor shows at each top-level key."""
ENTRY_MEANINGS = {
    "model": "Folder of the model, of a LoRA, or of a delta pack.",
    "name": "What reports call the model; without one, its path as written.",
    "fisher": "Folder of its Fisher, or the data to estimate one on.",
    "gram": "Folder of the Gram matrices of its layers' inputs, or the data to measure them on.",
    "parameters": "Parameters of the method, for this model alone.",
}


def recipe_schema(methods: Mapping[str, Method] | None = None) -> Schema:
    """The JSON schema (draft 2020-12) of recipes for these methods, by default those of the registry."""
    if methods is None:
        from rlmerge.methods import get_method, method_names

        methods = {name: get_method(name) for name in method_names()}
    return {
        "$schema": DIALECT,
        "title": "rlmerge recipe",
        "description": f"What rlmerge {VERSION} merges, and how.",
        **_with_misplaced(mapping(_top_keys(methods), "merge_method")),
        "anyOf": [{"required": [way]} for way in ("models", "slices", "modules")],
        "allOf": [_of_method(methods[name]) for name in sorted(methods)],
        "$defs": {_name_of(spec): _value(spec) for name in sorted(methods) for spec in methods[name].parameters},
    }


def _harmless(schema: Schema, names: Iterable[str]) -> Schema:
    """The same mapping with keys that an editor does not offer and does not mark as mistakes, either."""
    names = [name for name in names if name not in schema["properties"]]
    return schema | ({"patternProperties": {f"^({'|'.join(names)})$": NO_EFFECT}} if names else {})


def _with_misplaced(schema: Schema) -> Schema:
    """With parameters of mergekit's methods outside of `parameters:`, for some methods a warning and no mistake."""
    return _harmless(schema, mergekit_names())


def _top_keys(methods: Mapping[str, Method]) -> dict[str, Schema]:
    """Every top-level key; what stands under `parameters` is the method's affair."""
    made: dict[str, Schema] = {
        **{key: _optional(JSON_OF[check]) for key, check in TOP_VALUES.items()},
        "merge_method": {"enum": sorted(methods)},
        "models": items(_entry()),
        "slices": items(_slice(), 1),
        "modules": {"type": "object", "minProperties": 1, "additionalProperties": _module()},
        "parameters": ANY_PARAMETERS,
    }
    defaults = {spec.name: spec.default for spec in fields(Recipe) if spec.default not in (MISSING, None, ())}
    return {key: _described(made[key], TOP_MEANINGS[key], defaults.get(key)) for key in TOP_KEYS}


def _slice() -> Schema:
    """One entry of `slices`; the parameters of methods are not looked into."""
    layers = items({"anyOf": [{"type": "integer"}, {"type": "number"}, {"type": "string"}]}, 2) | {"maxItems": 2}
    source = _entry()
    source = source | {"properties": {**source["properties"], "layer_range": layers}}
    source["required"] = [*source["required"], "layer_range"]
    base = _optional(JSON_OF[TOP_VALUES["base_model"]])
    keys = {"sources": items(source, 1), "base_model": base, "parameters": ANY_PARAMETERS}
    return _with_misplaced(mapping(keys, "sources"))


def _module() -> Schema:
    """One value of `modules`."""
    ways = {"slices": either(items(_slice(), 1), NOTHING), "models": either(items(_entry()), NOTHING)}
    schema = _with_misplaced(mapping({**ways, "parameters": ANY_PARAMETERS}))
    return schema | {"anyOf": [{"required": [way]} for way in ways]}


def _entry() -> Schema:
    """One entry of `models`."""
    made: dict[str, Schema] = {key: _optional(JSON_OF[check]) for key, check in ENTRY_VALUES.items()}
    made |= {"model": JSON_OF[ENTRY_VALUES["model"]], "parameters": ANY_PARAMETERS}
    described = {key: _described(schema, ENTRY_MEANINGS[key]) for key, schema in made.items()}
    return _with_misplaced(mapping(described, "model"))


def _optional(schema: Schema) -> Schema:
    """A key without a value is a key that is not there."""
    return schema if NOTHING in schema.get("anyOf", ()) else either(schema, NOTHING)


def _described(schema: Schema, text: str, default: Any = None) -> Schema:
    return {"description": text, **({} if default is None else {"default": default}), **schema}


def _of_method(method: Method) -> Schema:
    """What holds if the recipe names this method: its parameters, and how many models it takes."""
    models: Schema = {"minItems": method.arity.minimum}
    # a base that is listed among the models may be left out of them
    ignores_base = method.arity.base == "required" or method.base_entry == "origin"
    if method.arity.maximum is not None and not ignores_base:
        models["maxItems"] = method.arity.maximum
    own = [spec for spec in method.parameters if spec.per_model]
    elsewhere = {spec.name: False for spec in method.parameters if spec.name in mergekit_names()}
    models["items"] = {"properties": {"parameters": _parameters(method.name, own), **elsewhere}}
    needed = [spec.name for spec in method.parameters if spec.default is None and not spec.per_model]
    properties: dict[str, Any] = {
        "merge_method": {"description": f"{method.summary}\n\n{method.formula}\n\nSource: {method.source}"},
        "models": models,
        "parameters": _parameters(method.name, method.parameters, needed),
        **elsewhere,
    }
    then: Schema = {"properties": properties}
    required = ["parameters"] if needed else []
    lacking = [_given(spec, ignores_base) for spec in own if spec.default is None]
    if method.arity.base == "required":  # slices may each have their own
        there = {"properties": {"base_model": {"not": NOTHING}}, "required": ["base_model"]}
        lacking.append(either(there, {"required": ["slices"]}, {"required": ["modules"]}))
    if required:
        then["required"] = required
    if lacking:
        then["allOf"] = lacking
    named = {"properties": {"merge_method": {"const": method.name}}, "required": ["merge_method"]}
    return {"if": named, "then": then}


def _given(spec: Parameter, ignores_base: bool) -> Schema:
    """A parameter that each model needs: once for all, or of each model (of some, where one may be the base)."""
    there = {"properties": {"parameters": {"type": "object", "required": [spec.name]}}, "required": ["parameters"]}
    of_models = {"properties": {"models": {"contains" if ignores_base else "items": there}}}
    return either(there, of_models, {"required": ["slices"]}, {"required": ["modules"]})


def _parameters(method: str, specs: Iterable[Parameter], needed: Iterable[str] = ()) -> Schema:
    """A mapping of parameters; nothing at all where none is needed."""
    needed = list(needed)
    harmless = [key for key in mergekit_names() if without_effect(method, key)]
    own = {**{spec.name: _parameter(spec) for spec in specs}, "int8_mask": NO_EFFECT}
    schema = _harmless(mapping(own, *needed), harmless)
    return schema if needed else schema | {"type": ["object", "null"]}


def _parameter(spec: Parameter) -> Schema:
    place = "per model or for all" if spec.per_model else "for all models"
    words = [f"{spec.doc[:1].upper()}{spec.doc[1:]}.", f"{expected(spec).capitalize()}; {place}."]
    if spec.flags:
        words.append(f"true is {spec.flags[0]}, false is {spec.flags[1]}.")
    return _described({"$ref": f"#/$defs/{_name_of(spec)}"}, " ".join(words), spec.default)


def _name_of(spec: Parameter) -> str:
    """The name of what a parameter may be: parameters that take the same share one definition."""
    bounds = (("ge", spec.minimum), ("gt", spec.above), ("le", spec.maximum))
    limits = [f"{word}{bound}" for word, bound in bounds if bound is not None]
    return "-".join([spec.kind, *limits, *spec.choices, *(["flag"] if spec.flags else [])])


def _value(spec: Parameter) -> Schema:
    """A scalar, a gradient over the layers, or `{filter, value}` entries; an empty list is no value, as in mergekit."""
    scalar = _scalar(spec)
    graded = [] if spec.kind == "integer" else [items(scalar, 1)]
    text: Schema = {"type": ["string", "null"], "description": "Part of the tensors' names; nothing or * for all."}
    entry = mapping({"filter": text, "value": either(scalar, *graded)}, "value")
    return either(scalar, *graded, entry, items(entry))


FLAG_TOO: tuple[Schema, ...] = ({"enum": [0, 1]}, {"type": "string", "pattern": "^[Tt][Rr][Uu][Ee]$"})
"""What else a flag of a method may be, as mergekit has it."""


def _scalar(spec: Parameter) -> Schema:
    if spec.kind == "flag":
        return either(FLAG, *FLAG_TOO)
    if spec.kind == "choice":
        return either({"enum": list(spec.choices)}, *([FLAG, *FLAG_TOO] if spec.flags else []))
    return number(spec.kind, minimum=spec.minimum, maximum=spec.maximum, exclusiveMinimum=spec.above)
