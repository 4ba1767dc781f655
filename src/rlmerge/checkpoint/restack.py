"""Layers of a model under new numbers: what a slice of a recipe sees of a checkpoint, and what config.json then says.

Names come from the files: the layers are the tensors with a number in their names, all under one prefix. Tensors
outside of the layers belong before them (embeddings) or after them (final norm, head), by patterns.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlmerge.checkpoint.fisher import FisherFolder
from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.gram import GramFolder
from rlmerge.checkpoint.match import is_buffer
from rlmerge.checkpoint.reading import json_text
from rlmerge.errors import MismatchError, RecipeError

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|v_head|qa_outputs|output)(\.|$)")
_BEFORE = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|wtt|shared|word_\w+|token_\w+|position_\w+|project_in)(\.|$)")
_AFTER = re.compile(r"(^|\.)(\w*norm\w*|ln_f|ln_final|\w*head\w*|pooler|cls|project_out)(\.|$)")
_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]{1,9}(?=\.|$)")

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "num_decoder_layers")
LISTS_OF_LAYERS = (
    "mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "no_rope_layer_indices", "moe_layers",
    "fullatt_block_indexes",
)  # fmt: skip
"""Keys of config.json that list the numbers of layers."""
_EACH_LAYER = re.compile(r"(^|_)(layers?|blocks?)(_|$)|^attn_type_list$")
"""Keys of lists with an entry a layer. So have others as long as the model is deep, but for those that hold tokens or
describe something else; of one entry, nothing tells them apart."""
_SOMETHING_ELSE = re.compile(r"token|architectures|(^|_)(ids?|labels?|languages|keys|mean|std|conv|sections?)(_|$)")


# ---- Modules ------------------------------------------------------------------------------------------------------

_VISION = r"^(model\.)?(vision_tower|vision_model|visual|vision_encoder)\."
_PROJECTOR = r"^(model\.)?(multi_modal_projector|mm_projector|connector|aligner)\."
_AUDIO = r"^(model\.)?(audio_tower|audio_model|audio)\."
ALIASES = {
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "multi_modal_projector": _PROJECTOR,
    "audio_tower": _AUDIO,
    "encoder": r"^(model\.)?encoder\.",
    "decoder": r"^(model\.)?decoder\.|^lm_head\.",
}
"""What mergekit calls modules, as patterns of names; `text_decoder` and `default` take what no other key does."""
REST = ("text_decoder", "default", "")


def module_of(names: Sequence[str], modules: Sequence[str]) -> dict[str, str]:
    """The module of each tensor: the longest key that begins its name, else the first alias that finds it, else the
    module of what is left. Raises RecipeError for tensors without one, and for modules without tensors.
    """
    found: dict[str, str] = {}
    rest = next((key for key in modules if key in REST), None)
    for name in names:
        starting = [key for key in modules if key not in REST and _begins(name, key)]
        named = [key for key in modules if key in ALIASES and re.search(ALIASES[key], name)]
        key = max(starting, key=len) if starting else named[0] if named else rest
        if key is None:
            raise RecipeError(
                f"modules: no key is the beginning of tensor {name!r}, so it would be missing in the output. Add a "
                f"module for it, such as {name.split('.')[0]!r}, or 'default' for all that is left.",
                ("modules",),
            )
        found[name] = key
    for key in modules:
        if key not in found.values():
            heads = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise RecipeError(
                f"modules: {key!r} is the beginning of no tensor's name. They begin with: {heads}.", ("modules", key)
            )
    return found


def _begins(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key.rstrip('.')}.")


# ---- Layers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """The layers of a model or module: what stands before and after their numbers, and how many there are."""

    prefix: str
    count: int

    def layer(self, name: str) -> int | None:
        """The layer of a tensor, or None outside of them."""
        if not name.startswith(self.prefix):
            return None
        number = name[len(self.prefix) :].split(".", 1)[0]
        return int(number) if number.isascii() and number.isdigit() else None

    def renamed(self, name: str, layer: int) -> str:
        """The name of a layer's tensor with another number."""
        rest = name[len(self.prefix) :].split(".", 1)
        return ".".join([f"{self.prefix}{layer}", *rest[1:]])


def find_layers(names: Sequence[str], reference: str) -> Layers:
    """The layers among these tensors. Raises MismatchError where there are none, or more than one stack of them."""
    counts: dict[str, int] = {}
    for name in names:
        found = _NUMBER.search(name)
        if found is not None:
            prefix = name[: found.start()]
            counts[prefix] = max(counts.get(prefix, 0), int(found.group()) + 1)
    if not counts:
        raise MismatchError(f"{reference}: no tensor has the number of a layer in its name, so it has no slices.")
    if len(counts) > 1:
        stacks = ", ".join(f"{prefix}* ({count})" for prefix, count in counts.items())
        raise MismatchError(
            f"{reference}: has more than one stack of layers: {stacks}. Slice them one by one under 'modules:'."
        )
    [(prefix, count)] = counts.items()
    return Layers(prefix, count)


