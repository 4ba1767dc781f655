"""`rlmerge eval`: completions of a model on tasks, verified, in one results file a task."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from rlmerge.errors import MissingExtraError, RlmergeError

from .options import Parser, at_least, declare_download, declare_output
from .show import told

USAGE = "[OPTIONS] MODEL --task TASK -o FOLDER"
DESCRIPTION = """\
Evaluate a model folder, a delta pack, or a recipe (.yml) merged in memory, on
tasks with verifiable answers: math, code, gym:gsm_symbolic, humaneval, problems.jsonl.

Every sample is a line of FOLDER/TASK.jsonl; an interrupted run is continued by
the same command. `rlmerge compare` compares such files.

With --backend server, MODEL is a model of the server at --url, which speaks
OpenAI's API (llama.cpp, vLLM, ...). With --lm-eval, EleutherAI's harness runs
its own tasks, or the YAML file of one, in a process of its own."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, pack, recipe (.yml), or name at the server")
    add("--task", metavar="TASK", action="append", default=[], help="task; several in a row are fine")
    add("--lm-eval", metavar="TASK", action="append", default=[], help="task of EleutherAI's harness")
    add("-o", "--out", metavar="FOLDER", required=True, help="folder for the results")
    add("--split", metavar="SPLIT", default="test", help="train, validation or test (default)")
    add("--count", metavar="N", type=at_least(1), help="problems; default 200, files whole")
    add("--samples", metavar="K", type=at_least(1), default=1, help="samples of each problem; default 1")
    add("--temperature", metavar="T", type=float, default=None, help="default 0 (greedy), 1 for several samples")
    add("--top-p", metavar="P", type=float, default=1.0, help="share of the probability to sample from")
    add("--top-k", metavar="N", type=at_least(0), default=0, help="sample from the N best tokens; default 0, from all")
    add("--max-new-tokens", metavar="N", type=at_least(1), default=256, help="default 256")
    add("--batch", metavar="N", type=at_least(1), default=32, help="sequences at once; default 32")
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of problems and samples")
    add("--dtype", metavar="D", default="float32", choices=("float32", "bfloat16"),
        help="arithmetic: float32 (default), or bfloat16, which is faster and less exact")  # fmt: skip
    add("--threads", metavar="N", type=at_least(1), help="threads of torch")
    add("--name", metavar="NAME", default="", help="what to call the model in comparisons")
    add("--role", metavar="ROLE", default="", choices=("", "base", "expert", "merged"), help="base, expert or merged")
    add("--model-seed", metavar="N", type=at_least(0), help="training seed, where several models were trained alike")
    add("--backend", metavar="KIND", default="transformers", choices=("transformers", "server"),
        help="transformers (default) or server")  # fmt: skip
    add("--base", metavar="BASE", help="base of a delta pack, where it is not where the pack says")
    add("--url", metavar="URL", help="address of the server, such as http://localhost:8080/v1")
    add("--parallel", metavar="N", type=at_least(1), default=8, help="requests to the server at once; default 8")
    add("--key-env", metavar="NAME", default="", help="environment variable that holds the server's key")
    add("--unsafe-exec", action="store_true", help="run model-written code although nothing isolates it")
    declare_download(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Evaluates task by task and prints the accuracies."""
    if bool(given.task) == bool(given.lm_eval):
        raise RlmergeError("give at least one --task, or else at least one --lm-eval.")
    if (given.backend == "server") != bool(given.url):
        raise RlmergeError("--backend server and --url belong together.")
    if Path(given.out).exists() and not Path(given.out).is_dir():
        raise RlmergeError(f"-o {given.out}: is a file; the results need a folder.")
    if given.lm_eval:
        _refuse_ours(given)
    try:
        found = _by_harness(given) if given.lm_eval else _by_us(given)
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge eval", error.name or "torch", "model") from None
    if given.json:
        json.dump(found, sys.stdout)
        print()
    elif not given.quiet:
        for entry in found:
            print(_line(entry))


def _refuse_ours(given: Namespace) -> None:
    """The harness has settings of its own: what it would not hear of is an error."""
    standard = {"backend": "transformers", "samples": 1, "temperature": None, "top_p": 1.0, "top_k": 0,
                "max_new_tokens": 256, "split": "test", "base": None, "threads": None, "download": False,
                "unsafe_exec": False}  # fmt: skip
    for name, value in standard.items():
        if getattr(given, name) != value:
            raise RlmergeError(f"--{name.replace('_', '-')} means nothing to --lm-eval: its task says that, or nobody.")


def _line(entry: dict[str, Any]) -> str:
    if "accuracy" not in entry:
        values = ", ".join(f"{key} {value:.4g}" for key, value in entry["scores"].items())
        return f"{entry['task']:<24} {values}"
    share = f"{entry['accuracy']:.1%}"
    return f"{entry['task']:<24} {share:>7} of {entry['problems']} problems  {entry['results']}"


def _by_us(given: Namespace) -> list[dict[str, Any]]:
    from rlmerge.evaluate.backend import Sampling
    from rlmerge.evaluate.results import scores
    from rlmerge.evaluate.run import check_sampling, evaluate
    from rlmerge.evaluate.tasks import load_task

    tasks = [load_task(spec, given.split, given.count, given.seed) for spec in given.task]
    outs = [Path(given.out) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', task.name)[:120]}.jsonl" for task in tasks]
    if len(set(outs)) < len(outs):
        raise RlmergeError(f"two of the tasks would be written to one file: {', '.join(map(str, outs))}.")
    temperature = given.temperature if given.temperature is not None else float(given.samples > 1)
    sampling = Sampling(temperature, given.max_new_tokens, given.top_p, given.top_k)
    check_sampling(sampling, given.samples)
    backend = _backend(given)
    found, told = [], 0
    for task, out in zip(tasks, outs):
        began = time.monotonic()

        def progress(done: int, total: int, tokens: int, name: str = task.name, began: float = began) -> None:
            nonlocal told
            if not given.quiet:
                rate = f", {tokens / max(time.monotonic() - began, 1e-9):,.1f} tokens/s" if tokens else ""
                print(f"{name}: {done} of {total} samples{rate}", file=sys.stderr)
            for note in getattr(backend, "notes", [])[told:]:
                print(f"note: {note}", file=sys.stderr)
                told += 1

        results = evaluate(
            backend, task, out, label=given.model, samples=given.samples, sampling=sampling, seed=given.seed,
            unsafe=given.unsafe_exec, progress=progress, name=given.name, role=given.role, model_seed=given.model_seed,
        )  # fmt: skip
        counted = scores(results)
        accuracy = sum(c / n for c, n in zip(counted.c, counted.n)) / len(counted.ids)
        found.append({"task": task.name, "problems": len(counted.ids), "accuracy": accuracy, "results": str(out)})
    return found


def _backend(given: Namespace) -> Any:
    if given.backend == "server":
        from rlmerge.evaluate.server import ServerBackend

        if given.key_env and given.key_env not in os.environ:
            raise RlmergeError(f"--key-env {given.key_env}: there is no such environment variable.")
        backend = ServerBackend(given.url, given.model, given.parallel, os.environ.get(given.key_env, ""))
        backend.check()
        return backend
    from rlmerge.evaluate.run import TransformersBackend, load_model

    if given.download:
        from rlmerge.downloads import fetch_model, find_folder

        fetch_model(given.model, told(given.quiet))
        given.base = find_folder(given.base, True, told(given.quiet)) if given.base else None
    if not given.quiet:
        print(f"loading {given.model}", file=sys.stderr)
    loaded = load_model(given.model, given.threads, given.dtype, given.base)
    return TransformersBackend(*loaded, given.batch)


def _by_harness(given: Namespace) -> list[dict[str, Any]]:
    from rlmerge.evaluate.lm_eval import evaluate_by_harness

    found = evaluate_by_harness(
        given.model, given.lm_eval, given.out, limit=given.count, batch=given.batch, seed=given.seed,
        dtype=given.dtype, name=given.name, role=given.role, model_seed=given.model_seed,
    )  # fmt: skip
    return [
        {"task": task, "scores": {key: value for key, value in values.items() if isinstance(value, (int, float))}}
        for task, values in found.items()
    ]
