"""What `rlmerge merge` can do, as functions: merge to a folder, to arrays or into a loaded model.

Every function takes a `Recipe`, a mapping of its keys, or the path of one; `merge_to_folder` also takes several
documents, as `Stages`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmerge.checkpoint.layout import WIDTH
from rlmerge.disk_errors import disk_errors
from rlmerge.downloads import with_all_downloads, with_downloads, without_weights
from rlmerge.errors import MismatchError
from rlmerge.execute.folder import OutputFolder
from rlmerge.execute.journal import Journal
from rlmerge.execute.local import Threads
from rlmerge.execute.report import collect
from rlmerge.execute.schedule import Executor, Run
from rlmerge.execute.stage_folder import StageFolder
from rlmerge.execute.work import Worker
from rlmerge.fisher.on_demand import with_estimates, without_fishers
from rlmerge.kernels import Backend, choose, is_compiled, load_kernels
from rlmerge.plan import Plan, without_records
from rlmerge.planner import make_plan
from rlmerge.recipe import Recipe
from rlmerge.sample import alarms, take_sample
from rlmerge.settings import (
    DEFAULT_SHARD_BYTES,
    KEPT_AT_MOST,
    KEPT_BYTES,
    as_recipe,
    as_recipes,
    check_executor,
    check_run,
    check_tokenizers,
    default_threads,
    limit_threads,
    make_variants,
    sweep_names,
)
from rlmerge.small_files import write_log, write_small_files
from rlmerge.stages import Stages

Progress = Callable[["Step"], None]


@dataclass(frozen=True, slots=True)
class Step:
    """How far a merge is: bytes read so far, units written and in all, and a message where there is one."""

    bytes_read: int
    units: int
    total_units: int
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """A finished merge: where it is, and for each variant its settings and statistics (`total`, `tensors`).

    stages   what was merged before it, by name; None for a stage that was there already, whole and unchanged.
             `seconds` and `bytes_read` are with them
    """

    out: Path | None
    names: tuple[str, ...]
    reports: list[dict[str, Any]]
    notes: tuple[str, ...]
    alarms: tuple[str, ...]
    resumed_units: int
    total_units: int
    seconds: float
    bytes_read: int
    stages: Mapping[str, Outcome | None] = field(default_factory=dict)

    @property
    def report(self) -> dict[str, Any]:
        """The statistics of the first variant."""
        return self.reports[0]


@disk_errors()
def merge_to_folder(
    recipe: Recipe | Stages | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    stages: Path | str | None = None,
    sweep: Sequence[dict[str, Any]] = (),
    threads: int | None = None,
    memory: int | None = None,
    kernels: Backend = "auto",
    overwrite: bool = False,
    fsync: bool = False,
    sha256: bool = False,
    accept_tokenizers: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    download: bool = False,
    executor: str = "local",
    address: str | None = None,
    progress: Progress = lambda step: None,
) -> Outcome:
    """Merges into a folder that appears whole or, when interrupted, is continued by the same call.

    recipe   of a file of several documents, the stages are merged first; those that are whole and unchanged are kept
    stages   where they are made and stay; by default in OUT.stages, which goes when OUT is whole
    sweep    settings such as [{'lambda': 0.3}, {'lambda': 1.0}]: one sub-folder each, all from one reading
    threads  workers (default: the processors at hand); `memory` in bytes lowers them; no bit depends on it
    download  fetches models of the hub: headers first, weights once headers show no mistake
    executor  'local': threads; 'ray': `threads` processes of the Ray cluster at `address`, or of one of our own
    Raises a subclass of RlmergeError for what a user can mend.
    """
    started = time.monotonic()
    recipe = as_recipes(recipe, stages)
    check_run(threads, kernels, shard_bytes)
    check_executor(executor, address, memory)
    if download:
        recipe = _fetch(recipe, StageFolder(Path(out), None if stages is None else Path(stages)), sweep, overwrite,
                        shard_bytes, progress)  # fmt: skip
    if isinstance(recipe, Stages):
        from rlmerge.staged_merge import merge_stages  # which calls this function for each of them

        return merge_stages(
            recipe, Path(out), None if stages is None else Path(stages), sweep=sweep, threads=threads, memory=memory,
            kernels=kernels, overwrite=overwrite, fsync=fsync, sha256=sha256, accept_tokenizers=accept_tokenizers,
            shard_bytes=shard_bytes, executor=executor, address=address, progress=progress,
        )  # fmt: skip
    if recipe.to_estimate:  # hours, perhaps: first everything that can be known without them
        with recipe.located():
            OutputFolder(make_plan(without_fishers(recipe)), Path(out), sweep_names(sweep), overwrite, fsync).check()
    recipe = with_estimates(recipe, lambda text: progress(Step(0, 0, 0, text)))
    variants = make_variants(recipe, sweep)
    names = sweep_names(sweep)
    with recipe.located():
        plan = make_plan(variants[0] if variants else recipe, variants, shard_bytes)
    notes = (*plan.notes, *check_tokenizers(plan, accept_tokenizers))
    target = OutputFolder(plan, Path(out), names, overwrite, fsync)
    target.tidy()
    target.check()
    target.check_space()
    limit = threads
    threads = limit_threads(threads or default_threads(), memory, plan)
    kernels = choose(kernels, plan.values_read)
    ready = kernels == "numpy" or is_compiled()
    warnings = tuple(alarms(plan, take_sample(plan, kernels if ready else "numpy")))
    for text in (*notes, *warnings):
        progress(Step(0, 0, 0, f"warning: {text}"))
    if not ready:
        progress(Step(0, 0, 0, "compiling the kernels: once, some seconds"))
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(_worker(plan, load_kernels("numpy" if executor == "ray" else kernels), threads))
        digest, stamps = f"{plan.digest()} {names}", worker.inputs.stamps()
        worker.inputs.check_unchanged(stamps)  # since it was planned
        journal = target.open(digest, stamps)
        try:
            done, total = len(journal.units), len(plan.unit_list())
            if done:
                progress(Step(0, done, total, f"continuing: {done} of {total} units are done"))
            if executor == "ray":
                doer: Executor = stack.enter_context(
                    _ray(plan, target, kernels, digest, stamps, address, threads, limit, progress)
                )
            else:
                doer = Threads(worker, target.write, threads)
            run = Run(worker, journal, doer, lambda count: progress(Step(count, len(journal.units), total)))
            run.merge(run.measure(), range(len(plan.tensors)))
            worker.inputs.check_unchanged(stamps)
            reports = collect(worker, journal)
            for variant, report in enumerate(reports):
                write_small_files(target, variant, report, journal, sha256)
            seconds = time.monotonic() - started
            write_log(target, seconds, threads, kernels, done, total, doer.bytes_read, executor)
            journal.close()
            target.finish()
        finally:
            journal.close()
            target.close()
    return Outcome(target.out, names, reports, notes, warnings, done, total, seconds, doer.bytes_read)


def merge(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    threads: int | None = None,
    kernels: Backend = "auto",
    accept_tokenizers: bool = False,
    download: bool = False,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Merges without touching the disk: yields (name, array) tensor by tensor, in the order of the base's files.

    fp32 and fp16 tensors are arrays of that dtype. NumPy has no bf16: such tensors come as fp32 holding bf16 values
    exactly. Tensors that are carried come in their own dtype. Memory: one tensor and a few blocks.
    """
    recipe = as_recipe(recipe)
    recipe = with_estimates(with_downloads(recipe) if download else recipe)
    with recipe.located():
        plan = without_records(make_plan(recipe))
    check_tokenizers(plan, accept_tokenizers)
    with _worker(plan, load_kernels(kernels, plan.values_read), threads or default_threads()) as worker:
        stamps = worker.inputs.stamps()
        made: dict[int, NDArray[np.uint8]] = {}

        def write(variant: int, index: int, start: int, data: NDArray[np.uint8]) -> None:
            offset = start * WIDTH[plan.tensors[index].dtype]
            made[index][offset : offset + data.size] = data

        run = Run(worker, Journal(None, "", []), Threads(worker, write, threads or default_threads()))
        first = run.measure()
        for t, tensor in enumerate(plan.tensors):
            made[t] = np.empty(tensor.size * WIDTH[tensor.dtype], np.uint8)
            run.merge(first, [t])
            yield tensor.name, _as_array(made.pop(t), tensor.dtype, tensor.shape, worker)
        worker.inputs.check_unchanged(stamps)


