"""Measures model folders on held-out problems: exact expected pass@1, and greedy accuracy, with paired errors.

All models see the same different problems, so the comparison with the first folder, the reference, is paired.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmerge.lab.policy import Policy, arithmetic, read_policy, sample
from rlmerge.lab.tasks import DOMAINS, Problem, held_out_problems
from rlmerge.lab.train import expected_pass

SCORES = ("pass", "greedy")


@dataclass(frozen=True)
class Mean:
    """A mean over problems and its standard error."""

    value: float
    error: float

    def percent(self, signed: bool = False) -> str:
        """Such as "12.3 ± 0.4", in percent; `signed` writes the sign of the value."""
        return f"{100 * self.value:{'+' if signed else ''}.1f} ± {100 * self.error:.1f}"


Result = dict[str, dict[str, list[float]]]
"""For every domain and score, one value per problem."""


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error of independent values."""
    value = sum(values) / len(values)
    variance = sum((x - value) ** 2 for x in values) / (len(values) - 1)
    return Mean(value, math.sqrt(variance / len(values)))


def paired_gain(values: Sequence[float], reference: Sequence[float]) -> Mean:
    """Mean difference to a reference on the same problems; the error is that of the differences."""
    return mean([a - b for a, b in zip(values, reference, strict=True)])


def greedy_passes(policy: Policy, batch: list[Problem]) -> list[float]:
    """For each problem, 1.0 if the greedy completion is right, else 0.0."""
    passes: list[float] = []
    for start in range(0, len(batch), 64):
        part = batch[start : start + 64]
        with arithmetic():
            samples = sample(policy, [policy.encode(problem.prompt) for problem in part])
        passes += [p.reward(policy.decode(tokens)) for p, tokens in zip(part, samples.tokens, strict=True)]
    return passes


def measure_folder(folder: Path, tests: dict[str, list[Problem]]) -> Result:
    """Both scores of one model on the problems of each domain."""
    policy = read_policy(folder)
    return {
        domain: {"pass": expected_pass(policy, batch), "greedy": greedy_passes(policy, batch)}
        for domain, batch in tests.items()
    }


def measure(folders: list[Path], count: int = 300, json_out: Path | None = None) -> None:
    """Measure the folders on `count` different held-out problems of each domain; print a table, and write JSON.

    The JSON holds the summary and, for later paired comparisons, every problem's scores.
    """
    # Prompts of like length lie together, so that little is spent on padding.
    tests = {domain: sorted(held_out_problems(domain, count), key=lambda p: len(p.prompt)) for domain in DOMAINS}
    results: dict[str, Result] = {}
    columns = [f"{domain} {score}" for domain in DOMAINS for score in SCORES]
    print("percent ± standard error; in brackets the paired difference to the first model")
    print(f"{'model':20}" + "".join(f"{column:>28}" for column in columns))
    for folder in folders:
        results[str(folder)] = measure_folder(folder, tests)
        print(_table_row(folder.name, results[str(folder)], results[str(folders[0])]), flush=True)
    if json_out is not None:
        json_out.write_text(json.dumps(_report(results, tests), indent=1) + "\n")


def _table_row(name: str, result: Result, reference: Result) -> str:
    cells = []
    for domain in DOMAINS:
        for score in SCORES:
            values, others = result[domain][score], reference[domain][score]
            gain = f" ({paired_gain(values, others).percent(signed=True)})" if result is not reference else ""
            cells.append(f"{mean(values).percent() + gain:>28}")
    return f"{name:20}" + "".join(cells)


def _report(results: dict[str, Result], tests: dict[str, list[Problem]]) -> dict[str, Any]:
    reference = next(iter(results.values()))
    summary = {
        folder: {
            domain: {
                score: {
                    "mean": vars(mean(values)),
                    "gain": vars(paired_gain(values, reference[domain][score])),
                }
                for score, values in scores.items()
            }
            for domain, scores in result.items()
        }
        for folder, result in results.items()
    }
    return {
        "reference": next(iter(results)),
        "summary": summary,
        "problems": {domain: [problem.prompt for problem in batch] for domain, batch in tests.items()},
        "scores": results,
    }
