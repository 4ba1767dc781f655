"""Writes the tokenizer files of an output that has tokens more, or fewer, than the tokenizer it starts from.

Files that need no change keep their bytes. New added tokens are matched in text, as they were in their model. New
pieces of a BPE vocabulary come with their model's merges if these extend the ones that are there, so that text is split
as in that model. A model that splits by other merges adds its pieces alone: they can be read, and text is split as
before, for no model knows a mixture of both ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmerge.checkpoint.reading import json_text, read_file
from rlmerge.checkpoint.tokenizer import OTHER_FORMATS, TEMPLATE_FOLDER, TOKENIZER_FILES, Tokenizer
from rlmerge.errors import MismatchError

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_SAVE = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one"


@dataclass(frozen=True)
class NewToken:
    """A token that is new to the tokenizer, its id, and the tokenizer that it comes from; `added`: matched in text."""

    content: str
    number: int
    origin: Tokenizer | None
    added: bool


def write_tokenizer(start: Tokenizer, gone: set[str], new: Sequence[NewToken]) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer files by name, and what the user should know of them.

    start  whose files they are; its tokens keep their ids, except that those in `gone` are left out
    Raises MismatchError where the format of the files does not allow it.
    """
    files = {name: read_file(path) for name, path in start.files.items()}
    if not gone and not new:
        return files, []
    if start.whole is None:
        raise MismatchError(
            f"{start.folder}: its tokenizer must be changed, and there is no tokenizer.json to write the change into. "
            f"{_SAVE}."
        )
    whole = {**start.whole, "model": dict(start.whole["model"])}
    _leave_out(whole, gone)
    entries = [_entry(token) for token in new if token.added]
    pieces = [token for token in new if not token.added]
    notes = _add_pieces(start, whole, pieces) if pieces else []
    whole.setdefault("added_tokens", [])
    whole["added_tokens"] = sorted([*whole["added_tokens"], *entries], key=lambda entry: entry["id"])
    _pin(start, whole, pieces)
    files["tokenizer.json"] = as_json(whole)
    _rewrite_settings(files, gone, entries)
    return files, notes + _rewrite_vocabulary(files, whole, gone, pieces, start)


def splitting(whole: dict[str, Any]) -> Any:
    """What decides how a tokenizer.json splits text, apart from its added tokens: equal for tokenizers that agree."""
    model = whole["model"]
    kind = model.get("type")
    parts: list[Any] = [kind, whole.get("normalizer"), whole.get("pre_tokenizer"), _pairs(model.get("merges") or [])]
    parts += [model.get(key) for key in ("byte_fallback", "ignore_merges", "continuing_subword_prefix")]
    if kind not in ("BPE", None) or model.get("ignore_merges"):
        added = {entry["content"] for entry in whole.get("added_tokens") or []}
        parts.append([piece for piece in model["vocab"] if kind == "Unigram" or piece not in added])
    return parts


