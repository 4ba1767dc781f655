"""The domain `math`: multi-step arithmetic as expressions, as named quantities and as small word problems.

Every problem is a signed sum of *atoms*: numbers (7), products (3 * 4), quotients (24 / 6) and groups ((3 + 4) * 5).
Its canonical form is that sum, sorted: order of terms, factors, names, things and wording make no new problem, so the
expression and the story about it are on one side of the split. This also makes the number of problems countable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations_with_replacement, product
from random import Random

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks import math_words
from rlmerge.evaluate.tasks.splits import END, Draft, digest

KINDS = ("expression", "names", "words")
"""How a problem can be asked; the same sum may be asked in each way."""

Atom = tuple[str, ...]
"""('n', '7'), ('p', '3', '4'), ('q', '24', '6') or ('g', '3', '4', '5'): what is left is canonical, smaller first."""


@dataclass(frozen=True)
class Level:
    """Ranges of a level.

    largest   numbers are 1..largest
    factor    factors and divisors are 2..factor
    shapes    atoms added, then atoms taken away, by class: 'pn-n' is a product plus a number minus a number
    """

    largest: int
    factor: int
    shapes: tuple[str, ...]


LEVELS = {
    1: Level(20, 9, ("nnn", "nn-n", "pn", "p-n", "nnn-n", "nn-nn", "pnn", "pn-n")),
    2: Level(30, 9, ("nnn-n", "nn-nn", "pn-n", "pnn", "qn-n", "gn", "g-n", "nnn-nn", "pnn-n")),
    3: Level(50, 9, ("nnn-nn", "pnn-n", "pp-n", "pn-nn", "gn-n", "qnn-n", "pqn-n", "gn-nn")),
    4: Level(99, 12, ("nnnn-nn", "pnn-nn", "ppn-n", "pn-pn", "gnn-nn", "pqn-nn", "ggn-n")),
}
"""Two or three operations at level 1, five to seven at level 4."""

LEVEL_0 = Level(9, 5, ("nnn-n", "nn-nn", "nnnn", "nnnn-n", "nnn-nn", "pn-n"))
"""For models of a few million parameters: one-digit numbers in an expression, worked out as asked, in one wording.