def outside(name: str, before: Sequence[str], after: Sequence[str], tied: bool) -> str | None:
    """'before' or 'after' the layers, for a tensor outside of them; None if no pattern knows.

    `before` and `after` are regular expressions that come first. A head that is tied to the embedding goes with it.
    """
    for word, patterns in (("before", before), ("after", after)):
        if any(re.search(pattern, name) for pattern in patterns):
            return word
    if _HEAD.search(name):
        return "before" if tied and "lm_head" in name else "after"
    return "before" if _BEFORE.search(name) else "after" if _AFTER.search(name) else None


def place_outside(
    checkpoint: Checkpoint, names: Sequence[str], before: Sequence[str], after: Sequence[str], tied: bool
) -> dict[str, str]:
    """Every tensor outside of the layers → 'before' or 'after', arguments as in `outside`. Raises RecipeError for one
    that no pattern knows.
    """
    found = {name: outside(name, before, after, tied) for name in names}
    unknown = [name for name, word in found.items() if word is None and not is_buffer(checkpoint.tensors[name])]
    if unknown:
        raise RecipeError(
            f"{checkpoint.reference}: tensor {unknown[0]!r} lies outside of the layers, and its name does not tell "
            "whether it belongs to the first slice or to the last. Write `pre_weights:` or `post_weights:` with a "
            "regular expression that finds it."
        )
    return {name: word or "before" for name, word in found.items()}


def view(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A checkpoint of which only these tensors are seen, under other names: {own name: seen name}."""
    seen = {names[name]: replace(info, name=names[name]) for name, info in checkpoint.tensors.items() if name in names}
    whole = checkpoint.whole or checkpoint
    return replace(
        checkpoint, tensors=checkpoint.tensors if checkpoint.adapter else seen, whole=whole, seen_as=dict(names)
    )


def view_fisher(folder: FisherFolder, names: Mapping[str, str]) -> FisherFolder:
    """The same of a Fisher."""

    def renamed(data: Mapping[str, Any]) -> dict[str, Any]:
        return {names[name]: value for name, value in data.items() if name in names}

    return replace(
        folder, tensors=renamed(folder.tensors), sums=renamed(folder.sums), digests=renamed(folder.digests),
        compact=renamed(folder.compact),
    )  # fmt: skip


def view_gram(folder: GramFolder, names: Mapping[str, str]) -> GramFolder:
    """The same of Gram matrices."""

    def renamed(data: Mapping[str, Any]) -> dict[str, Any]:
        return {names[name]: value for name, value in data.items() if name in names}

    first = frozenset(names[name] for name in folder.first if name in names)
    return replace(folder, tensors=renamed(folder.tensors), first=first, digests=renamed(folder.digests))


# ---- config.json --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """The layers of an output, each by the config.json and the number of the layer that it comes from.

    within   the part of config.json that speaks of them: any, or 'vision_config' and the like
    """

    depth: int
    layers: tuple[tuple[Mapping[str, Any], int], ...]
    within: str = ""


def restack_config(raw: bytes, stack: Stack) -> bytes:
    """config.json with the number of layers, and every list of one entry a layer, as the output has them."""
    config = json.loads(raw)
    before = copy.deepcopy(config)
    node = config.get(stack.within) if stack.within else config
    if isinstance(node, dict):
        _restack(node, (stack.within,) if stack.within else (), stack)
    return raw if config == before else (json_text(config, 2) + "\n").encode()


def _restack(node: dict[str, Any], path: tuple[str, ...], stack: Stack) -> None:
    deep = next((key for key in DEPTH_KEYS if node.get(key) == stack.depth), None)
    for key, value in list(node.items()):
        if isinstance(value, dict) and key not in ("vision_config", "audio_config"):
            _restack(value, (*path, key), stack)
        elif deep is None or not isinstance(value, list):
            continue
        elif key in LISTS_OF_LAYERS:
            node[key] = [
                number
                for number, (config, layer) in enumerate(stack.layers)
                if layer in (_at(config, (*path, key)) or ())
            ]
        elif len(value) == stack.depth and _is_each_layers(key, stack.depth):
            found = [_at(config, (*path, key)) for config, _ in stack.layers]
            node[key] = [
                there[layer] if isinstance(there, list) and layer < len(there) else value[min(layer, len(value) - 1)]
                for there, (_, layer) in zip(found, stack.layers)
            ]
    if deep is not None:
        for key in DEPTH_KEYS:
            if node.get(key) == stack.depth:
                node[key] = len(stack.layers)
        if node.get("max_window_layers") == stack.depth:
            node["max_window_layers"] = len(stack.layers)


def _is_each_layers(key: str, depth: int) -> bool:
    """Whether a list of so many entries has one for each layer."""
    return _EACH_LAYER.search(key) is not None or (depth > 1 and _SOMETHING_ELSE.search(key) is None)


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = config
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def inside(config: Mapping[str, Any], module: str) -> str:
    """Where config.json speaks of a module: 'vision_config', 'audio_config', or '' for the text model."""
    for word in ("vision", "visual", "audio"):
        key = f"{'vision' if word == 'visual' else word}_config"
        if word in module and isinstance(config.get(key), dict):
            return key
    return ""
