"""A disk that does not take what is written, at every call in turn: one message, nothing lost, the same command ends it.

By default one call of each kind on each file fails; the long suite goes through all calls.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.command_line import good_set, snapshot
from tests.execute.test_same_bytes import contents
from tests.faults.injection import WRITES, Disk, failing_disk

import rlmerge
from rlmerge.errors import OutputError

FULL = ("open to write", "write", "pwrite", "posix_fallocate", "fsync", "mkdir", "rename", "replace")
"""What a full disk refuses; things can still be removed from it."""
STAGES = """\
{name: one, merge_method: ties, base_model: base, models: [{model: e0, parameters: {weight: 1}}]}
---
{name: two, merge_method: ties, base_model: one, models: [{model: e1, parameters: {weight: 1}}]}
"""
HOW = {"threads": 1, "kernels": "numpy"}

Operation = Callable[[Path, Path], object]
OPERATIONS: dict[str, Operation] = {
    "merge": lambda home, out: rlmerge.merge_to_folder(home / "recipe.yml", out, **HOW),
    "merge --fsync": lambda home, out: rlmerge.merge_to_folder(home / "recipe.yml", out, fsync=True, **HOW),
    "merge --overwrite": lambda home, out: rlmerge.merge_to_folder(home / "recipe.yml", out, overwrite=True, **HOW),
    "sweep": lambda home, out: rlmerge.merge_to_folder(
        home / "recipe.yml", out, sweep=[{"lambda": 0.5}, {"lambda": 1.0}], **HOW),
    "stages": lambda home, out: rlmerge.merge_to_folder(home / "stages.yml", out, **HOW),
    "pack": lambda home, out: rlmerge.pack(home / "e0", home / "base", out, **HOW),
    "pack --overwrite": lambda home, out: rlmerge.pack(home / "e0", home / "base", out, overwrite=True, **HOW),
    "unpack": lambda home, out: rlmerge.unpack(home / "p0", out, **HOW),
}  # fmt: skip
EARLIER: dict[str, Operation] = {
    "merge --overwrite": lambda home, out: rlmerge.merge_to_folder(home / "ties.yml", out, **HOW),
    "pack --overwrite": lambda home, out: rlmerge.pack(home / "e1", home / "base", out, **HOW),
}
LEFTOVERS = {"lock", "journal.jsonl", ".replaced", ".made-in-one-go"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("in")
    good_set(home)
    (home / "stages.yml").write_text(STAGES)
    rlmerge.pack(home / "e0", home / "base", home / "p0", **HOW)
    return home


def places(disk: Disk, thorough: bool) -> list[int]:
    """The numbers of the calls that shall fail: all, or one of each kind on each name of a file."""
    sites: dict[tuple[str, str], list[int]] = {}
    for place, (kind, path) in enumerate(disk.calls):
        sites.setdefault((kind, Path(path).name), []).append(place)
    return sorted(place for found in sites.values() for place in (found if thorough else [found[len(found) // 2]]))


def prepared(name: str, home: Path, folder: Path) -> Path:
    """OUT in a fresh folder, with what is to be replaced."""
    folder.mkdir()
    if name in EARLIER:
        EARLIER[name](home, folder / "out")
    return folder / "out"


def held(out: Path) -> dict[str, bytes]:
    """An output without what a failure in the last moments may leave in it."""
    return {name: data for name, data in contents(out).items() if name.split("/")[0] not in LEFTOVERS}


def check(name: str, home: Path, folder: Path, want: dict[str, bytes], call: int, disk: str) -> None:
    """One run on a disk that fails at this call, and the same command when it is well again."""
    out = prepared(name, home, folder)
    earlier = held(out)
    kinds, number, stays = (WRITES, errno.EIO, False) if disk == "broken" else (FULL, errno.ENOSPC, True)
    failed = False
    with failing_disk([folder], kinds, number, call, stays) as found:
        try:
            OPERATIONS[name](home, out)
        except OutputError as error:
            failed = True
            assert str(folder / "out") in str(error)
            assert os.strerror(number) in str(error)
    site = found.calls[call]
    if not failed:
        assert held(out) == want, site
    elif out.exists() and any(out.iterdir()):  # never half of it
        assert held(out) in (want, earlier), site
    try:
        OPERATIONS[name](home, out)
    except OutputError as error:  # it is whole, and rlmerge says so by not replacing it
        assert "is not empty" in str(error), site
    assert contents(out) == want, site
    assert not LEFTOVERS & set(os.listdir(out)), site
    assert os.listdir(folder) == ["out"], site


QUICK = {"merge --fsync-broken", "merge --fsync-full", "merge --overwrite-broken", "stages-broken", "sweep-broken"}
CASES = [(name, disk) for name in OPERATIONS for disk in ("broken", "full")]


@pytest.mark.parametrize(
    ("name", "disk"),
    [pytest.param(*case, marks=[] if "pack" in case[0] or "-".join(case) in QUICK else pytest.mark.long,
                  id="-".join(case)) for case in CASES],
)  # fmt: skip
def test_at_every_call(home, tmp_path, name, disk, request):
    before = snapshot(home)
    out = prepared(name, home, tmp_path / "whole")
    with failing_disk([tmp_path / "whole"], WRITES if disk == "broken" else FULL) as counted:
        OPERATIONS[name](home, out)
    want = contents(out)
    assert len(counted.calls) > 10
    thorough = "long" in (request.config.option.markexpr or "")
    for call in places(counted, thorough):
        check(name, home, tmp_path / f"call-{call}", want, call, disk)
    assert snapshot(home) == before
