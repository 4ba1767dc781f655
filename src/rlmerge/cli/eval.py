"""`rlmerge eval`: samples of a model on tasks, verified, in one results file a task."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

from rlmerge.errors import MissingExtraError

from .options import Parser, at_least, declare_output

USAGE = "[OPTIONS] MODEL --task TASK -o FOLDER"
DESCRIPTION = """\
Evaluate a model folder, or a recipe (.yml) merged in memory, on tasks with
verifiable answers: math, code, gym:gsm_symbolic, humaneval, problems.jsonl.

Every sample is a line of FOLDER/TASK.jsonl; an interrupted run is continued by
the same command. `rlmerge compare` compares such files."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or recipe (.yml) to merge in memory")
    add("--task", metavar="TASK", action="append", required=True, help="task; several in a row are fine")
    add("-o", "--out", metavar="FOLDER", required=True, help="folder for the results")
    add("--split", metavar="SPLIT", default="test", help="train, validation or test (default)")
    add("--count", metavar="N", type=at_least(1), help="problems; default 200, files whole")
    add("--samples", metavar="K", type=at_least(1), default=1, help="samples of each problem; default 1")
    add("--temperature", metavar="T", type=float, default=None, help="default 0 (greedy), 1 for several samples")
    add("--top-p", metavar="P", type=float, default=1.0, help="share of the probability to sample from")
    add("--max-new-tokens", metavar="N", type=at_least(1), default=256, help="default 256")
    add("--batch", metavar="N", type=at_least(1), default=32, help="sequences at once; default 32")
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of problems and samples")
    add("--threads", metavar="N", type=at_least(1), help="threads of torch")
    add("--unsafe-exec", action="store_true", help="run model-written code although nothing isolates it")
    declare_output(parser)


def run(given: Namespace) -> None:
    """Evaluates task by task and prints the accuracies."""
    try:
        from rlmerge.evaluate.generate import Sampling
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge eval", error.name or "torch", "model") from None
    from rlmerge.evaluate.results import scores
    from rlmerge.evaluate.run import evaluate, load_model
    from rlmerge.evaluate.tasks import load_task

    tasks = [load_task(spec, given.split, given.count, given.seed) for spec in given.task]
    temperature = given.temperature if given.temperature is not None else float(given.samples > 1)
    sampling = Sampling(temperature, given.max_new_tokens, given.top_p)
    model, tokenizer = load_model(given.model, given.threads)
    found = []
    for task in tasks:
        out = Path(given.out) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', task.name)}.jsonl"

        def progress(done: int, total: int, name: str = task.name) -> None:
            if not given.quiet:
                print(f"{name}: {done} of {total} samples", file=sys.stderr)

        results = evaluate(
            model, tokenizer, task, out, label=given.model, samples=given.samples, sampling=sampling, seed=given.seed,
            batch=given.batch, unsafe=given.unsafe_exec, progress=progress,
        )  # fmt: skip
        counted = scores(results)
        accuracy = sum(c / n for c, n in zip(counted.c, counted.n)) / len(counted.ids)
        found.append({"task": task.name, "problems": len(counted.ids), "accuracy": accuracy, "results": str(out)})
    if given.json:
        json.dump(found, sys.stdout)
        print()
    elif not given.quiet:
        for entry in found:
            share = f"{entry['accuracy']:.1%}"
            print(f"{entry['task']:<24} {share:>7} of {entry['problems']} problems  {entry['results']}")
