"""`rlmerge demo`: RL-trained experts out of the package, merged, evaluated, compared."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

from rlmerge.errors import MissingExtraError

from .options import Parser, at_least, declare_output

USAGE = "[OPTIONS]"
DESCRIPTION = """\
Merge a math expert and a code expert, both trained by RL, into one model, and
two runs of one task into another; by SAR-Merging and the methods it is compared
with. Base and experts come with the package; what is printed was measured by
this very run. The same command goes on where it was killed."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("-o", "--out", metavar="DIR", default="demo-out", help="folder for what is made; default demo-out")
    add("--models", action="store_true", help="copy base and experts to DIR/models, and do nothing with them")
    add("--problems", metavar="N", type=at_least(20), default=400, help="of each domain; default 400")
    add("--workers", metavar="N", type=at_least(1), default=2, help="processes at once; default 2")
    declare_output(parser)


def run(given: Namespace) -> None:
    """Runs it and prints the report."""
    started = time.monotonic()
    try:
        from rlmerge.demo.picture import write_picture
        from rlmerge.demo.run import copy_models, run_demo
        from rlmerge.lab.schedule import Step

        def tell(step: Step) -> None:
            if not given.quiet:
                print(step.line, file=sys.stderr, flush=True)

        out = Path(given.out).resolve()
        if given.models:
            copy_models(out)
            names = sorted(path.name for path in (out / "models").iterdir())
            if given.json:
                print(json.dumps({"folder": str(out / "models"), "models": names}))
            elif not given.quiet:
                print(f"{given.out}/models: {', '.join(names)}")
            return
        report = run_demo(out, given.problems, given.workers, tell)
        picture = write_picture(report.data, out / "demo.svg")
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge demo", error.name or "torch", "demo") from None
    if given.json:
        print(json.dumps(report.data))
    elif not given.quiet:
        print("\n".join(report.lines))
        print(f"{given.out}: models, Fishers, results{', demo.svg' * picture}; {time.monotonic() - started:.0f} s.")
