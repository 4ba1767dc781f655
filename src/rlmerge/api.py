"""What the command line can do, as functions: merge to a folder, to arrays or into a loaded model, and verify.

Every function takes a `Recipe` or the path of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlmerge.checkpoint.card import model_card, read_licence, rewrite_config
from rlmerge.checkpoint.folder import other_files
from rlmerge.checkpoint.layout import INDEX, WIDTH, index_json
from rlmerge.errors import MismatchError, OutputError, RecipeError
from rlmerge.execute.folder import OutputFolder, hash_range
from rlmerge.execute.journal import Journal
from rlmerge.execute.local import LocalRun
from rlmerge.execute.report import collect
from rlmerge.execute.work import Worker
from rlmerge.kernels import Backend, is_compiled, load_kernels
from rlmerge.plan import Plan, make_plan, stage_names
from rlmerge.recipe import Recipe, load_recipe
from rlmerge.sample import alarms, take_sample
from rlmerge.version import VERSION

PROVENANCE = "rlmerge.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
KEPT_BYTES = 80 * 2**20
"""Per thread, for what a stage keeps of a tensor for the next one (a 4.4 M matrix of three sparse experts: 70 MB)."""
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
    """A finished merge: where it is, and for each variant its settings and statistics (`total`, `tensors`)."""

    out: Path | None
    names: tuple[str, ...]
    reports: list[dict[str, Any]]
    notes: tuple[str, ...]
    alarms: tuple[str, ...]
    resumed_units: int
    total_units: int
    seconds: float
    bytes_read: int

    @property
    def report(self) -> dict[str, Any]:
        """The statistics of the first variant."""
        return self.reports[0]


def as_recipe(recipe: Recipe | Path | str) -> Recipe:
    """The recipe itself, or the one that lies at this path."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def merge_to_folder(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    sweep: Sequence[dict[str, Any]] = (),
    threads: int | None = None,
    memory: int | None = None,
    kernels: Backend = "numba",
    overwrite: bool = False,
    fsync: bool = False,
    sha256: bool = False,
    accept_tokenizers: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda step: None,
) -> Outcome:
    """Merges into a folder that appears whole or, when interrupted, is continued by the same call.

    sweep    settings such as [{'lambda': 0.3}, {'lambda': 1.0}]: one sub-folder each, all from one reading
    threads  workers (default: the processors at hand); `memory` in bytes lowers them; no bit depends on it
    Raises a subclass of RlmergeError for what a user can mend.
    """
    started = time.monotonic()
    recipe = as_recipe(recipe)
    check_run(threads, kernels, shard_bytes)
    variants = make_variants(recipe, sweep)
    names = sweep_names(sweep)
    plan = make_plan(recipe, variants, shard_bytes)
    notes = (*plan.notes, *check_tokenizers(plan, accept_tokenizers))
    target = OutputFolder(plan, Path(out), names, overwrite, fsync)
    target.check()
    warnings = tuple(alarms(plan, take_sample(plan)))
    for text in (*notes, *warnings):
        progress(Step(0, 0, 0, f"warning: {text}"))
    threads = limit_threads(threads or default_threads(), memory, plan)
    if kernels == "numba" and not is_compiled():
        progress(Step(0, 0, 0, "compiling the kernels: once, some seconds"))
    with _worker(plan, kernels, threads) as worker:
        journal = target.open(f"{plan.digest()} {names}", worker.inputs.stamps())
        try:
            done, total = len(journal.units), len(plan.unit_list())
            if done:
                progress(Step(0, done, total, f"continuing: {done} of {total} units are done"))
            run = LocalRun(worker, journal, threads, lambda count: progress(Step(count, len(journal.units), total)))
            first = run.measure()
            run.merge(first, range(len(plan.tensors)), target.write)
            reports = collect(worker, journal)
            for name, variant, report in zip(names, plan.variants, reports):
                _write_small_files(
                    target.work / name, plan, variant, report, journal, plan.variants.index(variant), sha256
                )
            seconds = time.monotonic() - started
            _write_log(target.work / names[0], seconds, threads, kernels, done, total, worker.inputs.bytes_read)
            journal.close()
            target.finish()
        finally:
            journal.close()
            target.close()
    return Outcome(target.out, names, reports, notes, warnings, done, total, seconds, worker.inputs.bytes_read)


