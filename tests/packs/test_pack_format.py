"""The format as docs/packs.md describes it: a reader written from that page alone, slow and plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from tests.packs.pack_files import changed, words, write_words

import rlmerge


def open_file(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, raw[8 + length :]


def stored(path: Path, name: str) -> bytes:
    header, data = open_file(path)
    start, stop = header[name]["data_offsets"]
    return data[start:stop]


class Bits:
    """A stream of 64-bit words, least significant bit first."""

    def __init__(self, raw: bytes) -> None:
        self.number = int.from_bytes(raw, "little")
        self.at = 0

    def take(self, count: int) -> int:
        value = self.number >> self.at & ((1 << count) - 1)
        self.at += count
        return value

    def zeros(self) -> int:
        count = 0
        while not self.take(1):
            count += 1
        return count


def numbers(data: bytes, count: int, ones: int, golomb: bool, k: int) -> tuple[list[int], int]:
    """`count` numbers: upper parts in `ones` words, lower parts behind them; and the words of both."""
    upper = Bits(data[: 8 * ones])
    zeros = [upper.zeros() for _ in range(count)]
    if golomb:
        lower = Bits(data[8 * ones :])
        return [lower.take(k + z) + 2 ** (k + z) - 2**k for z in zeros], ones + -(-lower.at // 64)
    if k == 0:
        return zeros, ones
    each = 64 // k
    words = np.frombuffer(data, np.uint64)[ones : ones - (-count // each)].tolist()
    low = [words[i // each] >> (i % each * k) & (2**k - 1) for i in range(count)]
    return [z * 2**k + rest for z, rest in zip(zeros, low)], ones - (-count // each)


def rank(word: int, bits: int) -> int:
    return word if word < 1 << (bits - 1) else (1 << (bits - 1)) - 1 - word


def word_of(place: int, bits: int) -> int:
    return place if place >= 0 else (1 << (bits - 1)) - 1 - place


def decode(steps: bytes, chunks: bytes, reference: list[int], bits: int) -> list[int]:
    """The expert's words by the page."""
    found = list(reference)
    rows = np.frombuffer(chunks, np.uint32).reshape(-1, 4).tolist()
    ends = [*(row[0] for row in rows[1:]), len(steps) // 8]
    for chunk, ((first, count, ones, parameters), end) in enumerate(zip(rows, ends)):
        start, size = chunk * 2**15, min(2**15, len(reference) - chunk * 2**15)
        data = steps[8 * first : 8 * end]
        if parameters >> 17 & 1:
            raw = [data[i : i + bits // 8] for i in range(0, size * bits // 8, bits // 8)]
            found[start : start + size] = [int.from_bytes(one, "little") for one in raw]
            continue
        gaps, used = numbers(data, count, ones & 0xFFFF, False, parameters & 255)
        golomb, k = bool(parameters >> 16 & 1), parameters >> 8 & 255
        moves, more = numbers(data[8 * used :], count, ones >> 16, golomb, k)
        assert used + more == len(data) // 8
        at = start - 1
        for gap, number in zip(gaps, moves):
            at += gap + 1
            step = (number // 2 + 1) * (-1 if number & 1 else 1)
            found[at] = word_of(rank(found[at], bits) + step, bits)
    return found


@pytest.mark.parametrize("kind", ["sparse", "heavy", "anything"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_reader_written_from_the_page(tmp_path, dtype, kind):
    size, bits = 40_000, 16 if dtype == "BF16" else 32
    base = words(1, (size,), dtype)
    rng = np.random.default_rng(2)
    expert = changed(base, 3)
    if kind == "heavy":  # steps over zero, large and small
        where = rng.random(size) < 0.1
        expert = np.where(where, base ^ base.dtype.type(1 << (bits - 1)), expert)
    elif kind == "anything":
        expert = rng.integers(0, 2**bits, size).astype(base.dtype)
    write_words(tmp_path / "base" / "model.safetensors", {"t": (dtype, base)})
    write_words(tmp_path / "e" / "model.safetensors", {"t": (dtype, expert)}, {"format": "pt"})
    rlmerge.pack(tmp_path / "e", tmp_path / "base", tmp_path / "p")
    delta, note = tmp_path / "p" / "delta.safetensors", json.loads((tmp_path / "p" / "pack.json").read_text())
    assert decode(stored(delta, "t#steps"), stored(delta, "t#chunks"), base.tolist(), bits) == expert.tolist()
    raw = (tmp_path / "e" / "model.safetensors").read_bytes()
    header = stored(delta, "model.safetensors#header")
    assert header + expert.tobytes() == raw
    said = note["tensors"]["t"]
    assert said["kind"] == "steps"
    assert said["changed"] == np.count_nonzero(base != expert)
    assert said["xxh3_128"] == xxhash.xxh3_128_hexdigest(expert.tobytes())
    weights = [(i * 0x9E3779B1) % 2**32 | 1 for i in range(size)]
    assert int(said["base_sum"], 16) == sum(w * a for w, a in zip(base.tolist(), weights)) % 2**64


@pytest.mark.parametrize("size", [100, 300_000])
def test_the_hash_of_the_base(tmp_path, size):
    """Of small bases every byte, of others 64 pieces, cut at the end of their tensor."""
    base = {
        "b": ("BF16", words(1, (size,))),
        "a": ("F32", words(2, (size // 7,), "F32")),
        "c": ("BF16", words(3, (5,))),
    }
    expert = {**base, "b": ("BF16", changed(base["b"][1], 1))}
    write_words(tmp_path / "base" / "model.safetensors", base)
    write_words(tmp_path / "e" / "model.safetensors", expert)
    rlmerge.pack(tmp_path / "e", tmp_path / "base", tmp_path / "p")
    names = sorted(base)
    text = b"".join(json.dumps([n, base[n][0], list(base[n][1].shape)]).encode() + b"\n" for n in names)
    data = [base[name][1].tobytes() for name in names]
    total, begins = sum(map(len, data)), np.cumsum([0, *map(len, data)]).tolist()
    if total <= 262_144:
        text += b"".join(data)
    else:
        for raw, begin in zip(data, begins):
            starts = [total * p // 64 - begin for p in range(64)]
            text += b"".join(raw[s : s + 4096] for s in starts if 0 <= s < len(raw))
    note = json.loads((tmp_path / "p" / "pack.json").read_text())
    assert note["base"]["hash"] == xxhash.xxh3_128_hexdigest(text)
