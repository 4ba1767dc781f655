"""Short functions to write: on numbers, with a condition, over lists and on strings, each with calls that test it.

As with programs, a function is drawn as a *spec* in canonical form; what is asked, the calls and the solutions are
written from it. The calls come from the spec alone: one problem has one set of tests, wherever it is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import Any

Spec = list[Any]

FAMILIES = ("condition", "number", "over", "string")

ARGUMENTS = {"condition": "nx", "number": "nx", "over": "vx", "string": "st"}
"""Names that a family's argument can have."""


@dataclass(frozen=True)
class Level:
    """Ranges of a level: constants are 1..largest, multipliers 2..factor.

    steps      operations on a number, one after the other
    mapped     whether list functions change each number before they add
    divisors   whether list functions can ask for multiples (of 3..9)
    letters    most letters that a string function adds
    edits      edits of a string, one after the other
    """

    largest: int
    factor: int
    steps: int
    mapped: bool
    divisors: bool
    letters: int
    edits: int


LEVELS = {
    1: Level(20, 9, 2, False, False, 1, 1),
    2: Level(30, 9, 3, True, False, 2, 1),
    3: Level(50, 9, 4, True, True, 2, 2),
    4: Level(99, 12, 5, True, True, 3, 2),
}


def draw(random: Random, level: int, family: str) -> Spec:
    """A spec of one family, in canonical form."""
    return {"condition": _condition, "number": _number, "over": _over, "string": _string}[family](random, LEVELS[level])


def _operation(random: Random, ranges: Level, operators: str) -> list[Any]:
    operator = random.choice(operators)
    return [operator, random.randint(2, ranges.factor) if operator == "*" else random.randint(1, ranges.largest)]


def _number(random: Random, ranges: Level) -> Spec:
    """['number', [operator, constant], ...]: additions and products alternate, so that none commute."""
    kinds = ("+-", "*")
    first = random.randrange(2)
    return ["number", *(_operation(random, ranges, kinds[(first + step) % 2]) for step in range(ranges.steps))]


def _condition(random: Random, ranges: Level) -> Spec:
    """['condition', limit, operation above it, operation elsewhere]; the two differ."""
    while True:
        above, other = _operation(random, ranges, "+-*"), _operation(random, ranges, "+-*")
        if above != other:
            return ["condition", random.randint(1, ranges.largest), above, other]


def _over(random: Random, ranges: Level) -> Spec:
    """['over', 'sum' or 'count', filter, value, map or None, constant added at the end]"""
    tests = (">", "<", "odd", "even", "multiple") if ranges.divisors else (">", "<", "odd", "even")
    test = random.choice(tests)
    value = {"odd": 0, "even": 0, "multiple": random.randint(3, 9)}.get(test, random.randint(1, ranges.largest))
    reduce = random.choice(("sum", "count"))
    mapped = _operation(random, ranges, "+-*") if ranges.mapped and reduce == "sum" else None
    return ["over", reduce, test, value, mapped, random.randint(1, ranges.largest)]


def _string(random: Random, ranges: Level) -> Spec:
    """['string', edit, ...]: ['end' or 'front', letters] or ['replace', letter, another]; kinds do not repeat."""
    edits = []
    for kind in random.sample(("end", "front", "replace"), ranges.edits):
        if kind == "replace":
            edits.append([kind, *random.sample(ascii_lowercase, 2)])
        else:
            edits.append(
                [kind, "".join(random.choice(ascii_lowercase) for _ in range(random.randint(1, ranges.letters)))]
            )
    return ["string", *_settled(edits)]


def _settled(edits: list[list[str]]) -> list[list[str]]:
    """The edits, those that commute in one order: both ends, and a replacement that finds nothing in added letters."""
    kinds = [edit[0] for edit in edits]
    if sorted(kinds) == ["end", "front"] or (kinds[1:] == ["replace"] and edits[1][1] not in edits[0][1]):
        return sorted(edits) if "replace" not in kinds else edits[::-1]
    return edits


def evaluate(spec: Spec, argument: Any) -> Any:
    """What the function returns."""
    if spec[0] == "number":
        for operation in spec[1:]:
            argument = _applied(operation, argument)
        return argument
    if spec[0] == "condition":
        return _applied(spec[2] if argument > spec[1] else spec[3], argument)
    if spec[0] == "over":
        _, reduce, test, value, mapped, last = spec
        kept = [number for number in argument if _passes(test, value, number)]
        return last + (len(kept) if reduce == "count" else sum(_applied(mapped, number) for number in kept))
    for kind, *rest in spec[1:]:
        if kind == "replace":
            argument = argument.replace(*rest)
        else:
            argument = argument + rest[0] if kind == "end" else rest[0] + argument
    return argument


def calls(spec: Spec) -> list[list[Any]]:
    """[[[argument], result], ...]: corners first (limits and their neighbours, what is empty), then others."""
    random = Random(repr(spec))
    if spec[0] == "number":
        arguments: list[Any] = [0, 1, *random.sample(range(2, 100), 4)]
    elif spec[0] == "condition":
        arguments = [
            spec[1] - 1,
            spec[1],
            spec[1] + 1,
            0,
            *(random.randint(spec[1] + 2, spec[1] + 60) for _ in range(2)),
        ]
    elif spec[0] == "over":
        edge = [2, 3, 4, 9] if spec[2] in ("odd", "even") else [spec[3] - 1, spec[3], spec[3] + 1, 2 * spec[3]]
        arguments = [[], edge, *([_listed(random, spec) for _ in range(4)])]
    else:
        letters = "".join(edit[1] for edit in spec[1:] if edit[0] == "replace")
        arguments = ["", letters + "ab", *(_text(random, letters) for _ in range(4))]
    return [[[argument], evaluate(spec, argument)] for argument in arguments]


def count(level: int) -> int:
    """How many canonical functions the level has, exactly."""
    ranges = LEVELS[level]
    n, f, steps = ranges.largest, ranges.factor - 1, ranges.steps
    numbers = (2 * n) ** ((steps + 1) // 2) * f ** (steps // 2) + f ** ((steps + 1) // 2) * (2 * n) ** (steps // 2)
    operations = 2 * n + f
    conditions = n * operations * (operations - 1)
    tests = 2 * n + 2 + (7 if ranges.divisors else 0)
    overs = n * tests * (1 + (operations if ranges.mapped else 1))
    texts = sum(26**size for size in range(1, ranges.letters + 1))
    replaced = 26 * 25
    if ranges.edits == 1:
        return numbers + conditions + overs + 2 * texts + replaced
    found = sum(26**size - 25**size for size in range(1, ranges.letters + 1))
    strings = texts**2 + 2 * (texts + found) * replaced
    return numbers + conditions + overs + strings


def _applied(operation: list[Any] | None, number: int) -> int:
    if operation is None:
        return number
    operator, constant = operation
    return number + constant if operator == "+" else number - constant if operator == "-" else number * constant


def _passes(test: str, value: int, number: int) -> bool:
    if test == ">":
        return number > value
    if test == "<":
        return number < value
    return number % (value if test == "multiple" else 2) == (1 if test == "odd" else 0)


def _listed(random: Random, spec: Spec) -> list[int]:
    step = spec[3] if spec[2] == "multiple" and random.random() < 0.5 else 1
    top = 60 if spec[2] in ("odd", "even") else 2 * spec[3] + 10
    return [step * random.randint(0, top) for _ in range(random.randint(3, 6))]


def _text(random: Random, letters: str) -> str:
    return "".join(random.choice(letters * 2 + ascii_lowercase) for _ in range(random.randint(2, 8)))
