"""EleutherAI's lm-evaluation-harness, in a process of its own and through its `simple_evaluate`.

Its other functions move between versions; this one has stayed, and so has `TaskManager`, which is told to look at none
of its own tasks where none is asked for. A task is a name that the harness knows, or a YAML file of one: that is read
here and handed over as a dictionary. Scores go to one JSON file; samples that a metric calls right or wrong also become
results files, which `rlmerge compare` reads.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rlmerge.checkpoint.folder import is_pack
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
    dtype: str = "float32",
    name: str = "",
    role: str = "",
    model_seed: int | None = None,
) -> dict[str, Any]:
    """Scores of a model folder on tasks of the harness; the whole of its answer is in FOLDER/lm-eval.json.

    Returns {task: {metric: value}}. Raises EvaluationError if a task file is none or the harness fails, ResultsError
    where the folder holds another run, and MissingExtraError if the harness is not installed.
    """
    if Path(model).suffix in (".yml", ".yaml"):
        raise EvaluationError(f"{model}: the harness loads model folders: merge first (rlmerge merge {model} OUT).")
    if is_pack(Path(model)):
        raise EvaluationError(
            f"{model}: the harness loads model folders: unpack first (rlmerge unpack {model} -o OUT)."
        )
    if not (Path(model) / "config.json").is_file():
        raise EvaluationError(f"{model}: is no model folder: it has no config.json.")
    out = Path(out)
    read = [_read_task(task) for task in tasks]
    contents = {task["task"]: task for task in read if isinstance(task, dict)}
    of: dict[str, Any] = {"role": role, "name": name, "seed": model_seed}
    asked = {
        "model": str(Path(model).absolute()),
        "dtype": dtype,
        "tasks": read,
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
        raise _failure(tasks, process.returncode, process.stderr)
    found = json.loads(process.stdout.rsplit("\n", 1)[-1])
    out.mkdir(parents=True, exist_ok=True)
    (out / SCORES).write_text(json.dumps({key: found[key] for key in found if key != "samples"}, indent=1) + "\n")
    options = {key: value for key, value in asked["options"].items() if key != "batch_size"}
    settings = {"options": options, "seed": seed, "dtype": dtype, "versions": found.get("versions", {})}
    for task, samples in found["samples"].items():
        header = Header(
            str(model), f"lm-eval:{task}", settings | {"task": contents.get(task, task)}, len(samples), **of
        )
        for choice in dict.fromkeys(sample.get("filter") for sample in samples):
            some = [sample for sample in samples if sample.get("filter") == choice]
            several = len(some) < len(samples)
            name = _file_name(f"{task}-{choice}" if several else task)
            own = replace(header, task=f"{header.task}:{choice}" if several else header.task, problems=len(some))
            write_samples(out / f"lm-eval-{name}.jsonl", own, some)
    return {task: dict(values) for task, values in found["results"].items()}


def _failure(tasks: Sequence[str], code: int, printed: str) -> Exception:
    if "No module named 'lm_eval'" in printed:
        return MissingExtraError("rlmerge eval --lm-eval", "lm-eval", "eval")
    lines = printed.strip().splitlines() or ["no message"]
    what = lines[-1] if code > 0 else f"it was killed by signal {-code} (out of memory?)"
    hint = ""
    if any(word in printed for word in ("ConnectionError", "offline", "OfflineMode", "LocalEntryNotFound")):
        hint = "\n  Without a network its own tasks need their data in the cache; a task file can name local files."
    return EvaluationError(f"the harness failed on {', '.join(tasks)}: {what}{hint}")


def _file_name(task: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", task).strip(".")[:120] or "task"


def write_samples(path: Path, header: Header, samples: Sequence[Mapping[str, Any]]) -> bool:
    """A results file of the samples of one task; none (False) where no metric calls each of them right or wrong.

    Raises ResultsError where there is one of another run.
    """
    metric = next(
        (name for name in METRICS if samples and all(sample.get(name) in (0, 1, True, False) for sample in samples)),
        None,
    )
    if metric is None:
        return False
    header = replace(header, settings=header.settings | {"backend": {"kind": "lm-eval", "metric": metric}})
    with ResultsWriter.open(path, header) as writer:
        for number, sample in enumerate(samples):
            identity = f"{header.task}/{sample.get('doc_id', number)}"
            if (identity, 0) not in writer.done:
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
        hint = (
            " Tags such as !function are for the harness alone: give such a task by its name."
            if "!" in str(error)
            else ""
        )
        raise EvaluationError(f"{task}: cannot be read as a task: {error}{hint}") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise EvaluationError(f"{task}: is no task of the harness: it has no `task:` with a name.")
    files = (content.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        content["dataset_kwargs"]["data_files"] = {
            split: str((path.parent / file).absolute()) if isinstance(file, str) else file
            for split, file in files.items()
        }
    return content


def _is_whole(task: Mapping[str, Any]) -> bool:
    """Whether a task stands alone: names its data itself, and builds on no other one."""
    return "dataset_path" in task and "include" not in task


def _child() -> None:
    """Runs in the other process: the request on stdin, the answer as the last line of stdout."""
    import contextlib

    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        import lm_eval  # pyright: ignore[reportMissingImports]

        seed = asked["seed"]
        if all(isinstance(task, dict) and _is_whole(task) for task in asked["tasks"]):
            # it need not read its thousands of own tasks
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

            asked["options"]["task_manager"] = TaskManager(include_defaults=False)
        evaluate: Any = lm_eval.simple_evaluate
        found = evaluate(
            model="hf",
            model_args={"pretrained": asked["model"], "dtype": asked["dtype"], "device": "cpu"},
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
                "filter": sample.get("filter"),
                **{name: sample[name] for name in METRICS if name in sample},
            }
            for sample in entries
        ]
        for task, entries in found.get("samples", {}).items()
    }
    answer = {key: found[key] for key in ("results", "versions", "n-samples", "higher_is_better") if key in found}
    print("\n" + json.dumps(_plain(answer | {"samples": samples}), allow_nan=False), end="")


def _plain(value: Any) -> Any:
    """The same in types that JSON has: NumPy's numbers as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


if __name__ == "__main__":
    _child()
