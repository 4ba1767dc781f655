"""Wrong usage of the command line, said in one way."""

from __future__ import annotations

import sys
from typing import NoReturn


def refuse(message: str) -> NoReturn:
    """A message, with --json on stdout, too; exit code 2."""
    if "--json" in sys.argv:
        import json

        print(json.dumps({"error": "usage", "message": message}))
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(2)
