"""What an output folder may never do: touch inputs or strangers' files, appear half, fill a disk and die speechless."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from tests.execute.test_resume import digest, interrupted
from tests.execute.test_same_bytes import contents, recipe_of
from tests.methods.small_models import make_recipe, refusal, small_shards, sparse_model, write_all

import rlmerge
from rlmerge.errors import OutputError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def models(tmp_path):
    base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
    write_all(tmp_path / "in", base, experts, dtype="BF16")
    return tmp_path / "in"


@pytest.fixture
def recipe(models):
    return recipe_of(models, "ram", {})


def merge(recipe, out, **options):
    return rlmerge.merge_to_folder(recipe, out, kernels="numpy", **options)


@pytest.mark.parametrize("place", ["base", "base/out", "e1", "e1/deeper/out", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_never_into_or_over_an_input(models, recipe, place, overwrite):
    before = digest(models)
    with pytest.raises(OutputError, match="input folder"):
        merge(recipe, models / place, overwrite=overwrite)
    assert digest(models) == before
    assert not list(models.parent.rglob("*.unfinished"))


@pytest.mark.parametrize("place", ["link", "link/out", "through/out"])
def test_never_into_an_input_by_a_symbolic_link(models, recipe, tmp_path, place):
    (tmp_path / "link").symlink_to(models / "base")
    (tmp_path / "through").symlink_to(models / "e1", target_is_directory=True)
    before = digest(models)
    with pytest.raises(OutputError, match="input folder"):
        merge(recipe, tmp_path / place, overwrite=True)
    assert digest(models) == before


def test_never_into_an_input_whose_files_are_links(models, recipe):
    """As the hub's cache keeps snapshots: the folder holds links to files that lie elsewhere."""
    blobs = models / "blobs"
    blobs.mkdir()
    file = models / "base" / "model.safetensors"
    file.rename(blobs / "abc")
    file.symlink_to(blobs / "abc")
    for place in (models / "base" / "out", blobs / "out"):
        with pytest.raises(OutputError, match="input folder"):
            merge(recipe, place)


