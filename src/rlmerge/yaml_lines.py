"""YAML documents, or Python's mappings, as plain data, with the line of every place in a document, so that a message
can say where a mistake is.

Stricter than YAML: no tags of programming languages, no key twice, no alias bombs; `1e-5` is a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from rlmerge.errors import RecipeError
from rlmerge.parameters import NUMBER, show

MAX_BYTES = 2**20
MAX_VALUES = 20_000
MAX_DEPTH = 64

Place = tuple[str | int, ...]
"""Where a value stands: ('models', 1, 'parameters', 'density')."""


def dotted(place: Place) -> str:
    """A place as a message shows it: 'models[1].parameters.density'."""
    words = [f"[{part}]" if isinstance(part, int) else f".{_word(part)}" for part in place]
    return "".join(words).removeprefix(".")


def _word(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,60}", key) else show(key)


_TAG = "tag:yaml.org,2002:"
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters and halves of characters, which only escapes can bring."""
_WORDS = {
    "bool": re.compile("true|True|TRUE|yes|Yes|YES|on|On|ON|false|False|FALSE|no|No|NO|off|Off|OFF"),
    "null": re.compile("~|null|Null|NULL|"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": re.compile(rf"{NUMBER.pattern}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    "merge": re.compile("<<"),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes only; '1e-5' is a number (YAML 1.1 reads text), dates and '1:30' are text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    depth = 0
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.nodes += 1
        if self.nodes > MAX_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} values", problem_mark=mark)
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever YAML 1.1 or this module would read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _WORDS.items():
    _whole = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, None)
    Dumper.add_implicit_resolver(_TAG + _name, _whole, None)


def read_yaml(text: str, source: str, kind: type = dict) -> tuple[Any, dict[Place, int]]:
    """One YAML document as plain data, and the line of every place in it. RecipeError for everything else."""
    found = read_documents(text, source, kind)
    if len(found) > 1:
        line = found[1][1][()]
        raise RecipeError(
            f"{source}:{line}: a second document starts here, and one recipe is asked for. Several are stages of one "
            "merge: 'rlmerge merge', 'check' and 'explain' take the file; in Python, load_stages reads it."
        )
    return found[0]


