"""`rlmerge pack` and `rlmerge unpack`: one line of text, or JSON; merges by command take packs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.command_line import good_set, refused, rlmerge, rlmerge_process, succeeded
from tests.packs.pack_files import sha256s


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cli")
    good_set(home)
    return home


def test_pack_and_unpack(home, tmp_path):
    done = succeeded(rlmerge("pack", home / "e0", "--base", home / "base", "-o", tmp_path / "p0"))
    assert "of the expert's" in done.out
    assert "bits each" in done.out
    assert done.out.count("\n") == 1
    found = succeeded(
        rlmerge("pack", home / "e0", "--base", home / "base", "-o", tmp_path / "p0", "--overwrite", "--json")
    ).json
    assert found["changed"] > 0
    assert set(found) == {
        "out", "bytes", "expert_bytes", "coordinates", "changed", "bits_per_change", "whole", "seconds"
    }  # fmt: skip
    done = succeeded(rlmerge("unpack", tmp_path / "p0", "-o", tmp_path / "back"))
    assert "as they were" in done.out
    assert sha256s(tmp_path / "back") == sha256s(home / "e0")
    assert succeeded(rlmerge("unpack", tmp_path / "p0", "-o", tmp_path / "b2", "--json")).json["tensors"] == 6
    assert succeeded(rlmerge("unpack", tmp_path / "p0", "-o", tmp_path / "b3", "--quiet")).out == ""


def test_merges_by_command(home, tmp_path):
    for k in range(2):
        succeeded(rlmerge_process("pack", home / f"e{k}", "--base", home / "base", "-o", home / f"p{k}"))
    for kind in "ep":
        experts = [argument for k in range(2) for argument in ("--expert", home / f"{kind}{k}")]
        parts = ["--base", home / "base", *experts, "--method", "sar", "--set", "sensitivity=delta2"]
        succeeded(rlmerge("check", *parts))
        succeeded(rlmerge("merge", tmp_path / kind, *parts))
        succeeded(rlmerge("verify", tmp_path / kind))
    assert sha256s(tmp_path / "e")["model.safetensors"] == sha256s(tmp_path / "p")["model.safetensors"]
    assert "another base" in refused(
        rlmerge("merge", tmp_path / "x", "--base", home / "e1", "--expert", home / "p0", "--method", "linear",
                "--set", "weight=1")
    )  # fmt: skip


def test_wrong_usage(home, tmp_path):
    assert rlmerge("pack", home / "e0", "-o", tmp_path / "p").code == 2
    assert "there is no such folder" in refused(rlmerge("pack", home / "no", "--base", home / "base", "-o", tmp_path))
    assert "no delta pack" in refused(rlmerge("unpack", home / "e0", "-o", tmp_path / "x"))
