"""Words for the domain `math`: who, what, what happens, and how working is phrased."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

NAMES = (
    *("Ada", "Ali", "Amy", "Ann", "Ben", "Bob", "Cara", "Dan", "Ella", "Emma", "Eva", "Finn", "Gus", "Hana", "Ian"),
    *("Ivan", "Jack", "Jane", "Kim", "Leo", "Lily", "Lucy", "Maria", "Mark", "Mia", "Nina", "Noah", "Olga", "Omar"),
    *("Paul", "Ravi", "Rosa", "Sam", "Sara", "Tom", "Uma", "Vera", "Will", "Yuki", "Zoe"),
)
THINGS = (
    *("apple", "ball", "bead", "book", "button", "candle", "card", "carrot", "cent", "coin", "cookie", "cup", "doll"),
    *("egg", "flower", "key", "lemon", "letter", "marble", "nail", "nut", "orange", "pear", "pen", "pencil", "plate"),
    *("plum", "rope", "seed", "shell", "spoon", "stamp", "sticker", "stone", "ticket", "token", "toy"),
)
_GAINS = ("buys", "finds", "gets", "wins", "earns", "collects")
_LOSSES = ("gives away", "loses", "sells", "uses", "drops", "trades away")
_PACKS = ("bags", "boxes", "packs", "jars", "baskets")


def story(terms: Sequence[tuple[int, tuple[str, ...]]], random: Random) -> str:
    """A word problem whose answer is the signed sum of the terms, told in their order.

    terms   (sign, atom) with atoms of the classes n, p and q; the first sign is +
    """
    name, thing = random.choice(NAMES), random.choice(THINGS)
    told = [_event(sign, atom, place, thing, random) for place, (sign, atom) in enumerate(terms)]
    style = random.randrange(3)
    if style == 0:
        text = f"{name} {', '.join(told[:-1])} and then {told[-1]}."
    elif style == 1:
        text = f"{name} {told[0]}. Then {name} " + f". {name} ".join(told[1:]) + "."
    else:
        text = f"{name} {told[0]}, then " + ", then ".join(told[1:]) + "."
    return f"{text} How many {thing}s does {name} have now?"


def _event(sign: int, atom: tuple[str, ...], place: int, thing: str, random: Random) -> str:
    """What happens in one term, as a predicate: 'buys 3 bags of 4 pears'."""
    kind, *numbers = atom
    if kind == "n":
        what = f"{numbers[0]} {thing}" + ("" if numbers[0] == "1" else "s")
    elif kind == "p":
        many, each = random.sample(numbers, 2)
        what = f"{many} {random.choice(_PACKS)} of {each} {thing}s"
    else:
        what = f"one of {numbers[1]} equal shares of {numbers[0]} {thing}s"
    if place == 0:
        return f"{'has' if kind != 'q' else 'gets'} {what}"
    return f"{random.choice(_GAINS if sign > 0 else _LOSSES)} {what}"


def worded(steps: Sequence[str], random: Random) -> list[str]:
    """Equations as lines of working, in one of several phrasings."""
    style = random.randrange(5)
    if style == 0:
        return [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
    if style == 1:
        starts = ["First", *["Then"] * (len(steps) - 2), "Finally"][: len(steps)]
        return [f"{start} {step}." for start, step in zip(starts, steps)]
    if style == 2:
        return [f"{step}." for step in (step.replace(" = ", " is ") for step in steps)]
    if style == 3:
        return [f"We get {step}." for step in steps]
    return list(steps)
