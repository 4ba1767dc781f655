"""Gram matrices in a plan: the folders that a recipe names, and which tensors have one in every model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rlmerge.checkpoint.gram import GramFolder, open_gram
from rlmerge.checkpoint.header import TensorInfo
from rlmerge.checkpoint.match import Matched
from rlmerge.checkpoint.restack import view_gram
from rlmerge.errors import GramError
from rlmerge.pieces import Models, Piece
from rlmerge.plan import Place, TensorPlan
from rlmerge.recipe import Recipe


def open_grams(
    recipe: Recipe, variants: Sequence[Recipe], models: Models, pieces: Sequence[Piece], matched: Sequence[Matched]
) -> tuple[tuple[GramFolder, ...], list[tuple[GramFolder, ...]], list[str]]:
    """The Gram matrices of the inputs, if the method reads them, and as each piece sees them; all experts have them."""
    nothing: list[tuple[GramFolder, ...]] = [() for _ in pieces]
    if recipe.bare:
        return (), nothing, []
    paths = recipe.gram_paths
    having = [key for key in models.experts if paths[key] is not None]
    if not any(_uses_gram(variant) for variant in variants):
        notes = [f"`gram:` is given, but method {recipe.merge_method!r} does not read it."]
        return (), nothing, notes if having else []
    if len(having) < len(models.experts):
        missing = ", ".join(key for key in models.experts if key not in having)
        raise GramError(
            f"{recipe.merge_method!r} needs the Gram matrices of the inputs of every model; without `gram:` are: "
            f"{missing}.\n  Make them with `rlmerge gram MODEL --data FILE.jsonl -o FOLDER`, and write `gram: FOLDER` "
            "for each model in the recipe, or --gram on the command line."
        )
    plain = all(piece.layers is None for piece in pieces)
    opened = {
        key: open_gram(path, models.donor if plain or models.experts[key].adapter else models.experts[key])
        for key in models.experts
        if (path := paths[key]) is not None
    }
    of_pieces = []
    for piece in pieces:
        folders = [opened[key] for key in piece.keys]
        if piece.layers is not None:
            turned = [{own: name for name, own in names.items()} for names in piece.names]
            folders = [view_gram(folder, names) for folder, names in zip(folders, turned)]
        of_pieces.append(tuple(folders))
    lacking, shared = _sort(pieces, of_pieces, matched)
    if not shared:
        raise GramError("the models have no Gram matrix in common, so nothing could be solved for.")
    notes = []
    if lacking:
        notes.append(
            f"{len(lacking)} matrices have no Gram matrix in every model and are averaged: "
            + ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
        )  # fmt: skip
    return tuple(opened.values()), of_pieces, notes


def _sort(
    pieces: Sequence[Piece], of_pieces: Sequence[tuple[GramFolder, ...]], matched: Sequence[Matched]
) -> tuple[list[str], list[str]]:
    """Matrices that some model has no Gram matrix for, and those that all have one for."""
    lacking, shared = [], []
    for piece, folders, found in zip(pieces, of_pieces, matched):
        for name in (name for name, info in piece.donor.tensors.items() if len(info.shape) == 2):
            (shared if _in_all(name, folders, found.tied) else lacking).append(name)
            if len({name in folder.first for folder in folders if name in folder.tensors}) > 1:
                raise GramError(
                    f"the Gram matrices of {name!r} disagree on the dimension along which its inputs run "
                    "('input_first' of gram.json): estimate them alike."
                )
    return lacking, shared


def _in_all(name: str, grams: tuple[GramFolder, ...], tied: Mapping[str, str]) -> bool:
    """Whether every expert has a Gram matrix for this tensor. Tied copies, which must stay equal, have none."""
    return all(name in folder.tensors for folder in grams) and name not in tied and name not in tied.values()


def with_grams(
    tensor: TensorPlan, grams: tuple[GramFolder, ...], place: Callable[[TensorInfo], Place], tied: Mapping[str, str]
) -> TensorPlan:
    """The same with the places of its Gram matrices, where every expert has one."""
    name = tensor.name
    if not grams or tensor.carry is not None or not _in_all(name, grams, tied):
        return tensor
    places = tuple(place(folder.tensors[name]) for folder in grams)
    known = all(name in folder.digests for folder in grams)
    digests = tuple(folder.digests[name] for folder in grams) if known else ()
    return replace(tensor, grams=places, gram_digests=digests, gram_first=name in grams[0].first)


def _uses_gram(recipe: Recipe) -> bool:
    values = {spec.name: recipe.parameters.get(spec.name, spec.default) for spec in recipe.method.parameters}
    return recipe.method.uses_gram(values)
