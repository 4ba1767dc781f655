"""Inputs that cannot be read, that change, shrink or vanish under the run: refused, with the name of the file."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.checkpoint_files import write_tensors
from tests.cli.command_line import good_set, weights
from tests.execute.test_same_bytes import contents
from tests.faults.injection import READS, failing_disk
from tests.faults.test_write_faults import HOW, STAGES, Operation, places

import rlmerge
from rlmerge.errors import CheckpointError, FisherError, OutputError, RecipeError, RlmergeError
from rlmerge.execute.work import Worker

LISTED = ("stat", "lstat", "fstat")
"""Questions that Python itself takes for answered by 'there is no such file' may also fail unseen."""
OPERATIONS: dict[str, Operation] = {
    "merge": lambda home, out: rlmerge.merge_to_folder(home / "recipe.yml", out, **HOW),
    "merge --sha256": lambda home, out: rlmerge.merge_to_folder(home / "recipe.yml", out, sha256=True, **HOW),
    "merge of a pack": lambda home, out: rlmerge.merge_to_folder(home / "pack.yml", out, **HOW),
    "merge of vocabularies": lambda home, out: rlmerge.merge_to_folder(home / "union.yml", out, **HOW),
    "check": lambda home, out: rlmerge.check(home / "recipe.yml", out=out),
    "pack": lambda home, out: rlmerge.pack(home / "e0", home / "base", out, **HOW),
    "unpack": lambda home, out: rlmerge.unpack(home / "p0", out, **HOW),
    "verify": lambda home, out: rlmerge.verify(home / "merged"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("in")
    good_set(home)
    (home / "stages.yml").write_text(STAGES)
    ties = (home / "ties.yml").read_text()
    rlmerge.pack(home / "e0", home / "base", home / "p0", **HOW)
    (home / "pack.yml").write_text(ties.replace("e0", "p0"))
    (home / "union.yml").write_text(f"{ties}tokenizer: {{source: union}}\nchat_template: auto\n")
    (home / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    rlmerge.merge_to_folder(home / "ties.yml", home / "merged", **HOW)
    return home


@pytest.mark.parametrize("name", OPERATIONS)
def test_at_every_read(home, tmp_path, name, request):
    """EIO from each read in turn: an error that names the file, or one of the files that could not be told apart."""
    thorough = "long" in (request.config.option.markexpr or "")
    kinds = READS if thorough else tuple(kind for kind in READS if kind not in LISTED)
    with failing_disk([home], kinds) as counted:
        OPERATIONS[name](home, tmp_path / "whole")
    want = contents(tmp_path / "whole")
    chosen = set(places(counted, False))  # of the thousands of questions for a status, one of each kind on each name
    if thorough:
        chosen |= {call for call in places(counted, True) if counted.calls[call][0] not in LISTED}
    for call in sorted(chosen):
        out = tmp_path / f"call-{call}"
        error: RlmergeError | None = None
        with failing_disk([home], kinds, errno.EIO, call) as found:
            try:
                OPERATIONS[name](home, out)
            except RlmergeError as raised:
                error = raised
        kind, path = found.calls[call]
        if error is None:
            assert kind in LISTED, f"{kind} of {path} failed, and nobody was told"
            assert contents(out) == want, (kind, path)
            continue
        told = (CheckpointError, FisherError, RecipeError, *([OutputError] if name == "verify" else []))
        assert isinstance(error, told), (kind, path)
        assert kind in LISTED or Path(path).name in str(error), (kind, path, str(error))


# -- what happens to an input while it is read --------------------------------------------------------------------


def other_bytes(file: Path) -> None:
    """As many bytes, but others, and a time that tells."""
    with file.open("r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write(bytes(8))
    os.utime(file, ns=(0, 1))


def replaced(file: Path) -> None:
    copy = file.with_name("copy.tmp")
    shutil.copy(file, copy)
    other_bytes(copy)
    copy.rename(file)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "other bytes": other_bytes,
    "another time": lambda file: os.utime(file, ns=(0, 1)),
    "replaced": replaced,
    "cut": lambda file: os.truncate(file, file.stat().st_size - 300),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "gone": lambda file: file.unlink(),
}


@pytest.fixture
def fresh(tmp_path) -> Path:
    good_set(tmp_path / "in")
    (tmp_path / "in" / "stages.yml").write_text(STAGES)
    return tmp_path / "in"


def change_before(monkeypatch, units: int, change: Callable[[], Any]) -> None:
    """Changes an input when so many units are merged."""
    merge, left = Worker.merge, [units]

    def changing(self, *arguments):
        left[0] -= 1
        if left[0] == -1:
            change()
        return merge(self, *arguments)

    monkeypatch.setattr(Worker, "merge", changing)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["e0/model.safetensors", "base/model-00002-of-00002.safetensors",
                                  "f1/fisher.safetensors"])  # fmt: skip
@pytest.mark.parametrize("units", [0, 5])
def test_a_file_changes_while_it_is_merged(fresh, tmp_path, monkeypatch, change, name, units):
    """Refused by this run, and by the one that would continue it; --overwrite merges what is there now."""
    with monkeypatch.context() as patch:
        change_before(patch, units, lambda: CHANGES[change](fresh / name))
        with pytest.raises((CheckpointError, FisherError), match=Path(name).name):
            rlmerge.merge_to_folder(fresh / "recipe.yml", tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()
    if change in ("other bytes", "another time", "replaced"):
        with pytest.raises(OutputError, match="were changed since this merge was begun"):
            rlmerge.merge_to_folder(fresh / "recipe.yml", tmp_path / "out", **HOW)
        rlmerge.merge_to_folder(fresh / "recipe.yml", tmp_path / "out", overwrite=True, **HOW)
        rlmerge.merge_to_folder(fresh / "recipe.yml", tmp_path / "again", **HOW)
        assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize("change", ["other bytes", "replaced", "cut", "gone"])
def test_a_file_changes_between_plan_and_merge(fresh, tmp_path, monkeypatch, change):
    """After the headers were read, before the first weight is: refused, unless all that is merged was read after."""
    file = fresh / "e1" / "model.safetensors"
    plan = rlmerge.api.make_plan

    def planned(*arguments):
        found = plan(*arguments)
        if change == "replaced":  # by a model of the same size, with its tensors in another order
            values = weights(2)
            write_tensors(file, dict(reversed(values.items())), "BF16", {"format": "pt"})
        else:
            CHANGES[change](file)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(rlmerge.api, "make_plan", planned)
        if change == "other bytes":  # nothing of it was read yet
            rlmerge.merge_to_folder(fresh / "ties.yml", tmp_path / "out", **HOW)
            return
        with pytest.raises(CheckpointError, match=r"e1/model\.safetensors"):
            rlmerge.merge_to_folder(fresh / "ties.yml", tmp_path / "out", **HOW)
    assert not (tmp_path / "out").exists()


def test_a_file_changes_between_two_stages(fresh, tmp_path, monkeypatch):
    """The first stage is made of what was there; a changed input of it is seen by the next command."""
    from rlmerge.execute.stage_folder import StageFolder

    done = StageFolder.done

    def then_change(self, name, plan):
        done(self, name, plan)
        other_bytes(fresh / "e1" / "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(StageFolder, "done", then_change)
        rlmerge.merge_to_folder(fresh / "stages.yml", tmp_path / "out", stages=tmp_path / "stages", **HOW)
    before = (tmp_path / "stages" / "one" / "model.safetensors").stat().st_mtime_ns
    other_bytes(fresh / "e0" / "model.safetensors")
    rlmerge.merge_to_folder(
        fresh / "stages.yml", tmp_path / "out", stages=tmp_path / "stages", overwrite=True, **HOW)  # fmt: skip
    assert (tmp_path / "stages" / "one" / "model.safetensors").stat().st_mtime_ns > before
    rlmerge.merge_to_folder(fresh / "stages.yml", tmp_path / "again", **HOW)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_file_changes_while_tensors_are_handed_out(fresh):
    tensors = rlmerge.merge(fresh / "ties.yml", threads=1, kernels="numpy")
    next(tensors)
    other_bytes(fresh / "e0" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"e0/model\.safetensors: was changed"):
        list(tensors)


@pytest.mark.parametrize("model", ["e0", "base"])
def test_a_file_changes_while_it_is_packed(fresh, tmp_path, model):
    def progress(step):
        if step.done == step.total:
            for file in (fresh / model).glob("*.safetensors"):
                other_bytes(file)

    with pytest.raises(CheckpointError, match=rf"{model}/model.*: was changed"):
        rlmerge.pack(fresh / "e0", fresh / "base", tmp_path / "pack", progress=progress, **HOW)
    assert not list(tmp_path.glob("pack*"))


def test_the_base_of_a_pack_changes_while_it_is_unpacked(fresh, tmp_path):
    rlmerge.pack(fresh / "e0", fresh / "base", tmp_path / "pack", **HOW)

    def progress(step):
        if step.done < 600:
            other_bytes(next((fresh / "base").glob("*2.safetensors")))

    with pytest.raises(RlmergeError, match="base"):
        rlmerge.unpack(tmp_path / "pack", tmp_path / "back", progress=progress, **HOW)
    assert not list(tmp_path.glob("back*"))
