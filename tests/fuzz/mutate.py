"""Spoils files as an attacker or a bad disk would: knows JSON, safetensors headers and YAML, and also bytes alone."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 1e308,
    1e-320, float("nan"), float("inf"), 0.5, "", " ", "\0", "a", "..", "../../etc/passwd", "/etc/passwd", "/dev/zero",
    "/proc/self/mem", "\ud800", "é\u202e", "x" * 5000, "%s{0}$(id)`id`", "null", "1e999", "-", "union", "base", "BF16",
    "F32", "F64", "I64", "F8_E4M3", "BOOL", "same", "copy", "steps", "whole", [], {}, [[]], [None], {"": None}, [0, 0],
    [2**62, 4], [0] * 3, [-1, -1], ["a", "b"],
)  # fmt: skip
TOKENS = (
    "!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system", "!!binary aGk=", "!!set {a, b}",
    "!custom x", "&a", "*a", "&a [*a, *a]", "<<: *some", "<<: {}", "? x", "|", ">-", "---", "...", "{", "}", "[", "]",
    ": ", "- ", "#", "'", '"', "@", "`", "%YAML 1.2", "\t", "\0", "\u2028", "\ufeff", "0x1F", "0o17", "1_000", "1:30",
    "2001-01-01", "~", "yes", ".nan", "-.inf", "1e999", "1e-400", "9" * 400, "9" * 5000, "../../../etc", "/etc",
    "~/.ssh", "$HOME", "e0", "e1", "base", "base+l0", "e0+l0", "e0@main", "owner/name", "owner/name@../..", "p0",
    "f0", "one", "two", "merge_method: ties", "base_model: e0", "models: []", "slices: []", "name: ../../x", "name: .",
    "dtype: int8", "weight: [1, 2, 3]", "density: -1", "layer_range: [0, 99999999]", "layer_range: [2, 0]", "t: 2",
    "filter: '('", "seed: -1", "exclude: ['*']", "include: ['(a+)+$']", "chat_template: /etc/passwd",
    "tokenizer_source: e1", '"\\ud800"', '"\\e[31m"', '"\\0"', "pad_to_multiple_of: 1000000000",
    "allow_nonfinite: true", "out_dtype: float16", "rounding: stochastic",
)  # fmt: skip
HUGE = 3000
TYPES = (("U8", 1), ("I16", 2), ("F16", 2), ("BF16", 2), ("F32", 4), ("I64", 8), ("F64", 8), ("C64", 8), ("F8_E5M2", 1))


class Pairs(list):  # type: ignore[type-arg]
    """An object with a key that stands there twice."""


def dump(node: Any) -> str:
    """JSON, of `Pairs` too."""
    if isinstance(node, (dict, Pairs)):
        pairs = node if isinstance(node, Pairs) else node.items()
        return "{" + ",".join(f"{json.dumps(str(key))}:{dump(value)}" for key, value in pairs) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(dump, node)) + "]"
    return json.dumps(node)


def spoil(name: str, raw: bytes, chance: random.Random) -> bytes:
    """Other bytes for a file of this name."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # what is nested here must also be written
    try:
        return _spoil(name, raw, chance)
    finally:
        sys.setrecursionlimit(limit)


