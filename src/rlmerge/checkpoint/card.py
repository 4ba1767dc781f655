"""The small files of an output: configuration with the right dtype, model card. The same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

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
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


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


def read_licence(folder: Path) -> str | None:
    """The `license:` of a model card's front matter, if there is one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[: 2**16]
    except OSError:
        return None
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text[3:].split("\n---", 1)[0])
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None


def model_card(
    title: str, recipe: dict[str, Any], recipe_yaml: str, licences: dict[str, str | None], total: dict[str, Any]
) -> str:
    """README.md: front matter that the Hub understands, what was merged and how, and what became of the updates.

    References are those of the recipe, never made absolute. Licences that differ are named, not resolved.
    """
    references = list(dict.fromkeys(([recipe["base_model"]] if recipe.get("base_model") else []) + list(licences)))
    known = {licence for licence in licences.values() if licence}
    front: dict[str, Any] = {
        "base_model": references,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "rlmerge", recipe["merge_method"]],
    }
    if len(known) == 1 and all(licences.values()):
        front["license"] = known.pop()
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    lines += [
        f"A merge of {len(recipe['models'])} models by `{recipe['merge_method']}`, made with rlmerge {VERSION}.",
        "",
    ]
    if len({licence for licence in licences.values() if licence}) > 1:
        lines += ["**Licences differ**; whoever publishes this must satisfy all of them:", ""]
        lines += [f"- {name}: {licence or 'not stated'}" for name, licence in licences.items()]
        lines += [""]
    lines += ["## Recipe", "", "```yaml", recipe_yaml.strip(), "```", ""]
    rows = list(_figures(total))
    if rows:
        lines += ["## What the merge did", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in rows]
        lines += ["", "Definitions and figures per tensor are in `rlmerge.json`.", ""]
    return "\n".join(lines)


def _figures(total: dict[str, Any]) -> list[tuple[str, str]]:
    """The totals worth a line, in words."""
    rows: list[tuple[str, str]] = []
    for key, share in total.get("support", {}).items():
        rows.append((f"support of {key}", percent(share)))
    words = {
        "unique": "changed by one expert only (of changed)",
        "overlap": "changed by several (of changed)",
        "conflict": "sign conflict (of overlap)",
        "draws": "draws (of conflicts)",
        "survival": "intended updates that survive the cast",
    }
    rows += [(words[key], percent(total[key])) for key in words if key in total]
    rows += [(f"conflicts won by {key}", percent(share)) for key, share in total.get("wins", {}).items()]
    rows += [(f"kept of {key}", percent(share)) for key, share in total.get("kept", {}).items()]
    if "realised_cosine" in total:
        rows.append(("cosine of intended and stored update", f"{total['realised_cosine']:.4f}"))
    return rows


def percent(share: dict[str, Any]) -> str:
    """'12.3 %' of a counted share, '-' where there was nothing to count."""
    return f"{100 * share['share']:.1f} %" if "share" in share else "-"
