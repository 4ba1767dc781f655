"""Compares the tokenizers of model folders by what they do, not by how their files are written.

Models merge only if a token id means the same in all of them; a chat template or an end token that differs does not
break a merge, but the merged model will be asked in words that one of its experts was not trained on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from rlmerge.checkpoint.reading import parse_json, read_file, refuse_outside
from rlmerge.errors import CheckpointError

if TYPE_CHECKING:
    from rlmerge.checkpoint.folder import Checkpoint

OTHER_FORMATS = ("spiece.model", "sentencepiece.bpe.model", "tekken.json")
"""Whole tokenizers in formats that are not read; other tools read them."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json", *OTHER_FORMATS,
)  # fmt: skip
TEMPLATE_FOLDER = "additional_chat_templates"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SHOWN = 3


def compare_tokenizers(
    folders: list[Path],
    lent: Mapping[Path, Mapping[str, Path]] | None = None,
    aspects: Collection[str] = ("vocabulary", "merges", "sentencepiece", "special", "templates"),
) -> list[str]:
    """What differs between the tokenizers of these folders, as sentences that name two folders each; [] for nothing.

    Compared are tokens with their ids, merges, the special tokens and the chat templates; of a folder that lacks one of
    these files, only what it has. Raises CheckpointError for a tokenizer file that cannot be read.

    lent     by folder: files that lie elsewhere, by name, as those that a delta pack has in common with its base
    aspects  what is compared
    """
    cache = _Cache(lent or {})
    distinct: list[tuple[Path, dict[str, str]]] = []
    for folder in folders:
        digests = cache.digests(folder)
        if digests and all(digests != known for _, known in distinct):
            distinct.append((folder, digests))
    if len(distinct) < 2:
        return []
    first: dict[str, tuple[Path, Any]] = {}
    differences: list[str] = []
    for folder, digests in distinct:
        with plausible(folder):
            found = _read(digests, functools.partial(cache.parsed, folder, digests))
            differences += _compare(folder, {key: found[key] for key in found if key in aspects}, first)
    return differences


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model folder, as its files tell it.

    files      the files by their names in the folder
    tokens     token -> id, added ones included; None where no file lists them (SentencePiece's own format alone)
    whole      tokenizer.json, or None
    templates  the lines of its chat templates by name; 'default' is the one that is used
    """

    folder: Path
    files: dict[str, Path]
    tokens: dict[str, int] | None
    whole: dict[str, Any] | None
    templates: dict[str, list[str]]


def open_tokenizers(folders: list[Path], lent: Mapping[Path, Mapping[str, Path]] | None = None) -> list[Tokenizer]:
    """The tokenizer of each folder; files of equal bytes are parsed once. `lent` and errors as for comparisons."""
    cache = _Cache(lent or {})
    found = []
    for folder in folders:
        digests = cache.digests(folder)
        get = functools.partial(cache.parsed, folder, digests)
        with plausible(folder):
            vocabulary = _vocabulary(get)
            for merge in _merges(get) or []:
                if not (" " in merge if isinstance(merge, str) else isinstance(merge, list) and len(merge) == 2):
                    raise ValueError(f"{str(merge)[:60]!r} is no merge of two pieces")
            templates = {name: get(name) for name in digests if "chat_template" in name}
            tokens = None if vocabulary is None else vocabulary.tokens
            found.append(
                Tokenizer(
                    folder,
                    {name: cache.place(folder, name) for name in digests},
                    tokens,
                    get("tokenizer.json"),
                    _templates(get("tokenizer_config.json") or {}, templates),
                )
            )
    return found


def lent_files(lender: Checkpoint, models: Iterable[Checkpoint]) -> dict[Path, dict[str, Path]]:
    """By folder of a delta pack: the small files that it has in common with its base, where they lie."""
    home = lender.planned or lender.folder
    return {
        model.folder: {name: home / name for name, file in model.pack.files.items() if file.of_base}
        for model in models
        if model.pack is not None
    }


@contextlib.contextmanager
def plausible(folder: Path) -> Iterator[None]:
    """JSON that is not what tokenizers look like is an error that says so."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: its tokenizer files are not what tokenizers look like ({type(error).__name__}: {error}). "
            "Restore them from the original model."
        ) from None


