"""A pack is taken as hostile: whatever it holds, the answer is an RlmergeError or the expert, and never more memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoint.checkpoint_files import header_bytes
from tests.methods.small_models import make_recipe, needed_weights
from tests.packs.pack_files import sha256s, write_set

import rlmerge
from rlmerge.errors import HeaderError, PackError, RlmergeError

STEPS = "model.layers.0.up_proj.weight#steps"
TABLE = "model.layers.0.up_proj.weight#chunks"
NAME = "model.layers.0.up_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, e0 and its pack p0."""
    home = write_set(tmp_path_factory.mktemp("hostile"), 1)
    rlmerge.pack(home / "e0", home / "base", home / "p0")
    return home


def copy(home: Path, tmp: Path) -> Path:
    """A pack of one's own, beside a base."""
    for name in ("base", "p0", "back", "out"):
        shutil.rmtree(tmp / name, ignore_errors=True)
    shutil.copytree(home / "base", tmp / "base")
    shutil.copytree(home / "p0", tmp / "p0")
    return tmp / "p0"


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def use_all(tmp: Path) -> list[str | None]:
    """Unpacks and merges the pack p0: what each says, or None if it went through."""
    said: list[str | None] = []
    recipe = make_recipe(tmp, "linear", ["p0"], {}, needed_weights("linear", ["p0"]))
    for call in (
        lambda: rlmerge.unpack(tmp / "p0", tmp / "back"),
        lambda: rlmerge.check(recipe),
        lambda: rlmerge.merge_to_folder(recipe, tmp / "out", threads=1),
    ):
        try:
            call()
            said.append(None)
        except RlmergeError as error:
            said.append(str(error))
    return said


