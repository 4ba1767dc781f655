"""The vocabulary of an output whose recipe names one: its tokens, their ids, and the row that each model gives to each.

Nothing here reads a weight, and nothing needs transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmerge.checkpoint.folder import Checkpoint, read_json_object
from rlmerge.checkpoint.header import TensorInfo
from rlmerge.checkpoint.row_maps import ZERO, Mapper, Origin, RowMap, RowTable, count_origins
from rlmerge.checkpoint.token_ids import FILES, follow_settings, stops
from rlmerge.checkpoint.tokenizer import plausible
from rlmerge.checkpoint.tokenizer_files import NewToken, added_tokens, splitting, write_tokenizer
from rlmerge.checkpoint.vocabulary_models import Member, find_model, open_members, vocabulary_tensors
from rlmerge.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from rlmerge.recipe import Recipe

_SHOWN, _LISTED = 3, 100


@dataclass(frozen=True)
class Vocabulary:
    """What becomes of embedding, head and tokenizer.

    tensors   names of the tensors with a row for every token
    rows      of each of them in the output
    members   the models in the order of the maps: the base if there is one, the experts, the bases of slices
    experts   the number of each expert among them
    table     the maps; one for each member, then those for their Fishers
    files     the tokenizer files of the output
    ids       id of a token in the model that lends config.json -> its id in the output, None where it has none
    lender    config.json and generation_config.json of the model that lends the tokenizer, where it is another one
    report    tokens by where they come from and go to, as `check` prints it and rlmerge.json keeps it
    """

    tensors: frozenset[str]
    rows: int
    members: tuple[Member, ...]
    experts: dict[str, int]
    table: RowTable
    files: dict[str, bytes]
    ids: dict[int, int | None]
    lender: dict[str, dict[str, Any]]
    report: dict[str, Any]
    notes: tuple[str, ...]

    def resized(self, info: TensorInfo) -> TensorInfo:
        """A tensor of the donor in the shape that it has in the output."""
        if info.name not in self.tensors or info.shape[0] == self.rows:
            return info
        shape = (self.rows, *info.shape[1:])
        return replace(info, shape=shape, nbytes=info.nbytes // info.shape[0] * self.rows)

    def stored_by(self, donor: Checkpoint, key: str) -> Checkpoint:
        """The donor with as many rows as a model has: what a Fisher of that model must look like."""
        rows = self.members[self.experts[key]].rows.count
        shapes = {name: (rows, *donor.tensors[name].shape[1:]) for name in self.tensors if name in donor.tensors}
        tensors = {
            name: replace(info, shape=shapes[name]) if name in shapes else info for name, info in donor.tensors.items()
        }
        return replace(donor, tensors=tensors)

    def number_of(self, checkpoint: Checkpoint) -> int:
        """The number of a model, or of what a part of the recipe sees of it."""
        whole = checkpoint.whole or checkpoint
        return next(number for number, model in enumerate(self.members) if model.checkpoint is whole)


def plan_vocabulary(
    recipe: Recipe, base: Checkpoint | None, experts: Mapping[str, Checkpoint], opened: Sequence[Checkpoint]
) -> Vocabulary | None:
    """The vocabulary that `tokenizer_source:` or `tokenizer:` asks for; None without them.

    experts  by their keys, in the order of processing; `opened` are all models, with the bases of slices
    Raises RecipeError for a model that is none of the merge's or a token that is nowhere, MismatchError for tokenizers
    or embeddings that do not allow what is asked.
    """
    policy = recipe.tokenizer or {"source": recipe.tokenizer_source}
    if policy["source"] is None:
        return None
    place = ("tokenizer", "source") if recipe.tokenizer else ("tokenizer_source",)
    members, outside = open_members(recipe, base, experts, opened, policy["source"], place)
    home = 0 if base is not None else list(experts).index(recipe.models[0].key)
    donor = base if base is not None else experts[recipe.models[0].key]
    union = policy["source"] == "union"
    chosen_start = None if policy["source"] in ("union", "base") else find_model(members, policy["source"])
    start = members[home if chosen_start is None else chosen_start] if outside is None else outside
    tokens, new = _choose_tokens(start, members if union else [], members, policy.get("tokens") or {})
    with plausible(start.tokenizer.folder):
        files, notes = write_tokenizer(start.tokenizer, set(start.rowless), new)
    rows = _count_rows(tokens, start, outside is not None, policy.get("pad_to_multiple_of"))
    chosen, forced = _choose_rows(policy.get("tokens") or {}, members, recipe)
    padding = [home] if chosen_start in (None, home) else [home, chosen_start]
    mapper = Mapper(
        [model.rows for model in members], tokens, rows, 0 if base is not None else None, home, padding, chosen, forced
    )
    maps = mapper.maps()
    table = RowTable((*maps, *(entry.only(number) for number, entry in enumerate(maps))), tuple(mapper.means))
    ids = {number: tokens.get(token) for token, number in members[home].rows.tokens.items()}
    report = _report(policy["source"], members, home, tokens, rows, maps, mapper.nowhere)
    home_folder, start_folder = members[home].tokenizer.folder, start.tokenizer.folder
    lender = _settings(start_folder) if start_folder != home_folder else {}
    notes += _notes(members, start, files, new, mapper.nowhere)
    if lender and (note := _stop_note(start, tokens, _settings(home_folder), lender, ids)):
        notes.append(note)
    numbers = {key: number for number, key in enumerate(experts, start=0 if base is None else 1)}
    following = vocabulary_tensors(donor)
    if recipe.slices or recipe.modules:  # a head may come from a model that has one where the donor has none
        following = following.union(*(vocabulary_tensors(one) for one in opened if not one.adapter))
    return Vocabulary(following, rows, tuple(members), numbers, table, files, ids, lender, report, tuple(notes))


# -- the output's tokens ---------------------------------------------------------------------------------------------


def _choose_tokens(
    start: Member, joined: Sequence[Member], members: Sequence[Member], asked: Mapping[str, Any]
) -> tuple[dict[str, int], list[NewToken]]:
    """The output's tokens with their ids, and those that the tokenizer to start from does not have.

    Its own keep their ids. Then come those of the other models, model after model in the order of processing, in the
    order of their ids; then tokens that only `tokens:` names.
    """
    tokens = dict(start.rows.tokens)
    number = 1 + max(tokens.values(), default=-1)
    new: list[NewToken] = []
    for model in joined:
        extra = sorted((n, token) for token, n in model.rows.tokens.items() if token not in tokens)
        matched = added_tokens(model.tokenizer) if extra else {}
        for _, token in extra:
            tokens[token] = number
            new.append(NewToken(token, number, model.tokenizer, token in matched))
            number += 1
    for token in asked:
        if token not in tokens:
            having = next((model.tokenizer for model in members if token in model.rows.tokens), None)
            tokens[token] = number
            new.append(NewToken(token, number, having, True))
            number += 1
    return tokens, new


def _count_rows(tokens: Mapping[str, int], start: Member, foreign: bool, multiple: int | None) -> int:
    """Rows of the output: padding that the model has is kept, unless the recipe says what to pad to."""
    needed = 1 + max(tokens.values(), default=-1)
    if multiple is not None:
        return -(-needed // multiple) * multiple
    return needed if foreign else max(needed, start.rows.count)


def _choose_rows(
    asked: Mapping[str, Any], members: Sequence[Member], recipe: Recipe
) -> tuple[dict[str, Origin], frozenset[str]]:
    """What `tokens:` says: the origin of each token's row, and the tokens that have it in every model."""
    chosen: dict[str, Origin] = {}
    for token, entry in asked.items():
        source = entry.get("source")
        if source is None:
            if not any(token in model.rows.tokens for model in members):
                raise RecipeError(
                    f"tokens.{token}: no model has this token. Write where its embedding comes from: 'source: {{kind: "
                    "model_token, model: MODEL, token: TOKEN}', or 'source: {kind: zero}'.",
                    ("tokenizer",),
                )
            continue
        if source == {"kind": "zero"}:
            chosen[token] = (ZERO, 0)
            continue
        reference = source["model"] if isinstance(source, dict) else source
        number = find_model(members, reference)
        if number is None:
            names = [name for model in members for name in model.names]
            raise RecipeError(
                f"tokens.{token}: {reference!r} is no model of this merge.{did_you_mean(reference, names)} There are: "
                f"{', '.join(dict.fromkeys(names))}.",
                ("tokenizer",),
            )
        chosen[token] = (number, _row_of(token, source, members[number]))
    return chosen, frozenset(token for token, entry in asked.items() if entry["force"])


