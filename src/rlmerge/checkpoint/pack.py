"""Opens a delta pack: what training changed of a base, and all that is needed to have the expert again, bit for bit.

A pack is a folder with `delta.safetensors` (streams of steps, whole tensors, the headers of the expert's own files),
`pack.json` (which base, which tensors, which small files) and small files that differ from the base's. Nothing in it is
believed before it is checked. The format is described in docs/packs.md.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.checkpoint.folder import DELTA, MERGED_DTYPES, NOTE, Checkpoint, open_checkpoint
from rlmerge.checkpoint.header import Header, PackedInfo, TensorInfo, parse_header, read_header
from rlmerge.checkpoint.reading import read_file
from rlmerge.errors import CheckpointError, HeaderError, MismatchError, PackError

FORMAT = 2
CHUNK = 2**15
"""Coordinates of a chunk, as in `kernels.compiled.steps`."""
ROW_BYTES = 16
"""Bytes of a chunk's row in the table."""
PIECES, PIECE = 64, 4096
"""How much of a base is looked at to know it again: pieces, and bytes of each."""
_MAX_NOTE = 100_000_000


@dataclass(frozen=True)
class SmallFile:
    """A file of the expert beside its weights: its digest (xxh3-128, hex), and whether it is the base's own."""

    digest: str
    of_base: bool


@dataclass(frozen=True)
class Pack:
    """An opened pack.

    header     of delta.safetensors
    tensors    the expert's tensors in the order of its files
    weights    the headers of the expert's own files, and their bytes by file name
    base_hash  `identify` of the base that it was made for; `base_at` is where that was, seen from the pack
    """

    folder: Path
    header: Header
    base_at: str
    base_hash: str
    tensors: dict[str, PackedInfo]
    weights: tuple[Header, ...]
    raw_headers: dict[str, bytes]
    files: dict[str, SmallFile]

    @property
    def changed(self) -> int:
        """Coordinates whose words differ from the base's."""
        return sum(info.changed for info in self.tensors.values())


