"""The null model shows no effect where there is none, at any density; and it loses what was planted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tests.geometry.geometry_models import NAMES, document, nearest, write

from rlmerge.geometry import null

SHAPE = (1024, 640)
SIZE = SHAPE[0] * SHAPE[1]
DENSITIES = {0.28: 2.57e-5, 0.46: 4.88e-5, 0.93: 5.06e-4}
"""Share of changed weights, and the noise that makes it on weights of N(0, 0.02) in bf16."""


def noisy(folder: Any, density: float, dtype: str = "BF16") -> Any:
    """A base and two experts that are the base and independent noise, measured."""
    rng = np.random.default_rng(7)
    base = {NAMES[1]: nearest(0.02 * rng.standard_normal(SHAPE), dtype)}
    # fp16 has eight times as many steps
    size = DENSITIES[density] / (8 if dtype == "F16" else 1)
    experts = {
        key: {NAMES[1]: nearest(base[NAMES[1]] + size * rng.standard_normal(SHAPE), dtype)} for key in ("a", "b")
    }
    folders = write(folder, base, experts, dict.fromkeys(("base", "a", "b"), dtype))
    return document(folders, storage=False, kernels="numba")["coordinates"]["total"]


@pytest.mark.parametrize("density", DENSITIES)
def test_no_effect_on_structureless_noise(tmp_path, monkeypatch, density):
    """Observed less null is zero within five standard errors of both; the support is the same to the last count."""
    monkeypatch.setattr(null, "LEAST", SIZE)
    total = noisy(tmp_path, density)
    random = total["null"]
    for key, expert in total["experts"].items():
        assert expert["support"] == pytest.approx(density, abs=0.01)
        assert random["experts"][key]["support"] == expert["support"]
        assert random["experts"][key]["norm"] == pytest.approx(expert["norm"], rel=1e-3)
    [ours], [chance] = total["pairs"], random["pairs"]
    both, union = ours["overlap"] * SIZE, ours["union"] * SIZE
    errors = {
        "overlap": math.sqrt(ours["overlap"] / SIZE),
        "jaccard": math.sqrt(ours["jaccard"] / union),
        "lift": ours["lift"] / math.sqrt(both),
        "conflict_overlap": 0.5 / math.sqrt(both),
        "conflict_union": 0.5 / math.sqrt(union),
        # sizes of changes grow with the weights, so fewer coordinates decide these: measured, as the spread over seeds
        "conflict_energy": 1.0 / math.sqrt(both),
        "cosine": 1.5 / math.sqrt(both),
        "overlap_cosine": 3.0 / math.sqrt(both),
    }
    for name, error in errors.items():
        assert abs(ours[name] - chance[name]) < 5 * math.sqrt(2) * error, name
    # and rounding alone makes this noise share its coordinates
    assert ours["lift"] > {0.28: 2.0, 0.46: 1.3, 0.93: 1.002}[density]


def test_no_effect_in_fp16(tmp_path):
    """The other path: moved as fp32 values, rounded to fp16."""
    total = noisy(tmp_path, 0.46, "F16")
    [ours], [chance] = total["pairs"], total["null"]["pairs"]
    assert total["experts"]["a"]["support"] == pytest.approx(0.46, abs=0.06)
    for key, expert in total["experts"].items():
        assert total["null"]["experts"][key]["support"] == pytest.approx(expert["support"], abs=1e-3)
    assert ours["jaccard"] == pytest.approx(chance["jaccard"], abs=0.01)


def test_planted_effects_are_lost(tmp_path):
    """A shared direction, shared rows: large beside the null model, which keeps density and sizes only."""
    rng = np.random.default_rng(3)
    base = {NAMES[1]: nearest(0.02 * rng.standard_normal((256, 256)), "BF16")}
    rows = rng.random(256) < 0.3
    shared = rng.standard_normal((256, 256))
    experts = {}
    for key in ("a", "b"):
        noise = 2e-4 * (0.6 * shared + 0.8 * rng.standard_normal((256, 256)))
        experts[key] = {NAMES[1]: nearest(base[NAMES[1]] + noise * rows[:, None], "BF16")}
    total = document(write(tmp_path, base, experts), storage=False)["coordinates"]["total"]
    [ours], [random] = total["pairs"], total["null"]["pairs"]
    assert ours["cosine"] == pytest.approx(0.36, abs=0.02)
    assert abs(random["cosine"]) < 0.03
    assert ours["lift"] > 2.7
    assert random["lift"] < 1.3
    assert ours["conflict_overlap"] < 0.42
    assert random["conflict_overlap"] == pytest.approx(0.5, abs=0.02)


def test_values_move_within_their_bins_and_experts_apart(tmp_path):
    """With one exponent everywhere the deltas are a permutation: the same sizes, another seed another overlap."""
    rng = np.random.default_rng(1)
    base = {NAMES[1]: nearest(1.25 + 0.25 * rng.random((64, 64)), "BF16")}
    base[NAMES[1]][:4] = 0.0
    experts = {}
    for key in ("a", "b"):
        steps = rng.integers(-2, 3, (64, 64)) * (rng.random((64, 64)) < 0.5)
        steps[:4] = 0
        experts[key] = {NAMES[1]: (base[NAMES[1]] + steps * 2.0**-7).astype(np.float32)}
    folders = write(tmp_path, base, experts)
    found = [document(folders, storage=False, seed=seed)["coordinates"]["total"] for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["null"]["pairs"] != found[2]["null"]["pairs"]
    for total in found:
        for key, expert in total["experts"].items():
            assert total["null"]["experts"][key]["norm"] == pytest.approx(expert["norm"], rel=1e-14)
            assert total["null"]["experts"][key]["support"] == expert["support"]
        # the rows that nobody changed are another bin: nothing comes there
        share = total["experts"]["a"]["support"] * total["experts"]["b"]["support"] / (60 / 64)
        assert total["null"]["pairs"][0]["overlap"] == pytest.approx(share, abs=0.02)


def test_a_part_of_large_tensors_speaks_for_all(tmp_path, monkeypatch):
    """Scaled to the tensor, within the error of a part; the figures of the experts themselves are of all."""
    folder = tmp_path / "models"
    monkeypatch.setattr(null, "LEAST", 2**20)
    whole = noisy(folder, 0.46)
    monkeypatch.setattr(null, "LEAST", 2**16)
    folders = [folder / key for key in ("base", "a", "b")]
    found = document(folders, storage=False, kernels="numba")["coordinates"]
    part = found["total"]["null"]
    assert part["looked_at"] == sum(-(-size // 8) for size in (2**18, 2**18, SIZE - 2**19))
    assert whole["null"]["looked_at"] == SIZE
    assert found["total"]["experts"] == whole["experts"]
    error = math.sqrt(0.5 / part["looked_at"])
    for key in "ab":
        assert part["experts"][key]["support"] == pytest.approx(whole["experts"][key]["support"], abs=5 * error)
        assert part["experts"][key]["norm"] == pytest.approx(whole["experts"][key]["norm"], rel=0.02)
    assert part["pairs"][0]["jaccard"] == pytest.approx(whole["pairs"][0]["jaccard"], abs=10 * error)
    assert part["regions"]["inactive"] == pytest.approx(whole["regions"]["inactive"], abs=5 * error)
    assert math.fsum(part["regions"]["changers"]) == pytest.approx(1.0)


def test_parts_are_spread():
    """Every part of a run is somebody's; small tensors are looked at whole."""

    class Tensor:
        size, known_as = 2**26, "w"

    found = [null.part_of(Tensor, start, 1001, 0) for start in range(0, 99 * 1001, 1001)]  # type: ignore[arg-type]
    assert sorted(set(found)) == [(first, first + 126) for first in range(0, 876, 126)] + [(875, 1001)]
    Tensor.size = 2**19 - 1
    assert null.part_of(Tensor, 5, 1001, 0) == (0, 1001)  # type: ignore[arg-type]
