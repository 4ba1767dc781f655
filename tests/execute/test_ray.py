"""Merges on a cluster of three raylets: the bytes of a local merge, whoever is killed in the middle of it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.execute.ray_nodes import begin_together, kill_node, restore, three_nodes
from tests.execute.test_same_bytes import SAR, contents, recipe_of
from tests.methods.small_models import make_recipe, small_blocks, some_fishers, sparse_model, write_all

import rlmerge
from rlmerge.errors import ClusterError, NonFiniteError, PluginError, RecipeError
from rlmerge.plugins import load_plugins

ray = pytest.importorskip("ray")

from rlmerge.execute import ray_cluster, ray_run  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(sys.modules["tests.execute.ray_nodes"])


class SlowWorker(ray_run.MergeWorker):
    """Begins when every node has one, and takes its time."""

    def __init__(self, marks: Path, seconds: float = 0.05, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.marks, self.seconds = marks, seconds

    def do(self, job: Any) -> Any:
        begin_together(self.marks)
        time.sleep(self.seconds)
        return super().do(job)


@pytest.fixture(scope="module")
def cluster():
    with three_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def connection(cluster):
    """This process stays connected between tests."""
    with ray_cluster.connected(cluster.address, 1):
        yield cluster


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three bf16 experts with Fishers."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    base, experts = sparse_model(rng, 3, "BF16")
    write_all(folder, base, experts, some_fishers(rng, list(experts)), "BF16")
    return folder


@pytest.fixture
def slowly(monkeypatch, tmp_path):
    """Makes workers of the next merge slow."""
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(ray_run, "MergeWorker", lambda **arguments: SlowWorker(marks, **arguments))
    return marks


CASES = [
    ("ties", {"density": 0.5}),  # stages of a tensor
    ("iso_c", {}),  # whole matrices
    ("sar", SAR["model"]),  # stages of the model, then of tensors
    ("dare_ties", {"density": 0.5}),
]
MORE = [(method, {}) for method in rlmerge.method_names() if method not in ("ties", "iso_c", "sar", "dare_ties")]
MORE += [("sar", parameters) for name, parameters in SAR.items() if name != "model"]


def check_same(models, tmp_path, method, parameters, blocks):
    recipe = recipe_of(models, method, parameters)
    with small_blocks(*blocks):
        local = rlmerge.merge_to_folder(recipe, tmp_path / "local", threads=1)
        done = rlmerge.merge_to_folder(recipe, tmp_path / "ray", executor="ray")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert json.loads((tmp_path / "ray" / "run.log").read_text())["executor"] == "ray"
    assert done.bytes_read > 0
    assert done.report == local.report


# small units: tensors of many units, measured unit by unit; large ones: tensors that one job takes through all stages
UNITS, TENSORS = (8, 16), (2**16, 2**24)


@pytest.mark.parametrize(
    ("method", "parameters", "blocks"),
    [(*CASES[1], UNITS), (*CASES[2], UNITS), (*CASES[0], TENSORS), (*CASES[2], TENSORS)],
)
def test_the_bytes_of_a_local_merge(connection, models, tmp_path, method, parameters, blocks):
    check_same(models, tmp_path, method, parameters, blocks)


@pytest.mark.long
@pytest.mark.parametrize("blocks", [UNITS, TENSORS], ids=["units", "tensors"])
@pytest.mark.parametrize(("method", "parameters"), [*CASES, *MORE])
def test_the_bytes_of_a_local_merge_by_every_method(connection, models, tmp_path, method, parameters, blocks):
    check_same(models, tmp_path, method, parameters, blocks)


def test_a_sweep(connection, models, tmp_path):
    sweep = [{"lambda": 0.3}, {"lambda": 1.0}]
    recipe = recipe_of(models, "sar", SAR["default"])
    for executor in ("local", "ray"):
        rlmerge.merge_to_folder(recipe, tmp_path / executor, sweep=sweep, executor=executor)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.parametrize("method", ["ties", pytest.param("sar", marks=pytest.mark.long)])
def test_a_machine_is_killed(connection, models, tmp_path, slowly, method):
    """In the middle, with jobs on it; the two that are left do them, and what was measured is not measured again."""
    recipe = recipe_of(models, method, {"density": 0.5})
    said, left = [], [connection]

    def progress(step):
        if step.message:
            said.append(step.message)
        elif left:
            kill_node(left.pop(), slowly)

    try:
        with small_blocks(8, 16):
            rlmerge.merge_to_folder(recipe, tmp_path / "ray", executor="ray", progress=progress)
    finally:
        restore(connection)
    assert any("was lost; what it had is done again" in text for text in said), said
    rlmerge_local(recipe, tmp_path / "local")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def rlmerge_local(recipe, out):
    with small_blocks(8, 16):
        rlmerge.merge_to_folder(recipe, out)


PROGRAM = """
import sys, time
import rlmerge.planner
rlmerge.planner.BLOCK, rlmerge.planner.UNIT = 8, 16
from rlmerge.execute import ray_run

