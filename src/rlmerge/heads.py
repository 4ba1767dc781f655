"""Embedding and head of an output made of parts: one matrix where all models at its ends tie the two, else two.

A tied model has a head all the same: its embedding. So an output can take its embedding from one model and its head
from another, whatever each of them ties, as long as config.json then says that they are two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.header import TensorInfo
from rlmerge.checkpoint.names import HEAD
from rlmerge.errors import MismatchError
from rlmerge.parameters import layer_of

if TYPE_CHECKING:
    from rlmerge.pieces import Piece

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embed|embedding|embeddings|shared)\.weight$"
)


def pair_of(tensors: Mapping[str, TensorInfo]) -> tuple[str | None, str | None]:
    """The names of the embedding of tokens and of the head among these tensors, None for what is not there."""
    matrices = {name: info for name, info in tensors.items() if len(info.shape) == 2 and layer_of(name) is None}
    embedding = next((name for name in matrices if _EMBEDDING.search(name)), None)
    width = None if embedding is None else matrices[embedding].shape[1]
    heads = [name for name, info in matrices.items() if HEAD.search(name) and width in (None, info.shape[1])]
    return embedding, next(iter(heads), None)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether a loader uses the embedding as head; where config.json does not say it, whether no head is stored."""
    return checkpoint.setting("tie_word_embeddings", pair_of(checkpoint.tensors)[1] is None) is True


def separate_head(ends: Iterable[Checkpoint]) -> str | None:
    """The name of the head of stacked layers, where it is a matrix of its own; None where it goes with the embedding.

    ends   the models of the first and of the last slice
    It goes with the embedding where all of these models tie the two, and where none has a head.
    """
    models = list(ends)
    heads = [head for one in models if (head := pair_of(one.tensors)[1]) is not None]
    return heads[0] if heads and not all(map(is_tied, models)) else None


def embedding_as(head: str, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
    """{own name: head} for a model that has only its embedding as head; nothing for one that stores a head, or has
    none. Raises MismatchError where the embedding is not found.
    """
    embedding, own = pair_of({name: checkpoint.tensors[name] for name in names})
    if own is not None or not is_tied(checkpoint):
        return {}
    if embedding is None:
        raise MismatchError(
            f"{checkpoint.reference}: ties head and embedding, and a model of the other slices does not, so the output "
            f"needs {head!r}; but which of its tensors is the embedding cannot be told by its name. Untie it first: "
            f"store the embedding also as {head!r}, under tie_word_embeddings: false."
        )
    return {embedding: head}


def plan_tie(pieces: Sequence[Piece], donor: Checkpoint) -> tuple[bool | None, list[str]]:
    """What the donor's config.json must say of `tie_word_embeddings` instead, None if nothing, and notes on the head.

    Raises MismatchError where the parts leave out the head that the donor's model has.
    """
    made = {name: piece for piece in pieces for name in piece.donor.tensors}
    embedding, head = pair_of({name: piece.donor.tensors[name] for name, piece in made.items()})
    if embedding is None or all(piece.layers is None and not piece.part.module for piece in pieces):
        return None, []
    tied, notes = is_tied(made[embedding].donor.whole or made[embedding].donor), []
    if head is not None:
        tied, lender = tied and made[head] is made[embedding], made[head].donor
        if head not in (lender.seen_as or {head: head}):
            notes.append(f"{head} is the embedding of {lender.reference}, which ties the two.")
    elif not tied and pair_of(donor.tensors)[1] is not None:
        raise MismatchError(
            f"the output would have no head: {donor.reference} has one beside its embedding, and the last slice comes "
            f"from {pieces[-1].donor.reference}, which has none and does not tie it to the embedding "
            "(tie_word_embeddings: false). Take the last slice from a model with a head."
        )
    if tied == is_tied(donor) or (head is None and not tied):
        return None, notes
    said = "are one matrix" if tied else "are two matrices"
    notes.append(f"embedding and head {said}: config.json says tie_word_embeddings: {str(tied).lower()}.")
    return tied, notes
