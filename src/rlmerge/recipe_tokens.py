"""What a recipe may say of tokenizers and chat templates: `tokenizer_source`, `tokenizer`, `chat_template`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlmerge.errors import did_you_mean
from rlmerge.in_json import FLAG, Schema, either, in_json, mapping, number
from rlmerge.parameters import as_integer, show

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "force")
KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Chat templates that a recipe may name; their texts are in `checkpoint.chat_templates`."""

Reference = Callable[[Any], Any]
"""The check of a reference to a model."""


def tokenizer_in_json(reference: Schema) -> Schema:
    """The JSON schema of what `check_tokenizer` accepts, with that of a reference to a model."""
    nothing: Schema = {"type": "null"}
    text = either({"type": "string"}, nothing)
    of_model = {"kind": {"const": "model_token"}, "model": reference, "token": text}
    of_model["token_id"] = either(number("integer", minimum=0), nothing)
    kinds = either(mapping({"kind": {"const": "zero"}}, "kind"), mapping(of_model, "kind", "model"))
    token = mapping({"source": either(reference, kinds, nothing), "force": FLAG})
    tokens = {"type": "object", "additionalProperties": either(token, nothing)}
    multiple = either(number("integer", minimum=1), nothing)
    return mapping({"source": reference, "tokens": either(tokens, nothing), "pad_to_multiple_of": multiple})


def check_tokenizer(value: Any, reference: Reference) -> dict[str, Any]:
    """The canonical `tokenizer:`; ValueError with its place in front of what is wrong."""
    known = "write {source: union}, {source: base} or {source: MODEL}"
    _check_keys(value, TOKENIZER_KEYS, "setting of a tokenizer", known)
    found: dict[str, Any] = {"source": _at("source", reference, value.get("source", "union"))}
    tokens = value.get("tokens")
    if tokens is not None:
        if not isinstance(tokens, dict):
            raise ValueError(f"tokens: expected a mapping of tokens, found {show(tokens)}")
        found["tokens"] = {
            token: _at(f"tokens.{token}", lambda entry: _check_token(entry, reference), entry)
            for token, entry in tokens.items()
        }
    multiple = value.get("pad_to_multiple_of")
    if multiple is not None:
        found["pad_to_multiple_of"] = _at("pad_to_multiple_of", _positive, multiple)
    return found


@in_json(either({"enum": ["auto", *TEMPLATES]}, {"type": "string", "pattern": r"\{[{%]"}))
def check_chat_template(value: Any) -> str:
    """'auto', the name of a template, or the template itself; ValueError for what is neither."""
    if isinstance(value, str) and (value in ("auto", *TEMPLATES) or "{{" in value or "{%" in value):
        return value
    hint = did_you_mean(value, ("auto", *TEMPLATES)) if isinstance(value, str) else ""
    raise ValueError(f"{show(value)} is neither a template in Jinja nor one of: auto, {', '.join(TEMPLATES)}.{hint}")


def _check_token(entry: Any, reference: Reference) -> dict[str, Any]:
    """Where the embedding of a token comes from: {'source': …, 'force': …}."""
    if entry is None:
        return {"force": False}
    _check_keys(entry, TOKEN_KEYS, "setting of a token", "write {source: MODEL, force: true}")
    force = entry.get("force", False)
    if not isinstance(force, bool):
        raise ValueError(f"force: expected true or false, found {show(force)}")
    source = entry.get("source")
    if source is None:
        if force:
            raise ValueError("force: there is nothing to force without a 'source:': write the model that has the token")
        return {"force": False}
    return {"source": _at("source", lambda given: _check_source(given, reference), source), "force": force}


def _check_source(source: Any, reference: Reference) -> Any:
    """A model, {'kind': 'zero'}, or a token of a model: {'kind': 'model_token', 'model': …, 'token': …}."""
    if not isinstance(source, dict) or "kind" not in source:
        return reference(source)
    kind = source["kind"]
    if kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS)
        raise ValueError(f"kind: {show(kind)} is not one of: {', '.join(KINDS)}.{hint}")
    _check_keys(source, KINDS[kind], f"key of kind {kind}", "")
    if kind == "zero":
        return {"kind": "zero"}
    token, number = source.get("token"), source.get("token_id")
    if source.get("model") is None or (token is None) == (number is None):
        raise ValueError("a model_token needs 'model:' and one of 'token:' and 'token_id:'")
    found = {"kind": kind, "model": _at("model", reference, source["model"])}
    if token is None:
        return found | {"token_id": _at("token_id", _natural, number)}
    if not isinstance(token, str):
        raise ValueError(f"token: expected text, found {show(token)}; write it in quotes, or write 'token_id:'")
    return found | {"token": token}


def _check_keys(value: Any, known: tuple[str, ...], what: str, example: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping, found {show(value)}: {example}")
    for key in value:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ValueError(f"{show(key)} is no {what}.{hint} There are: {', '.join(known)}")


def _at(place: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _natural(value: Any) -> int:
    if (number := as_integer(value)) < 0:
        raise ValueError(f"expected an integer >= 0, found {show(value)}")
    return number


def _positive(value: Any) -> int:
    if (number := as_integer(value)) < 1:
        raise ValueError(f"expected an integer >= 1, found {show(value)}")
    return number
