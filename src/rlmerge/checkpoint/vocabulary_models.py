"""The models of a merge as a vocabulary sees them: tokens with their ids, and rows of the embedding.

Embedding and head are found by name and size, from headers and config.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.header import TensorInfo
from rlmerge.checkpoint.row_maps import Rows
from rlmerge.checkpoint.tokenizer import Tokenizer, lent_files, open_tokenizers
from rlmerge.errors import MismatchError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from rlmerge.recipe import Recipe

_NAMED = re.compile(
    r"(^|\.)(\w*embed\w*|wte|shared|lm_head|embed_out|output|output_layer|proj_out|decoder|predictions)"
    r"(\.weight|\.bias)?$"
)
_SURE = re.compile(r"(^|\.)(embed_tokens|embed_in|embed_out|wte|word_embeddings|shared|lm_head)(\.weight|\.bias)?$")
_OTHER = re.compile(r"position|token_type|segment|patch|vision|visual|image|audio|norm|mapping|rel_embed", re.I)


@dataclass(frozen=True)
class Member:
    """A model of the merge: its key, what a recipe may call it, its tokenizer, its rows, tokens that have no row.

    checkpoint  None of one that only lends its tokenizer
    """

    key: str
    names: tuple[str, ...]
    checkpoint: Checkpoint | None
    tokenizer: Tokenizer
    rows: Rows
    rowless: frozenset[str]


# -- embedding and head ----------------------------------------------------------------------------------------------


def vocabulary_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of a full model that have a row for every token: embedding, head, the bias of a head."""
    rows = vocabulary_rows(checkpoint)
    awkward = [name for name in checkpoint.tensors if name.endswith("final_logits_bias")]
    if awkward:
        raise MismatchError(
            f"{checkpoint.folder}: {awkward[0]} has a column for every token, and only rows can follow a vocabulary. "
            "Leave out `tokenizer_source` and `tokenizer`."
        )
    for info in _candidates(checkpoint):
        if info.shape[0] != rows and _SURE.search(info.name):
            raise MismatchError(
                f"{info.file}: {info.name} is {list(info.shape)} beside an embedding of {rows} rows, so its rows are "
                "no tokens, or padded in another way. Leave out `tokenizer_source` and `tokenizer`."
            )
    return frozenset(info.name for info in _candidates(checkpoint) if info.shape[0] == rows)


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding: `vocab_size` where a tensor that could be one has it, else what all such tensors have."""
    sizes = {info.shape[0]: info for info in _candidates(checkpoint) if len(info.shape) == 2}
    size = checkpoint.setting("vocab_size")
    if type(size) is int and size in sizes:
        return size
    if len(sizes) == 1:
        return next(iter(sizes))
    found = ", ".join(f"{info.name} {list(info.shape)}" for info in sizes.values()) or "no tensor that looks like one"
    raise MismatchError(
        f"{checkpoint.folder}: its embedding cannot be told: config.json has vocab_size {str(size)[:60]}, and there is "
        f"{found}. Write the number of rows as vocab_size into config.json."
    )


def _candidates(checkpoint: Checkpoint) -> list[TensorInfo]:
    return [
        info
        for name, info in checkpoint.tensors.items()
        if info.shape and _NAMED.search(name) and not _OTHER.search(name)
        and (len(info.shape) == 2 or (len(info.shape) == 1 and name.endswith("bias")))
    ]  # fmt: skip


# -- models and their tokens -----------------------------------------------------------------------------------------


def open_members(
    recipe: Recipe,
    base: Checkpoint | None,
    experts: Mapping[str, Checkpoint],
    opened: Sequence[Checkpoint],
    source: str,
    place: tuple[str, ...],
) -> tuple[list[Member], Member | None]:
    """The models of the merge, the base first; and the model that only lends its tokenizer, if there is one."""
    written = {entry.key: (entry.key, entry.model) for entry in recipe.models}
    called = "base" if "base" not in experts else "base_model"
    named = [] if base is None else [(called, ("base", recipe.base_model or "base"), base)]
    named += [(key, written[key], checkpoint) for key, checkpoint in experts.items()]
    seen = {id(checkpoint) for _, _, checkpoint in named}
    named += [(one.reference, (one.reference,), one) for one in opened if id(one) not in seen]
    donor = base if base is not None else experts[recipe.models[0].key]
    folders = [checkpoint.planned or checkpoint.folder for _, _, checkpoint in named]
    known = {os.path.normpath(name) for _, names, _ in named for name in names}
    foreign = source not in ("union", "base") and os.path.normpath(source) not in known
    if foreign:
        try:
            folders.append(recipe.resolve(source, small=True))
        except RecipeError as error:
            raise RecipeError(f"{error}{did_you_mean(source, known)}", place) from None
    tokenizers = open_tokenizers(folders, lent_files(donor, experts.values()))
    home = tokenizers[folders.index(donor.planned or donor.folder)]
    if home.tokens is None:
        raise MismatchError(_no_tokens(home))
    found = []
    for (key, names, checkpoint), tokenizer in zip(named, tokenizers):
        if tokenizer.tokens is None:
            if "tokenizer.model" in tokenizer.files:
                raise MismatchError(_no_tokens(tokenizer))
            tokenizer = home  # as adapters and bare checkpoints: it was trained with the base's
        count = vocabulary_rows(donor if checkpoint.adapter else checkpoint)
        found.append(_model(key, names, checkpoint, tokenizer, count))
    if not foreign:
        return found, None
    if (tokens := tokenizers[-1].tokens) is None:
        raise MismatchError(_no_tokens(tokenizers[-1]))
    return found, _model(source, (source,), None, tokenizers[-1], 1 + max(tokens.values(), default=0))


def _model(key: str, names: tuple[str, ...], checkpoint: Checkpoint | None, tokenizer: Tokenizer, count: int) -> Member:
    tokens = tokenizer.tokens or {}
    rows = Rows({token: number for token, number in tokens.items() if number < count}, count)
    return Member(key, names, checkpoint, tokenizer, rows, frozenset(tokens) - rows.tokens.keys())


def _no_tokens(tokenizer: Tokenizer) -> str:
    found = "only tokenizer.model" if "tokenizer.model" in tokenizer.files else "no tokenizer"
    return (
        f"{tokenizer.folder}: holds {found}, and its tokens are read from tokenizer.json (or vocab.json). "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one."
    )


def find_model(members: Sequence[Member], reference: str) -> int | None:
    """The number of the model that a recipe means by its name or path."""
    wanted = os.path.normpath(reference)
    found = (k for k, model in enumerate(members) if wanted in {os.path.normpath(name) for name in model.names})
    return next(found, None)
