"""Plain values as JSON and back: the only thing that crosses between tested code and what judges it. Never pickle.

None, booleans, short integers, finite floats, strings and lists are themselves; all else is an object of one key:
{"t": [...]} tuple, {"s": [...]} set, {"z": [...]} frozenset, {"d": [[key, value], ...]} dictionary, {"b": hex} bytes,
{"i": hex} long integer, {"f": text} inf and nan, {"c": [re, im]} complex, {"r": [number, type name]} anything else,
which stays where it is and can only be asked (see `harness`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

DEPTH = 60
_LONG = 1 << 60


class ValueTooDeep(ValueError):
    """Nested deeper than anything that is compared, or cyclic."""


def encode(value: Any, other: Callable[[Any], list[Any]] | None = None, depth: int = 0) -> Any:
    """`value` as JSON. Subclasses of plain types count as these; `other` numbers what is not plain."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if type(value) is str else str.__str__(value)
    if isinstance(value, int):
        return int(value) if -_LONG < value < _LONG else {"i": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"f": str(float(value))}
    if depth > DEPTH:
        raise ValueTooDeep("nested too deeply")
    if isinstance(value, list):
        return [encode(item, other, depth + 1) for item in value]
    if isinstance(value, dict):
        return {"d": [[encode(key, other, depth + 1), encode(item, other, depth + 1)] for key, item in value.items()]}
    for kind, letter in ((tuple, "t"), (set, "s"), (frozenset, "z")):
        if isinstance(value, kind):
            return {letter: [encode(item, other, depth + 1) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    if isinstance(value, complex):
        return {"c": [encode(value.real), encode(value.imag)]}
    if other is None:
        raise TypeError(f"{type(value).__name__} is no plain value")
    return {"r": other(value)}


def decode(value: Any, other: Callable[[int, str], Any] | None = None) -> Any:
    """The value that was encoded. Raises ValueError, TypeError or RecursionError for what `encode` never makes."""
    if isinstance(value, list):
        return [decode(item, other) for item in value]
    if not isinstance(value, dict):
        return value
    ((letter, content),) = value.items()
    match letter:
        case "t":
            return tuple(decode(item, other) for item in content)
        case "s":
            return {decode(item, other) for item in content}
        case "z":
            return frozenset(decode(item, other) for item in content)
        case "d":
            return {decode(key, other): decode(item, other) for key, item in content}
        case "b":
            return bytes.fromhex(content)
        case "i":
            return int(content, 16)
        case "f":
            return float(content)
        case "c":
            return complex(decode(content[0]), decode(content[1]))
        case "r" if other is not None:
            return other(int(content[0]), str(content[1]))
    raise ValueError(f"unknown value {letter!r}")


def same(expected: Any, found: Any, tolerance: float, depth: int = 0) -> bool:
    """Whether two encoded values are equal: as Python's ==, but lists equal tuples and floats may differ a little.

    `found` was written by tested code, so it is never turned into Python objects: no hash that it chose is computed.
    JSON has no keys but strings, so an expected key '1' also stands for 1.
    """
    if depth > DEPTH + 5:
        return False
    one, two = _number(expected), _number(found)
    if one is not None or two is not None:
        if one is None or two is None:
            return False
        if isinstance(one, int) and isinstance(two, int):
            return one == two
        try:
            return math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance) or (one != one and two != two)
        except OverflowError:
            return False
    one, two = _items(expected), _items(found)
    if one is not None or two is not None:
        if one is None or two is None or len(one) != len(two):
            return False
        return all(same(left, right, tolerance, depth + 1) for left, right in zip(one, two))
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return type(expected) is type(found) and expected == found
    if "d" in expected and "d" in found:
        return _same_mappings(expected["d"], found["d"], tolerance, depth)
    for letters in ("sz", "b", "c"):
        one = next((expected[letter] for letter in letters if letter in expected), None)
        two = next((found[letter] for letter in letters if letter in found), None)
        if one is None or two is None:
            continue
        if letters == "sz":
            return {_key(item) for item in one} == {_key(item) for item in two}
        return same(one, two, tolerance, depth + 1)
    return False


def _same_mappings(expected: list[Any], found: list[Any], tolerance: float, depth: int) -> bool:
    if len(expected) != len(found):
        return False
    entries = {_key(key): item for key, item in found}
    texts = {_json_key(key): item for key, item in found}
    for key, item in expected:
        if _key(key) in entries:
            other = entries[_key(key)]
        elif isinstance(key, str) and key in texts:
            other = texts[key]
        else:
            return False
        if not same(item, other, tolerance, depth + 1):
            return False
    return True


def _number(value: Any) -> int | float | None:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, dict) and len(value) == 1:
        if isinstance(value.get("i"), str):
            return int(value["i"], 16)
        if isinstance(value.get("f"), str):
            return float(value["f"])
    return None


def _items(value: Any) -> list[Any] | None:
    if isinstance(value, dict) and isinstance(value.get("t"), list):
        return value["t"]
    return value if isinstance(value, list) else None


def _key(value: Any) -> str:
    """Equal for equal values, as the keys of a dictionary are: 1, 1.0 and True are one."""
    number = _number(value)
    if number is not None:
        whole = isinstance(number, int) or number.is_integer()
        return f"number {hex(int(number)) if whole else number!r}"
    items = _items(value)
    if items is not None:
        return "(" + ",".join(map(_key, items)) + ")"
    return json.dumps(value, sort_keys=True)


def _json_key(value: Any) -> str:
    """What json.dumps makes of a key."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return value if isinstance(value, str) else _key(value)


def show(value: Any, width: int = 60) -> str:
    """An encoded value as Python would write it, shortened."""
    try:
        text = repr(_Shown(value))
    except (ValueError, TypeError, RecursionError, AttributeError):
        text = "something that is no value"
    return text if len(text) <= width else text[: width - 1] + "…"


class _Shown:
    """Prints an encoded value without making it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        value = self.value
        if isinstance(value, list):
            return "[" + ", ".join(repr(_Shown(item)) for item in value[:30]) + "]"
        if not isinstance(value, dict):
            return repr(value)
        ((letter, content),) = value.items()
        if letter in "ifc":
            return "a very large integer" if letter == "i" and len(content) > 200 else repr(decode(value))
        if letter == "b":
            return repr(bytes.fromhex(content[:80]))
        if letter == "r":
            return f"<{str(content[1])[:40]}>"
        if letter == "d":
            return "{" + ", ".join(f"{_Shown(key)!r}: {_Shown(item)!r}" for key, item in content[:30]) + "}"
        inner = ", ".join(repr(_Shown(item)) for item in content[:30])
        if letter == "t":
            return f"({inner},)" if len(content) == 1 else f"({inner})"
        if letter in "sz":
            braces = "{" + inner + "}" if content else "set()"
            return braces if letter == "s" else f"frozenset({braces})"
        raise ValueError(letter)
