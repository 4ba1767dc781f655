"""`rlmerge`: the commands, and what becomes of an error: 2 for the user's mistake, 1 for a defect of ours."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from rlmerge.errors import PluginError, RlmergeError, did_you_mean
from rlmerge.version import VERSION

from .usage import refuse

COMMANDS = {
    "merge": "Merge models: a recipe, or its parts as flags, to a folder.",
    "check": "Check a recipe against headers, small files and a one-percent sample.",
    "inspect": "See what training did: sparsity, overlap, conflict, storage.",
    "explain": "Print which parameters hold for which tensors.",
    "methods": "List the merge methods, or describe one.",
    "schema": "Print the JSON schema of a recipe, for editors.",
    "convert": "Convert pickled weights to safetensors.",
    "compare": "Compare models by their results, or reports of inspect.",
    "eval": "Evaluate a model on tasks with verifiable answers.",
    "demo": "Merge and measure the RL-trained experts that come with rlmerge.",
    "fisher": "Estimate which parameters a model's answers rest on.",
    "fisher-stats": "Judge Fishers: enough sequences, who wins, by what.",
    "gram": "Measure the inputs of a model's linear layers, for regmean.",
    "lab": "Train small RLVR, SFT and RFT experts, and merge them every way.",
    "pack": "Store what training changed in a base, bit for bit.",
    "unpack": "Make the expert of a delta pack again.",
    "verify": "Compare every byte of an output with its rlmerge.json.",
}
"""Each is a module of this package, imported when it is asked for: DESCRIPTION, USAGE, declare(parser), run(given)."""

HELP = """\
Usage: rlmerge COMMAND [OPTIONS] ...

  Merge language models trained by reinforcement learning with verifiable
  rewards, without breaking them.

Options:
  --version   Print the version and stop.
  -h, --help  Show this message and exit.

Commands:
{commands}

'rlmerge COMMAND --help' describes a command.
"""


def run(arguments: Sequence[str]) -> None:
    """One command. SystemExit for help (0) and for wrong usage (2)."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if not name or name in ("-h", "--help"):
        listed = "\n".join(f"  {command:<12} {summary}" for command, summary in COMMANDS.items())
        print(HELP.format(commands=listed), end="", file=sys.stdout if name else sys.stderr)
        raise SystemExit(0 if name else 2)
    if name == "--version":
        print(f"rlmerge {VERSION}")
        return
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        refuse(f"there is no {kind} {name!r}.{did_you_mean(name, COMMANDS)} See 'rlmerge --help'.")
    from .options import Parser

    command = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    parser = Parser(name, command.USAGE, command.DESCRIPTION)
    command.declare(parser)
    command.run(parser.parse_intermixed_args(rest))


def main() -> None:
    """One command from sys.argv, with everything that it raises made into a message and an exit code."""
    # one BLAS thread, as in all of rlmerge; a pool for every core of a large machine takes its time to start
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code: str | int | None = 0
    try:
        try:
            run(sys.argv[1:])
        except RlmergeError:
            raise
        except (Exception, SystemExit) as error:
            plugins = sys.modules.get("rlmerge.plugins")
            if plugins is not None and (message := plugins.blame(error)):
                raise PluginError(message) from error
            if not isinstance(error, SystemExit):
                raise
            code = error.code
        sys.stdout.flush()
    except RlmergeError as error:
        if "--json" in sys.argv:
            import json

            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"rlmerge: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"rlmerge: interrupted. {error}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # nobody reads: nothing more is written, not even by the interpreter at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        import traceback

        traceback.print_exc()
        print(
            f"rlmerge {VERSION}: this is a defect of rlmerge; please report it with the lines above.", file=sys.stderr
        )
        sys.exit(1)
    if code:
        sys.exit(code)


def script() -> None:
    """The console script: `main`, and after a merge out at once.

    All is written and closed by then; taking the interpreter and the kernels apart would take a tenth of a second.
    """
    main()
    if sys.argv[1:2] == ["merge"]:
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    script()