def edit_note(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(pack: Path) -> None:
        note = json.loads((pack / "pack.json").read_text())
        change(note)
        (pack / "pack.json").write_text(json.dumps(note))

    return damage


def edit_delta(change: Callable[[dict[str, Any], bytearray], Any]) -> Callable[[Path], None]:
    def damage(pack: Path) -> None:
        header, data = header_of(pack / "delta.safetensors")
        raw = bytearray(data)
        change(header, raw)
        (pack / "delta.safetensors").write_bytes(header_bytes(header) + raw)

    return damage


def put_row(row: int, column: int, value: int) -> Callable[[Path], None]:
    """Another number in the table of the chunks."""

    def change(header: dict[str, Any], raw: bytearray) -> None:
        start = header[TABLE]["data_offsets"][0] + 16 * row + 4 * column
        raw[start : start + 4] = value.to_bytes(4, "little")

    return edit_delta(change)


def rename(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)


def inner_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another header of the expert's own file, as long as it was."""

    def edit(header: dict[str, Any], raw: bytearray) -> None:
        start, stop = header["model.safetensors#header"]["data_offsets"]
        inner = json.loads(raw[start + 8 : stop])
        change(inner)
        text = json.dumps(inner, separators=(",", ":")).encode()
        assert len(text) <= stop - start - 8
        raw[start + 8 : stop] = text + b" " * (stop - start - 8 - len(text))

    return edit_delta(edit)


def of(note: dict[str, Any]) -> dict[str, Any]:
    return note["tensors"][NAME]


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no pack.json": (lambda p: (p / "pack.json").unlink(), "pack.json: is missing"),
    "no delta": (lambda p: (p / "delta.safetensors").unlink(), "delta.safetensors: is missing"),
    "not UTF-8": (lambda p: (p / "pack.json").write_bytes(b'{"format": "\xff"}'), "is not JSON"),
    "not JSON": (lambda p: (p / "pack.json").write_text("{"), "is not JSON"),
    "a list": (lambda p: (p / "pack.json").write_text("[]"), "must hold a JSON object"),
    "deep": (lambda p: (p / "pack.json").write_text("[" * 10**5), "nested too deeply"),
    "a key twice": (lambda p: (p / "pack.json").write_text('{"format": 2, "format": 2}'), "stands there twice"),
    "another format": (edit_note(lambda n: n.update(format=1)), "has format 1, and this rlmerge reads 2"),
    "no base": (edit_note(lambda n: n.pop("base")), "does not say which base"),
    "base of numbers": (edit_note(lambda n: n.update(base={"hash": 1, "reference": 2})), "does not say which base"),
    "no weights": (edit_note(lambda n: n.update(weights=[])), "does not name safetensors files"),
    "weights elsewhere": (edit_note(lambda n: n.update(weights=["../x.safetensors"])), "does not name"),
    "weights twice": (edit_note(lambda n: n.update(weights=n["weights"] * 2)), "named twice"),
    "unknown weights": (edit_note(lambda n: n.update(weights=["x.safetensors"])), "is not in delta.safetensors"),
    "tensor missing": (edit_note(lambda n: n["tensors"].pop(NAME)), "'tensors' are not those of the headers"),
    "tensors a list": (edit_note(lambda n: n.update(tensors=[1])), "'tensors' are not those of the headers"),
    "unknown kind": (edit_note(lambda n: of(n).update(kind="zip")), "of kind 'zip' is not in"),
    "kind a list": (edit_note(lambda n: of(n).update(kind=[])), "of kind \\[\\]"),
    "no digest": (edit_note(lambda n: of(n).pop("xxh3_128")), "digests that are none"),
    "sum of letters": (edit_note(lambda n: of(n).update(base_sum="z" * 16)), "digests that are none"),
    "changed −1": (edit_note(lambda n: of(n).update(changed=-1)), "has -1 changed coordinates"),
    "changed huge": (edit_note(lambda n: of(n).update(changed=10**30)), "changed coordinates"),
    "a copy of itself": (edit_note(lambda n: of(n).update(kind="copy", of=NAME)), "is a copy of"),
    "a copy beside the base's": (
        edit_note(lambda n: n["tensors"].update({"model.layers.1.q_proj.weight": {
            "kind": "copy", "of": "model.layers.0.q_proj.weight"}})), "the base has one of its own"),
    "whole, and is not": (edit_note(lambda n: of(n).update(kind="whole")), "as it was in the expert"),
    "files a list": (edit_note(lambda n: n.update(files=[])), "'files' is not an object"),
    "a file elsewhere": (
        edit_note(lambda n: n["files"].update({"../../x": n["files"]["config.json"]})), "is no file of a model"),
    "an absolute file": (
        edit_note(lambda n: n["files"].update({"/tmp/x": n["files"]["config.json"]})), "is no file of a model"),
    "a hidden file": (
        edit_note(lambda n: n["files"].update({".bashrc": n["files"]["config.json"]})), "is no file of a model"),
    "no table": (edit_delta(lambda h, r: rename(h, TABLE, "x")), "of kind 'steps' is not in"),
    "steps of bytes": (edit_delta(lambda h, r: h[STEPS].update(dtype="I64")), "are not 3 chunks"),
    "another number of chunks": (
        edit_delta(lambda h, r: h[TABLE].update(shape=[6, 2])), "are not 3 chunks"),
    "tensor twice": (
        lambda p: (p / "delta.safetensors").write_bytes(header_bytes(b'{"a": {}, "a": {}}')), "key 'a' twice"),
    "shape of the base": (
        inner_header(lambda h: h[NAME].update(shape=[120, 700])), "cannot be made of the base's"),
    "a huge tensor": (
        inner_header(lambda h: h[NAME].update(shape=[2**40], data_offsets=[0, 2**41])), "overlaps|belong to no tensor"),
    "offsets of text": (inner_header(lambda h: h[NAME].update(data_offsets=["a", "b"])), "is damaged"),
    "a tensor of another name": (inner_header(lambda h: rename(h, NAME, "x")), "'tensors' are not those"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_opened(home, tmp_path, case):
    """By every command, with one message that names the file."""
    damage, text = REFUSED[case]
    pack = copy(home, tmp_path)
    damage(pack)
    with pytest.raises((PackError, HeaderError), match=text):
        rlmerge.unpack(pack, tmp_path / "back")
    assert all(use_all(tmp_path))
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(
    ("column", "value"),
    [(0, 2**32 - 1), (0, 7), (1, 2**32 - 1), (1, 32769), (2, 2**32 - 1), (3, 2**32 - 1), (3, 1 << 17), (3, 200)],
)
def test_lying_tables(home, tmp_path, row, column, value):
    """Starts, counts, lengths and parameters that lead nowhere; or digests that tell."""
    pack = copy(home, tmp_path)
    put_row(row, column, value)(pack)
    with pytest.raises(PackError, match=r"are damaged|the pack is damaged"):
        rlmerge.unpack(pack, tmp_path / "back")
    use_all(tmp_path)


def test_truncated_streams(home, tmp_path):
    """Shorter, with headers that agree."""

    def shorten(header: dict[str, Any], raw: bytearray) -> None:
        start, stop = header[STEPS]["data_offsets"]
        del raw[stop - 800 : stop]
        header[STEPS].update(shape=[(stop - start - 800) // 8], data_offsets=[start, stop - 800])
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [offset - 800 for offset in entry["data_offsets"]]

    pack = copy(home, tmp_path)
    edit_delta(shorten)(pack)
    said = use_all(tmp_path)
    assert all(text and "are damaged" in text for text in (said[0], said[2]))


def test_a_cut_file(home, tmp_path):
    for size in (0, 7, 100, 5000):
        pack = copy(home, tmp_path)
        raw = (pack / "delta.safetensors").read_bytes()
        (pack / "delta.safetensors").write_bytes(raw[: len(raw) - size if size > 7 else size])
        assert all(use_all(tmp_path))


@given(st.integers(0, 2**32), st.sampled_from(["delta.safetensors", "pack.json"]))
def test_any_other_bytes(home, tmp_path, seed, name):
    """Bytes changed anywhere: an RlmergeError from each command; or, from unpack, the expert and nothing else."""
    rng = np.random.default_rng(seed)
    pack = copy(home, tmp_path)
    raw = bytearray((pack / name).read_bytes())
    for place in rng.integers(0, len(raw), rng.integers(1, 4)):
        raw[place] = rng.integers(0, 256)
    (pack / name).write_bytes(raw)
    said = use_all(tmp_path)
    if said[0] is None:
        weights = sha256s(home / "e0")["model.safetensors"]
        assert sha256s(tmp_path / "back").get("model.safetensors", weights) == weights


def test_a_stray_pack_file_is_no_model(home, tmp_path):
    """A folder whose one safetensors file is that of a pack is not read as a model with odd names."""
    (tmp_path / "x").mkdir()
    shutil.copy(home / "p0" / "delta.safetensors", tmp_path / "x")
    with pytest.raises(PackError, match=r"pack.json: is missing"):
        rlmerge.pack(tmp_path / "x", home / "base", tmp_path / "y")
