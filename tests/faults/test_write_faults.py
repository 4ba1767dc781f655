"""A disk that does not take what is written, at every call in turn: one message, nothing lost, and the way on.

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


def refusal(call: Callable[[], object]) -> str | None:
    """The message of an OutputError; None if there was none."""
    try:
        call()
    except OutputError as error:
        return str(error)
    return None


def held(out: Path) -> dict[str, bytes]:
    """An output without what a failure in the last moments may leave in it."""
    return {name: data for name, data in contents(out).items() if name.split("/")[0] not in LEFTOVERS}


def check(name: str, home: Path, folder: Path, want: dict[str, bytes], call: int, disk: str) -> None:
    """One run on a disk that fails at this call, and the same command when it is well again."""
    out = prepared(name, home, folder)
    earlier = held(out)
    kinds, number, stays = (WRITES, errno.EIO, False) if disk == "broken" else (FULL, errno.ENOSPC, True)
    with failing_disk([folder], kinds, number, call, stays) as found:
        said = refusal(lambda: OPERATIONS[name](home, out))
    site = found.calls[call]
    if said is not None:
        assert str(folder / "out") in said, site
        assert os.strerror(number) in said, site
    if said is None:
        assert held(out) == want, site
    elif out.exists() and any(out.iterdir()):  # never half of it
        assert held(out) in (want, earlier), site
    said = refusal(lambda: OPERATIONS[name](home, out))
    assert said is None or "is not empty" in said, site  # it is whole, and rlmerge says so by not replacing it
    assert contents(out) == want, site
    assert not LEFTOVERS & set(os.listdir(out)), site
    assert os.listdir(folder) == ["out"], site


QUICK = {"merge --fsync-full", "merge --overwrite-broken", "stages-broken"}
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


def test_a_pack_and_a_kill_between_the_renames(home, tmp_path):
    """The earlier pack is back with the next command, replaced if that says so; a stranger's folder stays."""
    out, aside = tmp_path / "out", tmp_path / "out.replaced"
    rlmerge.pack(home / "e1", home / "base", out, **HOW)
    before = contents(out)
    out.rename(aside)
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / ".made-in-one-go").touch()
    with pytest.raises(OutputError, match="is not empty"):
        rlmerge.pack(home / "e0", home / "base", out, **HOW)
    assert contents(out) == before
    assert not aside.exists()
    out.rename(aside)
    rlmerge.pack(home / "e0", home / "base", out, overwrite=True, **HOW)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    aside.mkdir()
    (aside / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"):
        rlmerge.pack(home / "e0", home / "base", out, overwrite=True, **HOW)
    assert (aside / "thesis.tex").read_text() == "mine"
