"""`rlmerge fisher`: estimates a diagonal Fisher, combines partial ones, or takes one from an optimizer's state."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from rlmerge.errors import FisherError, MissingExtraError

from .options import Parser, at_least, declare_download, declare_executor, declare_output, parse_bytes
from .show import duration, told

if TYPE_CHECKING:
    from rlmerge.fisher.estimate import FisherSettings
    from rlmerge.fisher.given import Progress

USAGE = "[OPTIONS] MODEL --data FILE.jsonl -o DIR"
DESCRIPTION = """\
Estimate which parameters a model's answers rest on: the diagonal Fisher
information, mean over sequences of the squared gradient of log p(answer).

MODEL is a folder, a delta pack, or a recipe (.yml) merged in memory. The data are
prompts, with what verifies an answer (--source own, policy) or with the
answers (gold); a task such as math:1 will do. An interrupted run is continued
by the same command.

  rlmerge fisher MODEL --data FILE.jsonl --source own -o DIR
  rlmerge fisher --combine A B -o DIR          shares of one Fisher (--part)
  rlmerge fisher --from-adam CHECKPOINT -o DIR     what a trainer left"""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="model folder, pack, or recipe (.yml)")
    add("--data", metavar="FILE", help="problems as .jsonl, or a task")
    add("-o", "--out", metavar="DIR", required=True, help="folder for the Fisher")
    add("--source", metavar="S", default="own", help="own (default), gold, sampled or policy")
    add("--sequences", metavar="N", type=at_least(1), help="sequences; default 256, or all of gold's if fewer")
    add("--attempts", metavar="M", type=at_least(1), default=8, help="tries of a prompt (own), at most; default 8")
    add("--group", metavar="G", type=at_least(2), default=8, help="samples of a prompt (policy); default 8")
    add("--temperature", metavar="T", type=float, default=1.0, help="of sampling; default 1")
    add("--max-new-tokens", metavar="N", type=at_least(1), default=256, help="of sampling; default 256")
    add("--reduce", metavar="R", default="sum", help="sum (default) or mean over a completion's tokens")
    add("--dtype", metavar="D", default="fp32", help="fp32 (default) or bf16, of the stored Fisher")
    add("--compute", metavar="C", default="fp32", help="fp32 (default), or bf16: faster, less exact")
    add("--batch-tokens", metavar="N", type=at_least(1), default=1024, help="padded tokens at once; default 1024")
    add("--base", metavar="BASE", help="base of a LoRA folder or a pack, if not where they say")
    add("--only", metavar="RECIPE", help="just the tensors whose Fishers this recipe reads")
    add("--sparse", action="store_true", help="with --only: just the coordinates at which it will ask")
    add("--storage", metavar="S", default="full", help="full (default), or factored: row and column sums")
    add("--part", metavar="I/N", default="1/1", help="the I-th of N shares of the sequences, for --combine")
    add("--combine", metavar="DIR", nargs="+", help="shares of one Fisher to put together")
    add("--from-adam", metavar="CHECKPOINT", help="folder with optimizer.pt of a Hugging Face trainer")
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of samples")
    add("--memory", metavar="SIZE", help="bound on memory, such as 4GB")
    add("--threads", metavar="N", type=at_least(1), help="threads of torch, in every process")
    declare_executor(parser)
    add("--workers", metavar="N", type=at_least(1), help="with ray: processes, each with the model; default: all")
    add("--overwrite", action="store_true", help="replace an earlier Fisher, or an unfinished one")
    add("--unsafe-exec", action="store_true", help="run model-written code although nothing isolates it")
    declare_download(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Estimates, combines or converts, and prints what came of it."""
    modes = [name for name in ("data", "combine", "from_adam") if getattr(given, name)]
    if len(modes) != 1 or (given.model is None) == (modes == ["data"]):
        raise FisherError(
            "give MODEL and --data, or --combine with folders, or --from-adam with a checkpoint: "
            "rlmerge fisher MODEL --data FILE.jsonl -o DIR"
        )
    try:
        meta = {"data": _estimate, "combine": _combine, "from_adam": _from_adam}[modes[0]](given)
    except KeyboardInterrupt:
        continues = f"The same command continues {given.out}." if given.data else ""
        raise KeyboardInterrupt(continues) from None
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge fisher", error.name or "torch", "model") from None
    if given.json:
        json.dump(meta, sys.stdout)
        print()
    elif not given.quiet:
        count = sum(entry["count"] for entry in meta["tensors"].values())
        total = sum(entry["sum"] for entry in meta["tensors"].values())
        print(f"{given.out}: {count:,} entries, mean {total / max(count, 1):.3g}, {meta.get('sequences', 0)} sequences")


