"""EleutherAI's lm-evaluation-harness, in a process of its own and through its `simple_evaluate` alone.

Its other functions move between versions; this one has stayed. A task is a name that the harness knows, or a YAML file
of one: that is read here and handed over as a dictionary. Scores go to one JSON file; samples that a metric calls right
or wrong also become results files, which `rlmerge compare` reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlmerge.errors import MissingExtraError
from rlmerge.evaluate.results import Header, ResultsWriter, Sample
from rlmerge.evaluate.run import EvaluationError

SCORES = "lm-eval.json"
METRICS = ("exact_match", "acc", "acc_norm", "pass@1")
"""Metrics that say of one sample whether it is right, in the order of preference."""


def evaluate_by_harness(
    model: Path | str,
    tasks: Sequence[str],
    out: Path | str,
    *,
    limit: int | None = None,
    batch: int = 8,
    few_shot: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> dict[str, Any]:
    """Scores of a model folder on tasks of the harness; the whole of its answer is in FOLDER/lm-eval.json.

    Returns {task: {metric: value}}. Raises EvaluationError if a task file is none or the harness fails, and
    MissingExtraError if it is not installed.
    """
    if Path(model).suffix in (".yml", ".yaml"):
        raise EvaluationError(f"{model}: the harness loads model folders: merge first (rlmerge merge {model} OUT).")
    if not (Path(model) / "config.json").is_file():
        raise EvaluationError(f"{model}: is no model folder: it has no config.json.")
    asked = {
        "model": str(Path(model).absolute()),
        "tasks": [_read_task(task) for task in tasks],
        "options": {"limit": limit, "batch_size": batch, "num_fewshot": few_shot, "apply_chat_template": chat},
        "seed": seed,
    }
    process = subprocess.run(
        [sys.executable, "-m", "rlmerge.evaluate.lm_eval"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        if "No module named 'lm_eval'" in process.stderr:
            raise MissingExtraError("rlmerge eval --lm-eval", "lm-eval", "eval")
        raise EvaluationError(
            f"the harness failed on {', '.join(tasks)}: {lines[-1]}\n  "
            + "\n  ".join(lines[-6:-1])
            + "\n  Without a network its own tasks need their data in the cache; a task file can name local files."
        )
    found = json.loads(process.stdout.rsplit("\n", 1)[-1])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / SCORES).write_text(json.dumps({key: found[key] for key in found if key != "samples"}, indent=1) + "\n")
    for task, samples in found["samples"].items():
        write_samples(out / f"lm-eval-{task}.jsonl", str(model), task, samples, asked["options"] | {"seed": seed})
    return {task: dict(values) for task, values in found["results"].items()}


def write_samples(
    path: Path, model: str, task: str, samples: Sequence[Mapping[str, Any]], settings: dict[str, Any]
) -> bool:
    """A results file of the samples of one task; none (False) where no metric calls each of them right or wrong."""
    metric = next(
        (name for name in METRICS if samples and all(sample.get(name) in (0, 1, True, False) for sample in samples)),
        None,
    )
    if metric is None:
        return False
    path.unlink(missing_ok=True)
    name = f"lm-eval:{task}"
    header = Header(model, name, {"backend": {"kind": "lm-eval", "metric": metric}} | settings, len(samples))
    with ResultsWriter.open(path, header) as writer:
        for number, sample in enumerate(samples):
            identity = f"{name}/{sample.get('doc_id', number)}"
            writer.append(Sample(identity, 0, bool(sample[metric]), metric, str(sample.get("answer", ""))))
    return True


def _read_task(task: str) -> str | dict[str, Any]:
    """A name as it is; a YAML file as its content, with the paths of its data made absolute."""
    path = Path(task)
    if path.suffix not in (".yaml", ".yml"):
        return task
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EvaluationError(f"{task}: cannot be read as a task: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise EvaluationError(f"{task}: is no task of the harness: it has no `task:` with a name.")
    files = (content.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        content["dataset_kwargs"]["data_files"] = {
            split: str((path.parent / file).absolute()) if isinstance(file, str) else file
            for split, file in files.items()
        }
    return content


def _child() -> None:
    """Runs in the other process: the request on stdin, the answer as the last line of stdout."""
    import contextlib

    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        import lm_eval  # pyright: ignore[reportMissingImports]

        seed = asked["seed"]
        evaluate: Any = lm_eval.simple_evaluate
        found = evaluate(
            model="hf",
            model_args={"pretrained": asked["model"], "dtype": "float32", "device": "cpu"},
            tasks=asked["tasks"],
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            **asked["options"],
        )
    samples = {
        task: [
            {
                "doc_id": sample.get("doc_id"),
                "answer": sample.get("filtered_resps"),
                **{name: sample[name] for name in METRICS if name in sample},
            }
            for sample in entries
        ]
        for task, entries in found.get("samples", {}).items()
    }
    answer = {key: found[key] for key in ("results", "versions", "n-samples", "higher_is_better") if key in found}
    print("\n" + json.dumps(answer | {"samples": samples}, default=str), end="")


if __name__ == "__main__":
    _child()
