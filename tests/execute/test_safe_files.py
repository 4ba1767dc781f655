"""Whatever somebody put into OUT.unfinished: nothing outside of it is written, and it is said what is in the way."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from tests.execute.test_resume import digest, finish, interrupted
from tests.execute.test_same_bytes import contents, recipe_of
from tests.methods.small_models import sparse_model, write_all

from rlmerge.errors import OutputError
from rlmerge.execute.safe_files import open_inside, write_inside


@pytest.fixture
def recipe(tmp_path):
    base, experts = sparse_model(np.random.default_rng(0), 3, "BF16")
    write_all(tmp_path / "in", base, experts, dtype="BF16")
    (tmp_path / "in" / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "base" / "additional_chat_templates" / "a.jinja").write_text("hello")
    return recipe_of(tmp_path / "in", "ram", {})


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_bytes(b"precious" * 100)
    (tmp_path / "victim" / "empty").write_bytes(b"")
    return tmp_path / "victim"


def put_in_the_way(kind, path, victim):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(victim / "file")
    elif kind == "hard link":
        os.link(victim / "file", path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim, target_is_directory=True)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
@pytest.mark.parametrize("name", ["model.safetensors", "README.md.part", "rlmerge.json.part", "run.log.part", "lock"])
def test_files_in_the_way(recipe, tmp_path, victim, monkeypatch, kind, name):
    unfinished = interrupted(monkeypatch, recipe, tmp_path / "out")
    put_in_the_way(kind, unfinished / name, victim)
    before = digest(victim)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=name):
            finish(recipe, tmp_path / "out", overwrite=overwrite)
    assert digest(victim) == before
    assert not (tmp_path / "out").exists()
    (unfinished / name).unlink()
    assert contents(finish(recipe, tmp_path / "out").out) == contents(finish(recipe, tmp_path / "whole").out)


def test_folders_in_the_way(recipe, tmp_path, victim, monkeypatch):
    unfinished = interrupted(monkeypatch, recipe, tmp_path / "out")
    put_in_the_way("folder", unfinished / "additional_chat_templates", victim)
    before = digest(victim)
    with pytest.raises(OutputError, match="additional_chat_templates"):
        finish(recipe, tmp_path / "out")
    assert digest(victim) == before


def test_points_of_a_sweep_in_the_way(recipe, tmp_path, victim, monkeypatch):
    sweep = [{"epsilon": 0.1}, {"epsilon": 0.2}]
    unfinished = interrupted(monkeypatch, recipe, tmp_path / "out", sweep=sweep)
    put_in_the_way("folder", unfinished / "epsilon=0.1", victim)
    before = digest(victim)
    with pytest.raises(OutputError, match=r"epsilon=0\.1"):
        finish(recipe, tmp_path / "out", sweep=sweep)
    assert digest(victim) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("text", ["my diary\n", '{"date": "1 May"}\n', "link"])
def test_a_journal_of_somebody_else_is_not_written_over(recipe, tmp_path, victim, overwrite, text):
    journal = tmp_path / "out.unfinished" / "journal.jsonl"
    journal.parent.mkdir()
    if text == "link":
        journal.symlink_to(victim / "file")
    else:
        journal.write_text(text)
    before = digest(tmp_path)
    with pytest.raises(OutputError, match=r"out\.unfinished.* Move it away"):
        finish(recipe, tmp_path / "out", overwrite=overwrite)
    assert digest(tmp_path) == before


def test_what_is_written_is_whole_and_where_it_belongs(tmp_path):
    write_inside(tmp_path, "a/b/c.txt", b"1")
    write_inside(tmp_path, "a/b/c.txt", b"22")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"22"
    assert os.listdir(tmp_path / "a" / "b") == ["c.txt"]
    handle = open_inside(tmp_path, "a/b/c.txt", os.O_RDWR)
    assert os.read(handle, 9) == b"22"
    os.close(handle)