def merge_to(
    model: Any,
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    threads: int | None = None,
    kernels: Backend = "auto",
    accept_tokenizers: bool = False,
    download: bool = False,
) -> Any:
    """Fills a loaded torch model with the merge and returns it; nothing is written to disk.

    The model must have the base's architecture; its own dtype is kept (values are cast by torch). Raises MismatchError
    if a merged tensor has no parameter or buffer to go to.
    """
    import torch

    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, array in merge(
            recipe, threads=threads, kernels=kernels, accept_tokenizers=accept_tokenizers, download=download
        ):
            if name not in state:
                raise MismatchError(
                    f"the model has no parameter {name!r}: load the recipe's base (or a model like it)."
                )
            if tuple(state[name].shape) != array.shape:
                shape = tuple(state[name].shape)
                raise MismatchError(f"{name}: the model has shape {shape}, the merge {array.shape}.")
            state[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
    return model


def _fetch(
    recipe: Recipe | Stages, place: StageFolder, sweep: Sequence[dict[str, Any]], overwrite: bool, shard_bytes: int,
    progress: Progress,
) -> Recipe | Stages:  # fmt: skip
    """The recipe with what is on the hub fetched: everything that headers show is raised before any weight moves."""
    from rlmerge.planned import check_places, plan_stages

    def tell(text: str) -> None:
        progress(Step(0, 0, 0, text))

    known = with_all_downloads(recipe, headers=True, tell=tell)
    documents = known if isinstance(known, Stages) else Stages((known,))
    if not any(map(without_weights, documents.recipes)):
        return known
    found = plan_stages(documents.at(place.folder), sweep, shard_bytes, place.is_made)
    check_places(place, found, sweep, overwrite)
    return with_all_downloads(recipe, tell=tell)


@contextlib.contextmanager
def _ray(
    plan: Plan, target: OutputFolder, kernels: Backend, digest: str, stamps: list[list[int]], address: str | None,
    threads: int, limit: int | None, progress: Progress,
) -> Iterator[Executor]:  # fmt: skip
    """The executor on a cluster: `threads` processors where it is our own, else `limit` of it or all."""
    from rlmerge.execute.ray_cluster import connected
    from rlmerge.execute.ray_run import merging

    def tell(text: str) -> None:
        progress(Step(0, 0, 0, f"warning: {text}"))

    with (
        connected(address, threads),
        merging(plan, target, kernels, digest, stamps, limit, tell) as executor,
    ):
        yield executor


@contextlib.contextmanager
def _worker(plan: Plan, kernels: ModuleType, threads: int) -> Iterator[Worker]:
    from threadpoolctl import threadpool_limits

    worker = Worker(plan, kernels, min(threads * KEPT_BYTES, KEPT_AT_MOST))
    try:
        with threadpool_limits(1):
            yield worker
    finally:
        worker.inputs.close()


def _as_array(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...], worker: Worker) -> NDArray[Any]:
    if dtype == "BF16":
        out = np.empty(raw.size // 2, np.float32)
        worker.kernels.decode_bf16(raw.view(np.uint16), out)
        return out.reshape(shape)
    kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BOOL": np.bool_, "C64": np.complex64}
    kind = kinds.get(dtype) or np.dtype(dtype.replace("U", "uint").replace("I", "int")).type
    return raw.view(kind).reshape(shape)
