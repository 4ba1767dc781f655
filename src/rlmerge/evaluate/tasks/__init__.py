"""Tasks by name: the project's own domains, reasoning-gym's generators, HumanEval and JSONL files.

`load_task('math:2')` is all that is needed; `docs/tasks.md` has the list. Packages that a task needs are imported when
it is loaded, not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from rlmerge.errors import did_you_mean
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks.splits import SHARES, Draft, TaskError, checked_split, digest, split_of, stream

__all__ = ["DOMAINS", "SHARES", "Task", "TaskError", "domain", "load_task", "problems", "split_of"]

DOMAINS = ("code", "math")
"""The project's own domains."""

FAMILIES = (*DOMAINS, "file", "gym", "humaneval")
"""What a task's name can begin with."""

VERIFIERS = ("exact", "gym", "math", "python")
"""Names that a problem's `verifier` can have; `verifiers.get_verifier` knows them."""

_DEFAULT_COUNT = 200


@dataclass(frozen=True)
class Task:
    """Problems with a name, and how they came to be.

    verifiers   names of the verifiers that the problems need, sorted; empty where nothing is verified
    settings    for the header of results: the same settings are the same problems
    """

    name: str
    problems: list[Problem]
    verifiers: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def load_task(
    spec: str, split: str = "test", count: int | None = None, seed: int = 0, options: dict[str, Any] | None = None
) -> Task:
    """The task that `spec` names.

    spec      'math', 'math:2' (level; 0 is for tiny models), 'math:answer-only', 'code:trace:1', 'gym:gsm_symbolic',
              'humaneval', 'file:problems.jsonl' or a path that ends in .jsonl
    split     'train', 'validation' or 'test'; files and HumanEval are taken whole and ignore it
    count     how many problems; without it 200, and all of a file or of HumanEval
    seed      another seed gives other problems (of generated tasks)
    options   configuration of a reasoning-gym generator
    Raises TaskError for what does not exist, MissingExtraError for a package that is not installed.
    """
    family, _, rest = spec.partition(":")
    if family not in FAMILIES and spec.endswith(".jsonl"):
        family, rest = "file", spec
    checked_split(split)
    if count is not None and count < 1:
        raise TaskError(f"{spec}: {count} problems asked for; ask for at least one.")
    if options and family != "gym":
        raise TaskError(f"{spec}: options are for gym: tasks only.")
    settings: dict[str, Any] = {"task": spec, "split": split, "seed": seed}
    if family in DOMAINS:
        found = list(islice(problems(spec, split, seed), count or _DEFAULT_COUNT))
    elif family == "gym":
        found = _gym(rest, split, count or _DEFAULT_COUNT, seed, options)
        settings["options"] = dict(options or {})
    elif family in ("file", "humaneval"):
        found = _whole(family, rest, spec)
        settings = {"task": spec}
        if count is not None:
            found = found[:count]
    else:
        raise TaskError(f"task {spec!r}: unknown.{did_you_mean(family, FAMILIES)} Write one of: {_known()}.")
    settings |= {"count": len(found), "problems": digest("\n".join(map(repr, found)), 16)}
    return Task(spec, found, tuple(sorted({problem.verifier for problem in found} - {""})), settings)


def domain(name: str) -> ModuleType:
    """The module of one of the project's own domains: LEVELS, KINDS, draw, traces, answer_only, count."""
    if name not in DOMAINS:
        raise TaskError(f"domain {name!r}: unknown.{did_you_mean(name, DOMAINS)} There are: {', '.join(DOMAINS)}.")
    return import_module(f"rlmerge.evaluate.tasks.{name}_domain")


def problems(spec: str, split: str, seed: int | str = 0) -> Iterator[Problem]:
    """An endless stream of different problems of an own domain: 'math', 'math:2', 'code:write:1:answer-only', …

    Without a level, levels are equally frequent. The control draws the same problems as what it is compared with.
    """
    name, *words = spec.split(":")
    module = domain(name)
    level, kind, bare = _parts(name, words, module)

    def draw(random: Random) -> Draft:
        chosen = random.choice(list(module.LEVELS)) if level is None else level  # 0 is for tiny models alone
        return module.draw(random, chosen, kind) if kind else module.draw(random, chosen)

    found = stream(draw, f"{name}/{'all' if level is None else level}/{kind or 'all'}", split, seed)
    return map(module.answer_only, found) if bare else found


def _parts(name: str, words: list[str], module: ModuleType) -> tuple[int | None, str | None, bool]:
    """(level, kind, answer-only) from the words after a domain's name."""
    kinds = module.KINDS if name == "code" else ()
    known = ["0", *map(str, module.LEVELS), *kinds, "answer-only"]
    level, kind, bare = None, None, False
    for word in words:
        if (
            word not in known
            or (word in kinds and kind)
            or (word.isdigit() and level is not None)
            or (word == "answer-only" and bare)
        ):
            state = "given twice" if word in known else f"unknown.{did_you_mean(word, known)}"
            raise TaskError(
                f"{':'.join([name, *words])}: {word!r} is {state} After '{name}:' can come {', '.join(known)}."
            )
        level = int(word) if word.isdigit() else level
        kind = word if word in kinds else kind
        bare = bare or word == "answer-only"
    if level == 0 and kind == "write":
        raise TaskError(f"{':'.join([name, *words])}: at level 0 there are traces only; write '{name}:0'.")
    return level, kind, bare


def _gym(name: str, split: str, count: int, seed: int, options: dict[str, Any] | None) -> list[Problem]:
    from rlmerge.evaluate.tasks import reasoning

    if not name:
        raise TaskError("task 'gym': which generator? Write gym:gsm_symbolic, for instance.")
    return reasoning.read_problems(name, split, count, seed, options)


def _whole(family: str, rest: str, spec: str) -> list[Problem]:
    from rlmerge.evaluate.tasks import human_eval, jsonl

    if family == "humaneval":
        if rest:
            raise TaskError(f"{spec}: nothing can follow 'humaneval'.")
        return human_eval.read_problems()
    if not rest:
        raise TaskError("task 'file': which file? Write file:problems.jsonl.")
    return jsonl.read_problems(Path(rest), VERIFIERS)


def _known() -> str:
    return "math, code, gym:<generator>, humaneval, file:<path>.jsonl"
