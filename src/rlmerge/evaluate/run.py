"""Evaluates a model on a task: prompts, samples, verdicts, one line of the results file for each; resumable.

A model is a folder, or a recipe: then the merge goes straight into the loaded base, and nothing is written but results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlmerge.errors import RlmergeError
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.results import Header, Results, ResultsWriter, Sample
from rlmerge.evaluate.tasks import Task
from rlmerge.evaluate.verifiers import completed, verify

BATCH_OF_VERDICTS = 64
"""Completions that are verified together: enough to keep the sandbox's workers busy, few enough to lose little."""


class EvaluationError(RlmergeError):
    """A model that cannot be evaluated as asked."""


def load_model(reference: Path | str, threads: int | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, or of the merge that a recipe (.yml) describes, in fp32 on the CPU.

    Raises EvaluationError for what transformers cannot load, and what `rlmerge.merge_to` raises.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    reference = Path(reference)
    recipe = None
    folder = reference
    if reference.suffix in (".yml", ".yaml"):
        from rlmerge.recipe import load_recipe

        recipe = load_recipe(reference)
        folder = recipe.base_path or next(iter(recipe.model_paths.values()))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{folder}: transformers cannot load it: {error}") from None
    if recipe is not None:
        from rlmerge.api import merge_to

        merge_to(model, recipe)
    return model, tokenizer


def prompt_ids(tokenizer: Any, problem: Problem) -> tuple[int, ...]:
    """The token ids that a model continues: the chat template for `messages`, else the raw prompt."""
    if problem.messages:
        text = tokenizer.apply_chat_template(list(problem.messages), tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer(problem.prompt)["input_ids"])


def stops_of(problems: Sequence[Problem]) -> tuple[str, ...]:
    """Every string at which the problems of a task say that an answer ends."""
    found: dict[str, None] = {}
    for problem in problems:
        found |= dict.fromkeys(filter(None, (problem.meta.get("end"), *problem.meta.get("stop", ()))))
    return tuple(found)


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    out: Path | str,
    *,
    label: str,
    samples: int = 1,
    sampling: Any = None,
    seed: int = 0,
    batch: int = 32,
    unsafe: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Makes and verifies `samples` completions of every problem; continues what the file `out` already holds.

    The random numbers of a sample depend on (seed, problem, number of the sample) alone. Greedy decoding
    (temperature 0, the default) makes one sample. Raises ResultsError if `out` holds other settings.
    """
    from rlmerge.evaluate.generate import Generator, Request, Sampling, seed_of

    sampling = sampling or Sampling()
    if sampling.temperature == 0.0 and samples > 1:
        raise EvaluationError(f"{samples} samples at temperature 0 are all alike: ask for one, or set a temperature.")
    if not task.verifiers:
        raise EvaluationError(f"task {task.name}: nothing says how to verify it; give its problems a 'verifier'.")
    sampling = replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *stops_of(task.problems)))))
    settings = {"task": task.settings, "sampling": asdict(sampling), "samples": samples, "seed": seed}
    settings["sampling"]["stop"] = list(sampling.stop)
    problems = {problem.id: problem for problem in task.problems}
    header = Header(label, task.name, settings, len(problems))
    options: dict[str, dict[str, Any]] = {"python": {"unsafe": unsafe}} if "python" in task.verifiers else {}
    with ResultsWriter.open(out, header) as writer:
        requests = [
            Request((problem.id, number), prompt_ids(tokenizer, problem), seed_of(seed, task.name, problem.id, number))
            for problem in task.problems
            for number in range(samples)
            if (problem.id, number) not in writer.done
        ]
        total = len(problems) * samples
        waiting: list[Any] = []

        def flush() -> None:
            asked = [problems[sample.key[0]] for sample in waiting]
            texts = [completed(sample.text, sample.finish, problem) for sample, problem in zip(waiting, asked)]
            for sample, text, verdict in zip(waiting, texts, verify(texts, asked, **options)):
                name, number = sample.key
                more = {"finish": sample.finish}
                writer.append(Sample(name, number, verdict.correct, verdict.reason, text, len(sample.tokens), more))
            waiting.clear()
            progress(len(writer.done), total)

        for sample in Generator(model, tokenizer, batch).run(requests, sampling):
            waiting.append(sample)
            if len(waiting) == BATCH_OF_VERDICTS:
                flush()
        flush()
    return Results.load(out)