class Slow(ray_run.MergeWorker):
    def do(self, job):
        time.sleep(0.15)
        return super().do(job)

ray_run.MergeWorker = Slow
from rlmerge.cli.main import main
sys.argv[0] = "rlmerge"
main()
"""


def check_driver_killed(cluster, models, tmp_path, lines: int) -> None:
    recipe = recipe_of(models, "ties", {"density": 0.5})
    (models / "killed.yml").write_text(recipe.to_yaml())
    command = [sys.executable, "-c", PROGRAM, "merge", str(models / "killed.yml"), str(tmp_path / "ray"), "--json",
               "--quiet", "--executor", "ray", "--address", cluster.address]  # fmt: skip
    journal = tmp_path / "ray.unfinished" / "journal.jsonl"
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b'{"unit"') >= lines:
            break
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_units"] >= lines
    rlmerge_local(recipe, tmp_path / "local")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.long  # on this machine alone: tests/execute/test_resume.py
def test_the_command_is_killed_and_given_again(cluster, models, tmp_path):
    check_driver_killed(cluster, models, tmp_path, 3)


@pytest.mark.long
@pytest.mark.parametrize("lines", [1, 2, 4, 5])
def test_the_command_is_killed_at_any_time(cluster, models, tmp_path, lines):
    check_driver_killed(cluster, models, tmp_path, lines)


def test_a_cluster_of_our_own(models, tmp_path):
    """By the command line; nothing is said but the result and, on a slow machine, how far it is."""
    recipe = recipe_of(models, "ties", {"density": 0.5})
    (models / "own.yml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "rlmerge", "merge", str(models / "own.yml"), str(tmp_path / "ray")]
    done = subprocess.run(
        [*command, "--executor", "ray", "--threads", "2", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.endswith("units written")] == []
    rlmerge.merge_to_folder(recipe, tmp_path / "local")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_an_error_of_the_user_is_raised_at_once_as_itself(connection, models, tmp_path, monkeypatch):
    monkeypatch.setattr("rlmerge.api.take_sample", lambda *_: {})  # which would find it first
    base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
    experts["e1"]["a.weight"] = experts["e1"]["a.weight"].copy()
    experts["e1"]["a.weight"][1, 2] = np.nan
    write_all(tmp_path / "in", base, experts, None, "BF16")
    recipe = recipe_of(tmp_path / "in", "ties", {"density": 0.5})
    with pytest.raises(NonFiniteError, match=r"e1.*'a\.weight' holds nan"):
        rlmerge.merge_to_folder(recipe, tmp_path / "ray", executor="ray")


def test_a_plugin_travels_and_its_error_names_file_and_line(connection, models, tmp_path):
    text = "from rlmerge.plugins import method\n\n\n@method('mine', 'half', symmetric=True)\ndef mine(base, deltas):\n"
    outcomes = []
    for body in ("    return base + deltas.sum(axis=0) / 2\n", "    return base + deltas[5]\n"):
        (tmp_path / "mine.py").write_text(text + body)
        methods = load_plugins(tmp_path / "mine.py")
        data = (
            f"merge_method: mine\nbase_model: {models}/base\nmodels: [{{model: {models}/e0}}, {{model: {models}/e1}}]"
        )
        recipe = rlmerge.parse_recipe(data, methods=methods)
        outcomes.append(recipe)
    rlmerge.merge_to_folder(outcomes[0], tmp_path / "local")
    rlmerge.merge_to_folder(outcomes[0], tmp_path / "ray", executor="ray")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    with pytest.raises(PluginError, match=r"mine\.py:6: method 'mine'"):
        rlmerge.merge_to_folder(outcomes[1], tmp_path / "bad", executor="ray")


def test_machines_must_see_the_same_inputs(connection, models, tmp_path, monkeypatch):
    class OtherFiles(ray_run.MergeWorker):
        def __init__(self, stamps, **arguments):
            super().__init__(stamps=[[1, 2] for _ in stamps], **arguments)

    monkeypatch.setattr(ray_run, "MergeWorker", OtherFiles)
    with pytest.raises(ClusterError, match="another file"):
        rlmerge.merge_to_folder(recipe_of(models, "ties", {}), tmp_path / "ray", executor="ray")


def test_machines_must_see_the_output(connection, models, tmp_path, monkeypatch):
    class Elsewhere(ray_run.MergeWorker):
        def __init__(self, out, **arguments):
            super().__init__(out=out.with_name("not-mounted"), **arguments)

    monkeypatch.setattr(ray_run, "MergeWorker", Elsewhere)
    with pytest.raises(ClusterError, match=r"not-mounted\.unfinished.*shared file system"):
        rlmerge.merge_to_folder(recipe_of(models, "ties", {}), tmp_path / "ray", executor="ray")
    assert not (tmp_path / "not-mounted.unfinished").exists()


def test_a_worker_that_fits_nowhere(connection, models, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_run, "thread_bytes", lambda plan: 10**12)
    with pytest.raises(ClusterError, match=r"1000\.\d\d GB, and no machine"):
        rlmerge.merge_to_folder(recipe_of(models, "ties", {}), tmp_path / "ray", executor="ray")


class Fatal(ray_run.MergeWorker):
    """Dies of every job."""

    def do(self, job: Any) -> Any:
        os._exit(1)


def test_workers_that_keep_dying_end_the_run(connection, models, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_run, "MergeWorker", Fatal)
    monkeypatch.setattr(ray_cluster, "RETRIES", 1)
    with pytest.raises(ClusterError, match="the same command continues"):
        rlmerge.merge_to_folder(recipe_of(models, "ties", {}), tmp_path / "ray", executor="ray")


def test_no_cluster_there(models, tmp_path):
    """Known at once; Ray itself would take minutes."""
    (models / "nobody.yml").write_text(recipe_of(models, "ties", {}).to_yaml())
    command = [sys.executable, "-m", "rlmerge", "merge", str(models / "nobody.yml"), str(tmp_path / "ray")]
    done = subprocess.run(
        [*command, "--executor", "ray", "--address", "127.0.0.1:1"], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "127.0.0.1:1: no Ray cluster answers there" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "slurm"}, "choose local"),
        ({"address": "host:6379"}, "add --executor ray"),
        ({"executor": "ray", "address": "host:6379", "memory": 10**9}, "--memory"),
    ],
)
def test_settings_that_do_not_go_together(models, tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        rlmerge.merge_to_folder(recipe_of(models, "ties", {}), tmp_path / "ray", **options)
    assert not any(tmp_path.iterdir())


def test_what_travels_is_small(connection, tmp_path, monkeypatch):
    """A model of 8 MB: jobs and what comes of them are summaries and records, of kilobytes."""
    rng = np.random.default_rng(0)
    base = {f"layers.{i}.weight": rng.standard_normal((512, 512)).astype(np.float32) for i in range(8)}
    experts = {"a": {name: value + np.float32(0.5) for name, value in base.items()}}
    write_all(tmp_path / "in", base, experts)
    sizes: list[int] = []
    run = ray_cluster.Pool.run

    def watched(self, queue, job, more):
        def noted(item):
            sizes.append(len(pickle.dumps(job(item))))
            return job(item)

        for item, outcome in run(self, queue, noted, more):
            sizes.append(len(pickle.dumps(outcome)))
            yield item, outcome

    monkeypatch.setattr(ray_cluster.Pool, "run", watched)
    recipe = make_recipe(tmp_path / "in", "task_arithmetic", ["a"], {}, {"a": {"weight": 1.0}})
    rlmerge.merge_to_folder(recipe, tmp_path / "ray", executor="ray")
    assert len(sizes) >= 16
    assert max(sizes) < 4000
