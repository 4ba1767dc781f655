"""`rlmerge`: the commands, and what becomes of an error: 2 for the user's mistake, 1 for a defect of ours."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rlmerge.errors import RlmergeError
from rlmerge.version import VERSION

from . import check, convert, explain, merge, methods, verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge language models trained by reinforcement learning with verifiable rewards, without breaking them.",
)


class _Stopped(Exception):
    """Ctrl-C, under a name that typer does not swallow."""


class _Closed(Exception):
    """Whoever read our output has stopped reading."""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with Ctrl-C and a closed pipe as exceptions of our own: typer would end without a word."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            raise _Stopped(*error.args) from None
        except BrokenPipeError:
            raise _Closed from None

    return run


for _name, _command in (
    ("merge", merge.merge),
    ("check", check.check),
    ("explain", explain.explain),
    ("methods", methods.methods),
    ("convert", convert.convert),
    ("verify", verify.verify),
):
    app.command(_name)(_guarded(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlmerge {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the console script."""
    try:
        app()
    except RlmergeError as error:
        if "--json" in sys.argv:
            typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
        typer.echo(f"rlmerge: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, _Stopped) as error:
        typer.echo(f"rlmerge: interrupted. {error}".rstrip(), err=True)
        sys.exit(130)
    except (BrokenPipeError, _Closed):
        # nobody reads: nothing more is written, not even by the interpreter at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        typer.echo(f"rlmerge {VERSION}: this is a defect of rlmerge; please report it with the lines above.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