def _spoil(name: str, raw: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.12:
        return _bytes(raw, chance)
    if name.endswith(".safetensors"):
        return _safetensors(raw, chance)
    if name.endswith(".json"):
        return _json_file(raw, chance)
    if name.endswith(".jsonl"):
        lines = raw.splitlines(keepends=True)
        place = chance.randrange(len(lines))
        lines[place] = chance.choice([_json_file(lines[place], chance) + b"\n", lines[place] * 2, b""])
        return b"".join(lines)
    if name.endswith((".yml", ".md")):
        return _text(raw, chance)
    return _bytes(raw, chance)


# ---- Bytes and text ----------------------------------------------------------------------------------------------


def _bytes(raw: bytes, chance: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place, kind = chance.randrange(len(data) + 1), chance.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[place % len(data)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7B, 0x22))
        elif kind == 2:
            del data[place : place + chance.choice((1, 2, 8, 100))]
        elif kind == 3:
            data[place:place] = chance.randbytes(chance.choice((1, 2, 8, 100)))
        elif kind == 4:
            del data[place:]
        else:
            data[place : place + 8] = chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


def _text(raw: bytes, chance: random.Random) -> bytes:
    """YAML, line by line and token by token."""
    lines = raw.decode(errors="surrogateescape").split("\n")
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place, kind = chance.randrange(len(lines)), chance.randrange(9)
        line = lines[place]
        key, colon, value = line.partition(": ")
        if kind == 0:
            lines.insert(place, line)
        elif kind == 1:
            lines.pop(place)
            lines = lines or [""]
        elif kind == 2:
            other = chance.randrange(len(lines))
            lines[place], lines[other] = lines[other], line
        elif kind == 3:
            lines[place] = f"{key}{colon}{chance.choice(TOKENS)}"
        elif kind == 4:
            lines[place] = f"{key}{colon}{chance.choice(TOKENS)} {value}"
        elif kind == 5:
            at = chance.randrange(len(line) + 1)
            lines[place] = line[:at] + chance.choice(TOKENS) + line[at:]
        elif kind == 6:
            lines.insert(place, " " * chance.choice((0, 0, 2, 4, 6)) + chance.choice(TOKENS))
        elif kind == 7:
            lines[place] = f"{key}{colon}{_deep(chance)}" if colon else f"{line}{_deep(chance)}"
        else:
            at, end = sorted((chance.randrange(len(line) + 1), chance.randrange(len(line) + 1)))
            lines[place] = line[:at] + line[end:]
    return "\n".join(lines).encode(errors="surrogateescape")


def _deep(chance: random.Random) -> str:
    """Nesting, aliases of aliases, or many values."""
    kind = chance.randrange(4)
    if kind == 0:
        return chance.choice("[{") * chance.choice((10, 70, HUGE))
    if kind == 1:
        return "[&a0 [x], " + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)) + "]"
    if kind == 2:
        return (
            "{<<: &m0 {a: 1}, b: {" + ", ".join(f"<<: [*m0, *m0, *m0], k{n}: &m{n} {{a: 1}}" for n in range(2)) + "}}"
        )
    return "[" + "0, " * 30_000 + "0]"


# ---- JSON --------------------------------------------------------------------------------------------------------