def merge(
    recipe: Recipe | Path | str,
    *,
    threads: int | None = None,
    kernels: Backend = "numba",
    accept_tokenizers: bool = False,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Merges without touching the disk: yields (name, array) tensor by tensor, in the order of the base's files.

    fp32 and fp16 tensors are arrays of that dtype. NumPy has no bf16: such tensors come as fp32 holding bf16 values
    exactly. Tensors that are carried come in their own dtype. Memory: one tensor and a few blocks.
    """
    recipe = as_recipe(recipe)
    plan = make_plan(recipe)
    check_tokenizers(plan, accept_tokenizers)
    with _worker(plan, kernels, threads or default_threads()) as worker:
        journal = Journal(None, "", [])
        run = LocalRun(worker, journal, threads or default_threads())
        first = run.measure()
        for t, tensor in enumerate(plan.tensors):
            raw = np.empty(tensor.size * WIDTH[tensor.dtype], np.uint8)

            def write(variant: int, index: int, start: int, data: NDArray[np.uint8], raw: Any = raw) -> None:
                offset = start * WIDTH[plan.tensors[index].dtype]
                raw[offset : offset + data.size] = data

            run.merge(first, [t], write)
            yield tensor.name, _as_array(raw, tensor.dtype, tensor.shape, worker)


def merge_to(
    model: Any,
    recipe: Recipe | Path | str,
    *,
    threads: int | None = None,
    kernels: Backend = "numba",
    accept_tokenizers: bool = False,
) -> Any:
    """Fills a loaded torch model with the merge and returns it; nothing is written to disk.

    The model must have the base's architecture; its own dtype is kept (values are cast by torch). Raises MismatchError
    if a merged tensor has no parameter or buffer to go to.
    """
    import torch

    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, array in merge(recipe, threads=threads, kernels=kernels, accept_tokenizers=accept_tokenizers):
            if name not in state:
                raise MismatchError(
                    f"the model has no parameter {name!r}: load the recipe's base (or a model like it)."
                )
            if tuple(state[name].shape) != array.shape:
                shape = tuple(state[name].shape)
                raise MismatchError(f"{name}: the model has shape {shape}, the merge {array.shape}.")
            state[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
    return model


def check_run(threads: int | None, kernels: str, shard_bytes: int) -> None:
    """Raises RecipeError for settings of a run that cannot mean anything."""
    if kernels not in ("numba", "numpy"):
        raise RecipeError(f"--kernels {kernels!r}: choose numba, or numpy (the same bits, slowly).")
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
        raise RecipeError(f"--set: a value is given twice: {', '.join(name or 'default' for name in names)}.")
    return tuple(names) or ("",)


def check_tokenizers(plan: Plan, accept: bool) -> tuple[str, ...]:
    """Raises MismatchError if tokenizers differ although the vocabularies have one size; notes them if accepted."""
    from rlmerge.checkpoint.tokenizer import compare_tokenizers

    folders = list(dict.fromkeys([plan.donor.folder, *(model.folder for model in plan.models)]))
    differences = tuple(compare_tokenizers(folders))
    if differences and not accept:
        listed = "\n  ".join(differences[:8]) + (
            f"\n  … and {len(differences) - 8} more" if len(differences) > 8 else ""
        )
        raise MismatchError(
            f"the models have the same shapes but not the same tokenizer:\n  {listed}\n"
            "  Their rows of the embedding may mean different tokens. If you know that this is harmless, add "
            f"--accept-tokenizers: the output then has the tokenizer of {plan.donor.reference}."
        )
    return differences


def limit_threads(threads: int, memory: int | None, plan: Plan) -> int:
    """Threads that fit in `memory` bytes. Raises RecipeError if not even one does."""
    if memory is None:
        return threads
    each, fixed = thread_bytes(plan), 250 * 2**20
    if fixed + each > memory:
        raise RecipeError(
            f"--memory {memory / 1e6:.0f} MB is less than one thread needs: {(fixed + each) / 1e6:.0f} MB "
            f"({fixed / 1e6:.0f} for Python and the kernels, {each / 1e6:.0f} for its buffers)."
        )
    return max(1, min(threads, (memory - fixed) // each))


def thread_bytes(plan: Plan) -> int:
    """Anonymous memory of one thread: decoded block, fp64 deltas and updates, histograms, for K experts."""
    count = len(plan.experts)
    block = max((tensor.block for tensor in plan.tensors), default=0)
    factors = 0
    for tensor in plan.tensors:
        for source in tensor.experts:
            if source.a is not None and source.b is not None:
                factors = max(factors, 4 * (source.a.nbytes + source.b.nbytes))
    return KEPT_BYTES + block * (16 + count * 40) + count * 2**20 * len(plan.variants) + count * factors


@contextlib.contextmanager
def _worker(plan: Plan, kernels: Backend, threads: int) -> Iterator[Worker]:
    from threadpoolctl import threadpool_limits

    worker = Worker(plan, load_kernels(kernels), threads * KEPT_BYTES)
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


# -- the small files of an output --------------------------------------------------------------------------------------


def _write_small_files(
    folder: Path, plan: Plan, recipe: Recipe, report: dict[str, Any], journal: Journal, variant: int, sha256: bool
) -> None:
    """Everything of an output but its weights; the provenance last."""
    digests: dict[str, str] = {}

    def put(name: str, data: bytes) -> None:
        part = folder / f"{name}.part"
        try:
            part.write_bytes(data)
            part.replace(folder / name)
        except OSError as error:
            raise OutputError(
                f"{folder / name}: cannot be written: {error.strerror}. What is done is kept; the same command "
                "continues."
            ) from error
        digests[name] = xxhash.xxh3_128_hexdigest(data)

    dtype = _main_dtype(plan)
    for path in other_files(plan.donor.folder):
        data = path.read_bytes()
        put(path.name, rewrite_config(data, dtype) if path.name == "config.json" and dtype else data)
    index = index_json(plan.outputs)
    if index is not None:
        put(INDEX, index.encode())
    written = {entry.model: read_licence(model.folder) for entry, model in zip(recipe.experts, plan.models)}
    licences = {entry.model: written[entry.model] for entry in recipe.models}
    if plan.base is not None and recipe.base_model:
        licences = {recipe.base_model: read_licence(plan.base.folder), **licences}
    title = recipe.name or f"{recipe.merge_method} merge"
    card = model_card(title, recipe.to_dict(), recipe.to_yaml(), licences, report["total"])
    put("README.md", card.encode())
    provenance = {
        "format": 1,
        "rlmerge": VERSION,
        "recipe": recipe.to_dict(),
        "inputs": _inputs(plan, journal, sha256),
        "files": digests,
        "weights": [
            {"file": file.name, "size": file.size, "header": xxhash.xxh3_128_hexdigest(file.header)}
            for file in plan.outputs
        ],
        "units": _written_units(plan, journal, variant),
        "notes": [portable(note, plan) for note in plan.notes],
        "statistics": report,
    }
    put(PROVENANCE, (json.dumps(provenance, indent=1, ensure_ascii=False) + "\n").encode())


def portable(note: str, plan: Plan) -> str:
    """A note without paths of this machine: folders as the recipe writes them, the recipe by its file name."""
    for checkpoint in (plan.donor, *plan.models):
        for folder in (str(checkpoint.folder.absolute()), str(checkpoint.folder)):
            note = note.replace(folder, checkpoint.reference)
    source = plan.recipe.source_name
    return note.replace(source, Path(source).name) if source else note


def _main_dtype(plan: Plan) -> str | None:
    """The dtype of most merged bytes."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.carry is None:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size * WIDTH[tensor.dtype]
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _inputs(plan: Plan, journal: Journal, sha256: bool) -> list[dict[str, Any]]:
    """Every model: reference as written, files with sizes and header digests, and the digest of the bytes read.

    `xxh3` is the xxh3-128 of the digests of the units in plan order, each of which is the xxh3-128 of the unit's bytes.
    """
    recipe = plan.recipe
    count = len(plan.experts)
    models = [("base", recipe.base_model, 0)] if plan.base is not None else []
    written = {entry.key: entry for entry in recipe.models}
    models += [(key, written[key].model, 1 + k) for k, key in enumerate(plan.experts)]
    if plan.fishers:
        models += [(f"fisher of {key}", written[key].fisher, 1 + count + k) for k, key in enumerate(plan.experts)]
    found = []
    for role, reference, number in models:
        state = xxhash.xxh3_128()
        for unit in plan.unit_list():
            read = journal.units[unit].read
            state.update((read[number] if number < len(read) else "-").encode())
        files = [entry for entry in plan.files if entry.model == role]
        listed = [{"file": Path(e.path).name, "size": e.size, "header": e.digest} for e in files]
        if sha256:
            for item, entry in zip(listed, files):
                with open(entry.path, "rb") as file:
                    item["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        found.append({"role": role, "reference": reference, "files": listed, "xxh3": state.hexdigest()})
    return found


def _written_units(plan: Plan, journal: Journal, variant: int) -> dict[str, Any]:
    """Per tensor, its units as [start, stop, xxh3 of the bytes written]."""
    return {
        tensor.name: [[*tensor.units[u], journal.units[t, u].written[variant]] for u in range(len(tensor.units))]
        for t, tensor in enumerate(plan.tensors)
    }


def _write_log(
    folder: Path, seconds: float, threads: int, kernels: str, resumed: int, units: int, bytes_read: int
) -> None:
    """run.log: the only file of an output that differs from run to run."""
    line = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "threads": threads,
        "kernels": kernels,
        "units_resumed": resumed,
        "units": units,
        "bytes_read": bytes_read,
    }
    (folder / "run.log").write_text(json.dumps(line) + "\n")


# -- verification ------------------------------------------------------------------------------------------------------


def verify(out: Path | str) -> dict[str, Any]:
    """Reads a merged folder again and compares every byte with what rlmerge.json says was written.

    Returns {'files': n, 'tensors': n, 'bytes': n}. Raises OutputError naming the first files and tensors that differ.
    """
    folder = Path(out)
    source = folder / PROVENANCE
    try:
        said = json.loads(source.read_bytes())
        weights, units, files = said["weights"], said["units"], said["files"]
    except FileNotFoundError:
        hint = " It is unfinished: run its merge command again." if Path(f"{folder}.unfinished").exists() else ""
        raise OutputError(f"{folder}: has no {PROVENANCE}, so it is not a finished output of rlmerge.{hint}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise OutputError(f"{source}: cannot be read as provenance of a merge: {error}") from None
    problems = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif xxhash.xxh3_128_hexdigest(path.read_bytes()) != digest:
            problems.append(f"{name}: was changed")
    total = 0
    known = {entry["file"] for entry in weights}
    strays = [path.name for path in sorted(folder.glob("*.safetensors")) if path.name not in known]
    problems += [f"{name}: was added; a loader may prefer it to what the merge wrote" for name in strays]
    for entry in weights:
        problems += _verify_weights(folder / entry["file"], entry, units)
        total += entry["size"]
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise OutputError(f"{folder}: is not what the merge wrote:\n  {shown}")
    return {"files": len(files) + len(weights), "tensors": len(units), "bytes": total}


def _verify_weights(path: Path, entry: dict[str, Any], units: dict[str, Any]) -> list[str]:
    from rlmerge.checkpoint.header import read_header
    from rlmerge.errors import HeaderError

    try:
        header = read_header(path)
    except (HeaderError, OSError) as error:
        return [f"{path.name}: {error}"]
    if header.digest != entry["header"] or header.size != entry["size"]:
        return [f"{path.name}: has another header or size"]
    problems = []
    with path.open("rb") as file:
        for name, info in header.tensors.items():
            width = WIDTH[info.dtype]
            for start, stop, digest in units.get(name, []):
                if hash_range(file.fileno(), info.start + start * width, info.start + stop * width) != digest:
                    problems.append(f"{path.name}: tensor {name!r}, coordinates {start} to {stop}, was changed")
    return problems
