"""`rlmerge gram`: estimates the Gram matrices of the inputs of a model's linear layers."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from rlmerge.errors import MissingExtraError

from .options import Parser, at_least, declare_download, declare_output, parse_bytes
from .show import duration, told

if TYPE_CHECKING:
    from rlmerge.fisher.given import Progress

USAGE = "[OPTIONS] MODEL --data FILE.jsonl -o DIR"
DESCRIPTION = """\
Measure what a model's linear layers see on its data, for method regmean: the
mean of xᵀx, x the input of a layer at one token.

MODEL is a folder, a delta pack, or a recipe (.yml) merged in memory. The data are
as for rlmerge fisher. Layers that share an input are measured once. An
interrupted run is continued by the same command."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, pack, or recipe (.yml)")
    add("--data", metavar="FILE", required=True, help="problems as .jsonl, or a task")
    add("-o", "--out", metavar="DIR", required=True, help="folder for the Gram matrices")
    add("--source", metavar="S", default="own", help="own (default), gold or sampled")
    add("--positions", metavar="P", default="all", help="all tokens (default), or those that predict the answer's")
    add("--sequences", metavar="N", type=at_least(1), help="sequences; default 256, or all of gold's if fewer")
    add("--attempts", metavar="M", type=at_least(1), default=8, help="tries of a prompt (own), at most; default 8")
    add("--temperature", metavar="T", type=float, default=1.0, help="of sampling; default 1")
    add("--max-new-tokens", metavar="N", type=at_least(1), default=256, help="of sampling; default 256")
    add("--batch-tokens", metavar="N", type=at_least(1), default=1024, help="padded tokens at once; default 1024")
    add("--base", metavar="BASE", help="base of a LoRA folder or a pack, if not where they say")
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of samples")
    add("--memory", metavar="SIZE", help="bound on memory, such as 4GB: layers in groups, a pass for each")
    add("--threads", metavar="N", type=at_least(1), help="threads of torch")
    add("--overwrite", action="store_true", help="replace an earlier Gram folder, or an unfinished one")
    add("--unsafe-exec", action="store_true", help="run model-written code although nothing isolates it")
    declare_download(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Estimates, and prints what came of it."""
    try:
        meta = _estimate(given)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command continues {given.out}.") from None
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge gram", error.name or "torch", "model") from None
    if given.json:
        json.dump(meta, sys.stdout)
        print()
    elif not given.quiet:
        count, others = len(meta["tensors"]), len(meta["aliases"])
        print(
            f"{given.out}: {count} Gram matrices for {count + others} weights, {meta['bytes'] / 1e6:.1f} MB, "
            f"{meta['counted']:,} positions of {meta['sequences']} sequences"
        )


def _estimate(given: Namespace) -> dict[str, Any]:
    from rlmerge.fisher.data import SequenceChoice
    from rlmerge.gram.estimate import GramSettings, estimate_gram

    began = {"activations": time.monotonic()}

    def tell(step: Progress) -> None:
        if given.quiet:
            return
        now = time.monotonic()
        if step.what == "loading":
            print(f"loading {given.model}", file=sys.stderr)
        elif step.what == "sampling":
            print(f"sampling: {step.done} of {step.total} sequences from {step.tokens} completions", file=sys.stderr)
        elif step.done == step.before:
            began["activations"] = now
            if step.before:
                print(f"activations: {step.done} of {step.total} sequences, continuing an earlier run", file=sys.stderr)
        else:
            rate = (step.done - step.before) / max(now - began["activations"], 1e-9)
            print(f"activations: {step.done} of {step.total} sequences, {rate:.2f} a second", file=sys.stderr)

    choice = SequenceChoice(
        given.source, given.sequences, given.attempts, 8, given.temperature, given.max_new_tokens, given.seed
    )
    settings = GramSettings(
        choice,
        given.positions,
        given.batch_tokens,
        parse_bytes(given.memory, "--memory"),
        given.unsafe_exec,
        given.threads,
    )
    if given.download:
        from rlmerge.downloads import fetch_model, find_folder

        fetch_model(given.model, told(given.quiet))
        given.base = find_folder(given.base, True, told(given.quiet)) if given.base else None
    made = estimate_gram(
        given.model, given.data, given.out, settings, base=given.base, overwrite=given.overwrite, progress=tell,
        tell=lambda text: None if given.quiet else print(text, file=sys.stderr),
    )  # fmt: skip
    if not given.quiet and not given.json:
        for note in made.meta["notes"]:
            print(f"note: {note}", file=sys.stderr)
        print(f"{duration(made.seconds)}, with loading and sampling", file=sys.stderr)
    return made.meta
