"""Disks that are really full, signals, and two processes at once: what no patched function can show."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.command_line import good_set
from tests.execute.test_resume import command, digest, killable, lines_of  # noqa: F401
from tests.execute.test_same_bytes import contents
from tests.faults.test_write_faults import HOW

import rlmerge
from rlmerge.errors import OutputError


def at_most(size: int):
    """For a child process: no file may become larger."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_limit_of_the_size_of_files(killable, tmp_path):  # noqa: F811
    """The kernel refuses to write: the weights, then the journal; the same command without the limit ends it."""
    folder, expected, _ = killable
    for size, name in ((10**6, "out.unfinished"), (9 * 10**6, None)):
        done = subprocess.run(command(folder / "in", tmp_path / "out"), capture_output=True, text=True, check=False,
                              preexec_fn=at_most(size))  # fmt: skip
        if name is None:
            assert done.returncode == 0, done.stderr
            break
        assert done.returncode == 2, done.stderr
        assert name in done.stderr
        assert "File too large" in done.stderr
        assert "Traceback" not in done.stderr
    assert contents(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("what", ["merge", "pack", "unpack"])
def test_a_disk_that_fills_up(small_disk, tmp_path, what):
    """Somebody else takes all the room when the first bytes are written, and gives it back later."""
    good_set(tmp_path / "in")
    rlmerge.pack(tmp_path / "in" / "e0", tmp_path / "in" / "base", tmp_path / "in" / "p0", **HOW)
    filler = small_disk / "filler"

    def run(out: Path, progress=lambda step: None):
        if what == "merge":
            return rlmerge.merge_to_folder(tmp_path / "in" / "recipe.yml", out, progress=progress, **HOW)
        if what == "pack":
            home = tmp_path / "in"
            return rlmerge.pack(home / "e0", home / "base", out, progress=progress, **HOW)
        return rlmerge.unpack(tmp_path / "in" / "p0", out, progress=progress, **HOW)

    def fill(step):
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as opened:
            while True:
                opened.write(bytes(4096))

    run(tmp_path / "beside" / "whole")
    with pytest.raises(OutputError, match="No space left on device") as caught:
        run(small_disk / "out", fill)
    assert str(small_disk / "out") in str(caught.value)
    assert not (small_disk / "out").exists()
    filler.unlink()
    run(small_disk / "out")
    assert contents(small_disk / "out") == contents(tmp_path / "beside" / "whole")
    assert os.listdir(small_disk) == ["out"]


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 60))])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_a_random_moment(killable, tmp_path, number, seed):  # noqa: F811
    """Ctrl-C: one line and 130. SIGTERM: at once. Either way the same command continues."""
    folder, expected, units = killable
    chance = random.Random(seed)
    out, journal = tmp_path / "out", tmp_path / "out.unfinished" / "journal.jsonl"
    before = digest(folder / "in")
    process = subprocess.Popen(command(folder / "in", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wanted = chance.randrange(0, units // 2)
    while process.poll() is None and len(lines_of(journal)) <= wanted:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if process.returncode != 0:  # it was not finished before the signal came
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM), said
        assert "Traceback" not in said
        assert not out.exists() or number == signal.SIGTERM
        subprocess.run(command(folder / "in", out, "--overwrite"), check=True, capture_output=True)
    assert contents(out) == expected
    assert os.listdir(tmp_path) == ["out"]
    assert digest(folder / "in") == before


BUSY = """
import sys, time, rlmerge
def progress(step):
    print("working", flush=True)
    time.sleep(60)
getattr(rlmerge, sys.argv[1])(*sys.argv[2:], progress=progress, threads=1, kernels="numpy")
"""


@pytest.mark.parametrize("what", ["merge_to_folder", "pack", "unpack"])
def test_the_second_of_two_processes_is_refused(tmp_path, what):
    """The first one goes on undisturbed; when it is killed, the second may."""
    home = tmp_path / "in"
    good_set(home)
    rlmerge.pack(home / "e0", home / "base", home / "p0", **HOW)
    inputs = {"merge_to_folder": [home / "recipe.yml"], "pack": [home / "e0", home / "base"], "unpack": [home / "p0"]}
    arguments = [*inputs[what], tmp_path / "out"]
    first = subprocess.Popen(
        [sys.executable, "-c", BUSY, what, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "working\n"
    for _ in range(2):  # the refused one leaves the lock where it is
        with pytest.raises(OutputError, match=r"another (rlmerge|process)"):
            getattr(rlmerge, what)(*arguments, **HOW)
    assert first.poll() is None
    first.kill()
    first.communicate()
    getattr(rlmerge, what)(*arguments, **HOW)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
