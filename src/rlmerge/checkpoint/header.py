"""Reads the header of one safetensors file and proves that it describes every byte of the file, once.

The file is taken as hostile: whatever it holds, the answer is a `Header` or a `HeaderError` that names the file. No
weight is read here, except by `equal_bytes`, which settles whether two tensors are one (tied weights).
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.errors import CheckpointError, HeaderError, did_you_mean

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of one element, by safetensors' spelling; the sub-byte ones are known only to be refused as quantized."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

_MAX_DIMENSIONS = 64
_MAX_EXTENT = 2**63 - 1
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one stored tensor lies: `start` is the absolute byte offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class PackedInfo(TensorInfo):
    """A tensor of a delta pack, see `checkpoint.pack`: `start` and `nbytes` are of what the pack holds of it.

    kind      'steps' from the base's tensor of this name, 'same' (none), 'whole' (stored as it is), 'copy' (of `of`)
    table     where the chunks of the steps lie
    digest    xxh3-128 (hex) of the expert's own bytes
    base_sum  weighted sum (hex) of the base's words, where the tensor is made from them
    changed   coordinates whose words differ from the base's
    """

    kind: str = "whole"
    table: TensorInfo | None = None
    digest: str = ""
    base_sum: str = ""
    changed: int = 0
    of: str = ""


@dataclass(frozen=True, slots=True)
class PlannedInfo(TensorInfo):
    """A tensor of a merge that is still to be made, see `planned`.

    known_as  the tensor of that merge with which it will be equal: itself, or the one that it repeats (tied weights)
    source    the stored tensor of which it will be a copy, where it is carried
    """

    known_as: str = ""
    source: TensorInfo | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """A proven header. `digest` is xxh3-128 (hex) of the header's bytes with its length field; tensors by offset."""

    file: Path
    size: int
    digest: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file: a few kilobytes, whatever the size of the model.

    Raises HeaderError, naming the file, for everything that keeps the header from describing exactly its bytes.
    """
    return parse_header(file, *_read_raw(file))


def parse_header(file: Path, raw: bytes, size: int) -> Header:
    """The same for a header with its length field that was read elsewhere, of a file of `size` bytes."""
    entries = _parse(file, raw[8:])
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    offset, length = len(raw), size - len(raw)
    tensors = [_tensor(file, name, entry, offset, length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_cover(file, tensors, offset, size)
    digest = xxhash.xxh3_128_hexdigest(raw)
    return Header(file, size, digest, {tensor.name: tensor for tensor in tensors}, metadata)


def equal_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes: a complete comparison, a mebibyte at a time, ended by a difference.

    Two tensors of packs are compared by their digests; of one that is still to be made it is known with which it is
    tied. Raises CheckpointError when a file cannot be read or has been cut since its header was read.
    """
    while isinstance(first, PlannedInfo) and first.source is not None:
        first = first.source
    while isinstance(second, PlannedInfo) and second.source is not None:
        second = second.source
    if isinstance(first, PlannedInfo) or isinstance(second, PlannedInfo):
        known = [
            (info.file.parent, info.known_as) if isinstance(info, PlannedInfo) else None for info in (first, second)
        ]
        return known[0] == known[1]
    if isinstance(first, PackedInfo) and isinstance(second, PackedInfo):
        return (first.dtype, first.shape, first.digest) == (second.dtype, second.shape, second.digest)
    if first.nbytes != second.nbytes:
        return False
    try:
        with open(first.file, "rb", buffering=0) as one, open(second.file, "rb", buffering=0) as two:
            for done in range(0, first.nbytes, _CHUNK):
                count = min(_CHUNK, first.nbytes - done)
                here = os.pread(one.fileno(), count, first.start + done)
                there = os.pread(two.fileno(), count, second.start + done)
                if len(here) != count or len(there) != count:
                    short = first.file if len(here) != count else second.file
                    raise CheckpointError(f"{short}: the file became shorter while it was read. Is it being written?")
                if here != there:
                    return False
    except OSError as error:
        raise CheckpointError(f"{error.filename or first.file}: cannot be read: {error.strerror or error}.") from error
    return True


