"""A short run of the fuzzer, and every case that once was a defect. `make fuzz HOURS=1` goes on for longer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz.good import SCENARIOS
from tests.fuzz.mutate import spoil
from tests.fuzz.run import CASES

ROOT = Path(__file__).parents[2]
FOUND = sorted(CASES.glob("*.json"))
SEED = 20_000


def fuzz(*arguments: str) -> str:
    """What the fuzzer says, which must have found nothing."""
    command = [sys.executable, "-m", "tests.fuzz.run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_cases(tmp_path):
    """The same cases in every run; all kinds of end must come."""
    said = fuzz("--minutes", "5", "--cases", "40", "--seed", str(SEED), "--jobs", "1", "--save", str(tmp_path))
    assert "0 defects" in said
    assert " 0 merged" not in said
    assert " 0 refused" not in said


def test_what_was_found_once():
    assert FOUND
    said = fuzz("--replay", *map(str, FOUND))
    assert f"{len(FOUND)} cases replayed" in said


def test_unspoiled_files_merge():
    """What is refused is refused for what was spoiled."""
    ends = [f"{name}: merged: " for name in SCENARIOS]
    assert fuzz("--good").splitlines() == [*ends, f"{len(SCENARIOS)} cases replayed"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.json", "a.yml", "a.jinja", "a.jsonl"])
def test_a_seed_says_it_all(name):
    raw = b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}          abcd\n'
    raw = raw if name == "a.safetensors" else b'{"a": [1, {"b": "c"}], "d": 1e-5}\n'
    for seed in range(30):
        assert spoil(name, raw, random.Random(seed)) == spoil(name, raw, random.Random(seed))
    assert len({spoil(name, raw, random.Random(seed)) for seed in range(30)}) > 8


HARNESS = """
import os, pathlib, subprocess, sys, tempfile, time, warnings
import numpy as np
from tests.fuzz.good import Scenario
from tests.fuzz.run import run_case

def crash(home, out):
    os.kill(os.getpid(), 11)

place = pathlib.Path(tempfile.mkdtemp())
(place / "home").mkdir()
for action in (
    lambda home, out: None,
    lambda home, out: np.ones(2**27),
    lambda home, out: time.sleep(60),
    lambda home, out: [None for _ in iter(int, 1)],
    crash,
    lambda home, out: (place / "elsewhere").write_text("x"),
    lambda home, out: subprocess.run(["true"]),
    lambda home, out: warnings.warn("overflow", RuntimeWarning),
    lambda home, out: {}["x"],
):
    print(run_case(place / "home", Scenario((), action), {}, seconds=0.5).kind.split(" ")[0])
"""


def test_the_fuzzer_sees_what_it_looks_for():
    done = subprocess.run([sys.executable, "-c", HARNESS], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [
        "merged", "MemoryError", "hang", "hang", "crash", "outside", "outside", "RuntimeWarning", "KeyError"
    ]  # fmt: skip
