"""docs/tutorial.md, block by block, as a reader would run it: real TRL training, Fishers, a merge, evaluations.

The long suite runs it; every suite reads it: a script that compiles, a recipe that parses, commands and options that
there are.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.command_line import rlmerge

from rlmerge.stages import parse_stages

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LIMIT = 240
"""Seconds that one block may take."""


def test_every_block_can_be_run() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    commands = 0
    for language, title, body in BLOCK.findall(text):
        if language == "python":
            compile(body, title, "exec")
        elif language == "yaml":
            parse_stages(body, title)
        else:
            for line in body.splitlines():
                words = shlex.split(line)
                if words[:1] == ["rlmerge"]:
                    commands += 1
                    known = rlmerge(words[1], "--help").out
                    assert [word for word in words if word.startswith("--") and word not in known] == [], line
    assert commands > 10


@pytest.mark.long
def test_every_block_runs(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    found = [(language, title, body) for language, title, body in BLOCK.findall(text)]
    assert [title for language, title, _ in found if language != "bash"] == ["train.py", "recipe.yml"]
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    for language, title, body in found:
        if language != "bash":
            (tmp_path / title).write_text(body, encoding="utf-8")
            continue
        command = ["bash", "-euo", "pipefail", "-c", body]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, f"{body}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if "rlmerge compare" in body:
            assert "of the gain" in done.stdout
            assert {"base", "math", "code", "sar"} <= set(done.stdout.split())
        if "rlmerge merge" in body:
            assert "survival" in done.stdout + done.stderr
    assert (tmp_path / "math-pack" / "pack.json").exists()
