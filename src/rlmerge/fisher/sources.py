"""Where the sequences of a Fisher come from: the model's own right answers, gold ones, all its answers, or groups.

own       completions that the model samples and the verifier accepts: what RLVR reinforces (the default)
gold      the completions of the data
sampled   completions that the model samples, right or wrong: the true Fisher
policy    groups of samples of one prompt, weighted by their advantages: the gradient that GRPO follows
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlmerge.errors import FisherError
from rlmerge.evaluate.backend import Sampling
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.run import prompt_ids, seed_of, stops_of
from rlmerge.evaluate.verifiers import completed, verify

from .data import SequenceChoice
from .sequences import Sequence, Unit

SLAB = 128
"""Completions that are sampled, verified and noted together."""


@dataclass(frozen=True)
class Drawn:
    """A completion as ids, and what the verifier said (None where nobody asked it)."""

    problem: int
    attempt: int
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    correct: bool | None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.__dict__, ensure_ascii=False)

    @staticmethod
    def from_json(line: str) -> Drawn:
        """The same from a line."""
        data = json.loads(line)
        return Drawn(**{**data, "prompt": tuple(data["prompt"]), "ids": tuple(data["ids"])})


def gold(tokenizer: Any, problems: Several[Problem], choice: SequenceChoice, limit: int | None) -> list[Drawn]:
    """The data's completions, encoded by themselves without special tokens, and an end. `limit`: the model's tokens."""
    found = []
    for place, problem in enumerate(problems[: choice.wanted]):
        assert problem.completion is not None
        end, text = problem.meta.get("end") or "", problem.completion
        if end and not text.endswith(end):
            text += end
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not end and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        prompt = prompt_ids(tokenizer, problem)
        if not prompt or (limit and len(prompt) + len(ids) > limit):
            raise FisherError(
                f"problem {problem.id}: prompt and completion have {len(prompt)} and {len(ids)} tokens; the model "
                f"reads up to {limit}, and a prompt of one at least. Leave the problem out."
            )
        found.append(Drawn(place, 0, prompt, tuple(ids), text, None))
    return found


def sample(
    model: Any,
    tokenizer: Any,
    problems: Several[Problem],
    choice: SequenceChoice,
    notes: Path,
    batch: int = 32,
    unsafe: bool = False,
    tell: Callable[[int, int], None] = lambda accepted, tried: None,
) -> list[Drawn]:
    """Completions that the model samples, until there are enough of them (and, for `own`, right ones).

    Prompts are tried in the order of the data, every one once before any is tried again. What a completion is depends
    on (seed, problem, attempt) alone. Each slab is added to the file `notes`; a later call goes on from there. Raises
    FisherError if too few are right.
    """
    from rlmerge.evaluate.generate import Generator, Request

    done = _read_notes(notes)
    sampler = Generator(model, tokenizer, batch)
    limit = getattr(model.config, "max_position_embeddings", None)
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    for problem, prompt in zip(problems, prompts):
        if not prompt or (limit and len(prompt) + choice.max_new_tokens > limit):
            raise FisherError(
                f"problem {problem.id}: its prompt has {len(prompt)} tokens, and up to {choice.max_new_tokens} follow; "
                f"the model reads up to {limit}. Leave it out, or lower --max-new-tokens."
            )
    sampling = Sampling(choice.temperature, choice.max_new_tokens)
    order = _order(choice, len(problems))
    verified = choice.source in ("own", "policy")
    kept: list[Drawn] = []
    tried = 0
    while len(kept) < choice.wanted:
        slab = list(islice(order, SLAB))
        if not slab:
            break
        asked = [
            Request((p, a), prompts[p], seed_of("fisher", choice.seed, problems[p].id, a), stops_of(problems[p]))
            for p, a in slab
            if (p, a) not in done
        ]
        made = {}
        for one in sampler.run(asked, sampling):
            ids = one.tokens if one.end is None else (*one.tokens, one.end)
            text = completed(one.text, one.finish, problems[one.key[0]])
            made[one.key] = (ids, text)
        keys = [key for key in slab if key in made]
        options: dict[str, dict[str, Any]] = {"python": {"unsafe": unsafe}}
        of = [problems[p] for p, _ in keys]
        if not any(problem.verifier == "python" for problem in of):
            options = {}
        verdicts = verify([made[key][1] for key in keys], of, **options) if verified and keys else []
        judged = [verdict.correct for verdict in verdicts] if verified else [None] * len(keys)
        with notes.open("a", encoding="utf-8") as file:
            for (p, a), correct in zip(keys, judged):
                done[p, a] = Drawn(p, a, prompts[p], made[p, a][0], made[p, a][1], correct)
                file.write(done[p, a].to_json() + "\n")
        tried += len(slab)
        kept += [done[key] for key in slab if done[key].ids and (choice.source != "own" or done[key].correct)]
        tell(min(len(kept), choice.wanted), tried)
    if len(kept) < choice.wanted:
        raise FisherError(
            f"{len(kept)} of {tried} completions were right ({len(kept) / max(tried, 1):.1%}), fewer than the "
            f"{choice.wanted} that --sequences asks for.\n  Lower --sequences, raise --attempts (now {choice.attempts})"
            " or (with --overwrite) --max-new-tokens, give more problems, or use --source gold, which finds none."
        )
    return kept[: choice.wanted]


def make_units(drawn: Several[Drawn], choice: SequenceChoice) -> list[Unit | None]:
    """The units in order; None for one without a gradient (a group whose rewards are all equal), which still counts."""
    if choice.source != "policy":
        return [Unit((Sequence((*one.prompt, *one.ids), len(one.prompt)),)) for one in drawn]
    groups: dict[int, list[Drawn]] = {}
    for one in drawn:
        groups.setdefault(one.problem, []).append(one)
    units: list[Unit | None] = []
    for group in groups.values():
        reward = np.array([float(bool(one.correct)) for one in group])
        if reward.std() == 0.0:
            units.append(None)
            continue
        # as GRPO has it (arXiv 2402.03300, section 4.1.2): centred and divided by the group's standard deviation
        advantage = (reward - reward.mean()) / reward.std(ddof=1) / len(group)
        units.append(
            Unit(
                tuple(
                    Sequence((*one.prompt, *one.ids), len(one.prompt), float(weight))
                    for one, weight in zip(group, advantage)
                )
            )
        )
    return units


def _order(choice: SequenceChoice, problems: int) -> Iterator[tuple[int, int]]:
    """(problem, attempt) in the order in which they are tried."""
    if choice.source == "policy":
        groups = choice.wanted // choice.group
        return ((p, a) for p in range(groups) for a in range(choice.group))
    attempts = choice.attempts if choice.source == "own" else -(-choice.wanted // problems)
    return ((p, a) for a in range(attempts) for p in range(problems))


def _read_notes(notes: Path) -> dict[tuple[int, int], Drawn]:
    found: dict[tuple[int, int], Drawn] = {}
    if notes.exists():
        for line in notes.read_text(encoding="utf-8").split("\n"):
            try:
                one = Drawn.from_json(line)
            except (ValueError, TypeError, KeyError):
                break  # the end of a run that was stopped while it wrote
            found[one.problem, one.attempt] = one
        notes.write_text("".join(one.to_json() + "\n" for one in found.values()), encoding="utf-8")
    return found
