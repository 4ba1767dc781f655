"""Where a tensor belongs: the number of its layer, and its kind, which the tensors of all layers share."""

from __future__ import annotations

from rlmerge.parameters import layer_of

ROOTS = frozenset({"model", "transformer", "language_model", "base_model", "gpt_neox", "backbone"})


def place_of(name: str) -> tuple[int | None, str]:
    """Layer and kind: 'model.layers.3.self_attn.q_proj.weight' → (3, 'self_attn.q_proj.weight').

    Outside of the layers: None, and the name without the model's own root, 'model.embed_tokens.weight' →
    (None, 'embed_tokens.weight'). Further numbers, of the experts of a mixture, become '*'.
    """
    parts, layer = name.split("."), layer_of(name)
    if layer is not None:
        parts = parts[1 + next(i for i, part in enumerate(parts) if part.isdigit()) :]
    else:
        while len(parts) > 1 and parts[0] in ROOTS:
            parts = parts[1:]
    return layer, ".".join("*" if part.isdigit() else part for part in parts)