def _row_of(token: str, source: Any, model: Member) -> int:
    if isinstance(source, dict) and "token_id" in source:
        row = source["token_id"]
        if row < model.rows.count:
            return row
        problem = f"{model.key} has no token_id {row}: its embedding has {model.rows.count} rows"
    else:
        wanted = source["token"] if isinstance(source, dict) else token
        if wanted in model.rows.tokens:
            return model.rows.tokens[wanted]
        lacking = "has no row of the embedding in" if wanted in model.rowless else "is no token of"
        problem = f"{wanted!r} {lacking} {model.key}"
    raise RecipeError(f"tokens.{token}: {problem}. Write another source.", ("tokenizer",))


# -- what is said of it ----------------------------------------------------------------------------------------------


def _report(
    source: str, members: Sequence[Member], home: int, tokens: Mapping[str, int], rows: int,
    maps: Sequence[RowMap], nowhere: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Per model: tokens that it brings (others before it lack them), loses, whose ids move, rows taken from others."""
    found: dict[str, Any] = {"source": source, "tokens": len(tokens), "rows": rows}
    found["padding"] = rows - len(set(tokens.values()))
    found["zero"] = nowhere[:_LISTED]
    found["models"] = {}
    seen = set(members[home].rows.tokens)
    for number, (model, entry) in enumerate(zip(members, maps)):
        own = model.rows.tokens
        added = [token for token in own if token not in seen and token in tokens]
        dropped = [token for token in own if token not in tokens]
        seen |= own.keys()
        found["models"][model.key] = {
            "rows": model.rows.count,
            "added": {"count": len(added), "tokens": added[:_LISTED]},
            "dropped": {"count": len(dropped), "tokens": dropped[:_LISTED]},
            "without_row": sorted(model.rowless)[:_LISTED],
            "moved": sum(tokens.get(token, n) != n for token, n in own.items()),
            "taken_from": count_origins(entry, number, lambda k: members[k].key),
        }
    return found


def _notes(
    members: Sequence[Member], start: Member, files: Mapping[str, bytes], new: Sequence[NewToken], nowhere: list[str]
) -> list[str]:
    notes = []
    for model in members:
        if model.rowless:
            notes.append(
                f"{model.key}: {len(model.rowless)} tokens have no row in its embedding and count as none "
                f"({some(sorted(model.rowless))})."
            )
    if nowhere:
        notes.append(f"{len(nowhere)} tokens are in no model and get rows of zeros ({some(nowhere)}).")
    changed = bool(start.rowless or new)
    whole = json.loads(files["tokenizer.json"]) if changed else start.tokenizer.whole
    if whole is None:
        return notes
    wanted, known = splitting(whole), {id(whole): True}
    for model in members:
        theirs = model.tokenizer.whole
        if theirs is not None and not known.setdefault(id(theirs), theirs is whole or splitting(theirs) == wanted):
            notes.append(
                f"{model.key}: the output's tokenizer splits text in another way than the one that it was trained with."
            )
    return notes


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: read_json_object(folder / name) for name in FILES if (folder / name).is_file()}


def _stop_note(
    start: Member, tokens: Mapping[str, int], settings: Mapping[str, dict[str, Any]],
    lender: Mapping[str, dict[str, Any]], ids: Mapping[int, int | None],
) -> str | None:  # fmt: skip
    """Says so where the new tokenizer ends a text with a token at which the model would not stop."""
    if "tokenizer_config.json" not in start.tokenizer.files:
        return None
    token = read_json_object(start.tokenizer.files["tokenizer_config.json"]).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    moved = {name: follow_settings(entry, lender.get(name, {}), ids, None) for name, entry in settings.items()}
    if not isinstance(token, str) or token not in tokens or not (ends := stops(moved)) or tokens[token] in ends:
        return None
    return (
        f"the tokenizer of {start.key} ends with {token!r}, which is {tokens[token]}, and the output stops at "
        f"{', '.join(map(str, sorted(ends)))}: look at eos_token_id in config.json and generation_config.json."
    )


def some(tokens: Sequence[str]) -> str:
    """The first of a list of tokens."""
    return ", ".join(map(repr, tokens[:_SHOWN])) + (", …" if len(tokens) > _SHOWN else "")


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report as lines: for `rlmerge check` and `explain`."""
    lines = [
        f"vocabulary ({report['source']}): {report['tokens']:,} tokens, {report['rows']:,} rows"
        + (f", {report['padding']:,} of them padding" if report["padding"] else "")
    ]
    for key, entry in report["models"].items():
        parts = [
            f"{_count(entry[what]['count'], 'token')} {what} ({some(entry[what]['tokens'])})"
            for what in ("added", "dropped")
            if entry[what]["count"]
        ]
        parts += [f"{_count(entry['moved'], 'id')} moved"] if entry["moved"] else []
        parts += [f"{_count(count, 'row')} from {origin}" for origin, count in entry["taken_from"].items()]
        lines.append(f"  {key}: {', '.join(parts) or 'as it is'}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
