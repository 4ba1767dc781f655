"""Chat templates: the formats of the named ones as transformers renders them, and where an output keeps its own."""

from __future__ import annotations

import json

import pytest
from tests.methods.small_models import refusal
from tests.token_models import byte_bpe, recipe, tensors, write
from transformers import AutoTokenizer

import rlmerge
from rlmerge.checkpoint.chat_templates import NAMED, write_template
from rlmerge.recipe_tokens import TEMPLATES

BASE = byte_bpe()
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]
FORMATS = {
    "alpaca": "Be brief.\n\n### Instruction:\n1 + 1?\n\n### Response:\n2<eos>\n\n"
    "### Instruction:\nAnd 2 + 2?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
    "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]1 + 1?\n[|assistant|]2[|endofturn|]\n"
    "[|user|]And 2 + 2?\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "2<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\n1 + 1? [/INST] 2<eos>[INST] And 2 + 2? [/INST]",
}


def merged(tmp_path, template, models=("expert",), **top):
    given = recipe(tmp_path, "task_arithmetic", list(models), chat_template=template, **top)
    outcome = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy", overwrite=True)
    assert outcome.out is not None
    return outcome.out


def models(tmp_path, **templates):
    """base and experts, each with this template in its file, or none."""
    for seed, (name, template) in enumerate(templates.items()):
        write(tmp_path / name, BASE, tensors(seed, len(BASE)))
        if template is not None:
            (tmp_path / name / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_named_templates(tmp_path, name):
    models(tmp_path, base=None, expert=None)
    tokenizer = AutoTokenizer.from_pretrained(merged(tmp_path, name))
    tokenizer.bos_token = "<s>"
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == FORMATS[name]
    assert sorted(NAMED) == list(TEMPLATES) == sorted(FORMATS)


def test_a_template_in_the_recipe_settles_a_difference(tmp_path):
    models(tmp_path, base="{{ 'base' }}", expert="{{ 'expert' }}")
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    out = merged(tmp_path, template)
    assert (out / "chat_template.jinja").read_text() == template
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(TALK[:2], tokenize=False) == "Be brief.|1 + 1?|"


def test_auto_is_what_most_models_have(tmp_path):
    models(tmp_path, base="{{ 1 }}", a="{{ 2 }}\n", b="{{ 2 }}", c=None)
    assert (merged(tmp_path, "auto", ["a", "b", "c"]) / "chat_template.jinja").read_text() == "{{ 2 }}"
    models(tmp_path, base="{{ 1 }}", a="{{ 2 }}")
    assert (merged(tmp_path, "auto", ["a"]) / "chat_template.jinja").read_text() == "{{ 1 }}"


def test_auto_without_any(tmp_path):
    models(tmp_path, base=None, expert=None)
    out = merged(tmp_path, "auto")
    assert (out / "tokenizer_config.json").read_bytes() == (tmp_path / "base" / "tokenizer_config.json").read_bytes()
    assert not (out / "chat_template.jinja").exists()


def test_with_another_models_tokenizer(tmp_path):
    """The file of the tokenizer's own model, unless the recipe names a template."""
    models(tmp_path, base="{{ 1 }}", expert="{{ 2 }}")
    given = recipe(tmp_path, "task_arithmetic", ["expert"], tokenizer_source="expert")
    outcome = rlmerge.merge_to_folder(given, tmp_path / "first", kernels="numpy")
    assert outcome.out is not None
    assert (outcome.out / "chat_template.jinja").read_text() == "{{ 2 }}"
    assert any("chat templates" in note for note in outcome.notes)
    out = merged(tmp_path, "{{ 3 }}", tokenizer_source="expert")
    assert (out / "chat_template.jinja").read_text() == "{{ 3 }}"


CONFIG, JINJA, JSON = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"


def named(**templates):
    return {"chat_template": [{"name": name, "template": text} for name, text in templates.items()]}


@pytest.mark.parametrize(("before", "after"), [
    ({}, {JINJA: "NEW"}),
    ({JINJA: "old"}, {JINJA: "NEW"}),
    ({CONFIG: {}}, {CONFIG: {"chat_template": "NEW"}}),
    ({CONFIG: {"a": 1, "chat_template": "old"}}, {CONFIG: {"a": 1, "chat_template": "NEW"}}),
    ({CONFIG: named(rag="r", default="d")}, {CONFIG: named(rag="r", default="NEW")}),
    ({CONFIG: {"chat_template": {"rag": "r"}}}, {CONFIG: {"chat_template": {"rag": "r", "default": "NEW"}}}),
    ({CONFIG: {}, JINJA: "old"}, {CONFIG: {}, JINJA: "NEW"}),
    ({CONFIG: {"chat_template": "o"}, JINJA: "old"}, {CONFIG: {"chat_template": "NEW"}, JINJA: "NEW"}),
    ({CONFIG: {}, JSON: {"chat_template": "old"}}, {CONFIG: {}, JSON: {"chat_template": "NEW"}}),
])  # fmt: skip
def test_templates_go_where_they_were(before, after):
    def encode(files):
        return {
            name: json.dumps(data).encode() if name.endswith("json") else data.encode() for name, data in files.items()
        }

    found = write_template(encode(before), "NEW")
    assert {n: json.loads(d) if n.endswith("json") else d.decode() for n, d in found.items()} == after


@pytest.mark.parametrize(("template", "words"), [
    ("chatmll", ["'chatmll' is neither a template in Jinja nor one of: auto, alpaca,", "Did you mean 'chatml'?"]),
    (3, ["3 is neither a template"]),
])  # fmt: skip
def test_what_is_no_template(tmp_path, template, words):
    message = refusal(lambda: recipe(tmp_path, "linear", ["a", "b"], None, chat_template=template))
    assert message is not None
    assert all(word in message for word in words), message
