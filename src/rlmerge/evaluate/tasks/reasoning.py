"""Any generator of the package reasoning-gym as a task, verified by the generator's own scorer.

A problem remembers its generator, configuration, seed and place, so that the scorer (in a process of its own) can make
the very entry again. reasoning-gym gives item i of seed s the seed s + i: neighbouring seeds share problems, so seeds
here are drawn far apart, and the split is decided by the question.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from rlmerge.errors import MissingExtraError, did_you_mean
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks.splits import TaskError, digest, split_of

_TRIES = 40
"""Entries looked at for each one wanted, before giving up."""


def read_problems(name: str, split: str, count: int, seed: int, options: dict[str, Any] | None = None) -> list[Problem]:
    """`count` different problems of one generator.

    options   the generator's configuration, as {'min_terms': 2}; 'seed' and 'size' are not among them
    Raises TaskError if there is no such generator, option, or so many problems.
    """
    options = dict(options or {})
    start = int(digest(f"rlmerge/gym/{name}/{seed}", 4), 16) % (1 << 30)
    data = dataset(name, json.dumps(options, sort_keys=True), start, _TRIES * count)
    found: dict[str, Problem] = {}
    for place in range(_TRIES * count):
        entry = data[place]
        canonical = f"gym:{name}:{' '.join(entry['question'].split())}"
        if canonical not in found and split_of(canonical) == split:
            source = {"name": name, "options": options, "seed": start, "place": place}
            found[canonical] = _problem(name, canonical, entry, source)
            if len(found) == count:
                return list(found.values())
    raise TaskError(
        f"gym:{name}: only {len(found)} different problems in split {split!r}, not {count}: ask for fewer, or set the "
        "generator's options."
    )


@lru_cache(maxsize=8)
def dataset(name: str, options: str, seed: int, size: int) -> Any:
    """The generator, configured. `options` is JSON text."""
    if find_spec("reasoning_gym") is None:
        raise MissingExtraError(f"Task 'gym:{name}'", "reasoning-gym", "lab")
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        raise TaskError(
            f"gym:{name}: reasoning-gym has no generator {name!r}.{did_you_mean(name, DATASETS)} It has {len(DATASETS)}"
            ", such as gsm_symbolic, basic_arithmetic, chain_sum: see its GALLERY.md."
        )
    chosen = json.loads(options)
    known = [key for key in DATASETS[name][1].__dataclass_fields__ if key not in ("seed", "size")]
    for key in chosen:
        if key not in known:
            raise TaskError(f"gym:{name}: no option {key!r}.{did_you_mean(key, known)} It has: {', '.join(known)}.")
    try:
        return create_dataset(name, seed=seed, size=size, **chosen)
    except (AssertionError, ValueError, TypeError) as error:
        raise TaskError(f"gym:{name}: options {options} are refused: {error or type(error).__name__}.") from None


def score(answer: str, source: dict[str, Any]) -> float:
    """The generator's score of an answer, in [0, 1]. Some scorers parse with sympy: call it in a process of its own."""
    data = dataset(source["name"], json.dumps(source["options"], sort_keys=True), source["seed"], source["place"] + 1)
    points = float(data.score_answer(answer, data[source["place"]]))
    return points if math.isfinite(points) else 0.0


def _problem(name: str, canonical: str, entry: dict[str, Any], source: dict[str, Any]) -> Problem:
    answer = entry.get("answer")
    prompt = f"Question: {entry['question']}\nWorking:\n"
    return Problem(
        id=f"gym-{name}-{digest(canonical)}",
        prompt=prompt,
        answer=None if answer is None else str(answer),
        verifier="gym",
        canonical=canonical,
        meta={"source": "reasoning-gym", "kind": name, "marker": "Answer:", "lines": True, "gym": source},
    )