def identify(base: Checkpoint) -> str:
    """The hash by which a pack knows its base: xxh3-128 of names, dtypes, shapes and 64 pieces of 4 KiB (hex).

    Small bases are read whole. It does not depend on how the base is cut into files.
    """
    state = xxhash.xxh3_128()
    infos = [base.tensors[name] for name in sorted(base.tensors)]
    for info in infos:
        state.update(json.dumps([info.name, info.dtype, list(info.shape)]).encode() + b"\n")
    total = sum(info.nbytes for info in infos)
    wanted = [total * piece // PIECES for piece in range(PIECES)]
    before = 0
    for info in infos:
        if total <= PIECES * PIECE:
            places = [(0, info.nbytes)] if info.nbytes else []
        else:
            places = [(w - before, PIECE) for w in wanted if before <= w < before + info.nbytes]
        for start, count in places:
            state.update(read_bytes(info, start, min(count, info.nbytes - start)))
        before += info.nbytes
    return state.hexdigest()


def check_base(packed: Checkpoint, base: Checkpoint) -> None:
    """Raises MismatchError where a pack was made for another base; 64 short reads."""
    pack = packed.pack
    assert pack is not None
    if base.pack is not None or base.adapter:
        kind = "a delta pack" if base.pack is not None else "a LoRA adapter"
        raise PackError(f"{base.reference}: is {kind}, which changes a model and is none. Write the full base.")
    found = identify(base)
    if found != pack.base_hash:
        raise MismatchError(
            f"{packed.reference}: this pack was made for another base: for {pack.base_at} with hash {pack.base_hash}, "
            f"and {base.reference} has hash {found}. Added to that, its steps would give weights that nobody trained. "
            "Write the base that it was made for."
        )
    for name, info in pack.tensors.items():
        twin = base.tensors.get(name)
        if info.kind == "copy" and twin is not None:
            raise _broken(pack.folder / NOTE, f"tensor {name!r} is a copy, and the base has one of its own")
        if info.kind in ("steps", "same"):
            fits = twin is not None and twin.shape == info.shape
            known = fits and info.dtype in MERGED_DTYPES and twin is not None and twin.dtype in MERGED_DTYPES
            if not fits or twin is None or not (known or (info.kind == "same" and twin.dtype == info.dtype)):
                raise _broken(pack.folder / NOTE, f"tensor {name!r} cannot be made of the base's")


def find_base(packed: Checkpoint, given: Path | str | None = None) -> Checkpoint:
    """The opened base of a pack: where the user says, else where the pack says, verified by its hash."""
    pack = packed.pack
    assert pack is not None
    tried = [Path(given)] if given is not None else [pack.folder / pack.base_at, Path(pack.base_at)]
    place = next((path for path in tried if path.is_dir()), None)
    if place is None:
        where = " nor ".join(dict.fromkeys(os.path.realpath(path) for path in tried))
        raise PackError(f"{packed.reference}: its base is not at {where}. Say where it is: --base FOLDER.")
    base = open_checkpoint(place, str(given) if given is not None else str(place))
    check_base(packed, base)
    return base


def read_bytes(info: TensorInfo, start: int, count: int) -> bytes:
    """Bytes [start, start + count) of what a file holds of a tensor. Raises CheckpointError where there are fewer."""
    try:
        with open(info.file, "rb", buffering=0) as file:
            found = os.pread(file.fileno(), count, info.start + start)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read: {error.strerror or error}.") from error
    if len(found) != count:
        raise CheckpointError(f"{info.file}: the file became shorter while it was read. Is it being written?")
    return found


# ---- Opening ----------------------------------------------------------------------------------------------------


def open_pack(folder: Path) -> Pack:
    """Opens a pack by its headers and pack.json. Raises PackError (HeaderError for a damaged file), naming the file."""
    note, delta = folder / NOTE, folder / DELTA
    for file in (note, delta):
        if not file.is_file():
            raise PackError(f"{file}: is missing, and a delta pack needs it. Copy or make the pack again.")
    said = _read_note(note)
    header = read_header(delta)
    base, names = said.get("base"), said.get("weights")
    if said.get("format") != FORMAT:
        raise PackError(
            f"{note}: has format {str(said.get('format'))[:40]}, and this rlmerge reads {FORMAT}. Use another version."
        )
    if not isinstance(base, dict) or not all(_is_text(base.get(key)) for key in ("reference", "hash")):
        raise _broken(note, "'base' does not say which base it is")
    if not isinstance(names, list) or not names or not all(_is_file_name(n, weights=True) for n in names):
        raise _broken(note, "'weights' does not name safetensors files")
    raw: dict[str, bytes] = {}
    weights = []
    for name in names:
        stored = header.tensors.get(f"{name}#header")
        if stored is None or stored.dtype != "U8" or name in raw:
            raise _broken(note, f"the header of {name!r} is not in {DELTA}, or is named twice")
        raw[name] = read_bytes(stored, 0, stored.nbytes)
        weights.append(_their_header(folder / name, raw[name]))
    infos = [info for one in weights for info in one.tensors.values()]
    if len({info.name for info in infos}) < len(infos):
        raise _broken(note, "two of its files hold a tensor of the same name")
    tensors = _tensors(note, said.get("tensors"), infos, header)
    return Pack(
        folder, header, base["reference"], base["hash"], tensors, tuple(weights), raw, _files(note, said.get("files"))
    )


def _read_note(note: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    try:
        if note.stat().st_size > _MAX_NOTE:
            raise _broken(note, "it is larger than any pack.json")
        parsed = json.loads(read_file(note, _MAX_NOTE).decode("utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise PackError(f"{note}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise _broken(note, f"it is not JSON ({reason})") from None
    if not isinstance(parsed, dict):
        raise _broken(note, "it must hold a JSON object")
    return parsed


def _their_header(file: Path, raw: bytes) -> Header:
    """The header of one of the expert's own files; the size of that file follows from it."""
    if len(raw) < 10 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise PackError(f"{file.parent / DELTA}: the header that it keeps of {file.name} is damaged. Make it again.")
    try:
        entries = json.loads(raw[8:].decode())
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        size = len(raw) + max(ends, default=0)
        if not isinstance(size, int) or size > 2**62:
            raise ValueError
        return parse_header(file, raw, size)
    except HeaderError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise PackError(
            f"{file.parent / DELTA}: the header that it keeps of {file.name} is damaged. Make the pack again."
        ) from None


def _tensors(note: Path, said: Any, infos: list[TensorInfo], header: Header) -> dict[str, PackedInfo]:
    """What pack.json says of each tensor, against what is there."""
    if not isinstance(said, dict) or said.keys() != {info.name for info in infos}:
        raise _broken(note, "'tensors' are not those of the headers that it keeps")
    found = {info.name: _packed(note, info, said[info.name], header) for info in infos}
    for name, info in found.items():
        if info.kind == "copy":
            first = found.get(info.of)
            if first is None or first.kind == "copy" or (first.dtype, first.shape) != (info.dtype, info.shape):
                raise _broken(note, f"tensor {name!r} is a copy of {info.of!r}, which is none like it")
            found[name] = replace(info, start=first.start, nbytes=first.nbytes, digest=first.digest, table=first.table)
    return found


def _packed(note: Path, info: TensorInfo, said: Any, header: Header) -> PackedInfo:
    kind = said.get("kind") if isinstance(said, dict) else None
    name, file = info.name, header.file
    if kind == "copy" and _is_text(said.get("of")):
        return PackedInfo(name, info.dtype, info.shape, file, 0, 0, "copy", of=said["of"])
    said = said if isinstance(said, dict) else {}
    digest, changed, total = str(said.get("xxh3_128")), said.get("changed"), str(said.get("base_sum", ""))
    if not _is_hex(digest, 32) or (total != "" and not _is_hex(total, 16)):
        raise _broken(note, f"tensor {name!r} has no kind, or digests that are none")
    if kind == "same":
        return PackedInfo(name, info.dtype, info.shape, file, 0, 0, "same", None, digest, total)
    if kind == "whole":
        whole = header.tensors.get(name)
        if whole is None or (whole.dtype, whole.shape) != (info.dtype, info.shape):
            raise _broken(note, f"tensor {name!r} is not in {DELTA} as it was in the expert")
        return PackedInfo(name, info.dtype, info.shape, file, whole.start, whole.nbytes, "whole", None, digest)
    steps, table = header.tensors.get(f"{name}#steps"), header.tensors.get(f"{name}#chunks")
    chunks = -(-info.size // CHUNK)
    if kind != "steps" or steps is None or table is None or info.dtype not in MERGED_DTYPES or not chunks:
        raise _broken(note, f"tensor {name!r} of kind {kind!r} is not in {DELTA}")
    if steps.dtype != "U64" or len(steps.shape) != 1 or table.dtype != "U32" or table.shape != (chunks, 4):
        raise _broken(note, f"the steps of tensor {name!r} {list(info.shape)} are not {chunks} chunks")
    if type(changed) is not int or not 0 <= changed <= info.size:
        raise _broken(note, f"tensor {name!r} has {str(changed)[:40]} changed coordinates")
    return PackedInfo(
        name, info.dtype, info.shape, file, steps.start, steps.nbytes, "steps", table, digest, total, changed
    )


def _files(note: Path, said: Any) -> dict[str, SmallFile]:
    if not isinstance(said, dict):
        raise _broken(note, "'files' is not an object of file names")
    found = {}
    for name, entry in said.items():
        known = isinstance(entry, dict) and entry.get("in") in ("base", "pack") and _is_hex(entry.get("xxh3_128"), 32)
        if not known or not _is_file_name(name) or name in (NOTE, DELTA):
            raise _broken(note, f"{name[:200]!r} is no file of a model, or is not said to be in the base or the pack")
        found[name] = SmallFile(entry["xxh3_128"], entry["in"] == "base")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 4096 and value.isprintable()


def _is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def _is_file_name(name: Any, weights: bool = False) -> bool:
    """Whether a name can be that of a file of a model: it stays in its folder and hides nothing."""
    if not _is_text(name) or "\\" in name or any(part.startswith(".") or not part for part in name.split("/")):
        return False
    return (name.endswith(".safetensors") and "/" not in name) if weights else not name.endswith(".safetensors")


def _broken(file: Path, found: str) -> PackError:
    return PackError(f"{file}: is not a valid delta pack: {found}. Copy or make the pack again.")
