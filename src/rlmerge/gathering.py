"""The part of a plan that a new vocabulary changes: embeddings, heads and their Fishers are read through row maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.header import TensorInfo
from rlmerge.checkpoint.match import Source
from rlmerge.checkpoint.names import HEAD
from rlmerge.checkpoint.row_maps import MEAN, RowMap
from rlmerge.checkpoint.vocabulary import Vocabulary
from rlmerge.errors import FisherError, MismatchError
from rlmerge.heads import is_tied, pair_of
from rlmerge.pieces import Piece
from rlmerge.plan import GatheredPlace, Place, TensorPlan

Places = Callable[[TensorInfo], Place]


def gather_rows(
    tensor: TensorPlan, vocabulary: Vocabulary, piece: Piece, sources: Sequence[Source], place_of: Places
) -> TensorPlan:
    """The plan of a tensor with a row for every token, every input of it in the output's order of rows.

    sources   what `match` found for each expert of the piece; none for a tensor that is only carried
    place_of  where the plan's files hold a stored tensor
    Raises MismatchError or FisherError for inputs of which no single row can be read.
    """
    if tensor.name not in vocabulary.tensors:
        return tensor
    numbers = [vocabulary.experts[key] for key in piece.keys]
    home = vocabulary.number_of(piece.donor)
    infos: dict[int, TensorInfo | None] = {}
    for number, model in enumerate(vocabulary.members):
        kept = piece.donor if model.checkpoint is None or model.checkpoint.adapter else model.checkpoint
        infos[number] = _stored(kept, tensor.name) if kept.lora is None else None
    for number, source in zip(numbers, sources):
        # a tied expert may store it under another name
        own = source.info if source.kind == "tensor" else None
        infos[number] = piece.donor.tensors[tensor.name] if source.kind == "base" else own
    origins = tuple(None if info is None else place_of(info) for info in infos.values())

    def gathered(number: int, own: Place | None) -> Place | None:
        chosen, info = vocabulary.table.maps[number], infos[number]
        if chosen.is_identity(number, vocabulary.members[number].rows.count):
            return own
        _check(tensor, vocabulary, number, origins)
        stored = origins[number]
        if own is None or info is None or stored is None:
            return own
        size = stored.nbytes // info.shape[0] * vocabulary.rows
        return GatheredPlace(own.file, own.start, own.dtype, size, rows=number, origins=origins)

    experts = []
    for number, source in zip(numbers, tensor.experts):
        maps = vocabulary.table.maps
        if source.kind == "base" and not _same(maps[number], number, maps[home], home):
            _refuse(tensor, vocabulary.members[number].key, "is an adapter whose tokens are not those of its base")
        experts.append(replace(source, place=gathered(number, source.place)))
    base = None if tensor.base is None else gathered(home, tensor.base)
    return _gather_fishers(replace(tensor, base=base, experts=tuple(experts)), vocabulary, numbers)


def _stored(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    """A tensor of a model; for its head, its embedding where it ties the two and stores one."""
    if name not in checkpoint.tensors and HEAD.search(name) and is_tied(checkpoint):
        name = pair_of(checkpoint.tensors)[0] or name
    return checkpoint.tensors.get(name)


def _gather_fishers(tensor: TensorPlan, vocabulary: Vocabulary, numbers: Sequence[int]) -> TensorPlan:
    """Fishers through the same maps: 0 where a model has no token of its own. Recorded sums are of other rows then."""
    count, places = len(vocabulary.members), []
    for number, place in zip(numbers, tensor.fishers):
        chosen, model = vocabulary.table.maps[count + number], vocabulary.members[number]
        if chosen.is_identity(0, model.rows.count):
            places.append(place)
            continue
        if place.kind != "dense":
            raise FisherError(
                f"the {place.kind} Fisher of {model.key} for tensor {tensor.name!r} cannot follow "
                "a new vocabulary: estimate it anew and store it whole (without --only, without --factored)."
            )
        size = place.nbytes // model.rows.count * vocabulary.rows
        places.append(GatheredPlace(place.file, place.start, place.dtype, size, rows=count + number, origins=(place,)))
    if all(new is old for new, old in zip(places, tensor.fishers)):
        return tensor
    return replace(tensor, fishers=tuple(places), fisher_sums=(), fisher_digests=())


def _check(tensor: TensorPlan, vocabulary: Vocabulary, number: int, origins: Sequence[Place | None]) -> None:
    """Raises MismatchError where a map needs rows that cannot be read one by one."""
    for origin in sorted(_origins(vocabulary, number) | {number}):
        place, key = origins[origin], vocabulary.members[origin].key
        if place is None:
            _refuse(tensor, key, "has it not, or as a low-rank update of a LoRA")
        elif place.kind == "packed":
            _refuse(tensor, key, "is a delta pack, which has it as steps from its base: unpack it (rlmerge unpack)")


def _origins(vocabulary: Vocabulary, number: int) -> set[int]:
    chosen = vocabulary.table.maps[number]
    found = set(np.unique(chosen.origin).tolist())
    for mean in np.unique(chosen.row[chosen.origin == MEAN]).tolist():
        found |= set(np.unique(vocabulary.table.means[mean].origin).tolist())
    return {origin for origin in found if origin >= 0}


def _same(one: RowMap, number: int, other: RowMap, home: int) -> bool:
    """Whether two models' maps are one, but that each calls its own rows its own."""
    origin = np.where(one.origin == number, home, one.origin)
    return bool((origin == other.origin).all() and (one.row == other.row).all())


def _refuse(tensor: TensorPlan, key: str, reason: str) -> None:
    raise MismatchError(
        f"{tensor.name!r} must follow the vocabulary of the output row by row, and {key} {reason}. Merge it into a "
        "full model first, or leave out `tokenizer_source` and `tokenizer`."
    )
