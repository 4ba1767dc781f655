"""The settings of a run, before anything is computed: threads and memory, the points of a sweep, what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmerge.errors import MismatchError, RecipeError
from rlmerge.figures import size
from rlmerge.plan import PartResolver, Plan
from rlmerge.planner import stage_names
from rlmerge.recipe import Recipe, load_recipe, parse_recipe
from rlmerge.stages import Stages, load_stages, with_adapted_bases

DEFAULT_SHARD_BYTES = 5 * 10**9
PROCESS_BYTES = 250 * 2**20
"""Python and the kernels."""
KEPT_BYTES = 128 * 2**20
"""Per thread, for what stages keep of a tensor for the next one (4.4 M coordinates, three sparse experts: 40 MB)."""
KEPT_AT_MOST = 2 * KEPT_BYTES
"""For all threads: they work on the units of one or two tensors at a time, however many they are."""


def as_recipe(recipe: Recipe | Mapping[str, Any] | Path | str) -> Recipe:
    """The recipe itself, that of a mapping of its keys, or the one that lies at this path."""
    if isinstance(recipe, Stages):
        raise RecipeError("expected one recipe, found stages: these are merged into a folder only (merge_to_folder).")
    if isinstance(recipe, Mapping):
        return parse_recipe(recipe)
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def as_recipes(
    recipe: Recipe | Stages | Mapping[str, Any] | Path | str, folder: Path | str | None = None
) -> Recipe | Stages:
    """The recipe or the stages themselves, or those that lie at this path or in a mapping; stages of one document are
    its recipe, and a recipe whose base is first to be made is stages.

    Raises RecipeError for a folder of stages where there are none.
    """
    found = parse_recipe(recipe) if isinstance(recipe, Mapping) else recipe
    found = found if isinstance(found, (Recipe, Stages)) else load_stages(found)
    found = with_adapted_bases([found]) if isinstance(found, Recipe) and not found.stages else found
    found = found.final if isinstance(found, Stages) and len(found.recipes) == 1 else found
    if folder is not None and not isinstance(found, Stages):
        raise RecipeError(
            f"--stages {folder}: {found.source_name} is one document, so there are no stages. Leave it out."
        )
    return found


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_executor(executor: str, address: str | None, memory: int | None = None) -> None:
    """Raises RecipeError for a way to run that there is not, or settings that it does not have."""
    if executor not in ("local", "ray"):
        raise RecipeError(f"--executor {executor!r}: choose local (threads of this machine) or ray (a cluster).")
    if executor == "local" and address is not None:
        raise RecipeError(f"--address {address}: is that of a Ray cluster: add --executor ray.")
    if address is not None and memory is not None:
        raise RecipeError("--memory bounds this machine; machines of a cluster know theirs. Leave it out.")


def check_run(threads: int | None, kernels: str, shard_bytes: int) -> None:
    """Raises RecipeError for settings of a run that cannot mean anything."""
    if kernels not in ("auto", "numba", "numpy"):
        raise RecipeError(f"--kernels {kernels!r}: choose numba, numpy (the same bits, slowly), or auto.")
    if threads is not None and threads < 1:
        raise RecipeError(f"--threads {threads}: at least one is needed.")
    if shard_bytes < 10**6:
        raise RecipeError(f"--shard-size: {shard_bytes} bytes is too little; write at least 1MB, for instance 5GB.")


def make_variants(recipe: Recipe, sweep: Sequence[dict[str, Any]]) -> tuple[Recipe, ...]:
    """The recipe of each point of a sweep. Raises RecipeError for what cannot vary within one reading."""
    fixed = sorted({key for point in sweep for key in point} & {"dtype", "out_dtype", "min_change", "on_mismatch"})
    if fixed and len(sweep) > 1:
        raise RecipeError(
            f"--set {fixed[0]}: all points of a sweep share one reading, so {', '.join(fixed)} cannot vary in it: "
            "run one merge for each value."
        )
    variants = tuple(recipe.with_settings(settings) for settings in sweep)
    if len({stage_names(variant) for variant in variants}) > 1:
        raise RecipeError(
            "--set: the points of this sweep must measure different things, so they cannot share one reading: run one "
            "merge for each value."
        )
    return variants


def sweep_names(sweep: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The folder of each point of a sweep, by what varies: 'lambda=0.3,density=0.5'; '' for a single merge."""
    keys = list(dict.fromkeys(key for point in sweep for key in point))
    varying = [key for key in keys if len({str(point.get(key)) for point in sweep}) > 1]
    names = [",".join(f"{key}={point[key]}" for key in varying if key in point) or "default" for point in sweep]
    if len(sweep) == 1:
        names = [",".join(f"{key}={value}" for key, value in sweep[0].items())]
    if len(set(names)) < len(names):
        point = next(point for point, name in zip(sweep, names) if names.count(name) > 1)
        said = ", ".join(f"{key}={value}" for key, value in point.items())
        raise RecipeError(f"--set: the sweep has {said} twice. Write each value once.")
    return tuple(names) or ("",)