def _compare(folder: Path, aspects: dict[str, Any], first: dict[str, tuple[Path, Any]]) -> list[str]:
    """Compare a folder with the first that had each aspect; `first` learns the aspects that are new."""
    differences: list[str] = []
    for aspect, value in aspects.items():
        other, reference = first.setdefault(aspect, (folder, value))
        if value is not reference and value != reference:
            differences += _COMPARE[aspect](other, folder, reference, value)
    return differences


class _Cache:
    """Parses files of equal bytes once."""

    def __init__(self, lent: Mapping[Path, Mapping[str, Path]]) -> None:
        self._lent = lent
        self._parsed: dict[str, Any] = {}

    def digests(self, folder: Path) -> dict[str, str]:
        """xxh3 of each tokenizer file that the folder has; additional chat templates among them."""
        names = [
            *TOKENIZER_FILES,
            *(f"{TEMPLATE_FOLDER}/{file.name}" for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))),
        ]
        names += sorted(name for name in self._lent.get(folder, {}) if name.startswith(f"{TEMPLATE_FOLDER}/"))
        files = {name: file for name in names if (file := self.place(folder, name)).is_file()}
        for name, file in files.items():
            refuse_outside(file, Path(*file.parts[: -len(Path(name).parts)]))
        return {name: xxhash.xxh3_128_hexdigest(read_file(file)) for name, file in files.items()}

    def place(self, folder: Path, name: str) -> Path:
        """Where a file of a folder lies."""
        return self._lent.get(folder, {}).get(name, folder / name)

    def parsed(self, folder: Path, digests: dict[str, str], name: str) -> Any:
        """A JSON object, or the lines of a text file (there, kinds of new lines do not matter); None without it."""
        if name not in digests:
            return None
        key = f"{digests[name]} {Path(name).suffix}"
        if key not in self._parsed:
            self._parsed[key] = _parse(self.place(folder, name))
        return self._parsed[key]


def _parse(file: Path) -> Any:
    try:
        text = read_file(file).decode("utf-8")
        if file.suffix != ".json":
            return text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        value = parse_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({str(error)[:200]}). Restore it from the original model."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object {{...}}. Restore it from the original model.")
    return value


@dataclass(frozen=True)
class _Vocabulary:
    tokens: dict[str, int]
    scores: tuple[float, ...]


def _read(digests: dict[str, str], get: Callable[[str], Any]) -> dict[str, Any]:
    """The comparable aspects of one folder, only those that its files tell."""
    aspects: dict[str, Any] = {"vocabulary": _vocabulary(get), "merges": _merges(get)}
    if aspects["vocabulary"] is None:
        aspects["sentencepiece"] = digests.get("tokenizer.model")
    config, special = get("tokenizer_config.json"), get("special_tokens_map.json")
    if config is not None or special is not None:
        aspects["special"] = {key: _content((config or {}).get(key) or (special or {}).get(key)) for key in _SPECIAL}
    templates = [name for name in digests if "chat_template" in name]
    if config is not None or templates:
        aspects["templates"] = _templates(config or {}, {name: get(name) for name in templates})
    return {aspect: value for aspect, value in aspects.items() if value is not None}


