"""The benchmark's data, recipes and floor are what its tables say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import agree
import floor
import models
import rlmerge
import rows
from contenders import METHODS, SPECTRAL, Place

TINY = models.SIZES["tiny"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, experts, Fishers and copies."""
    return models.ensure(tmp_path_factory.mktemp("data"), TINY, fishers=3, equal=1)


def test_shards_hold_the_same_bytes_as_one_file(data: Path, tmp_path: Path) -> None:
    models.ensure(tmp_path, replace(TINY, shards=3), fishers=0)
    for name in ("base", "expert2"):
        assert len(models.weights(tmp_path / name)) == 3
        whole, parts = agree.Tensors(data / name), agree.Tensors(tmp_path / name)
        assert whole.where.keys() == parts.where.keys()
        assert all(np.array_equal(whole.words(tensor), parts.words(tensor)) for tensor in whole.where)


def test_experts_change_thirteen_percent_and_copies_nothing(data: Path) -> None:
    base = agree.Tensors(data / "base")
    changed = {}
    for name in ("expert0", "expert1", "equal0"):
        other = agree.Tensors(data / name)
        changed[name] = sum(int((other.words(t) != base.words(t)).sum()) for t in base.where) / TINY.parameters()
    assert changed == {"expert0": pytest.approx(0.13, abs=0.01), "expert1": pytest.approx(0.13, abs=0.01), "equal0": 0}


@pytest.mark.parametrize("method", [*METHODS.values(), *SPECTRAL.values()], ids=lambda method: method.name)
def test_recipes_are_recipes(method: object, data: Path) -> None:
    made = METHODS.get(method.name) or SPECTRAL[method.name]  # type: ignore[attr-defined]
    recipe = rlmerge.parse_recipe(made.recipe("bfloat16", agree=True), folder=data)
    assert recipe.merge_method == (made.merge or made.name)
    assert [entry.model for entry in recipe.models] == list(made.inputs)


def test_floor_reads_fishers_where_they_are_used(data: Path, tmp_path: Path) -> None:
    place = Place(data, tmp_path, Path("rlmerge"))
    read = {name: [path.parent.name for path in place.inputs(METHODS[name])] for name in ("linear", "slerp", "sar")}
    assert read["linear"] == ["expert0", "expert1", "expert2"]
    assert read["slerp"] == ["base", "expert0"]
    assert read["sar"] == ["base", "expert0", "expert1", "expert2", "fisher0", "fisher1", "fisher2"]
    commands = place.commands(METHODS["sar"], place.write_recipe(METHODS["sar"], "bfloat16"))
    assert all(str(path) in commands["floor"] for path in place.inputs(METHODS["sar"]))


def test_floor_sees_every_byte_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(floor, "hasher", lambda: lambda piece: seen.append(len(piece)))
    read = models.weights(data / "base") + models.weights(data / "fisher0")
    floor.run(read, tmp_path / "out", 1_000_001, hash_too=True, chunk=1 << 16)
    assert sum(seen) == sum(path.stat().st_size for path in read) + 1_000_001
    assert (tmp_path / "out").stat().st_size == 1_000_001


def test_rows_ask_for_the_data_that_they_read() -> None:
    asked = [*rows.counts("135M", 3), *rows.nothing("0.5B", 3), *rows.against("methods", "0.5B", ("sar",), 3, True)]
    needs = rows.needs(asked)
    assert needs["135M"] == {"experts": 8, "fishers": 0, "equal": 0}
    assert needs["0.5B"] == {"experts": 3, "fishers": 3, "equal": 3}


def _written(model: Path, like: Path, change: dict[str, dict[int, float]]) -> Path:
    """A copy of a model, some values of which are others."""
    model.mkdir(parents=True)
    for path in models.weights(like):
        header, start = models.read_header(path)
        raw = bytearray(path.read_bytes())
        for name, values in change.items():
            begin = start + header[name]["data_offsets"][0]
            for index, value in values.items():
                word = np.array([value], np.float32).view(np.uint32) >> 16
                raw[begin + 2 * index : begin + 2 * index + 2] = word.astype(np.uint16).tobytes()
        (model / path.name).write_bytes(raw)
    return model


def test_ties_excuse_what_ties_and_nothing_else(data: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base = agree.Tensors(data / "base")[name]
    experts = [agree.Tensors(data / f"expert{i}")[name] for i in range(3)]
    free = agree.excuses(METHODS["ties"], base, experts)
    assert free is not None
    deltas = np.abs(experts[0] - base)
    threshold = np.sort(deltas)[-int(0.05 * base.size)]
    assert set(deltas[free & (deltas > 0)]) >= {threshold}
    inside, outside = int(np.flatnonzero(free)[0]), int(np.flatnonzero(~free)[0])
    excused = _written(tmp_path / "a", data / "base", {name: {inside: 1.5}})
    found = agree.compare(data / "base", excused, data, METHODS["ties"])
    assert (found["verdict"], found["tie_at_threshold"]) == ("but for ties", 1)
    wrong = _written(tmp_path / "b", data / "base", {name: {outside: 1.5}})
    assert agree.compare(data / "base", wrong, data, METHODS["ties"])["verdict"] == "differ"
    assert agree.compare(data / "base", wrong, data, METHODS["karcher"])["verdict"] == "known"
    assert agree.compare(data / "base", data / "base", data, METHODS["karcher"])["verdict"] == "agree"
    assert agree.compare_bf16(data / "base", wrong)["differ_share"] == pytest.approx(1 / TINY.parameters())


def test_drawn_updates_are_compared_by_their_size(data: Path) -> None:
    same = agree.compare_drawn(data / "expert0", data / "expert1", data)
    assert same["verdict"] == "as likely"
    with np.errstate(invalid="ignore", divide="ignore"):
        assert agree.compare_drawn(data / "base", data / "expert1", data)["verdict"] == "differ"
