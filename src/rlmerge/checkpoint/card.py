"""The small files of an output: configuration with the right dtype, model card. The same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlmerge.checkpoint.reading import json_text, leads_out, read_file
from rlmerge.figures import as_markdown, statistics_table
from rlmerge.version import VERSION

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_KEYS = ("dtype", "torch_dtype")


def rewrite_config(raw: bytes, dtype: str) -> bytes:
    """config.json with every dtype key that the donor has set to the dtype written; unchanged bytes if it agrees.

    Plain JSON: keys, order and nesting stay. The donor's own key is used, `torch_dtype` or `dtype`, at any depth.
    """
    config = json.loads(raw)
    name = DTYPE_NAMES[dtype]
    if not _set_dtype(config, name):
        return raw
    return (json_text(config, 2) + "\n").encode()


def _set_dtype(node: Any, name: str) -> bool:
    changed = False
    if isinstance(node, dict):
        for key, value in node.items():
            if key in DTYPE_KEYS and isinstance(value, str) and value.removeprefix("torch.") in DTYPE_NAMES.values():
                if value.removeprefix("torch.") != name:
                    node[key] = name
                    changed = True
            else:
                changed |= _set_dtype(value, name)
    elif isinstance(node, list):
        for value in node:
            changed |= _set_dtype(value, name)
    return changed


def rewrite_tie(raw: bytes, tied: bool) -> bytes:
    """config.json with `tie_word_embeddings`, for the model and where it speaks of its text model."""
    config = json.loads(raw)
    config["tie_word_embeddings"] = tied
    if isinstance(nested := config.get("text_config"), dict):
        nested["tie_word_embeddings"] = tied
    return (json_text(config, 2) + "\n").encode()


def read_licence(folder: Path) -> str | None:
    """The `license:` of a model card's front matter, if there is one. CheckpointError where a card cannot be read."""
    file = folder / "README.md"
    if not file.is_file() or leads_out(file) is not None:
        return None
    text = read_file(file)[: 2**16].decode("utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        # nodes only: a document that is made of aliases takes no more room than its text
        front = yaml.compose(text[3:].split("\n---", 1)[0], yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    pairs = front.value if isinstance(front, yaml.MappingNode) else []
    found = [value for key, value in pairs if key.value == "license" and isinstance(value, yaml.ScalarNode)]
    return found[-1].value if found and found[-1].tag == "tag:yaml.org,2002:str" else None


def model_card(
    title: str,
    recipe: dict[str, Any],
    models: int,
    recipe_yaml: str,
    licences: dict[str, str | None],
    total: dict[str, Any],
    plugin: str = "",
    commits: Sequence[tuple[str, str]] = (),
) -> str:
    """README.md: front matter that the Hub understands, what was merged and how, and what became of the updates.

    `licences` has a line for every model, the base first: in a merge of several stages, those that were there before.
    `commits` are those of what came from the hub, with their ids; only these are `base_model`, for the Hub refuses what
    is no id, and a folder may look like one.
    References are those of the recipe, never made absolute. Licences that differ are named, not resolved.
    """
    known = {licence for licence in licences.values() if licence}
    ids = list(dict.fromkeys(name for name, _ in commits))
    front: dict[str, Any] = {
        **({"base_model": ids, "base_model_relation": "merge"} if ids else {}),
        "library_name": "transformers",
        "tags": ["merge", "rlmerge", recipe["merge_method"]],
    }
    if len(known) == 1 and all(licences.values()):
        front["license"] = known.pop()
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    lines += [
        f"A merge of {models} models by `{recipe['merge_method']}`{plugin}, made with rlmerge {VERSION}.",
        "",
    ]
    if len({licence for licence in licences.values() if licence}) > 1:
        lines += ["**Licences differ**; whoever publishes this must satisfy all of them:", ""]
        lines += [f"- {name}: {licence or 'not stated'}" for name, licence in licences.items()]
        lines += [""]
    if commits:
        lines += ["What came from the hub, and of which commit it is:", ""]
        lines += [*(f"- `{name}`: `{commit}`" for name, commit in commits), ""]
    lines += ["## Recipe", "", "```yaml", recipe_yaml.strip(), "```", ""]
    table = statistics_table(total)
    if len(table) > 1:
        lines += ["## What the merge did", "", *as_markdown(table), "", "Figures per tensor are in `rlmerge.json`.", ""]
    return "\n".join(lines)