def _vocabulary(get: Callable[[str], Any]) -> _Vocabulary | None:
    added: list[tuple[str, int]] = []
    scores: tuple[float, ...] = ()
    if (whole := get("tokenizer.json")) is not None:
        vocabulary = whole["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the position
            scores = tuple(score for _, score in vocabulary)
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = [(token["content"], token["id"]) for token in whole.get("added_tokens") or []]
    elif (vocabulary := get("vocab.json")) is None:
        if (lines := get("vocab.txt")) is None:
            return None
        vocabulary = {line: number for number, line in enumerate(lines)}
    if whole is None:
        added += (get("added_tokens.json") or {}).items()
        decoder = (get("tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
        added += [(token["content"], int(number)) for number, token in decoder.items()]
    tokens = {**vocabulary, **dict(added)}
    for token, number in tokens.items():
        if type(token) is not str or type(number) is not int or number < 0:
            raise ValueError(f"token {str(token)[:60]!r} has the id {str(number)[:60]!r}")
    return _Vocabulary(tokens, scores)


def _merges(get: Callable[[str], Any]) -> list[Any] | None:
    """Merges in order, as stored: 'a b' or [a, b]."""
    if (whole := get("tokenizer.json")) is not None:
        return whole["model"].get("merges")
    return [line for line in get("merges.txt") or [] if line and not line.startswith("#version")] or None


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else (m[0], m[1]) for m in merges]  # type: ignore[misc]


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _templates(config: dict[str, Any], files: dict[str, Any]) -> dict[str, list[str]]:
    """Lines of every named template; a file goes before the configuration, as in transformers."""
    stored = config.get("chat_template") or {}
    if isinstance(stored, list):
        stored = {entry["name"]: entry["template"] for entry in stored}
    named: dict[str, str] = {"default": stored} if isinstance(stored, str) else dict(stored)
    lines = {name: text.replace("\r\n", "\n").removesuffix("\n").split("\n") for name, text in named.items()}
    for name, held in sorted(files.items()):
        if name == "chat_template.json":
            text = held["chat_template"]
            lines.setdefault("default", text.replace("\r\n", "\n").removesuffix("\n").split("\n"))
        else:
            lines["default" if name == "chat_template.jinja" else Path(name).stem] = held
    return lines


def _compare_vocabularies(a: Path, b: Path, one: _Vocabulary, two: _Vocabulary) -> list[str]:
    differences = []
    only = [
        (folder, [f"{token!r} = {number}" for token, number in here.items() if token not in there])
        for folder, here, there in ((a, one.tokens, two.tokens), (b, two.tokens, one.tokens))
    ]
    moved = [
        f"{token!r} is {number} and {two.tokens[token]}"
        for token, number in one.tokens.items()
        if two.tokens.get(token, number) != number
    ]
    parts = [f"{len(tokens)} only in {folder} ({_some(tokens)})" for folder, tokens in only if tokens]
    parts += [f"{len(moved)} with other ids ({_some(moved)})"] if moved else []
    if parts:
        differences.append(f"The tokens of {a} and {b} differ: {', '.join(parts)}.")
    elif one.scores != two.scores:
        differences.append(f"The tokens of {a} and {b} have different scores, so they split text differently.")
    return differences


def _compare_merges(a: Path, b: Path, one: list[Any], two: list[Any]) -> list[str]:
    one, two = _pairs(one), _pairs(two)
    if one == two:
        return []
    place = next(i for i, (x, y) in enumerate(zip_longest(one, two)) if x != y)
    here, there = (repr(" ".join(m[place])) if place < len(m) else "no more" for m in (one, two))
    return [
        f"The merges of {a} ({len(one)}) and {b} ({len(two)}) differ, first at number {place + 1}: {here} and {there}."
    ]


def _compare_sentencepiece(a: Path, b: Path, one: str, two: str) -> list[str]:
    return [f"The SentencePiece models {a / 'tokenizer.model'} and {b / 'tokenizer.model'} are different files."]


def _compare_special(a: Path, b: Path, one: dict[str, str | None], two: dict[str, str | None]) -> list[str]:
    return [
        f"The {key} is {_name(one[key])} in {a} and {_name(two[key])} in {b}."
        for key in _SPECIAL
        if one[key] != two[key]
    ]


def _compare_templates(a: Path, b: Path, one: dict[str, list[str]], two: dict[str, list[str]]) -> list[str]:
    differences = []
    for name in sorted(one.keys() | two.keys()):
        what = "chat template" if name == "default" else f"chat template {name!r}"
        if name not in one or name not in two:
            has, lacks = (a, b) if name in one else (b, a)
            differences.append(f"{has} has a {what}, and {lacks} has none.")
        elif one[name] != two[name]:
            lines = enumerate(zip_longest(one[name], two[name]), start=1)
            number, (x, y) = next((number, pair) for number, pair in lines if pair[0] != pair[1])
            x, y = _around(x, y)
            differences.append(f"The {what}s of {a} and {b} differ, first in line {number}: {x} and {y}.")
    return differences


def _around(x: str | None, y: str | None) -> tuple[str, str]:
    """Two different lines, cut to the surroundings of their first difference."""
    pairs = enumerate(zip_longest(x or "", y or ""))
    start = max(0, next((i for i, (p, q) in pairs if p != q), 0) - 20)
    cut = [
        "no such line" if line is None else ("..." if start else "") + repr(line[start : start + 60]) for line in (x, y)
    ]
    return cut[0], cut[1]


def _name(token: str | None) -> str:
    return "not set" if token is None else repr(token)


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


_COMPARE = {
    "vocabulary": _compare_vocabularies,
    "merges": _compare_merges,
    "sentencepiece": _compare_sentencepiece,
    "special": _compare_special,
    "templates": _compare_templates,
}
