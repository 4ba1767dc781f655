"""Where a tensor stands in a picture: its layer, and what is left of its name."""

from __future__ import annotations

import re

_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks|block|layer)\.(\d+)\.(.+?)$")


def place_of(name: str) -> tuple[int | str, str]:
    """Layer ('–' outside of the layers) and module: 'model.layers.3.mlp.up_proj.weight' → 3, 'mlp.up_proj'."""
    found = _LAYER.match(name)
    layer, module = (int(found[1]), found[2]) if found else ("–", name.removeprefix("model."))
    return layer, module.removesuffix(".weight")
