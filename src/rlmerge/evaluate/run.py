"""Evaluates a model on a task: prompts, samples, verdicts, one line of the results file for each; resumable.

A model is a folder, a delta pack, or a recipe, whose merge goes straight into the loaded base: nothing is written but
results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from rlmerge.checkpoint.folder import is_pack
from rlmerge.errors import RlmergeError
from rlmerge.evaluate.backend import Asked, Backend, Completion, Sampling
from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.results import Header, Results, ResultsWriter, Sample
from rlmerge.evaluate.tasks import Task
from rlmerge.evaluate.verifiers import completed, verify

if TYPE_CHECKING:
    from rlmerge.recipe import Recipe

PATIENCE = 5.0
"""Seconds after which what there is is verified and written, so that little is lost and something is seen to happen."""
BATCH_OF_VERDICTS = 64
"""Completions that are verified together: enough to keep the sandbox's workers busy, few enough to lose little."""


class EvaluationError(RlmergeError):
    """A model that cannot be evaluated as asked."""


def load_model(
    reference: Path | str | Recipe,
    threads: int | None = None,
    dtype: str = "float32",
    base: Path | str | None = None,
    download: bool = False,
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, a delta pack, or the merge of a recipe (a .yml), in this dtype on the CPU.

    base      the base of a pack, where it is not where the pack says
    download  fetches models of the hub
    Raises EvaluationError for what transformers cannot load, PackError or MismatchError for a pack that does not fit,
    and what `rlmerge.merge_to` raises.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    from rlmerge.downloads import find_model, with_downloads
    from rlmerge.recipe import load_recipe

    found = find_model(str(reference), download) if isinstance(reference, (str, Path)) else reference
    recipe, folder = (None, found) if isinstance(found, Path) else (found, Path())
    if folder.suffix in (".yml", ".yaml"):
        recipe = load_recipe(folder)
    if recipe is not None and download:
        recipe = with_downloads(recipe)
    if recipe is not None:
        if recipe.tokenizer_source or recipe.tokenizer or recipe.chat_template:
            raise EvaluationError(
                f"{recipe.source_name}: makes a tokenizer or chat template of its own, which a merge in memory lacks: "
                "merge to a folder (rlmerge merge RECIPE OUT) and evaluate that."
            )
        folder = recipe.base_path or next(iter(recipe.model_paths.values()))
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: there is no such model folder.")
    if recipe is None and is_pack(folder):
        from rlmerge.packs.model import load_packed

        return load_packed(folder, base, lambda home, tensors: _load(home, folder, dtype, tensors))
    model, tokenizer = _load(folder, folder, dtype)
    if recipe is not None:
        from rlmerge.api import merge_to

        merge_to(model, recipe)
    return model, tokenizer


def _load(folder: Path, named: Path, dtype: str, tensors: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, with its own weights or these; messages speak of `named`."""
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
    )

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise EvaluationError(
            f"{named}: has no tokenizer files, so nothing can be asked of it. Copy those of its base."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
        options |= {"local_files_only": True, "output_loading_info": True}
        if tensors is None:
            found: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # the class itself takes None for "only these tensors"; AutoModelForCausalLM would look for adapters there
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            found = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
            if (folder / "generation_config.json").is_file():
                settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
                found[0].generation_config = settings
    except Exception as error:  # whatever transformers, safetensors or a missing package raise, the folder is at fault
        raise EvaluationError(f"{named}: transformers cannot load it: {type(error).__name__}: {error}") from None
    model, loaded = found
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise EvaluationError(
            f"{named}: has no weights for {missing} …: transformers would fill them with random numbers."
        )
    return model, tokenizer


class TransformersBackend:
    """A loaded model of transformers and its tokenizer, at most `batch` sequences at a time."""

    def __init__(self, model: Any, tokenizer: Any, batch: int = 32) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch = batch

    @property
    def settings(self) -> dict[str, Any]:
        """Kind and dtype."""
        return {"kind": "transformers", "dtype": str(self.model.dtype).removeprefix("torch.")}

    @property
    def identity(self) -> str:
        """xxh3-128 of all weights as they are loaded, or merged."""
        import torch

        state = xxhash.xxh3_128()
        for name, tensor in self.model.state_dict().items():
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()

    def run(self, asked: Iterable[Asked], sampling: Sampling) -> Iterator[Completion]:
        """Completions in the order in which they are finished."""
        from rlmerge.evaluate.generate import Generator, Request

        limit = getattr(self.model.config, "max_position_embeddings", None)
        requests = []
        for one in asked:
            ids = prompt_ids(self.tokenizer, one.problem)
            if not ids or (limit and len(ids) >= limit):
                raise EvaluationError(
                    f"problem {one.problem.id}: its prompt has {len(ids)} tokens; the model reads 1 to {limit}."
                )
            requests.append(Request(one.key, ids, one.seed, one.stop))
        for sample in Generator(self.model, self.tokenizer, self.batch).run(requests, sampling):
            yield Completion(sample.key, len(sample.tokens), sample.text, sample.finish)


def prompt_ids(tokenizer: Any, problem: Problem) -> tuple[int, ...]:
    """The token ids that a model continues: the chat template for `messages`, else the raw prompt."""
    if problem.messages:
        try:
            text = tokenizer.apply_chat_template(list(problem.messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # no template, or one that refuses these roles: jinja2's own errors
            raise EvaluationError(
                f"problem {problem.id}: the model's chat template cannot be applied: {error}"
            ) from None
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer(problem.prompt)["input_ids"])


def stops_of(problem: Problem) -> tuple[str, ...]:
    """The strings at which an answer to this problem ends. Raises EvaluationError for what is no list of strings."""
    end, stop = problem.meta.get("end") or "", problem.meta.get("stop", ())
    if (
        not isinstance(end, str)
        or not isinstance(stop, (list, tuple))
        or not all(isinstance(s, str) and s for s in stop)
    ):
        raise EvaluationError(f"problem {problem.id}: meta.stop must be a list of strings, and meta.end a string.")
    return tuple(dict.fromkeys(filter(None, (end, *stop))))


def check_sampling(sampling: Sampling, samples: int) -> None:
    """Raises EvaluationError for what means nothing."""
    if not (0.0 <= sampling.temperature < float("inf")):
        raise EvaluationError(f"temperature {sampling.temperature}: write 0 (greedy) or more.")
    if not (0.0 < sampling.top_p <= 1.0):
        raise EvaluationError(f"top-p {sampling.top_p}: write a share of the probability, more than 0 and at most 1.")
    if sampling.temperature == 0.0 and samples > 1:
        raise EvaluationError(f"{samples} samples at temperature 0 are all alike: ask for one, or set a temperature.")


def evaluate(
    backend: Backend,
    task: Task,
    out: Path | str,
    *,
    label: str,
    samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    unsafe: bool = False,
    name: str = "",
    role: str = "",
    model_seed: int | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> Results:
    """Makes and verifies `samples` completions of every problem; continues what the file `out` already holds.

    The random numbers of a sample depend on (seed, problem, number of the sample) alone. Greedy decoding
    (temperature 0, the default) makes one sample. A file is continued by the same model only. `name`, `role` and
    `model_seed` are for comparisons (see `results.Header`). `progress` hears of samples done, samples in all, and
    tokens made by this call. Raises ResultsError if `out` holds other settings or another model's results.
    """
    sampling = sampling or Sampling()
    check_sampling(sampling, samples)
    if not task.verifiers:
        raise EvaluationError(f"task {task.name}: nothing says how to verify it; give its problems a 'verifier'.")
    settings = {"task": task.settings, "sampling": asdict(sampling), "samples": samples, "seed": seed}
    settings["sampling"]["stop"] = list(sampling.stop)
    settings["backend"] = backend.settings
    problems = {problem.id: problem for problem in task.problems}
    stops = {problem.id: stops_of(problem) for problem in task.problems}
    header = Header(label, task.name, settings, len(problems), role, name, model_seed, backend.identity)
    options: dict[str, dict[str, Any]] = {"python": {"unsafe": unsafe}} if "python" in task.verifiers else {}
    with ResultsWriter.open(out, header) as writer:
        asked = [
            Asked((problem.id, number), problem, seed_of(seed, task.name, problem.id, number), stops[problem.id])
            for problem in task.problems
            for number in range(samples)
            if (problem.id, number) not in writer.done
        ]
        tokens = 0
        waiting: list[Completion] = []

        written = time.monotonic()

        def flush() -> None:
            nonlocal written
            of = [problems[made.key[0]] for made in waiting]
            texts = [completed(made.text, made.finish, problem) for made, problem in zip(waiting, of)]
            for made, text, verdict in zip(waiting, texts, verify(texts, of, **options)):
                name, number = made.key
                more = {"finish": made.finish}
                writer.append(Sample(name, number, verdict.correct, verdict.reason, text, made.tokens, more))
            waiting.clear()
            written = time.monotonic()
            progress(len(writer.done), len(problems) * samples, tokens)

        if asked:
            completions = backend.run(asked, sampling)
            try:
                for made in completions:
                    waiting.append(made)
                    tokens += made.tokens
                    if len(waiting) >= BATCH_OF_VERDICTS or time.monotonic() - written > PATIENCE:
                        flush()
            finally:
                # whatever ended it: what was made is kept, and nothing goes on behind our back
                close = getattr(completions, "close", None)
                if close is not None:
                    close()
                flush()
        else:
            progress(len(writer.done), len(problems) * samples, 0)
    return Results.load(out)


def seed_of(*parts: Any) -> int:
    """The seed of one sample: xxh3-64 of what it belongs to (task, problem, number of the sample, run)."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())
