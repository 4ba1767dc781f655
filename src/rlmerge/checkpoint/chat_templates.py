"""Chat templates by name, the most common one of several models, and where a model folder keeps its own.

The texts are ours; the formats are those that the models of these names were trained on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.tokenizer import Tokenizer, lent_files, open_tokenizers
from rlmerge.checkpoint.tokenizer_files import as_json

if TYPE_CHECKING:
    from rlmerge.recipe import Recipe

ALPACA = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

EXAONE = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[|user|]' + message['content'] + '\\n' }}
    {%- else %}
        {{- '[|' + message['role'] + '|]' + message['content'] + '[|endofturn|]\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{- bos_token }}
{%- set pending = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set pending.system = message['content'] + '\\n\\n' %}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + pending.system + message['content'] + ' [/INST]' }}
        {%- set pending.system = '' %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

NAMED = {"alpaca": ALPACA, "chatml": CHATML, "exaone": EXAONE, "llama3": LLAMA3, "mistral": MISTRAL}


def plan_template(recipe: Recipe, donor: Checkpoint, models: Mapping[str, Checkpoint]) -> str | None:
    """The chat template that the recipe asks for; None where it leaves the tokenizer's own."""
    if recipe.chat_template is None:
        return None
    folders = list(dict.fromkeys(model.planned or model.folder for model in (donor, *models.values())))
    return choose_template(recipe.chat_template, open_tokenizers(folders, lent_files(donor, models.values())))


def choose_template(asked: str, tokenizers: Sequence[Tokenizer]) -> str | None:
    """The text of a named template; for 'auto' the one that most of the models have, the first of those that tie (None
    if no model has one); else the text itself.
    """
    if asked != "auto":
        return NAMED.get(asked, asked)
    found = ["\n".join(tokenizer.templates.get("default", [])).strip() for tokenizer in tokenizers]
    common = Counter(text for text in found if text).most_common(1)
    return common[0][0] if common else None


def write_template(files: dict[str, bytes], template: str) -> dict[str, bytes]:
    """The files with another default chat template, in the places where they have one.

    A template file goes before the configuration, as in transformers; without either it is the configuration, which
    every version reads.
    """
    files = dict(files)
    settings = json.loads(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else None
    held = (settings or {}).get("chat_template")
    apart = [name for name in ("chat_template.jinja", "chat_template.json") if name in files]
    if settings is not None and (held is not None or not apart):
        if isinstance(held, list):
            named = {entry["name"]: entry["template"] for entry in held} | {"default": template}
            settings["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        elif isinstance(held, dict):
            settings["chat_template"] = held | {"default": template}
        else:
            settings["chat_template"] = template
        files["tokenizer_config.json"] = as_json(settings)
    if "chat_template.jinja" in apart or settings is None:
        files["chat_template.jinja"] = template.encode()
    if "chat_template.json" in apart:
        files["chat_template.json"] = as_json(json.loads(files["chat_template.json"]) | {"chat_template": template})
    return files
