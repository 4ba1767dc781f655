"""The two answer-only domains, made procedurally: math (short arithmetic) and code (what the Python REPL prints).

Every problem is a prompt with one right answer, ended by a newline, so a reward is a string comparison and the expected
pass@1 of a model is the probability of one completion. No torch in here.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from string import ascii_lowercase

DOMAINS = ("math", "code")
"""The domains that `problems` can make."""

HELD_OUT_SHARE = 5
"""One problem in this many is held out: never trained on in any stage, whatever the seed."""


@dataclass(frozen=True)
class Problem:
    """A question with one right answer.

    `completion` is the only text that earns a reward: the answer as the model must write it after the prompt, with the
    newline that stops generation.
    """

    domain: str
    kind: str
    prompt: str
    completion: str

    @property
    def held_out(self) -> bool:
        """Whether the problem is reserved for measuring; decided by its prompt alone."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_SHARE == 0

    def reward(self, text: str) -> float:
        """1.0 if the generated text (newline included) is exactly the right completion, else 0.0."""
        return float(text == self.completion)


def problems(domain: str, stream: str, held_out: bool = False) -> Iterator[Problem]:
    """Endless stream of problems, with repetitions; kinds are drawn uniformly.

    `stream` names the stage and seed, for example "rlvr/1": different names give independent streams, the same name the
    same problems on every machine. Only problems on the wanted side of the held-out split appear.
    """
    kinds = _kinds(domain)
    random = Random(f"rlmerge.lab/{domain}/{stream}")
    while True:
        kind = random.choice(list(kinds))
        prompt, completion = kinds[kind](random)
        problem = Problem(domain, kind, prompt, completion)
        if problem.held_out == held_out:
            yield problem


def held_out_problems(domain: str, count: int, stream: str = "measure") -> list[Problem]:
    """The first `count` different held-out problems of a stream.

    Small kinds (multiplication) run dry, so they are rarer here than in a training stream. Raises ValueError if the
    domain seems to have fewer problems than that.
    """
    found: dict[str, Problem] = {}
    for problem in islice(problems(domain, stream, held_out=True), 30 * count):
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{domain}: found only {len(found)} different held-out problems, not {count}: ask for fewer.")


Maker = Callable[[Random], tuple[str, str]]


def _kinds(domain: str) -> dict[str, Maker]:
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: the lab has {', '.join(DOMAINS)}.")
    return _MATH if domain == "math" else _CODE


def _equation(left: str, value: int) -> tuple[str, str]:
    return f"{left} =", f" {value}\n"


def _repl(expression: str, value: object) -> tuple[str, str]:
    return f">>> {expression}\n", f"{value!r}\n"


# Math. Ranges are as large as a cold-started 135M model can still learn in a hundred steps; results are never negative.


def _add(random: Random) -> tuple[str, str]:
    a, b = random.randint(1, 30), random.randint(1, 30)
    return _equation(f"{a} + {b}", a + b)


def _subtract(random: Random) -> tuple[str, str]:
    b, a = sorted((random.randint(1, 30), random.randint(1, 30)))
    return _equation(f"{a} - {b}", a - b)


def _multiply(random: Random) -> tuple[str, str]:
    a, b = random.randint(2, 12), random.randint(2, 12)
    return _equation(f"{a} * {b}", a * b)


def _add_three(random: Random) -> tuple[str, str]:
    a, b, c = (random.randint(1, 9) for _ in range(3))
    return _equation(f"{a} + {b} + {c}", a + b + c)


def _add_subtract(random: Random) -> tuple[str, str]:
    a, b = random.randint(1, 9), random.randint(1, 9)
    c = random.randint(1, min(9, a + b))
    return _equation(f"{a} + {b} - {c}", a + b - c)


_MATH: dict[str, Maker] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "add_three": _add_three,
    "add_subtract": _add_subtract,
}


# Code. Strings are random letters, not words: a word list is small enough to be learned by heart.


def _numbers(random: Random, low: int, high: int) -> list[int]:
    return [random.randint(0, 20) for _ in range(random.randint(low, high))]


def _letters(random: Random, low: int, high: int, alphabet: str = ascii_lowercase) -> str:
    return "".join(random.choice(alphabet) for _ in range(random.randint(low, high)))


def _max(random: Random) -> tuple[str, str]:
    values = _numbers(random, 2, 4)
    return _repl(f"max({values})", max(values))


def _min(random: Random) -> tuple[str, str]:
    values = _numbers(random, 2, 4)
    return _repl(f"min({values})", min(values))


def _sum(random: Random) -> tuple[str, str]:
    values = [random.randint(0, 9) for _ in range(random.randint(2, 3))]
    return _repl(f"sum({values})", sum(values))


def _item(random: Random) -> tuple[str, str]:
    values = _numbers(random, 2, 4)
    place = random.randrange(len(values))
    return _repl(f"{values}[{place}]", values[place])


def _length(random: Random) -> tuple[str, str]:
    text = _letters(random, 2, 8)
    return _repl(f'len("{text}")', len(text))


def _count(random: Random) -> tuple[str, str]:
    alphabet = "".join(random.sample(ascii_lowercase, 3))
    text, letter = _letters(random, 3, 7, alphabet), random.choice(alphabet)
    return _repl(f'"{text}".count("{letter}")', text.count(letter))


def _letter(random: Random) -> tuple[str, str]:
    text = _letters(random, 2, 5)
    place = random.randrange(len(text))
    return _repl(f'"{text}"[{place}]', text[place])


_CODE: dict[str, Maker] = {
    "max": _max,
    "min": _min,
    "sum": _sum,
    "item": _item,
    "length": _length,
    "count": _count,
    "letter": _letter,
}