def check_tokenizers(plan: Plan, accept: bool) -> tuple[str, ...]:
    """Raises MismatchError if tokenizers differ although the vocabularies have one size; notes them if accepted."""
    from rlmerge.checkpoint.tokenizer import compare_tokenizers, lent_files, open_tokenizers
    from rlmerge.small_files import copied_files

    if plan.chat_template is not None or plan.vocabulary is not None:  # files that cannot take it are known now
        copied_files(plan)
    folders = list(dict.fromkeys(model.planned or model.folder for model in (plan.donor, *plan.models)))
    # what the recipe decides is no question any more
    aspects = ["vocabulary", "merges", "sentencepiece"] if plan.vocabulary is None else []
    aspects += ["special", *(["templates"] if plan.chat_template is None else [])]
    lent = lent_files(plan.base or plan.donor, plan.models)
    differences = tuple(compare_tokenizers(folders, lent, aspects))
    if not differences or plan.vocabulary is not None:
        return differences
    framing = differences == tuple(compare_tokenizers(folders, lent, ("special", "templates")))
    templates = [tokenizer.templates for tokenizer in open_tokenizers(folders, lent)]
    lost = plan.chat_template is None and not templates[0] and any(templates)
    taken = f"the output then has the tokenizer of {plan.donor.reference}{', and no chat template' if lost else ''}"
    keep = "`tokenizer_source: MODEL` in the recipe keeps a model's tokenizer, its special tokens and chat template"
    keep += "; `chat_template: auto` the template alone." if lost else "."
    if not accept:
        listed = "\n  ".join(differences[:8]) + (
            f"\n  … and {len(differences) - 8} more" if len(differences) > 8 else ""
        )
        raise MismatchError(
            f"the models have the same shapes but not the same tokenizer:\n  {listed}\n"
            f"  {_FRAMING if framing else _ROWS} add --accept-tokenizers: {taken}.\n  {keep}"
        )
    return (*differences, f"{taken.replace(' then', '')}. {keep}") if lost else differences


_ROWS = "Their rows of the embedding may mean different tokens. If you know that this is harmless,"
_FRAMING = "Their tokens are the same; what differs is how text is framed. If that is harmless,"


def limit_threads(threads: int, memory: int | None, plan: Plan) -> int:
    """Threads that have work and fit in `memory` bytes. Raises RecipeError if not even one does."""
    threads = max(1, min(threads, len(plan.unit_list())))
    if memory is None:
        return threads
    each, fixed = thread_bytes(plan), PROCESS_BYTES
    if fixed + each > memory:
        raise RecipeError(
            f"--memory {size(memory)} is less than one thread needs: {size(fixed + each)} "
            f"({size(fixed)} for Python and the kernels, {size(each)} for its buffers)."
        )
    return max(1, min(threads, (memory - fixed) // each))


def whole_cost(plan: Plan) -> list[tuple[float, int, int]]:
    """For each tensor that is merged whole: decompositions of all variants, m·n·min(m, n) of one, bytes held."""
    found = []
    resolvers = [PartResolver(recipe, plan.layers) for recipe in plan.variants]
    for tensor in plan.tensors if plan.recipe.method.grain == "matrix" else ():
        if tensor.carry is not None:
            continue
        costs = [
            plan.recipe.method.whole_cost(
                tensor.name,
                tensor.shape,
                resolver.resolve(tensor).values,
                len(tensor.experts),
                int(not tensor.gram_first) if tensor.grams else None,
            )
            for resolver in resolvers
        ]
        if any(number or held for number, held in costs):
            number, held = sum(number for number, _ in costs), max(held for _, held in costs)
            found.append((number, tensor.size * min(tensor.shape), held))
    return found


def whole_bytes(plan: Plan) -> int:
    """Memory that a thread takes for the largest tensor that it merges whole."""
    return max((held for _, _, held in whole_cost(plan)), default=0)


def thread_bytes(plan: Plan) -> int:
    """Anonymous memory of one thread, at most: what stages keep, a block of stored words or decoded values, places,
    deltas and updates in fp64, histograms, LoRA factors, for K experts; a whole matrix where the method needs one.
    """
    count = len(plan.experts)
    block = max((min(tensor.block, tensor.size) for tensor in plan.tensors), default=0)
    kept = min(KEPT_BYTES, 16 * sum(tensor.size for tensor in plan.tensors))
    factors = sums = 0
    for tensor in plan.tensors:
        for source in tensor.experts:
            if source.a is not None and source.b is not None:
                factors = max(factors, 4 * (source.a.nbytes + source.b.nbytes))
        sums = max(sums, sum(source.kind == "sum" for source in tensor.experts))
    return (
        kept
        + whole_bytes(plan)
        + block * (24 + count * 60 + (sums > 0) * 8 * count + sums * 16)
        + count * 7 * 2**18 * len(plan.variants)
        + count * factors
    )