def _settings(given: Namespace) -> FisherSettings:
    from rlmerge.fisher.data import SequenceChoice
    from rlmerge.fisher.estimate import FisherSettings

    choice = SequenceChoice(
        given.source, given.sequences, given.attempts, given.group, given.temperature, given.max_new_tokens, given.seed
    )
    place, slash, parts = given.part.partition("/")
    if not (slash and place.isdecimal() and parts.isdecimal()):
        raise FisherError(f"--part {given.part}: write I/N, as in 1/4.")
    return FisherSettings(
        choice,
        reduce=given.reduce,
        dtype=given.dtype,
        compute=given.compute,
        storage=given.storage,
        tokens=given.batch_tokens,
        memory=parse_bytes(given.memory, "--memory"),
        part=(int(place), int(parts)),
        unsafe=given.unsafe_exec,
        threads=given.threads,
        executor=given.executor,
        address=given.address,
        workers=given.workers,
    )


def _estimate(given: Namespace) -> dict[str, Any]:
    from rlmerge.fisher.estimate import estimate_fisher

    began = {"gradients": time.monotonic()}

    def tell(step: Progress) -> None:
        if given.quiet:
            return
        now = time.monotonic()
        since = began["gradients"]
        if step.what == "loading":
            print(f"loading {given.model}", file=sys.stderr)
        elif step.what == "sampling":
            began["gradients"] = now
            print(f"sampling: {step.done} of {step.total} sequences from {step.tokens} completions", file=sys.stderr)
        elif step.what != "gradients":
            print(f"warning: {step.what}", file=sys.stderr)
        else:
            rate = f", {(step.done - step.before) / (now - since):.2f} a second" if now > since else ""
            if step.done == step.before:
                rate = "" if step.before == 0 else ", continuing an earlier run"
            print(f"gradients: {step.done} of {step.total} sequences{rate}", file=sys.stderr)

    settings = _settings(given)
    if given.download:
        from rlmerge.downloads import fetch_model, find_folder

        for name in filter(None, (given.model, given.only)):
            fetch_model(name, told(given.quiet))
        given.base = find_folder(given.base, True, told(given.quiet)) if given.base else None
    made = estimate_fisher(
        given.model, given.data, given.out, settings, base=given.base, only=given.only, sparse=given.sparse,
        overwrite=given.overwrite, progress=tell,
    )  # fmt: skip
    if not given.quiet and not given.json:
        for note in made.meta["notes"]:
            print(f"note: {note}", file=sys.stderr)
        size, whole = made.meta["bytes"], made.meta["whole_bytes"]
        if size < 0.99 * whole:
            smaller = f"{whole / max(size, 1):.1f} times smaller than the whole Fisher"
            print(f"{size / 1e6:.1f} MB, {smaller} ({whole / 1e6:.1f} MB)", file=sys.stderr)
        took = made.meta["sequences"] / max(made.seconds, 1e-9)
        print(f"{duration(made.seconds)}, {took:.2f} sequences/s with loading and sampling", file=sys.stderr)
    return made.meta


def _combine(given: Namespace) -> dict[str, Any]:
    from rlmerge.fisher.combine import combine_fishers

    return combine_fishers(given.combine, given.out, overwrite=given.overwrite)


def _from_adam(given: Namespace) -> dict[str, Any]:
    from rlmerge.fisher.adam import fisher_from_adam

    return fisher_from_adam(given.from_adam, given.out, dtype=given.dtype, overwrite=given.overwrite)
