"""Short programs to trace to their output: chains of assignments, loops, branches and lists.

A program is drawn as a *spec*: a JSON-able list in canonical form (operands of + and * sorted, branches in one order,
no names). Source text and working are written from it, each in several ways. No value is ever negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from random import Random
from typing import Any

FAMILIES = ("branch", "chain", "list", "loop")

Spec = list[Any]


@dataclass(frozen=True)
class Level:
    """Ranges of a level.

    largest   numbers are 1..largest
    factor    multipliers are 2..factor (in the first product of a chain, both sides are 2..9)
    chains    operations of a chain; neighbours never commute, so different constants are different programs
    turns     most rounds of a loop (at least 2)
    bodies    what a loop does: '+' t + b, 'i' t + i * b, '*' t * b, 'm' t * 2 + b
    length    numbers in a list
    """

    largest: int
    factor: int
    chains: tuple[str, ...]
    turns: int
    bodies: str
    length: int


LEVELS = {
    1: Level(20, 5, ("+*", "*+", "*-", "-*", "+*-"), 3, "+", 3),
    2: Level(30, 5, ("+*-", "*+*", "*-*", "-*+", "+*+"), 4, "+i", 4),
    3: Level(50, 4, ("+*-*", "*+*-", "-*+*", "*-*+"), 4, "+i*", 4),
    4: Level(99, 4, ("+*-*+", "*+*-*", "-*+*-", "*-*+*"), 5, "+im", 5),
}

LEVEL_0 = Level(9, 3, ("+*", "*+", "*-", "-*"), 3, "+", 3)
"""For models of a few million parameters: one-digit numbers; no part of the mixture of levels."""


def ranges_of(level: int) -> Level:
    """The ranges of a level, 0 included."""
    return LEVELS[level] if level else LEVEL_0


def draw(random: Random, level: int, family: str) -> Spec:
    """A spec of one family, in canonical form."""
    ranges = ranges_of(level)
    number = _Numbers(random, ranges.largest)
    return {"branch": _branch, "chain": _chain, "list": _list, "loop": _loop}[family](number, ranges)


@dataclass(frozen=True)
class _Numbers:
    random: Random
    largest: int

    def __call__(self, largest: int | None = None) -> int:
        return self.random.randint(1, self.largest if largest is None else largest)

    def pair(self) -> list[int]:
        return sorted((self(), self()))


def _chain(number: _Numbers, ranges: Level) -> Spec:
    """['chain', first, [operator, constant], ...]"""
    operators = number.random.choice(ranges.chains)
    if operators[0] == "*":
        first, second = sorted(number.random.randint(2, 9) for _ in range(2))
    else:
        first, second = number.pair()
    if operators[0] == "-":
        first, second = second, first
    value, steps = apply(operators[0], first, second), [[operators[0], second]]
    for operator in operators[1:]:
        if operator == "*":
            constant = number.random.randint(2, ranges.factor)
        else:
            constant = number(max(1, min(value, ranges.largest)) if operator == "-" else None)
        value = max(0, apply(operator, value, constant))
        steps.append([operator, constant])
    return ["chain", first, *steps] if replay(first, steps) >= 0 else _chain(number, ranges)


def _loop(number: _Numbers, ranges: Level) -> Spec:
    """['loop', body, start, rounds, b, sign, last]: print(t sign last) after the loop."""
    random = number.random
    body, sign = random.choice(ranges.bodies), random.choice("+-")
    start, last = number.pair()[:: -1 if sign == "-" else 1]
    if body in "*m" and sign == "+" and random.random() < 0.5:
        start, last = last, start  # here they do not commute
    b = random.randint(2, 3) if body == "*" else number(9 if body == "i" else ranges.largest)
    return ["loop", body, start, random.randint(2, ranges.turns), b, sign, last]


def _branch(number: _Numbers, ranges: Level) -> Spec:
    """['branch', a, '>' or '>=', limit, [operator, b] where it holds, [operator, c] where not]"""
    random = number.random
    a = number()
    arms = []
    for _ in range(2):
        operator = random.choice("+-*")
        arms.append(
            [operator, random.randint(2, ranges.factor) if operator == "*" else number(a if operator == "-" else None)]
        )
    return ["branch", a, random.choice((">", ">=")), number(), *arms]


def _list(number: _Numbers, ranges: Level) -> Spec:
    """['list', values, operator, i, j]: v[i] operator v[j]; ['list', sorted values, 'sum', c]: sum(v) + c."""
    random = number.random
    values = [number() for _ in range(ranges.length)]
    if random.random() < 0.25:
        return ["list", sorted(values), "sum", number()]
    i, j = sorted(random.sample(range(len(values)), 2))
    if random.random() < 0.5:
        return ["list", values, "+", i, j]
    return ["list", values, "-", *((i, j) if values[i] >= values[j] else (j, i))]


def apply(operator: str, left: int, right: int) -> int:
    """left operator right."""
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def replay(value: int, steps: Sequence[Sequence[Any]]) -> int:
    """The value after all steps; -1 if one on the way is negative."""
    for operator, constant in steps:
        value = apply(operator, value, constant)
        if value < 0:
            return -1
    return value


def count(level: int) -> int:
    """How many canonical programs the level has, exactly."""
    ranges = ranges_of(level)
    n, f = ranges.largest, ranges.factor - 1
    pairs = n * (n + 1) // 2
    chains = sum(_chain_count(operators, ranges) for operators in ranges.chains)
    loops = 0
    for body in ranges.bodies:
        values = {"*": 2, "i": 9}.get(body, n)
        plus = n * n if body in "*m" else pairs
        loops += (ranges.turns - 1) * values * (plus + pairs)
    branches = sum(2 * n * (n + f + a) ** 2 for a in range(1, n + 1))
    places = ranges.length * (ranges.length - 1) // 2
    picks = n**ranges.length * places * 2
    sums = n * comb(n + ranges.length - 1, ranges.length)
    return chains + loops + branches + picks + sums


def _chain_count(operators: str, ranges: Level) -> int:
    """Chains by the values they reach, one operation at a time."""
    n = ranges.largest
    low, high = (2, 9) if operators[0] == "*" else (1, n)
    ways: dict[int, int] = {}
    for a in range(low, high + 1):
        for b in range(a, high + 1):
            value = apply(operators[0], *((b, a) if operators[0] == "-" else (a, b)))
            ways[value] = ways.get(value, 0) + 1
    for operator in operators[1:]:
        after: dict[int, int] = {}
        for value, number in ways.items():
            top = ranges.factor if operator == "*" else min(value, n) if operator == "-" else n
            for constant in range(2 if operator == "*" else 1, top + 1):
                reached = apply(operator, value, constant)
                after[reached] = after.get(reached, 0) + number
        ways = after
    return sum(ways.values())