def _read_raw(file: Path) -> tuple[bytes, int]:
    """The header with its length field, and the size of the file."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise HeaderError(f"{file}: this is not a regular file, so it cannot be a safetensors file.")
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            field = stream.read(8)
            if len(field) < 8:
                raise _broken(file, f"it has {size} bytes, and a safetensors file begins with an 8-byte length")
            length = int.from_bytes(field, "little")
            if length > size - 8 or length > MAX_HEADER_BYTES:
                raise _oversized(file, field, length, size)
            body = stream.read(length)
    except FileNotFoundError:
        raise HeaderError(f"{file}: there is no such file.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise HeaderError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(body) < length:
        raise _broken(file, f"it ended after {len(body)} of {length} header bytes")
    return field + body, size


def _oversized(file: Path, field: bytes, length: int, size: int) -> HeaderError:
    if field == b"version ":
        return HeaderError(
            f"{file}: this is a Git LFS pointer, not the file itself: the weights were never downloaded. "
            "Run 'git lfs pull' in its folder, or download the file again."
        )
    if field[:2] in (b"PK", b"\x80\x02"):
        return HeaderError(
            f"{file}: this is a PyTorch pickle with a safetensors name. Rename it to .bin, "
            "then make safetensors of it with 'rlmerge convert FOLDER OUT'."
        )
    if length > MAX_HEADER_BYTES:
        return _broken(file, f"its header claims {length} bytes; more than {MAX_HEADER_BYTES} is never valid")
    return _broken(file, f"its header claims {length} bytes, but only {size - 8} follow")


def _broken(file: Path, found: str) -> HeaderError:
    return HeaderError(
        f"{file}: not a valid safetensors file: {found}. It is truncated, damaged or of another format. "
        "Download or save it again."
    )


class _DuplicateKey(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return result


def _parse(file: Path, body: bytes) -> dict[str, Any]:
    if not body.startswith(b"{"):
        raise _broken(file, f"its header must begin with '{{' and begins with {body[:12]!r}")
    try:
        parsed = json.loads(body.decode("utf-8"), object_pairs_hook=_object)
    except _DuplicateKey as error:
        raise _broken(file, f"its header has the key {str(error)[:200]!r} twice") from None
    except UnicodeDecodeError as error:
        raise _broken(file, f"its header is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _broken(file, "its header is nested too deeply") from None
    except ValueError as error:
        raise _broken(file, f"its header is not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise _broken(file, "its header is not a JSON object")
    return parsed


def _printable(text: str) -> bool:
    """Whether a name can be printed, put into a path or a log line: no control characters, no lone surrogates."""
    if text.isascii():  # nearly every name, and nearly all the time that a header takes
        return text.isprintable()
    return not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in text)


def _metadata(file: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _broken(file, "'__metadata__' in its header is not an object")
    for key, text in value.items():
        if not isinstance(text, str):
            raise _broken(file, f"'__metadata__' in its header holds {key[:200]!r} that is not a string")
    return value


def _tensor(file: Path, name: str, entry: Any, offset: int, length: int) -> TensorInfo:
    """One header entry, checked on its own: name, keys, dtype, shape, offsets and their agreement."""
    if not name or not _printable(name):
        raise _broken(file, f"a tensor is named {name[:200]!r}: empty, or with characters that no name has")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, f"tensor {name!r} must have exactly 'dtype', 'shape' and 'data_offsets'")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        hint = did_you_mean(dtype.upper(), DTYPE_BITS) if isinstance(dtype, str) and len(dtype) < 40 else ""
        raise HeaderError(
            f"{file}: tensor {name!r} has the dtype {str(dtype)[:40]!r}, which safetensors does not have.{hint}"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise _broken(file, f"the shape of tensor {name!r} is not a list of at most {_MAX_DIMENSIONS} numbers")
    if any(type(extent) is not int or not 0 <= extent <= _MAX_EXTENT for extent in shape):
        raise _broken(file, f"the shape of tensor {name!r} holds something other than sensible whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int or o < 0 for o in offsets):
        raise _broken(file, f"'data_offsets' of tensor {name!r} are not two whole numbers")
    begin, end = offsets
    if begin > end:
        raise _broken(file, f"tensor {name!r} ends (at {end}) before it begins (at {begin})")
    if end > length:
        raise _broken(file, f"tensor {name!r} reaches to byte {end} of the data, and the file holds {length}")
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise _broken(file, f"tensor {name!r} of {dtype} {list(shape)} cannot take {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, offset + begin, end - begin)


def _check_cover(file: Path, tensors: list[TensorInfo], offset: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position, before = offset, "the header"
    for tensor in tensors:
        if tensor.start < position:
            raise _broken(file, f"tensor {tensor.name!r} overlaps with {before}")
        if tensor.start > position:
            gap = tensor.start - position
            raise _broken(file, f"{gap} bytes between {before} and tensor {tensor.name!r} belong to no tensor")
        position, before = tensor.start + tensor.nbytes, f"tensor {tensor.name!r}"
    if position != size:
        raise _broken(file, f"{size - position} bytes after {before} belong to no tensor")