def _json_file(raw: bytes, chance: random.Random) -> bytes:
    try:
        value = json.loads(raw)
    except ValueError:
        return _bytes(raw, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = spoil_json(value, chance)
    text = dump(value)
    if chance.random() < 0.05:
        deep = "[" * HUGE + "]" * HUGE, '{"a":' * HUGE + "1" + "}" * HUGE
        other = "\ufeff" + text, text + " x", text.replace(":", ": " * 2)
        text = chance.choice((*deep, *other, "9" * 5000, "", "NaN", '"' + "x" * 10**5 + '"'))
    return text.encode(errors=chance.choice(("replace", "surrogatepass")))


def spoil_json(root: Any, chance: random.Random) -> Any:
    """One change somewhere in a value; returns it."""
    places = list(_places(root))
    if not places:
        return chance.choice(NASTY)
    parent, key = chance.choice(places)
    value, kind = parent[key], chance.randrange(10)
    if kind <= 2:
        parent[key] = chance.choice(NASTY)
    elif kind == 3:
        del parent[key]
    elif kind == 4 and type(value) is int:
        parent[key] = value + chance.choice((-1, 1, 2, 8, 2**32, -value - 1))
    elif kind == 4 and isinstance(value, str):
        parent[key] = chance.choice((value + "x", value[:-1], value.upper(), value * 2, "../" + value, value + "\0"))
    elif kind == 5:
        other, name = chance.choice(places)
        parent[key] = other[name] if other[name] is not parent and not _contains(other[name], parent) else None
    elif kind == 6 and isinstance(parent, dict):
        parent[chance.choice(("", "x", "\ud800", "a\nb", str(key) + "x", "../" + str(key), "x" * 3000))] = parent.pop(
            key
        )
    elif kind == 7 and isinstance(value, dict):
        parent[key] = Pairs([*value.items(), *list(value.items())[:1]])
    elif kind == 8:
        for _ in range(chance.choice((1, 30, 600))):
            value = [value] if chance.random() < 0.5 else {"a": value}
        parent[key] = value
    elif isinstance(value, list):
        parent[key] = value * chance.choice((0, 2, 50)) if chance.random() < 0.7 else value[::-1]
    else:
        parent[key] = chance.choice(NASTY)
    return root


def _contains(node: Any, wanted: Any) -> bool:
    return any(parent[key] is wanted or parent is wanted for parent, key in _places(node))


def _places(root: Any) -> Any:
    """(parent, key) of every value, without recursion."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Pairs) or not isinstance(node, (dict, list)):
            continue
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            waiting.append(node[key])


# ---- safetensors -------------------------------------------------------------------------------------------------


def _safetensors(raw: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    try:
        header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    except ValueError:
        return _bytes(raw, chance)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        kind = chance.randrange(9)
        if kind <= 2 or not names:
            header = spoil_json(header, chance)
        elif kind == 3 and data:  # a value: NaN, infinity, a sign, another exponent
            place = chance.randrange(len(data))
            data[place] = chance.choice((0x7F, 0xFF, 0x80, data[place] ^ 0x80))
        elif kind == 4 and data:
            place = chance.randrange(0, len(data), 2)
            data[place : place + 2] = chance.choice((b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\x00\x80", b"\x01\x00"))
        else:
            _shift(header, data, chance.choice(names), chance)
        if not isinstance(header, dict):
            break
        names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
    text = dump(header).encode(errors="surrogatepass")
    text += b" " * chance.choice((0, 0, 0, 1, 8, 1000))
    size = (
        len(text)
        if chance.random() < 0.95
        else chance.choice((0, 1, len(text) - 1, len(text) + 8, 2**40, 2**63, 10**8))
    )
    return size.to_bytes(8, "little") + text + bytes(data)


def _shift(header: dict[str, Any], data: bytearray, name: str, chance: random.Random) -> None:
    """Another shape, type or order, told consistently: what only the meaning can refuse."""
    entry = header[name]
    kind = chance.randrange(6)
    try:
        shape, (start, stop) = list(entry["shape"]), entry["data_offsets"]
        if kind == 0:
            entry["shape"] = shape[::-1]
        elif kind == 1:
            entry["shape"] = [*shape[:-1], shape[-1] // 2, 2] if shape[-1] % 2 == 0 else [1, *shape]
        elif kind == 2:
            entry["dtype"], width = chance.choice(TYPES)
            entry["shape"] = [(stop - start) // width]
        elif kind == 3:
            header[name + chance.choice((".bias", "x", "_scale_inv", "#values", "\u00e9"))] = header.pop(name)
        elif kind == 4:
            header["extra"] = {"dtype": entry["dtype"], "shape": chance.choice(([0], [0, 5], [2**40, 0], [])),
                               "data_offsets": [len(data), len(data)]}  # fmt: skip
            if header["extra"]["shape"] == []:
                header["extra"] = {"dtype": "F32", "shape": [], "data_offsets": [len(data), len(data) + 4]}
                data += bytes(4)
        else:  # removed, all others moved
            del data[start:stop]
            header.pop(name)
            for other in header.values():
                if isinstance(other, dict) and other.get("data_offsets", [0])[0] >= stop:
                    other["data_offsets"] = [offset - (stop - start) for offset in other["data_offsets"]]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return  # was spoiled before
