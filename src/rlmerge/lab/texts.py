"""Texts that are known to be right, and how likely a model is to write one of them.

Where a problem has one right string, its probability is the expected pass@1, without the noise of samples. Answers with
working have many; so the base is asked often, and what a verifier finds right is kept, with the solution of the problem
where that is wanted. The probability of all of them is pass@1 seen from below, as it misses texts that nobody wrote
down. The base is the start of all arms, so that its texts are no arm's own; solutions are what SFT is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlmerge.evaluate.tasks import Task
from rlmerge.lab.policy import Policy, log_probabilities

TOGETHER = 8
"""Right texts of a problem that are kept: their logits, in a vocabulary of 49,152, are held together."""

LOGITS = 2**26
"""Logits that are held together, at most, but for one problem's: a quarter of a GB in fp32, and once more for their
losses."""

Texts = Sequence[Sequence[Sequence[int]]]
"""Right texts of the first problems of a task, as token ids, the end included: [problems][texts][tokens]."""


def find_texts(
    out: Path,
    model: Path,
    tasks: Mapping[str, Task],
    problems: int,
    attempts: int,
    max_new_tokens: int,
    solutions: bool = True,
) -> Iterator[tuple[str, Any]]:
    """Writes OUT/TASK.json for each task; yields of how many problems how many texts were found."""
    from rlmerge.evaluate.run import load_model

    policy = Policy(*load_model(model))
    policy.model.eval()
    for spec, task in tasks.items():
        texts = right_texts(policy, task, problems, attempts, max_new_tokens, solutions)
        out.mkdir(exist_ok=True)
        file_of(out, spec).write_text(json.dumps(texts))
        yield spec, {"problems": sum(map(bool, texts)), "texts": sum(map(len, texts))}


def read_texts(folder: Path, tasks: Sequence[str]) -> dict[str, Texts]:
    """What `find_texts` wrote."""
    return {spec: json.loads(file_of(folder, spec).read_text()) for spec in tasks}


def file_of(folder: Path, spec: str) -> Path:
    """Where the texts of a task are."""
    return folder / f"{spec.replace(':', '-')}.json"


def likelihoods(policy: Policy, task: Task, texts: Texts) -> tuple[list[float], list[float]]:
    """Of those of the first problems that have texts: the probability that the answer is one of the texts, and their
    mean log-probability a token. Exact, by teacher forcing. Texts are tokens, as they were drawn: another spelling of
    one counts as another.
    """
    found: dict[int, tuple[float, float]] = {}
    for places in _together(texts, policy.model.config.vocab_size):
        prompts = [policy.encode_prompt(task.problems[place].prompt) for place in places]
        with torch.no_grad():
            logs, mask = log_probabilities(policy, prompts, [text for place in places for text in texts[place]])
        sums, lengths = (values.sum(1).view(len(places), -1) for values in (logs, mask))
        mass, trace = sums.double().exp().sum(1).tolist(), (sums / lengths).mean(1).tolist()
        found |= dict(zip(places, zip(mass, trace), strict=True))
    return [found[place][0] for place in sorted(found)], [found[place][1] for place in sorted(found)]


def _together(texts: Texts, vocabulary: int) -> Iterator[list[int]]:
    """Places of problems that have as many texts as each other, few enough that their logits fit; those without texts
    are left out.
    """
    by_count: dict[int, list[int]] = {}
    for place, known in enumerate(texts):
        by_count.setdefault(len(known), []).append(place)
    for count, places in sorted(by_count.items()):
        while count and places:
            longest = max(len(text) for place in places for text in texts[place])
            size = max(1, LOGITS // (count * longest * vocabulary))
            yield places[:size]
            places = places[size:]


def right_texts(
    policy: Policy, task: Task, problems: int, attempts: int, max_new_tokens: int, solutions: bool = True
) -> list[list[list[int]]]:
    """Texts that a verifier found right, of each of the first problems: of `attempts` samples at temperature 1, and, if
    wanted, the solution that it comes with; different ones, the likeliest TOGETHER of them, or none at all.
    """
    from rlmerge.lab.rlvr import draw, rewards_of, tokens_of

    found = []
    some, together = task.problems[:problems], max(1, 256 // attempts)
    for start in range(0, len(some), together):
        part = some[start : start + together]
        samples = draw(policy, part, attempts, f"texts/{start}", max_new_tokens)
        rewards = rewards_of(samples, part).tolist()
        for place, problem in enumerate(part):
            own = samples[place * attempts : (place + 1) * attempts]
            assert problem.completion is not None, "problems of the project's own domains have a solution"
            known = {tuple(tokens_of(sample)) for sample, reward in zip(own, rewards[place]) if reward}
            ordered = sorted(known | ({tuple(policy.encode(problem.completion))} if solutions else set()))
            if not ordered:
                found.append([])
                continue
            with torch.no_grad():
                logs, _ = log_probabilities(policy, [policy.encode_prompt(problem.prompt)], ordered)
            likeliest = sorted(zip(logs.sum(1).tolist(), ordered), reverse=True)[:TOGETHER]
            found.append([list(text) for _, text in likeliest])
    return found
