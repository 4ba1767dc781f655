"""Sums that fisher.json records: they save a pass over the Fishers, change no bit, and are not believed blindly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from tests.checkpoint.checkpoint_files import write_tensors
from tests.methods.small_models import (
    make_recipe,
    read_words,
    refusal,
    small_blocks,
    some_fishers,
    sparse_model,
    write_all,
)

import rlmerge
from rlmerge.execute.work import Worker


def record(folder: Path, fishers, change: float = 1.0, digests: bool = False) -> None:
    """fisher.json beside each Fisher, with exact sums times `change`, and the digests of its tensors or none."""
    for key, tensors in fishers.items():
        sums = {name: {"sum": float(f.sum(dtype=np.float64)) * change, "count": f.size} for name, f in tensors.items()}
        if digests:
            for name, f in tensors.items():
                sums[name]["xxh3_128"] = xxhash.xxh3_128_hexdigest(f.astype(np.float32).tobytes())
        (folder / f"fisher_{key}" / "fisher.json").write_text(json.dumps({"tensors": sums}))


@pytest.fixture
def recipe(tmp_path: Path):
    rng = np.random.default_rng(4)
    base, experts = sparse_model(rng, 3)
    # sums of few bits are exact in any order
    fishers = {k: {n: np.round(f * 64) / 64 for n, f in t.items()} for k, t in some_fishers(rng, list(experts)).items()}
    write_all(tmp_path, base, experts, fishers)
    return make_recipe(tmp_path, "sar", list(experts), {"density": 0.6}, {}, True), fishers


def measured(monkeypatch) -> list[str]:
    """The names of the stages that are measured from now on."""
    seen: list[str] = []
    plain = Worker.measure

    def spy(self, wanted, *rest):
        seen.extend(stage.name for _, stage, _ in wanted)
        return plain(self, wanted, *rest)

    monkeypatch.setattr(Worker, "measure", spy)
    return seen


@pytest.mark.parametrize(("digests", "unit"), [(False, 32), (True, 32), (True, 1 << 20)])
def test_recorded_sums_save_a_pass_and_change_no_bit(tmp_path, recipe, monkeypatch, digests, unit) -> None:
    merge, fishers = recipe
    seen = measured(monkeypatch)
    with small_blocks(16, unit):
        rlmerge.merge_to_folder(merge, tmp_path / "without", threads=2)
        assert "fisher_mean" in seen
        seen.clear()
        record(tmp_path, fishers, digests=digests)
        outcome = rlmerge.merge_to_folder(merge, tmp_path / "with", threads=2)
    assert seen
    assert "fisher_mean" not in seen
    one, other = (read_words(tmp_path / name) for name in ("without", "with"))
    assert all(one[name][1].tobytes() == other[name][1].tobytes() for name in one)
    expected = {key: sum(f.sum() for f in t.values()) / sum(f.size for f in t.values()) for key, t in fishers.items()}
    assert outcome.report["total"]["fisher_mean"] == pytest.approx(expected)


def test_one_fisher_without_sums_is_measured_for_all(tmp_path, recipe, monkeypatch) -> None:
    merge, fishers = recipe
    record(tmp_path, fishers)
    (tmp_path / f"fisher_{next(iter(fishers))}" / "fisher.json").unlink()
    seen = measured(monkeypatch)
    dict(rlmerge.merge(merge))
    assert "fisher_mean" in seen


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_sums_of_other_values_are_found_out(tmp_path, recipe, kernels) -> None:
    merge, fishers = recipe
    record(tmp_path, fishers, change=1.01)
    message = refusal(lambda: rlmerge.merge_to_folder(merge, tmp_path / "out", kernels=kernels))
    assert message is not None
    assert "fisher.json beside it says" in message
    assert not (tmp_path / "out").exists()
    # nor does the same command deliver it when it continues
    assert "fisher.json" in str(refusal(lambda: rlmerge.merge_to_folder(merge, tmp_path / "out", kernels=kernels)))
    # who hands out tensors one by one believes nothing
    values = dict(rlmerge.merge(merge))
    for file in tmp_path.glob("fisher_*/fisher.json"):
        file.unlink()
    assert all((values[name] == value).all() for name, value in rlmerge.merge(merge))


@pytest.mark.parametrize(("value", "word"), [(-1.0, "mean of squares"), (np.nan, "nan"), (np.inf, "inf")])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("digests", [True, False])
def test_bad_entries_are_found_although_no_pass_looks_for_them(
    tmp_path, recipe, value, word, sampled, digests, monkeypatch
):
    merge, fishers = recipe
    record(tmp_path, fishers, digests=digests)
    if not sampled:
        monkeypatch.setattr("rlmerge.api.take_sample", lambda *_: {})
        monkeypatch.setattr("rlmerge.api.alarms", lambda *_: [])
    file = tmp_path / f"fisher_{next(iter(fishers))}" / "fisher.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-8:-4] = np.float32(value).tobytes()
    file.write_bytes(raw)
    message = refusal(lambda: rlmerge.merge_to_folder(merge, tmp_path / "out"))
    assert message is not None
    # where nobody asks for the entry, the digest finds it
    assert word in message or "negative" in message or (digests and "the bytes of tensor" in message)


def test_a_digest_of_bad_values_does_not_make_them_good(tmp_path, recipe, monkeypatch) -> None:
    """Every entry is negative and recorded as such: found where conflicts ask for it."""
    merge, fishers = recipe
    bad = {key: {name: -f - 1 for name, f in tensors.items()} for key, tensors in fishers.items()}
    for key, tensors in bad.items():
        write_tensors(tmp_path / f"fisher_{key}" / "fisher.safetensors", tensors, "F32")
    record(tmp_path, bad, change=-1.0, digests=True)
    monkeypatch.setattr("rlmerge.api.take_sample", lambda *_: {})
    monkeypatch.setattr("rlmerge.api.alarms", lambda *_: [])
    assert "mean of squares" in str(refusal(lambda: rlmerge.merge_to_folder(merge, tmp_path / "out")))


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
@pytest.mark.parametrize("sparsify", ["magnitude", "fisher_magnitude"])
@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_bad_entries_behind_a_block_that_nobody_reads(tmp_path, kernels, sparsify, value, monkeypatch) -> None:
    """Nothing changes in the first blocks, so the Fisher is first read in the middle: looked at there all the same."""
    monkeypatch.setattr("rlmerge.api.take_sample", lambda *_: {})
    monkeypatch.setattr("rlmerge.api.alarms", lambda *_: [])
    rng = np.random.default_rng(0)
    base, experts = {"a.weight": rng.standard_normal((64, 64)).astype(np.float32)}, {}
    for k in range(2):
        changed = np.where(rng.random((64, 64)) < 0.5, base["a.weight"] + 1, base["a.weight"])
        changed[:8] = base["a.weight"][:8]
        experts[f"e{k}"] = {"a.weight": changed}
    fishers = {key: {"a.weight": rng.random((64, 64)).astype(np.float32)} for key in experts}
    record_of = {key: {"a.weight": f["a.weight"].copy()} for key, f in fishers.items()}
    for tensors in fishers.values():
        tensors["a.weight"][20:30] = value
    write_all(tmp_path, base, experts, fishers)
    record(tmp_path, record_of)
    recipe = make_recipe(tmp_path, "sar", list(experts), {"sparsify": sparsify, "density": 0.5}, {}, True)
    with small_blocks(64, 4096):
        message = refusal(lambda: rlmerge.merge_to_folder(recipe, tmp_path / "out", threads=1, kernels=kernels))
    assert message is not None
    assert "mean of squares" in message or "nan" in message


def test_a_sum_of_an_excluded_tensor_is_measured(tmp_path, recipe) -> None:
    """It counts in the mean, and the merge would not read it otherwise: a wrong one changes nothing."""
    _, fishers = recipe
    keys = list(fishers)
    merge = make_recipe(tmp_path, "sar", keys, {"density": 0.6}, {}, True, exclude=["c.weight"])
    rlmerge.merge_to_folder(merge, tmp_path / "without")
    record(tmp_path, fishers)
    file = tmp_path / f"fisher_{keys[0]}" / "fisher.json"
    entries = json.loads(file.read_text())
    entries["tensors"]["c.weight"]["sum"] *= 1000
    file.write_text(json.dumps(entries))
    rlmerge.merge_to_folder(merge, tmp_path / "with")
    one, other = (read_words(tmp_path / name) for name in ("without", "with"))
    assert all(one[name][1].tobytes() == other[name][1].tobytes() for name in one)