@pytest.mark.parametrize("name", ["out.old", "out.unfinished", "out.part", "out.tmp"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_neighbours_are_left_alone(recipe, tmp_path, name, overwrite):
    """Folders of somebody else next to OUT, whatever they are called."""
    if overwrite:
        merge(recipe, tmp_path / "out")
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("mine")
    said = refusal(lambda: merge(recipe, tmp_path / "out", overwrite=overwrite))
    assert said is None or name in said
    assert (tmp_path / name / "precious").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs_may_be_called_like_a_neighbour(models, tmp_path, overwrite):
    """An input called OUT.old is an input."""
    (models / "base").rename(models / "m.old")
    recipe = make_recipe(models, "ram", ["e0", "e1"], base="m.old")
    before = digest(models / "m.old")
    for _ in range(2 if overwrite else 1):
        said = refusal(lambda: merge(recipe, models / "m", overwrite=overwrite))
        assert said is None or "m.old" in said
    assert (models / "m.old").is_dir()
    assert digest(models / "m.old") == before


def test_an_existing_output_is_not_replaced_unasked(recipe, tmp_path):
    first = contents(merge(recipe, tmp_path / "out").out, but=())
    with pytest.raises(OutputError, match="--overwrite"):
        merge(recipe.with_settings({"epsilon": 0.1}), tmp_path / "out")
    assert contents(tmp_path / "out", but=()) == first


def test_overwrite_replaces_an_earlier_output_whole(recipe, tmp_path):
    with small_shards(100):
        out = merge(recipe, tmp_path / "out").out
    assert len(list(out.glob("*.safetensors"))) > 1
    (out / "leftover").write_text("x")
    with pytest.raises(OutputError, match="leftover"):
        merge(recipe, tmp_path / "out", overwrite=True)
    (out / "leftover").unlink()
    merge(recipe, tmp_path / "out", overwrite=True)
    assert contents(out) == contents(merge(recipe, tmp_path / "other").out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other", "out"]


def test_overwrite_replaces_a_sweep_and_nothing_else(recipe, tmp_path):
    merge(recipe, tmp_path / "out", sweep=[{"epsilon": 0.1}, {"epsilon": 0.2}])
    merge(recipe, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(OutputError, match="rlmerge did not write"):
        merge(recipe, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


def test_the_old_output_stays_until_the_new_one_is_whole(recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "out")
    first = contents(tmp_path / "out", but=())
    interrupted(monkeypatch, recipe.with_settings({"epsilon": 0.1}), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out", but=()) == first


def test_a_file_in_the_way(recipe, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="is a file"):
        merge(recipe, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "a file"


def test_an_empty_folder_is_taken(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    assert contents(merge(recipe, tmp_path / "out").out)


def test_a_link_to_an_empty_folder_is_taken_or_refused_at_once(recipe, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    try:
        merge(recipe, tmp_path / "out")
    except OutputError:
        assert not (tmp_path / "out.unfinished").exists()
    else:
        assert (tmp_path / "out" / "rlmerge.json").exists()


def test_overwrite_through_a_link_replaces_or_refuses(recipe, tmp_path):
    merge(recipe, tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    try:
        merge(recipe.with_settings({"epsilon": 0.1}), tmp_path / "out", overwrite=True)
    except OutputError:
        assert not (tmp_path / "out.unfinished").exists()
    else:
        assert (tmp_path / "out" / "rlmerge.json").exists()
        assert not (tmp_path / "out.old").exists()


def test_folders_on_the_way_are_made(recipe, tmp_path):
    assert contents(merge(recipe, tmp_path / "a" / "b" / "out").out)


def test_a_second_process_is_refused(models, recipe, tmp_path):
    """While another process holds OUT; afterwards it goes on."""
    (models / "recipe.yml").write_text(recipe.to_yaml())
    program = (
        "import sys, time, rlmerge\n"
        "from rlmerge.execute.work import Worker\n"
        "def wait(*arguments): print('ready', flush=True); time.sleep(60)\n"
        "Worker.merge = wait\n"
        f"recipe, out = {str(models / 'recipe.yml')!r}, {str(tmp_path / 'out')!r}\n"
        "rlmerge.merge_to_folder(recipe, out, kernels='numpy', threads=1)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="another rlmerge"):
                merge(rlmerge.load_recipe(models / "recipe.yml"), tmp_path / "out", overwrite=overwrite)
    finally:
        other.kill()
        other.communicate()
    assert contents(merge(rlmerge.load_recipe(models / "recipe.yml"), tmp_path / "out").out)


def test_a_full_disk_is_known_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 100))
    with pytest.raises(OutputError, match=r"needs [0-9.]+ k?B more, and 100 B are free"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors.part"))
    monkeypatch.undo()
    assert contents(merge(recipe, tmp_path / "out").out)  # the same command, when there is room


@pytest.mark.parametrize("call", ["pwrite", "write"])
def test_a_disk_that_fills_up_later_is_one_message(recipe, tmp_path, monkeypatch, call):
    """Weights (pwrite) or journal (write): OutputError, and the same command continues."""
    original = getattr(os, call)
    left = [3]

    def full(handle, *arguments):
        left[0] -= 1
        if left[0] < 0 and handle > 2:
            raise OSError(28, "No space left on device")
        return original(handle, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match="No space left"):
            merge(recipe, tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()
    assert contents(merge(recipe, tmp_path / "out").out)


def test_a_disk_that_is_full_for_the_small_files_is_one_message(recipe, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)  # the last step of each small file
        with pytest.raises(OutputError, match="No space left"):
            merge(recipe, tmp_path / "out")
    assert contents(merge(recipe, tmp_path / "out").out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(recipe, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be"):
        merge(recipe, tmp_path / "closed" / "out")


def test_somebody_elses_unfinished_folder(recipe, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not an unfinished merge"):
            merge(recipe, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.unfinished" / "thesis.tex").exists()


def test_a_failed_merge_leaves_no_output(models, tmp_path):
    """fp16 overflow: an error that names the tensor; no OUT."""
    write_all(models, {"w": np.full((2, 2), 60000, np.float32)}, {"e0": {"w": np.full((2, 2), 65000, np.float32)}})
    recipe = make_recipe(models, "task_arithmetic", ["e0"], {"lambda": 5}, {"e0": {"weight": 1}}, dtype="float16")
    with pytest.raises(rlmerge.RlmergeError, match=r"'w' holds inf at coordinate 0 .*F16") as caught:
        merge(recipe, tmp_path / "out")
    assert "out_dtype: float32" in str(caught.value)
    assert not (tmp_path / "out").exists()
