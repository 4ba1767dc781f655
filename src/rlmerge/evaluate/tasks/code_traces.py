"""Source and working of the programs of `code_programs`: both in several wordings that mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from rlmerge.evaluate.tasks.code_programs import Spec, apply

_NAMES = "abcdkmnpqstuvwxyz"
_FLIPPED = {">": "<", ">=": "<="}
_OPPOSITE = {">": "<=", ">=": "<"}


def source(spec: Spec, random: Random) -> tuple[str, list[str]]:
    """(the program, the names that its working speaks of)."""
    names = random.sample(_NAMES, 6)
    if spec[0] == "chain" and random.random() < 0.6:
        names = names[:1] * 6
    lines = {"chain": _chain, "loop": _loop, "branch": _branch, "list": _list}[spec[0]](spec, names, random)
    return "\n".join(lines) + "\n", names


def output(spec: Spec) -> int:
    """What the program prints."""
    return _work(spec, ["x"] * 6, Random(0))[1]


def working(spec: Spec, names: Sequence[str], random: Random) -> list[str]:
    """Lines that lead to the output, in one of several wordings."""
    return _work(spec, names, random)[0]


def _update(target: str, name: str, operator: str, constant: Any, random: Random) -> str:
    """target = name operator constant, in one of its spellings."""
    if target == name and random.random() < 0.4:
        return f"{target} {operator}= {constant}"
    sides = [name, str(constant)]
    if operator != "-" and random.random() < 0.3:
        sides.reverse()
    return f"{target} = {f' {operator} '.join(sides)}"


def _chain(spec: Spec, names: Sequence[str], random: Random) -> list[str]:
    first, steps = spec[1], [list(step) for step in spec[2:]]
    if steps[0][0] != "-" and random.random() < 0.5:
        first, steps[0][1] = steps[0][1], first
    lines = [f"{names[0]} = {first}"]
    for before, name, (operator, constant) in zip(names, names[1:], steps):
        lines.append(_update(name, before, operator, constant, random))
    return [*lines, f"print({names[len(steps)]})"]


def _loop(spec: Spec, names: Sequence[str], random: Random) -> list[str]:
    _, body, start, turns, b, sign, last = spec
    t, i = names[:2]
    if body == "i":
        update = f"{t} = {t} + {i} * {b}" if b > 1 else _update(t, t, "+", i, random)
    elif body == "m":
        update = f"{t} = {t} * 2 + {b}"
    else:
        update = _update(t, t, body, b, random)
    return [f"{t} = {start}", f"for {i} in range({turns}):", f"    {update}", f"print({t} {sign} {last})"]


def _branch(spec: Spec, names: Sequence[str], random: Random) -> list[str]:
    _, a, comparison, limit, *arms = spec
    x = names[0]
    if random.random() < 0.3:
        comparison, arms = _OPPOSITE[comparison], arms[::-1]
    test = f"{x} {comparison} {limit}"
    if comparison in _FLIPPED and random.random() < 0.2:
        test = f"{limit} {_FLIPPED[comparison]} {x}"
    then, other = (_update(x, x, operator, constant, random) for operator, constant in arms)
    return [f"{x} = {a}", f"if {test}:", f"    {then}", "else:", f"    {other}", f"print({x})"]


def _list(spec: Spec, names: Sequence[str], random: Random) -> list[str]:
    v = names[0]
    values = list(spec[1])
    if spec[2] == "sum":
        random.shuffle(values)
        shown = f"sum({v}) + {spec[3]}"
    else:
        places = [f"{v}[{place}]" for place in spec[3:]]
        if spec[2] == "+" and random.random() < 0.5:
            places.reverse()
        shown = f" {spec[2]} ".join(places)
    if random.random() < 0.5:
        return [f"{v} = {values[:-1]}", f"{v}.append({values[-1]})", f"print({shown})"]
    return [f"{v} = {values}", f"print({shown})"]


def _work(spec: Spec, names: Sequence[str], random: Random) -> tuple[list[str], int]:
    """(working, output) in one of the wordings."""
    work = {"chain": _work_chain, "loop": _work_loop, "branch": _work_branch, "list": _work_list}[spec[0]]
    return work(spec, names, random, random.randrange(3))


def _step(name: str, left: int, operator: str, right: int, style: int) -> tuple[str, int]:
    """(a line for name = left operator right, its value)."""
    value = apply(operator, left, right)
    equation = f"{left} {operator} {right}"
    line = (
        f"{name} = {equation} = {value}",
        f"{equation} = {value}, so {name} = {value}",
        f"{name} is {equation} = {value}.",
    )
    return line[style], value


def _sides(operator: str, left: int, right: int, random: Random) -> tuple[int, int]:
    return (right, left) if operator != "-" and random.random() < 0.25 else (left, right)


def _work_chain(spec: Spec, names: Sequence[str], random: Random, style: int) -> tuple[list[str], int]:
    value, lines = spec[1], []
    for name, (operator, constant) in zip(names[1:], spec[2:]):
        line, value = _step(name, *_between(operator, *_sides(operator, value, constant, random)), style)
        lines.append(line)
    return lines, value


def _between(operator: str, left: int, right: int) -> tuple[int, str, int]:
    return left, operator, right


def _work_loop(spec: Spec, names: Sequence[str], random: Random, style: int) -> tuple[list[str], int]:
    _, body, value, turns, b, sign, last = spec
    t, i = names[:2]
    lines = [f"{t} = {value}"] if random.random() < 0.5 else []
    show_turn = random.random() < 0.5
    for turn in range(turns):
        operator, constant = (body, b) if body in "+*" else ("+", turn * b if body == "i" else b)
        start = f"{i} = {turn}: " if show_turn or body == "i" else ""
        if body == "m":
            line, value = _step(t, value, "*", 2, style)
            lines.append(start + line)
            start = ""
        line, value = _step(t, value, operator, constant, style)
        lines.append(start + line)
    lines.append(f"{value} {sign} {last} = {apply(sign, value, last)}")
    return lines, apply(sign, value, last)


def _work_branch(spec: Spec, names: Sequence[str], random: Random, style: int) -> tuple[list[str], int]:
    _, a, comparison, limit, then, other = spec
    holds = a > limit or (comparison == ">=" and a == limit)
    seen = _says(a, limit, random)
    operator, constant = then if holds else other
    line, value = _step(names[0], *_between(operator, *_sides(operator, a, constant, random)), style)
    first = [f"{names[0]} = {a}"] if random.random() < 0.6 else []
    return [*first, seen, line], value


def _says(a: int, limit: int, random: Random) -> str:
    """How the two numbers compare, as a line."""
    sign, words = (">", "more than") if a > limit else ("<", "less than") if a < limit else ("==", "equal to")
    return random.choice((f"{a} {sign} {limit}", f"{a} is {words} {limit}."))


def _work_list(spec: Spec, names: Sequence[str], random: Random, style: int) -> tuple[list[str], int]:
    v, values, what = names[0], list(spec[1]), spec[2]
    if what == "sum":
        random.shuffle(values)
        total, lines = values[0], []
        for number in [*values[1:], spec[3]]:
            lines.append(f"{total} + {number} = {total + number}")
            total += number
        return lines, total
    left, right = (values[place] for place in spec[3:])
    reads = [f"{v}[{place}] {'is' if style == 2 else '='} {values[place]}" for place in spec[3:]]
    if random.random() < 0.5:
        reads.reverse()
    if what == "+" and random.random() < 0.5:
        left, right = right, left
    lines = [", ".join(reads)] if style == 1 else reads
    value = apply(what, left, right)
    return [*lines, f"{left} {what} {right} = {value}"], value
