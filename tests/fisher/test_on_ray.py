"""Fishers on a cluster of three raylets: one set of bits, whatever the processes, and whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from tests.evaluate.test_run import write_model  # noqa: E402
from tests.execute.ray_nodes import begin_together, kill_node, three_nodes  # noqa: E402
from tests.fisher.test_estimate import write_data  # noqa: E402

from rlmerge.errors import ClusterError, FisherError, RecipeError  # noqa: E402
from rlmerge.execute.ray_cluster import connected  # noqa: E402
from rlmerge.fisher import on_ray  # noqa: E402
from rlmerge.fisher.estimate import FisherSettings, estimate_fisher  # noqa: E402
from rlmerge.fisher.sources import SequenceChoice  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(sys.modules["tests.execute.ray_nodes"])
HERE = FisherSettings(SequenceChoice("gold"), threads=1)
THERE = replace(HERE, executor="ray")
CHUNKS = 7


class SlowWorker(on_ray.FisherWorker):
    """Begins when there are so many, and takes its time."""

    def __init__(self, marks: Path, count: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.marks, self.count = marks, count

    def do(self, chunk: int) -> None:
        begin_together(self.marks, self.count)
        time.sleep(0.2)
        super().do(chunk)


@pytest.fixture(scope="module")
def cluster():
    with three_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def home(cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, data.jsonl; local: the Fisher by this process; whole: by one process of the cluster."""
    home = tmp_path_factory.mktemp("fisher")
    write_model(home / "model", 0)
    write_data(home / "data.jsonl", 16 * CHUNKS - 3)
    estimate_fisher(home / "model", home / "data.jsonl", home / "local", HERE)
    one = replace(THERE, workers=1, address=cluster.address)
    estimate_fisher(home / "model", home / "data.jsonl", home / "whole", one)
    return home


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.long
def test_it_is_the_local_one_but_for_the_order_of_sums(home: Path) -> None:
    local, found = (load_file(home / name / "fisher.safetensors") for name in ("local", "whole"))
    assert local.keys() == found.keys()
    for name, value in local.items():
        # fp32 sums of up to 16 squares, then of chunks, against one long sum
        assert float((found[name] - value).norm()) <= 2e-6 * float(value.norm()), name
    said = json.loads((home / "whole" / "fisher.json").read_text())
    assert (said["sums"], said["units"]) == ("by chunk", 16 * CHUNKS - 3)
    assert contents(home / "whole").keys() == contents(home / "local").keys()


PROGRAM = """
import sys, time
import rlmerge.cli.fisher
from rlmerge.fisher import on_ray

DONE = sys.argv.pop(1)

class Slow(on_ray.FisherWorker):
    def do(self, chunk):
        time.sleep(0.3)
        super().do(chunk)
        with open(DONE, "a") as done:
            done.write(f"{chunk}\\n")

on_ray.FisherWorker = Slow
from rlmerge.cli.main import main
sys.argv[0] = "rlmerge"
main()
"""


def sums_in(folder: Path) -> int:
    return len(list(folder.glob("sums-*.safetensors"))) if folder.is_dir() else 0


@pytest.mark.long  # a merge that is killed on Ray is in tests/execute
def test_the_command_is_killed_and_given_again(cluster, home: Path, tmp_path: Path) -> None:
    """What its processes had added up is not added up again."""
    done = tmp_path / "done"
    command = [sys.executable, "-c", PROGRAM, str(done), "fisher", str(home / "model"), "--data",
               str(home / "data.jsonl"), "-o", str(tmp_path / "f"), "--source", "gold", "--threads", "1",
               "--workers", "2", "--executor", "ray", "--address", cluster.address, "--quiet"]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline and sums_in(tmp_path / "f.unfinished") < 2:
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its processes end with it
    before = sums_in(tmp_path / "f.unfinished")
    assert 2 <= before < CHUNKS
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert contents(tmp_path / "f") == contents(home / "whole")
    # one may have been written and not noted, when its process was stopped
    assert CHUNKS - 1 <= len(done.read_text().splitlines()) <= CHUNKS


@pytest.mark.long  # in a merge: tests/execute/test_ray.py
def test_a_machine_is_killed(cluster, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle, at work on a chunk; the others do it. Two processes, as one left over, end with the same bits."""
    marks, said, left = tmp_path / "marks", [], [cluster]
    marks.mkdir()
    monkeypatch.setattr(on_ray, "FisherWorker", lambda **arguments: SlowWorker(marks, 3, **arguments))

    def progress(step) -> None:
        said.append(step.what)
        if step.what == "gradients" and step.done and left:
            kill_node(left.pop(), marks)

    settings = replace(THERE, address=cluster.address)
    estimate_fisher(home / "model", home / "data.jsonl", tmp_path / "f", settings, progress=progress)
    assert any("was lost" in text for text in said), said
    assert contents(tmp_path / "f") == contents(home / "whole")


@pytest.mark.long
def test_machines_must_load_the_same_weights(cluster, home: Path, tmp_path: Path, monkeypatch) -> None:
    write_model(tmp_path / "other", 5)

    class Elsewhere(on_ray.FisherWorker):
        def __init__(self, origin, **arguments):
            super().__init__(origin=replace(origin, source=tmp_path / "other"), **arguments)

    monkeypatch.setattr(on_ray, "FisherWorker", Elsewhere)
    settings = replace(THERE, address=cluster.address, workers=1)
    with pytest.raises(ClusterError, match="loads other weights"):
        estimate_fisher(home / "model", home / "data.jsonl", tmp_path / "f", settings)


def test_sums_of_another_way_are_not_continued(home: Path, tmp_path: Path) -> None:
    """A folder that a local run began, and sums of a chunk that are no run's own."""
    shutil.copytree(home / "local", tmp_path / "f.unfinished")
    (tmp_path / "f.unfinished" / "fisher.json").unlink()
    (tmp_path / "f.unfinished" / "run.json").write_text('{"torch": "0"}')
    (tmp_path / "f.unfinished" / "sums-00000-abc.safetensors").touch()
    with pytest.raises(FisherError, match="an unfinished Fisher of another model"):
        estimate_fisher(home / "model", home / "data.jsonl", tmp_path / "f", HERE)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (replace(HERE, workers=2), FisherError, "add --executor ray"),
        (replace(HERE, address="host:1"), RecipeError, "add --executor ray"),
        (replace(HERE, executor="slurm"), RecipeError, "choose local"),
    ],
)
def test_settings_that_do_not_go_together(home: Path, tmp_path: Path, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        estimate_fisher(home / "model", home / "data.jsonl", tmp_path / "f", settings)
    assert not any(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes(cluster, home: Path, tmp_path: Path, workers: int) -> None:
    with connected(cluster.address, 1):
        estimate_fisher(home / "model", home / "data.jsonl", tmp_path / "f", replace(THERE, workers=workers))
    assert contents(tmp_path / "f") == contents(home / "whole")
