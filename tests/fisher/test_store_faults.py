"""A disk that fails while a Fisher is written: one message, the earlier Fisher stays, the same command continues."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from tests.execute.test_same_bytes import contents  # noqa: E402
from tests.faults.injection import WRITES, failing_disk  # noqa: E402

import rlmerge.fisher.store  # noqa: E402
from rlmerge.errors import FisherError, OutputError  # noqa: E402
from rlmerge.execute.safe_files import take_lock  # noqa: E402
from rlmerge.fisher.folder import RunFolder  # noqa: E402
from rlmerge.fisher.store import write_fisher  # noqa: E402

SAID = {"draw": {"data": "x", "seed": 1}, "dtype": "fp32"}


@pytest.fixture(autouse=True)
def save_in_python(monkeypatch):
    """safetensors writes in Rust, where no fault can be put: the same bytes, written by Python."""

    def save(tensors, file, metadata=None):
        save_file(tensors, f"{file}.made", metadata=metadata)
        data = Path(f"{file}.made").read_bytes()
        os.remove(f"{file}.made")
        with open(file, "wb") as opened:
            opened.write(data)

    monkeypatch.setattr(rlmerge.fisher.store, "save_file", save)


def write(out: Path, value: float, said: dict | None) -> None:
    with RunFolder(out, True).opened(said) as folder:
        write_fisher(folder, {"w": torch.full((4, 3), value), "norm": torch.ones(3)}, {"source": "own"}, "fp32")


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("said", [SAID, None])
def test_at_every_write(tmp_path, replaces, said):
    write(tmp_path / "whole", 2.0, said)
    write(tmp_path / "before", 1.0, said)
    want, before = contents(tmp_path / "whole"), contents(tmp_path / "before")
    (tmp_path / "count").mkdir()
    if replaces:
        write(tmp_path / "count" / "out", 1.0, said)
    with failing_disk([tmp_path / "count"], WRITES) as counted:
        write(tmp_path / "count" / "out", 2.0, said)
    assert len(counted.calls) > 12
    for call in range(len(counted.calls)):
        home = tmp_path / f"call-{call}"
        home.mkdir()
        out = home / "out"
        if replaces:
            write(out, 1.0, said)
        failed = None
        with failing_disk([home], WRITES, errno.EIO, call) as disk:
            try:
                write(out, 2.0, said)
            except OutputError as error:
                failed = error
        site = disk.calls[call]
        held = {name: data for name, data in contents(out).items() if name not in ("run.json", "lock")}
        assert held in (want, before if replaces else {}), site
        if failed is not None:
            assert str(out) in str(failed), site
            assert "Input/output error" in str(failed), site
        else:
            assert held == want, site
        for old in home.glob("*.replaced"):  # what could not be removed is named by the next run
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        write(out, 2.0, said)
        assert contents(out) == want, site
        assert os.listdir(home) == ["out"], site


def test_a_kill_between_the_renames(tmp_path):
    """The earlier Fisher is back with the next command; but not while the other process lives, and not a stranger's."""
    write(tmp_path / "out", 1.0, SAID)
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    (tmp_path / "out.unfinished").mkdir()
    lock = take_lock(tmp_path / "out.unfinished")
    assert lock is not None
    with pytest.raises(OutputError, match="another process"):
        RunFolder(tmp_path / "out", True)
    os.close(lock)
    RunFolder(tmp_path / "out", True)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.replaced").exists()
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    (tmp_path / "out.replaced" / "thesis.tex").write_text("mine")
    with pytest.raises(FisherError, match="is in the way"):
        RunFolder(tmp_path / "out", True)
