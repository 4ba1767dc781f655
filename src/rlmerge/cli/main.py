"""`rlmerge`: the commands, and what becomes of an error: 2 for the user's mistake, 1 for a defect of ours."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Annotated

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
app.command("merge")(merge.merge)
app.command("check")(check.check)
app.command("explain")(explain.explain)
app.command("methods")(methods.methods)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)


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
    except KeyboardInterrupt:
        typer.echo("rlmerge: interrupted. An unfinished merge is continued by the same command.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        typer.echo(f"rlmerge {VERSION}: this is a defect of rlmerge; please report it with the lines above.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