No part of the mixture of levels: it is had by name only ('math:0').
"""


def draw(random: Random, level: int) -> Draft:
    """Draws the terms of a problem; the sum is at least 1."""
    ranges = ranges_of(level)
    while True:
        shape = random.choice(ranges.shapes)
        added, _, taken = shape.partition("-")
        plus = sorted(_atom(random, kind, ranges) for kind in added)
        minus = sorted(_atom(random, kind, ranges) for kind in taken)
        if sum(map(value, plus)) > sum(map(value, minus)):
            return Draft(canonical_of(plus, minus), partial(_build, plus, minus, level))


def ranges_of(level: int) -> Level:
    """The ranges of a level, 0 included."""
    return LEVELS[level] if level else LEVEL_0


def canonical_of(plus: Sequence[Atom], minus: Sequence[Atom]) -> str:
    """'math:' and the sorted signed sum, as a Python expression."""
    parts = ["+" + written(atom).replace(" ", "") for atom in sorted(plus)]
    parts += ["-" + written(atom).replace(" ", "") for atom in sorted(minus)]
    return "math:" + "".join(parts)[1:]


def value(atom: Atom) -> int:
    """What an atom amounts to."""
    kind, *rest = atom
    numbers = [int(text) for text in rest]
    if kind == "n":
        return numbers[0]
    if kind == "p":
        return numbers[0] * numbers[1]
    if kind == "q":
        return numbers[0] // numbers[1]
    return (numbers[0] + numbers[1]) * numbers[2]


def written(atom: Atom, random: Random | None = None) -> str:
    """The atom as an expression; with `random`, factors and summands in any order."""
    kind, *rest = atom
    if kind == "n":
        return rest[0]
    if kind == "q":
        return f"{rest[0]} / {rest[1]}"
    if kind == "p":
        return " * ".join(_shuffled(rest, random))
    return " * ".join(_shuffled([f"({' + '.join(_shuffled(rest[:2], random))})", rest[2]], random))


def traces(problem: Problem, random: Random) -> str:
    """One of many valid derivations, up to and with the final line.

    They differ in the order of operations (compound terms first, or when they are met; a running total, or what is
    added and what is taken away apart) and in wording.
    """
    plus, minus = _atoms(problem)
    steps: list[str] = []
    if problem.meta["level"] == 0:
        _total([(sign, tuple(atom)) for sign, atom in problem.meta["terms"]], None, steps)
        return "\n".join([*steps, f"Answer: {problem.answer}"]) + END
    if len(minus) > 1 and random.random() < 0.35:
        up = _total([(1, atom) for atom in plus], random, steps)
        down = _total([(1, atom) for atom in minus], random, steps)
        steps.append(f"{up} - {down} = {up - down}")
    else:
        _total(ordered(plus, minus, random), random, steps)
    lines = math_words.worded(steps, random)
    return "\n".join([*lines, f"Answer: {problem.answer}"]) + END


def answer_only(problem: Problem) -> Problem:
    """The control: the same question, answered without working."""
    prompt = problem.prompt.replace("Working:\n", "Answer:")
    meta = {**problem.meta, "form": "answer-only"}
    return Problem(
        f"{problem.id}-a", prompt, (), f" {problem.answer}{END}", problem.answer, None, "exact", problem.canonical, meta
    )


def ordered(plus: Sequence[Atom], minus: Sequence[Atom], random: Random) -> list[tuple[int, Atom]]:
    """The signed terms in a random order in which no partial sum is negative."""
    terms = [(1, atom) for atom in plus] + [(-1, atom) for atom in minus]
    for _ in range(8):
        random.shuffle(terms)
        total, low = 0, 0
        for sign, atom in terms:
            total += sign * value(atom)
            low = min(low, total)
        if low == 0:
            return terms
    return sorted(terms, key=lambda term: -term[0])


def count(level: int) -> int:
    """How many canonical forms the level has, exactly: pairs of multisets of atoms, the first with the larger sum."""
    ranges = ranges_of(level)
    total = 0
    for shape in ranges.shapes:
        added, _, taken = shape.partition("-")
        plus, minus = _sums(added, level), _sums(taken, level)
        total += sum(n * m for s, n in plus.items() for t, m in minus.items() if s > t)
    return total


def _sums(kinds: str, level: int) -> dict[int, int]:
    """How many multisets of atoms of these classes have each sum."""
    found = {0: 1}
    for kind in sorted(set(kinds)):
        ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(kinds.count(kind))]
        for amount in _values(kind, level):
            for size in range(1, len(ways)):
                for s, n in ways[size - 1].items():
                    ways[size][s + amount] = ways[size].get(s + amount, 0) + n
        mixed: dict[int, int] = {}
        for (s, n), (t, m) in product(found.items(), ways[-1].items()):
            mixed[s + t] = mixed.get(s + t, 0) + n * m
        found = mixed
    return found


@cache
def _values(kind: str, level: int) -> list[int]:
    """What each atom of a class amounts to."""
    ranges = ranges_of(level)
    numbers, factors = range(1, ranges.largest + 1), range(2, ranges.factor + 1)
    if kind == "n":
        return list(numbers)
    if kind == "p":
        return [a * b for a, b in combinations_with_replacement(factors, 2)]
    if kind == "q":
        return [q for q, _ in product(factors, factors)]
    return [(a + b) * c for (a, b), c in product(combinations_with_replacement(range(1, 10), 2), factors)]


def _atom(random: Random, kind: str, ranges: Level) -> Atom:
    if kind == "n":
        return ("n", str(random.randint(1, ranges.largest)))
    a, b = random.randint(2, ranges.factor), random.randint(2, ranges.factor)
    if kind == "p":
        return ("p", str(min(a, b)), str(max(a, b)))
    if kind == "q":
        return ("q", str(a * b), str(b))
    low, high = sorted((random.randint(1, 9), random.randint(1, 9)))
    return ("g", str(low), str(high), str(a))


def _build(plus: list[Atom], minus: list[Atom], level: int, random: Random) -> Problem:
    canonical = canonical_of(plus, minus)
    meta = {
        "domain": "math",
        "level": level,
        "kind": "expression",
        "plus": plus,
        "minus": minus,
        "marker": "Answer:",
        "end": END,
    }
    if level:
        kinds = KINDS if all(atom[0] != "g" for atom in plus) else KINDS[:2]
        meta["kind"] = kind = random.choice(kinds)
        question = {"expression": _expression, "names": _names, "words": _words}[kind](plus, minus, random)
    else:
        meta["terms"] = ordered(plus, minus, random)
        question = f"What is {_sum_of(meta['terms'], random)}?"
    answer = str(sum(map(value, plus)) - sum(map(value, minus)))
    prompt = f"Question: {question}\nWorking:\n"
    problem = Problem(f"math-{digest(canonical)}", prompt, (), None, answer, None, "exact", canonical, meta)
    return Problem(problem.id, prompt, (), traces(problem, random), answer, None, "exact", canonical, meta)


def _expression(plus: list[Atom], minus: list[Atom], random: Random) -> str:
    text = _sum_of(ordered(plus, minus, random), random)
    return random.choice(("What is {}?", "Work out {}.", "Find {}.")).format(text)


def _sum_of(terms: Sequence[tuple[int, Atom]], random: Random) -> str:
    """The terms as one expression, in their order."""
    return "".join(f" {'+' if sign > 0 else '-'} {written(atom, random)}" for sign, atom in terms).removeprefix(" + ")


def _names(plus: list[Atom], minus: list[Atom], random: Random) -> str:
    terms = ordered(plus, minus, random)
    letters = random.sample("abcdkmnpqrstuvwxyz", len(terms))
    lines = [f"{letters[0]} = {written(terms[0][1], random)}"]
    for before, letter, (sign, atom) in zip(letters, letters[1:], terms[1:]):
        sides = [before, written(atom, random)]
        lines.append(f"{letter} = {' + '.join(_shuffled(sides, random)) if sign > 0 else ' - '.join(sides)}")
    return f"{', '.join(lines)}. What is {letters[-1]}?"


def _words(plus: list[Atom], minus: list[Atom], random: Random) -> str:
    return math_words.story(ordered(plus, minus, random), random)


def _total(terms: list[tuple[int, Atom]], random: Random | None, steps: list[str]) -> int:
    """The sum of the terms in this order, with the equations on the way appended to `steps`.

    Without `random` in one way: compound terms when they are met, the running total on the left.
    """
    early = random is not None and random.random() < 0.5
    if early:
        for _, atom in terms:
            _compound(atom, random, steps)
    total: int | None = None
    for sign, atom in terms:
        if not early:
            _compound(atom, random, steps)
        amount = value(atom)
        if total is None:
            total = amount
            continue
        left, right = (total, amount) if sign < 0 or random is None or random.random() < 0.7 else (amount, total)
        total += sign * amount
        steps.append(f"{left} {'+' if sign > 0 else '-'} {right} = {total}")
    assert total is not None
    return total


def _compound(atom: Atom, random: Random | None, steps: list[str]) -> None:
    """The equations that turn an atom into a number; none for a number."""
    if atom[0] == "n":
        return
    if atom[0] == "g":
        a, b = _shuffled(atom[1:3], random)
        inner = int(a) + int(b)
        steps.append(f"{a} + {b} = {inner}")
        steps.append(f"{' * '.join(_shuffled([str(inner), atom[3]], random))} = {value(atom)}")
    else:
        steps.append(f"{written(atom, random)} = {value(atom)}")


def _atoms(problem: Problem) -> tuple[list[Atom], list[Atom]]:
    return [tuple(atom) for atom in problem.meta["plus"]], [tuple(atom) for atom in problem.meta["minus"]]


def _shuffled(items: Sequence[str], random: Random | None) -> list[str]:
    """The items in any order; as they are without `random`."""
    return random.sample(list(items), len(items)) if random else list(items)
