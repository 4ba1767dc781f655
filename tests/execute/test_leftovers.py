"""A kill in the last moments of a merge: the next command that has to do with OUT puts everything right."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from tests.execute.test_resume import Stop, digest, finish
from tests.execute.test_same_bytes import contents, recipe_of
from tests.methods.small_models import refusal, sparse_model, write_all

import rlmerge
from rlmerge.errors import OutputError
from rlmerge.execute.leftovers import is_journal, standing_output, tidy

AFTER = {".replaced", "journal.jsonl", "lock"}


@pytest.fixture
def recipe(tmp_path):
    base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
    write_all(tmp_path / "in", base, experts, dtype="BF16")
    return recipe_of(tmp_path / "in", "ram", {})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def stopped(monkeypatch, moment, recipe, out, **options):
    """A merge that is killed between its two renames, or after them."""
    with monkeypatch.context() as patch:
        if moment == "between":
            original = Path.rename

            def rename(self, target):
                if self.name.endswith(".unfinished"):
                    raise Stop
                return original(self, target)

            patch.setattr(Path, "rename", rename)
        else:

            def stop(*arguments):
                raise Stop

            patch.setattr("rlmerge.execute.folder.remove_leftovers", stop)
        with pytest.raises(Stop):
            finish(recipe, out, **options)


def neighbours(out):
    return sorted(path.name for path in out.parent.iterdir())


def test_between_the_renames_verify_restores_the_earlier_output(recipe, out, monkeypatch):
    earlier = contents(finish(recipe, out).out, but=())
    other = recipe.with_settings({"epsilon": 0.1})
    stopped(monkeypatch, "between", other, out, overwrite=True)
    assert not out.exists()
    assert rlmerge.verify(out)["tensors"] == 4
    assert contents(out, but=()) == earlier
    finish(other, out, overwrite=True)
    assert neighbours(out) == ["in", "out"]
    assert not AFTER & set(os.listdir(out))


@pytest.mark.parametrize("overwrite", [False, True])
def test_between_the_renames_the_next_merge_restores_or_replaces(recipe, out, monkeypatch, overwrite):
    earlier = contents(finish(recipe, out).out, but=())
    other = recipe.with_settings({"epsilon": 0.1})
    stopped(monkeypatch, "between", other, out, overwrite=True)
    third = recipe.with_settings({"epsilon": 0.2})  # not the merge that was stopped
    said = refusal(lambda: finish(third, out, overwrite=overwrite))
    if overwrite:
        assert said is None
        assert contents(out) == contents(finish(third, out.with_name("whole")).out)
        assert neighbours(out) == ["in", "out", "whole"]
    else:
        assert said is not None
        assert "--overwrite" in said
        assert contents(out, but=()) == earlier


def test_the_same_command_finishes_without_merging_again(recipe, out, monkeypatch):
    finish(recipe, out)
    other = recipe.with_settings({"epsilon": 0.1})
    stopped(monkeypatch, "between", other, out, overwrite=True)
    outcome = finish(other, out, overwrite=True)
    assert outcome.resumed_units == outcome.total_units
    assert contents(out) == contents(finish(other, out.with_name("whole")).out)


@pytest.mark.parametrize("moment", ["between", "after"])
def test_a_check_touches_nothing_and_knows_what_a_merge_would_say(recipe, out, monkeypatch, moment):
    finish(recipe, out)
    stopped(monkeypatch, moment, recipe, out, overwrite=True)
    before = digest(out.parent)
    with pytest.raises(OutputError, match="--overwrite"):
        rlmerge.check(recipe, out=out)
    rlmerge.check(recipe, out=out, overwrite=True)
    assert digest(out.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("next_command", ["verify", "merge", "overwrite"])
def test_after_the_renames_what_is_left_over_goes(recipe, out, monkeypatch, overwrite, next_command):
    if overwrite:
        finish(recipe.with_settings({"epsilon": 0.1}), out)
    stopped(monkeypatch, "after", recipe, out, overwrite=overwrite)
    assert set(os.listdir(out)) & AFTER == (AFTER if overwrite else AFTER - {".replaced"})
    if next_command == "verify":
        rlmerge.verify(out)
    elif next_command == "merge":
        assert "--overwrite" in (refusal(lambda: finish(recipe, out)) or "")
    else:
        finish(recipe, out, overwrite=True)
    assert not AFTER & set(os.listdir(out))
    assert neighbours(out) == ["in", "out"]
    assert contents(out) == contents(finish(recipe, out.with_name("whole")).out)


def test_a_sweep_is_tidied_too(recipe, out, monkeypatch):
    sweep = [{"epsilon": 0.1}, {"epsilon": 0.2}]
    finish(recipe, out, sweep=sweep)
    stopped(monkeypatch, "after", recipe, out, sweep=sweep, overwrite=True)
    tidy(out)
    assert sorted(os.listdir(out)) == ["epsilon=0.1", "epsilon=0.2"]


@pytest.mark.parametrize("moment", ["between", "after"])
def test_a_merge_that_is_still_running_is_left_alone(recipe, out, monkeypatch, moment):
    finish(recipe, out)
    stopped(monkeypatch, moment, recipe, out, overwrite=True)
    folder = out if moment == "after" else out.with_name("out.unfinished")
    before = digest(out.parent)
    with (folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="another rlmerge"):
                finish(recipe, out, overwrite=overwrite)
        if moment == "after":
            rlmerge.verify(out)
        assert digest(out.parent) == before


@pytest.mark.parametrize("name", ["lock", "journal.jsonl"])
def test_files_of_somebody_else_are_not_leftovers(recipe, out, name):
    finish(recipe, out)
    (out / name).write_text("mine")
    rlmerge.verify(out)
    assert (out / name).read_text() == "mine"


def test_an_output_that_appeared_meanwhile_is_not_hidden_by_the_one_set_aside(recipe, out, monkeypatch):
    finish(recipe, out)
    stopped(monkeypatch, "between", recipe, out, overwrite=True)
    out.mkdir()
    assert standing_output(out) != out
    (out / "thesis.tex").write_text("x")
    assert standing_output(out) == out
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        finish(recipe, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("text", "ours"),
    [(b"", True), (b"{", True), (b'{"plan": "ab', True), (b"[1]", False), (b'{"plan": 1}', False), (b"\0" * 20, False)],
)
def test_what_is_a_journal(tmp_path, text, ours):
    (tmp_path / "journal.jsonl").write_bytes(text)
    assert is_journal(tmp_path / "journal.jsonl") == ours
    (tmp_path / "link").symlink_to(tmp_path / "journal.jsonl")
    assert not is_journal(tmp_path / "link")
    assert not is_journal(tmp_path / "absent")
    assert not is_journal(tmp_path)
