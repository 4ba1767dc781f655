"""Problems with the sequences on which models are compared: drawn once, in fixed batches, so that numbers repeat."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import GeometryError
from rlmerge.evaluate.backend import Sampling
from rlmerge.evaluate.results import scores
from rlmerge.evaluate.run import TransformersBackend, evaluate
from rlmerge.evaluate.tasks import Task, load_task
from rlmerge.fisher.data import SequenceChoice, check_choice
from rlmerge.fisher.given import Progress, count_accepted, draw
from rlmerge.fisher.sequences import Batch, Unit, make_batches
from rlmerge.fisher.sequences import Sequence as Tokens

from .passes import negative_log_likelihoods, score

DEFAULT_SEQUENCES = 64
TOKENS = 1024
"""Padded tokens of a batch, at most."""


@dataclass(frozen=True)
class Asked:
    """A set before it is drawn: which experts it belongs to, and the choice of sequences, checked against the data."""

    name: str
    data: str
    experts: tuple[str, ...]
    task: Task
    choice: SequenceChoice


@dataclass(frozen=True)
class ProblemSet:
    """Sequences of the problems of one task.

    name       of its expert where that expert drew the sequences, else of the data
    experts    whose own task this is
    batches    of sequences, always the same; `owners` int64[R] of each: which problem a row belongs to, 0 … n − 1
    tokens     fp64[n], scored tokens of each problem
    accepted   right completions and all that were verified, where any were
    """

    name: str
    data: str
    experts: tuple[str, ...]
    task: Task
    tokenizer: Any
    batches: tuple[Batch, ...]
    owners: tuple[NDArray[np.int64], ...]
    tokens: NDArray[np.float64]
    sequences: int
    accepted: list[int] | None

    def losses(self, model: Any) -> NDArray[np.float64]:
        """−Σ log p over each problem's scored tokens, fp64[n], in nats."""
        found = np.zeros(len(self.tokens))
        for batch, owners in zip(self.batches, self.owners):
            rows = negative_log_likelihoods(score(model, batch), len(owners)).numpy()
            np.add.at(found, owners, rows)
        return found

    def answers(self, model: Any, problems: int, choice: SequenceChoice, unsafe: bool) -> NDArray[np.float64]:
        """1 for each of the first `problems` that the model answers rightly by greedy decoding, else 0; by id."""
        task = replace(self.task, problems=self.task.problems[:problems])
        sampling = Sampling(0.0, choice.max_new_tokens)
        with tempfile.TemporaryDirectory(prefix="rlmerge-") as home:
            out = Path(home) / "results.jsonl"
            backend = TransformersBackend(model, self.tokenizer)
            found = scores(evaluate(backend, task, out, label="point", sampling=sampling, unsafe=unsafe))
        return np.array(found.c, np.float64) / np.array(found.n)

    def to_dict(self) -> dict[str, Any]:
        """What it is, JSON-able."""
        return {
            "name": self.name,
            "data": self.data,
            "experts": list(self.experts),
            "problems": len(self.tokens),
            "sequences": self.sequences,
            "tokens": int(self.tokens.sum()),
            "accepted": self.accepted[0] if self.accepted else None,
            "tried": self.accepted[1] if self.accepted else None,
        }


def ask(
    data: str | Path | Mapping[str, str | Path], experts: Sequence[str], choice: SequenceChoice, pass_rate: int
) -> list[Asked]:
    """The sets to draw: one for each file or task of gold completions, or else one for each expert, of its own.

    Raises TaskError for data that cannot be read, FisherError or GeometryError for what they cannot give.
    """
    if isinstance(data, Mapping) and data.keys() != set(experts):
        raise GeometryError(
            f"data are given for {', '.join(sorted(data)) or 'nothing'}, and the experts are {', '.join(experts)}: "
            "give one file or task for all, or one for each expert."
        )
    if choice.source == "policy":
        raise GeometryError(
            "source policy weighs the gradients of a group's samples, and losses have no such weights: use own, gold "
            "or sampled."
        )
    named = {key: str(data[key] if isinstance(data, Mapping) else data) for key in experts}
    tasks = {spec: _load(spec, choice, pass_rate) for spec in dict.fromkeys(named.values())}
    found = []
    for spec, task in tasks.items():
        gold = choice.source == "gold"
        count = choice.sequences or (min(DEFAULT_SEQUENCES, len(task.problems)) if gold else DEFAULT_SEQUENCES)
        own = replace(choice, sequences=count)
        check_choice(own, task.problems, spec)
        if pass_rate and not task.verifiers:
            raise GeometryError(
                f"{spec}: pass rates are asked for, and nothing says how to verify its answers. Give its problems a "
                "'verifier', or leave pass rates out."
            )
        keys = tuple(key for key in experts if named[key] == spec)
        found += [Asked(spec, spec, keys, task, own)] if gold else [Asked(k, spec, (k,), task, own) for k in keys]
    return found


def draw_set(
    asked: Asked, model: Any, tokenizer: Any, unsafe: bool, tokens: int, progress: Callable[[Progress], None]
) -> ProblemSet:
    """Draws the sequences with the model of the set's (first) expert, and puts them into batches."""
    with tempfile.TemporaryDirectory(prefix="rlmerge-") as home:
        drawn = draw(model, tokenizer, asked.task, asked.choice, unsafe, Path(home), progress)
        accepted = count_accepted(Path(home))
    problems = {problem: place for place, problem in enumerate(sorted({one.problem for one in drawn}))}
    units = [Unit((Tokens((*one.prompt, *one.ids), len(one.prompt)),)) for one in drawn]
    largest, rows = max(max(unit.sequences[0].ids) for unit in units), model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise GeometryError(
            f"{asked.name}: its tokenizer made token {largest}, and the models' embedding has only {rows} rows: they "
            "do not belong together."
        )
    order = sorted(range(len(units)), key=lambda place: (units[place].length, place))
    batches = make_batches([units[place] for place in order], tokens, False)
    owner = np.array([problems[drawn[place].problem] for place in order])
    ends = np.cumsum([batch.units for batch in batches])
    scored = np.zeros(len(problems))
    np.add.at(scored, owner, [units[place].sequences[0].scored for place in order])
    return ProblemSet(
        asked.name, asked.data, asked.experts, asked.task, tokenizer, tuple(batches),
        tuple(np.split(owner, ends[:-1])), scored, len(drawn), accepted,
    )  # fmt: skip


def _load(spec: str, choice: SequenceChoice, pass_rate: int) -> Task:
    """A file whole; of a generated task problems that nothing was trained on, as many as are needed."""
    whole = spec.endswith(".jsonl") or spec.partition(":")[0] in ("file", "humaneval")
    wanted = max(choice.sequences or DEFAULT_SEQUENCES, pass_rate)
    return load_task(spec, "test", None if whole else wanted, choice.seed)
