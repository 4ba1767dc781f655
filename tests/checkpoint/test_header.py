"""Whatever bytes a file holds, `read_header` finds a header that covers them exactly, or an error names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoint_files import header_bytes, random, write_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlmerge.checkpoint.header import equal_bytes, read_header
from rlmerge.errors import HeaderError

TWO = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = bytes(range(32))
A = json.dumps(TWO["a"])


def test_describes_what_was_written(tmp_path: Path) -> None:
    arrays = {"x": random(0, 3, 5), "n": (np.arange(4), "I64"), "scalar": (np.float32(2), "F32"), "e": random(1, 0, 7)}
    file = write_tensors(tmp_path / "m.safetensors", arrays, metadata={"format": "pt"})
    raw = file.read_bytes()
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["x", "n", "scalar", "e"]
    assert header.size == len(raw)
    length = 8 + int.from_bytes(raw[:8], "little")
    assert header.digest == xxhash.xxh3_128_hexdigest(raw[:length])
    x = header.tensors["x"]
    assert (x.dtype, x.shape, x.size, x.nbytes) == ("F32", (3, 5), 15, 60)
    assert np.array_equal(np.frombuffer(raw[x.start : x.start + x.nbytes], "<f4").reshape(x.shape), arrays["x"])
    assert header.tensors["scalar"].size == 1
    assert header.tensors["e"].size == 0


def test_orders_tensors_by_offset(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(header_bytes({"b": TWO["b"], "a": TWO["a"]}) + DATA)
    assert list(read_header(file).tensors) == ["a", "b"]


def test_agrees_with_the_library(tmp_path: Path) -> None:
    torch_save = pytest.importorskip("safetensors.numpy").save_file
    arrays = {"w": random(2, 4, 4), "h": random(3, 8).astype(np.float16), "i": np.arange(3)}
    torch_save(arrays, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    assert {n: i.shape for n, i in header.tensors.items()} == {n: a.shape for n, a in arrays.items()}
    assert [header.tensors[n].dtype for n in arrays] == ["F32", "F16", "I64"]


def entry(**changes: object) -> dict[str, object]:
    return {**TWO, "b": {**TWO["b"], **changes}}


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "length above the limit": (2**63).to_bytes(8, "little") + b"{}" * 50,
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "pickle": b"PK\x03\x04" + bytes(40),
    "not utf-8": header_bytes(b'{"\xff":1}'),
    "not json": header_bytes(b"{nonsense"),
    "array": header_bytes(b"[1, 2]"),
    "leading space": header_bytes(b" {}"),
    "deep": header_bytes(b'{"a":' + b"[" * 200_000),
    "huge number": header_bytes(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
    "duplicate key": header_bytes(f'{{"a":{A},"a":{A}}}'.encode()),
    "unknown dtype": header_bytes(entry(dtype="BF17")) + DATA,
    "dtype no string": header_bytes(entry(dtype=["BF16"])) + DATA,
    "negative extent": header_bytes(entry(shape=[-4])) + DATA,
    "two negative extents": header_bytes(entry(shape=[-2, -2])) + DATA,
    "fraction": header_bytes(entry(shape=[4.0])) + DATA,
    "boolean extent": header_bytes(entry(shape=[4, True])) + DATA,
    "nan extent": header_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'),
    "extent beyond 63 bits": header_bytes(entry(shape=[2**63, 0], data_offsets=[24, 24])) + DATA[:24],
    "overflowing product": header_bytes(entry(shape=[2**62, 4, 2**62])) + DATA,
    "shape no list": header_bytes(entry(shape=4)) + DATA,
    "many dimensions": header_bytes(entry(shape=[1] * 100 + [4])) + DATA,
    "offsets three": header_bytes(entry(data_offsets=[24, 30, 32])) + DATA,
    "offsets fraction": header_bytes(entry(data_offsets=[24.0, 32])) + DATA,
    "offsets negative": header_bytes(entry(data_offsets=[-8, 0])) + DATA,
    "begin after end": header_bytes(entry(data_offsets=[32, 24])) + DATA,
    "overlap": header_bytes(entry(data_offsets=[16, 24])) + DATA[:24],
    "same bytes twice": header_bytes({"a": TWO["a"], "b": TWO["a"]}) + DATA[:24],
    "hole": header_bytes(entry(data_offsets=[32, 40])) + DATA + bytes(8),
    "hole at the start": header_bytes({"b": TWO["b"]}) + DATA,
    "truncated": header_bytes(TWO) + DATA[:-1],
    "trailing byte": header_bytes(TWO) + DATA + b"x",
    "size against shape": header_bytes(entry(shape=[5])) + DATA,
    "half a byte": header_bytes({"f": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}) + b"x",
    "missing key": header_bytes({"a": {"dtype": "F32", "shape": [2]}}) + DATA,
    "further key": header_bytes(entry(colour="red")) + DATA,
    "entry no object": header_bytes({"a": 5}) + DATA,
    "metadata no object": header_bytes({**TWO, "__metadata__": ["pt"]}) + DATA,
    "metadata number": header_bytes({**TWO, "__metadata__": {"format": 1}}) + DATA,
    "empty name": header_bytes({"a": TWO["a"], "": TWO["b"]}) + DATA,
    "new line in a name": header_bytes({"a": TWO["a"], "b\nc": TWO["b"]}) + DATA,
    "lone surrogate": header_bytes({"a": TWO["a"], "b\ud800": TWO["b"]}) + DATA,
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_refuses(tmp_path: Path, what: str) -> None:
    file = tmp_path / "culprit.safetensors"
    file.write_bytes(BROKEN[what])
    with pytest.raises(HeaderError, match=r"culprit\.safetensors") as caught:
        read_header(file)
    str(caught.value).encode()  # printable anywhere
    assert len(str(caught.value)) < 1000


def test_the_unbroken_one_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(header_bytes({**TWO, "__metadata__": {"format": "pt"}}) + DATA)
    assert read_header(file).tensors["b"].shape == (4,)


def test_says_what_the_file_really_is(tmp_path: Path) -> None:
    for what, word in (("git lfs pointer", "git lfs pull"), ("pickle", "rlmerge convert"), ("truncated", "truncated")):
        (tmp_path / "m.safetensors").write_bytes(BROKEN[what])
        with pytest.raises(HeaderError, match=word):
            read_header(tmp_path / "m.safetensors")


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("pipe.safetensors", "absent.safetensors", ""):
        with pytest.raises(HeaderError):
            read_header(tmp_path / name)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 40)
)
def test_mutated_bytes_never_surprise(tmp_path: Path, edits: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(header_bytes({**TWO, "__metadata__": {"format": "pt"}}) + DATA)
    for place, value in edits:
        raw[place % len(raw)] = value
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw[: len(raw) - (cut if cut < 20 else 0)])
    try:
        header = read_header(file)
    except HeaderError as error:
        message = str(error)
    else:
        length = 8 + int.from_bytes(raw[:8], "little")
        assert sum(info.nbytes for info in header.tensors.values()) + length == header.size
        return
    assert str(file) in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F4", "U8"]) | JSON, "shape": st.lists(st.integers(-1, 5)) | JSON,
     "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | JSON}
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRY | JSON, max_size=3),
    n=st.integers(0, 40),
)
def test_arbitrary_headers_never_surprise(tmp_path: Path, header: dict[str, object], n: int) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(header_bytes(header) + bytes(n))
    try:
        assert sum(info.nbytes for info in read_header(file).tensors.values()) == n
    except HeaderError as error:
        str(error).encode()


def test_equal_bytes_compares_to_the_last_byte(tmp_path: Path) -> None:
    big = random(0, 700, 1000)  # 2.8 MB: three reads
    other = big.copy()
    other[-1, -1] += 1
    header = read_header(write_tensors(tmp_path / "m.safetensors", {"a": big, "b": big, "c": other, "d": big[:1]}))
    a, b, c, d = header.tensors.values()
    assert equal_bytes(a, b)
    assert not equal_bytes(a, c)
    assert not equal_bytes(a, d)