def read_documents(text: str, source: str, kind: type = dict) -> list[tuple[Any, dict[Place, int]]]:
    """Every YAML document that is not empty, and the lines of its places, counted in the whole text. RecipeError."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(f"{source}: the recipe is longer than {MAX_BYTES} bytes; that is no recipe.")
    try:
        loader = _Loader(text)
        nodes = [loader.get_single_node()] if kind is not dict else _nodes(loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and kind is dict else ""
        hint = "\n  Indent with spaces, not with tabs." if "'\\t'" in str(error.problem) else _indent_hint(error)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{source}{line}: this is no recipe in YAML: {problem}.{hint}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: this is no recipe in YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise RecipeError(f"{source}: this is nested too deeply.") from None
    found, count = [], 0
    for node in nodes:
        if node is not None:
            reader = _Reader(source, count)
            found.append((reader.read(node, ()), reader.lines))
            count = reader.count
    # a line of three dashes at the end begins a document of nothing
    full = [document for document in found if document[0] is not None]
    if not found:
        raise RecipeError(f"{source}: the recipe is empty.")
    return full or found[:1]


def plain_data(value: Any, source: str, place: Place = ()) -> Any:
    """What a program gives in place of YAML, as `read_yaml` returns it: tuples as lists, paths as text, NumPy's numbers
    as Python's. RecipeError for keys that are no text and for what contains itself; other values stay for the checks.
    """
    where = f"{source}: {dotted(place)}: " if place else f"{source}: "
    if len(place) > MAX_DEPTH:
        raise RecipeError(f"{source}: this is nested too deeply.")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{where}a key must be text, found {show(key)}.")
            if _UNWRITABLE.search(key):
                raise RecipeError(f"{where}the key {show(key)} holds characters that no text has.")
        return {key: plain_data(inner, source, (*place, key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(inner, source, (*place, number)) for number, inner in enumerate(value)]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and _UNWRITABLE.search(value):
        raise RecipeError(f"{where}{show(value)} holds characters that no text has.")
    return value


def _indent_hint(error: yaml.MarkedYAMLError) -> str:
    """What to say of a line that starts in a column in which nothing around it starts."""
    if error.context is None or "block" not in error.context or "expected <block end>" not in str(error.problem):
        return ""
    assert error.context_mark is not None
    assert error.problem_mark is not None
    first, column = error.context_mark.line + 1, error.problem_mark.column + 1
    if "collection" in error.context:
        return (
            "\n  This line stands further left than the keys of the entry that it belongs to, in the list from line "
            f"{first}: they start under the entry's first key, not under its dash."
        )
    return f"\n  This line starts in column {column}, the keys that it belongs to (from line {first}) in another one."


def _nodes(loader: _Loader) -> list[Any]:
    loader.get_event()  # the start of the stream
    nodes = []
    while not loader.check_event(yaml.StreamEndEvent):
        nodes.append(loader.compose_document())
    return nodes


class _Reader:
    """Turns nodes into plain data: no tags of programming languages, no key twice, no alias bombs."""

    def __init__(self, source: str, count: int = 0) -> None:
        self.source = source
        self.lines: dict[Place, int] = {}
        self.count = count
        self.open: set[int] = set()

    def fail(self, node: Any, place: Place, problem: str) -> RecipeError:
        """The error for a node."""
        where = f"{self.source}:{node.start_mark.line + 1}: " + (f"{dotted(place)}: " if place else "")
        return RecipeError(where + problem)

    def read(self, node: Any, place: Place) -> Any:
        """The data of a node; `place` is where it stands in the recipe."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise RecipeError(f"{self.source}: with its aliases the recipe has more than {MAX_VALUES} values.")
        if id(node) in self.open:
            raise self.fail(node, place, "this alias refers to itself.")
        self.open.add(id(node))
        self.lines.setdefault(place, node.start_mark.line + 1)
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            data = self._mapping(node, place)
        elif isinstance(node, yaml.SequenceNode) and tag == "seq":
            data = [self.read(item, (*place, k)) for k, item in enumerate(node.value)]
        elif isinstance(node, yaml.ScalarNode):
            data = self._scalar(node, tag, place)
        else:
            raise self.fail(node, place, f"the tag {node.tag!r} is not allowed in a recipe.")
        self.open.remove(id(node))
        return data

    def _mapping(self, node: Any, place: Place) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                merged = {**self._merged(value, place), **merged}
        own: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                continue
            if key.tag != _TAG + "str":
                shown = show(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise self.fail(key, place, f"a key must be text, found {shown}; if it is meant, write it in quotes.")
            line = key.start_mark.line + 1
            if _UNWRITABLE.search(key.value):
                raise self.fail(key, place, f"the key {show(key.value)} holds characters that no text has.")
            if key.value in own:
                raise self.fail(key, (*place, key.value), f"the same key stands in line {own[key.value]} already.")
            own[key.value] = self.lines[(*place, key.value)] = line
            merged[key.value] = self.read(value, (*place, key.value))
        return merged

    def _merged(self, node: Any, place: Place) -> dict[str, Any]:
        """What `<<: *other` or `<<: [*one, *two]` brings; the earlier of several wins."""
        total: dict[str, Any] = {}
        for part in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            if not isinstance(part, yaml.MappingNode):
                raise self.fail(part, place, "'<<' takes a mapping or a list of mappings.")
            total |= self.read(part, place)
        return total

    def _scalar(self, node: Any, tag: str, place: Place) -> Any:
        text = node.value
        if tag == "str":
            if _UNWRITABLE.search(text):
                raise self.fail(node, place, f"{show(text)} holds characters that no text has.")
            return text
        if tag not in ("bool", "null", "int", "float"):
            raise self.fail(node, place, f"the tag {node.tag!r} is not allowed in a recipe.")
        if not _WORDS[tag].fullmatch(text):
            raise self.fail(node, place, f"{show(text)} is not a value of the tag {node.tag!r}.")
        if tag == "bool":
            return text.lower() in ("true", "yes", "on")
        if tag == "null":
            return None
        return (
            int(text)
            if tag == "int" and len(text) < 1000
            else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        )
