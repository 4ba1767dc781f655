"""Whether an output is still what the merge wrote: every byte against the digests in its `rlmerge.json`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.checkpoint.header import read_header
from rlmerge.checkpoint.layout import WIDTH, hash_range
from rlmerge.errors import HeaderError, OutputError
from rlmerge.execute.leftovers import tidy, work_folder

PROVENANCE = "rlmerge.json"


def verify(out: Path | str) -> dict[str, Any]:
    """Reads a merged folder again and compares every byte with what rlmerge.json says was written.

    Returns {'files': n, 'tensors': n, 'bytes': n}. Raises OutputError naming the first files and tensors that differ.
    What a merge that was killed in its last moments left over is put right first, where that can be written.
    """
    folder = Path(out)
    with contextlib.suppress(OSError, OutputError):
        tidy(folder)
    source = folder / PROVENANCE
    try:
        said = json.loads(source.read_bytes())
        weights, units, files = said["weights"], said["units"], said["files"]
    except FileNotFoundError:
        hint = " It is unfinished: run its merge command again." if work_folder(folder).exists() else ""
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
