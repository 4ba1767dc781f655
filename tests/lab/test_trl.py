"""RLVR by TRL's trainer: what it leaves, and that a killed run goes on from TRL's own checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlmerge.lab.optimizer import Rate
from rlmerge.lab.rlvr import Rlvr, rlvr
from rlmerge.lab.runs import Progress

trl = pytest.importorskip("rlmerge.lab.trl")
pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, TRL and accelerate

SETTINGS = Rlvr("math:0", 1, steps=5, prompts=2, group=2, rate=Rate(1e-3, 2), max_new_tokens=8, trainer="trl")


class Interrupted(Exception):
    pass


def test_a_killed_run_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "SAVE_STEPS", 2)

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise Interrupted

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        rlvr(base, out, SETTINGS, stop)
    kept = tmp_path / "out.unfinished" / "checkpoints"
    assert [path.name for path in kept.glob("checkpoint-*")] == ["checkpoint-2"]
    told: list[int] = []
    rlvr(base, out, SETTINGS, lambda progress: told.append(progress.step))
    assert told == [3, 4, 5]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4]
    assert {"reward", "kl", "entropy", "length", "lr", "seconds"} <= set(log[0])
    assert sorted(file.name for file in out.iterdir()) == [
        *("bf16", "curve.svg", "fp32", "log.jsonl", "run.json", "samples.jsonl")
    ]
    half, whole = (load_file(out / dtype / "model.safetensors") for dtype in ("bf16", "fp32"))
    assert all((whole[name].bfloat16() == half[name]).all() for name in half)
    rlvr(base, out, SETTINGS, lambda progress: told.append(progress.step))
    assert told == [3, 4, 5]  # finished: nothing is made again