def added_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The tokens that a tokenizer matches in text, with their settings as tokenizer.json stores them."""
    if tokenizer.whole is not None:
        return {entry["content"]: entry for entry in tokenizer.whole.get("added_tokens") or []}
    found: dict[str, dict[str, Any]] = {}
    if "added_tokens.json" in tokenizer.files:
        listed = json.loads(read_file(tokenizer.files["added_tokens.json"]))
        found = {content: {"id": number, "content": content, **_PLAIN} for content, number in listed.items()}
    if "tokenizer_config.json" in tokenizer.files:
        decoder = json.loads(read_file(tokenizer.files["tokenizer_config.json"])).get("added_tokens_decoder") or {}
        found |= {entry["content"]: {"id": int(number), **entry} for number, entry in decoder.items()}
    return found


def _leave_out(whole: dict[str, Any], gone: set[str]) -> None:
    """Takes tokens out of the vocabulary, and with them the merges that need them."""
    model = whole["model"]
    whole["added_tokens"] = [entry for entry in whole.get("added_tokens") or [] if entry["content"] not in gone]
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        # the id is the place, so only the end may go; ids without a row are at the end
        end = next((n for n in range(len(vocabulary), 0, -1) if vocabulary[n - 1][0] not in gone), 0)
        model["vocab"] = vocabulary[:end]
        return
    model["vocab"] = {piece: number for piece, number in vocabulary.items() if piece not in gone}
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        kept = model["vocab"]
        model["merges"] = [m for m in model["merges"] if all(piece in kept for piece in _three(m, prefix))]


def _entry(token: NewToken) -> dict[str, Any]:
    """The token as an entry of tokenizer.json, with the settings of the model that it comes from."""
    known = added_tokens(token.origin).get(token.content) if token.origin is not None else None
    settings = {key: (known or _PLAIN).get(key, value) for key, value in _PLAIN.items()}
    return {"id": token.number, "content": token.content, **settings}


def _add_pieces(start: Tokenizer, whole: dict[str, Any], pieces: Sequence[NewToken]) -> list[str]:
    """New entries of the vocabulary, and merges; notes on pieces that no text is split into."""
    model = whole["model"]
    origins = list({id(token.origin): token.origin for token in pieces if token.origin is not None}.values())
    for origin in origins:
        if origin.whole is None:
            raise MismatchError(
                f"{origin.folder}: has tokens that {start.folder} lacks, and no tokenizer.json to take them from. "
                f"{_SAVE}."
            )
        theirs = origin.whole["model"].get("type")
        if theirs != model.get("type") or model.get("type") not in ("BPE", "WordPiece", "WordLevel"):
            raise MismatchError(
                f"{start.folder} and {origin.folder}: a {model.get('type')} and a {theirs} tokenizer with different "
                "vocabularies have no union: the score of a piece means nothing to another model. Write "
                "`tokenizer_source: base`, or a model whose tokenizer the output is to have."
            )
        if _alphabet(whole) != _alphabet(origin.whole):
            raise MismatchError(
                f"{start.folder} and {origin.folder}: their tokenizers spell spaces in different ways "
                f"({_alphabet(whole)} and {_alphabet(origin.whole)}), so their pieces have no union. Write "
                "`tokenizer_source: base`, or a model whose tokenizer the output is to have."
            )
    model["vocab"] = {**model["vocab"], **{token.content: token.number for token in pieces}}
    if model.get("type") != "BPE":
        return []
    notes, own = [], _pairs(model.get("merges") or [])
    for origin in origins:
        merges = (origin.whole or {})["model"].get("merges") or []
        if _pairs(merges[: len(own)]) == own:
            _add_merges(model, merges)
            continue
        count = sum(token.origin is origin for token in pieces)
        notes.append(
            f"{origin.folder}: its merges do not extend those of {start.folder}, so {count} of its tokens have ids and "
            "rows in the output, and text is never split into them."
        )
    return notes


def _add_merges(model: dict[str, Any], merges: Iterable[Any]) -> None:
    """Appends the merges that are new and whose pieces are all there, in the spelling of those that are there."""
    known, prefix = set(_pairs(model.get("merges") or [])), model.get("continuing_subword_prefix") or ""
    found: list[tuple[str, str]] = []
    for merge in merges:
        pair = _pair(merge)
        if pair not in known and all(piece in model["vocab"] for piece in _three(merge, prefix)):
            known.add(pair)
            found.append(pair)
    listed = [*_pairs(model.get("merges") or []), *found]
    spelt = bool(model.get("merges")) and isinstance(model["merges"][0], str)
    if spelt and not any(" " in piece for pair in listed for piece in pair):
        model["merges"] = [" ".join(pair) for pair in listed]
    else:
        model["merges"] = [list(pair) for pair in listed]


def _pin(start: Tokenizer, whole: dict[str, Any], pieces: Sequence[NewToken]) -> None:
    """Makes sure that a reader gives every added token its id.

    The library numbers added tokens that are not in the vocabulary one after the other, after its size, whatever the
    file says; in the vocabulary, they keep their ids.
    """
    vocabulary = whole["model"].get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    last = -1
    wrong = False
    for entry in whole["added_tokens"]:
        given = vocabulary.get(entry["content"], max(len(vocabulary), last + 1))
        wrong |= given != entry["id"]
        last = max(last, given)
    if not wrong:
        return
    if not isinstance(whole["model"].get("vocab"), dict):
        raise MismatchError(
            f"{start.folder}: its tokenizer numbers pieces and added tokens in a way that leaves no room for tokens of "
            "other models. Write `tokenizer_source: base`."
        )
    pinned = {entry["content"]: entry["id"] for entry in whole["added_tokens"]}
    both = whole["model"]["vocab"] | pinned
    whole["model"]["vocab"] = dict(sorted(both.items(), key=lambda item: item[1]))


def _rewrite_settings(files: dict[str, bytes], gone: set[str], entries: list[dict[str, Any]]) -> None:
    """tokenizer_config.json, added_tokens.json and special_tokens_map.json, where the tokenizer has them."""
    if "added_tokens.json" in files:
        listed = {
            token: number for token, number in json.loads(files["added_tokens.json"]).items() if token not in gone
        }
        files["added_tokens.json"] = as_json(listed | {entry["content"]: entry["id"] for entry in entries})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name not in files:
            continue
        settings = json.loads(files[name])
        kept = {key: value for key, value in settings.items() if _content(value) not in gone or key == "chat_template"}
        if isinstance(kept.get("added_tokens_decoder"), dict):
            decoder = {k: v for k, v in kept["added_tokens_decoder"].items() if _content(v) not in gone}
            new = {str(e["id"]): {key: value for key, value in e.items() if key != "id"} for e in entries}
            kept["added_tokens_decoder"] = decoder | new
        if kept != settings:
            files[name] = as_json(kept)


def _rewrite_vocabulary(
    files: dict[str, bytes], whole: dict[str, Any], gone: set[str], pieces: Sequence[NewToken], start: Tokenizer
) -> list[str]:
    """vocab.json and merges.txt follow; what cannot (SentencePiece's file, vocab.txt) is left out, which is noted."""
    listed = (start.whole or {})["model"].get("vocab") or {}
    listed = listed if isinstance(listed, dict) else {piece: 0 for piece, _ in listed}
    if not pieces and not gone & listed.keys():
        return []
    if "vocab.json" in files:
        old = {piece: n for piece, n in json.loads(files["vocab.json"]).items() if piece not in gone}
        files["vocab.json"] = as_json(old | {token.content: token.number for token in pieces})
    if "merges.txt" in files:
        lines = ["#version: 0.2", *(" ".join(pair) for pair in _pairs(whole["model"].get("merges") or []))]
        files["merges.txt"] = ("\n".join(lines) + "\n").encode()
    out = [name for name in ("tokenizer.model", "vocab.txt", *OTHER_FORMATS) if files.pop(name, None) is not None]
    return [f"{name} cannot hold the vocabulary of the output and is left out; tokenizer.json has it." for name in out]


def _alphabet(whole: dict[str, Any]) -> str:
    text = json.dumps([whole.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in text:
        return "bytes as letters"
    return "'▁'" if "▁" in text or '"Metaspace"' in text else "as they are"


def _pair(merge: Any) -> tuple[str, str]:
    """A merge as stored: 'a b' or [a, b]."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    return [_pair(merge) for merge in merges]


def _three(merge: Any, prefix: str) -> tuple[str, str, str]:
    """The two pieces of a merge and what they become."""
    first, second = _pair(merge)
    return first, second, first + second.removeprefix(prefix)


def _content(value: Any) -> Any:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def as_json(value: Any) -> bytes:
    """Readable JSON, as tokenizers store theirs."""
    return (json_text(value, 2) + "\n").encode()


def is_tokenizer_file(name: str) -> bool:
    """Whether a small file of a model belongs to its tokenizer."""
    return name in TOKENIZER_FILES or Path(name).parts[0] == TEMPLATE_FOLDER
