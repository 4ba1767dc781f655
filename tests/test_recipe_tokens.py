"""`tokenizer_source`, `tokenizer` and `chat_template` in recipes: canonical forms, and every mistake with its place."""

from __future__ import annotations

import pytest
from tests.methods.small_models import refusal

import rlmerge

HEAD = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"

FORMS = {
    "tokenizer_source: union": ("tokenizer_source", "union"),
    "tokenizer_source: {model: {path: a}}": ("tokenizer_source", "a"),
    "tokenizer_source: model:a": ("tokenizer_source", "a"),
    "tokenizer: {}": ("tokenizer", {"source": "union"}),
    "tokenizer: {source: a, pad_to_multiple_of: 64}": ("tokenizer", {"source": "a", "pad_to_multiple_of": 64}),
    "tokenizer: {tokens: {x: , y: {source: a}}}": (
        "tokenizer", {"source": "union", "tokens": {"x": {"force": False}, "y": {"source": "a", "force": False}}},
    ),
    "tokenizer: {tokens: {x: {source: {kind: zero}, force: true}}}": (
        "tokenizer", {"source": "union", "tokens": {"x": {"source": {"kind": "zero"}, "force": True}}},
    ),
    "tokenizer: {tokens: {x: {source: {model: {path: a}}}}}": (
        "tokenizer", {"source": "union", "tokens": {"x": {"source": "a", "force": False}}},
    ),
    "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: 3}}}}": (
        "tokenizer",
        {"source": "union", "tokens": {"x": {
            "source": {"kind": "model_token", "model": "a", "token_id": 3}, "force": False
        }}},
    ),
    "tokenizer: {tokens: {x: {source: {kind: model_token, model: {path: a}, token: y}}}}": (
        "tokenizer",
        {"source": "union", "tokens": {"x": {
            "source": {"kind": "model_token", "model": "a", "token": "y"}, "force": False
        }}},
    ),
    "chat_template: chatml": ("chat_template", "chatml"),
    "chat_template: '{{ messages }}'": ("chat_template", "{{ messages }}"),
}  # fmt: skip

X = "tokenizer: {tokens: {x: {source: "
MISTAKES = {
    "tokenizer_source: 3": "tokenizer_source: expected text, found 3; write it in quotes",
    "tokenizer_source: a\ntokenizer: {source: a}": "r.yml:4: tokenizer: 'tokenizer_source' says the same",
    "tokenizer: union": "tokenizer: expected a mapping, found 'union': write {source: union}",
    "tokenizer: {sorce: a}": "'sorce' is no setting of a tokenizer. Did you mean 'source'? There are: source, tokens",
    "tokenizer: {tokens: [x]}": "tokenizer: tokens: expected a mapping of tokens",
    "tokenizer: {pad_to_multiple_of: 0}": "pad_to_multiple_of: expected an integer >= 1, found 0",
    "tokenizer: {pad_to_multiple_of: x}": "pad_to_multiple_of: ",
    "tokenizer: {tokens: {x: a}}": "tokens.x: expected a mapping, found 'a': write {source: MODEL, force: true}",
    "tokenizer: {tokens: {x: {sorce: a}}}": "tokens.x: 'sorce' is no setting of a token. Did you mean 'source'?",
    "tokenizer: {tokens: {x: {force: true}}}": "tokens.x: force: there is nothing to force without a 'source:'",
    X + "a, force: 1}}}": "tokens.x: force: expected true or false, found 1",
    X + "{kind: null}}}}": "tokens.x: source: kind: ",
    X + "{kind: zeros}}}}": "'zeros' is not one of: zero, model_token. Did you mean 'zero'?",
    X + "{kind: zero, model: a}}}}": "'model' is no key of kind zero.",
    X + "{kind: model_token, model: a}}}}": "a model_token needs 'model:' and one of",
    X + "{kind: model_token, token: a}}}}": "a model_token needs 'model:' and one of",
    X + "{kind: model_token, model: a, token: y, token_id: 1}}}}": "and one of 'token:' and",
    X + "{kind: model_token, model: a, token_id: -1}}}}": "token_id: expected an integer >= 0",
    X + "{kind: model_token, model: a, token: 3}}}}": "token: expected text, found 3",
    X + "3}}}": "tokens.x: source: expected text, found 3",
}


@pytest.mark.parametrize("text", FORMS)
def test_canonical_forms(text):
    key, value = FORMS[text]
    recipe = rlmerge.parse_recipe(HEAD + text)
    assert getattr(recipe, key) == value
    assert recipe.to_dict()[key] == value
    assert rlmerge.parse_recipe(recipe.to_yaml()).to_dict() == recipe.to_dict()
    assert getattr(recipe.with_settings({"seed": 3}), key) == value


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(text):
    message = refusal(lambda: rlmerge.parse_recipe(HEAD + text, "r.yml"))
    assert message is not None
    assert MISTAKES[text] in message, message


def test_without_them_a_recipe_is_what_it_was():
    assert not {"tokenizer", "tokenizer_source", "chat_template"} & rlmerge.parse_recipe(HEAD).to_dict().keys()
