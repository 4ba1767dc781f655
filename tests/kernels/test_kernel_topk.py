"""The three top-k stages together keep exactly what sorting keeps, however the coordinates are cut into blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.kernel_pairs import COMPILED, FP32, PLAIN, fp32

from rlmerge.kernels.plain.hash import hash64
from rlmerge.methods import topk
from rlmerge.methods.base import Patch, Task

KEY = 1234567


class Sizes(topk.Scorer):
    """Ranks |expert| itself."""

    def applies(self, task):
        return True

    def density(self, task):
        return task.per_model["density"]

    def wanted(self, task, density, eligible):
        return int(density * eligible)

    def score(self, block, task, results):
        """Coordinates that one changed alone, by expert, and those that several changed."""
        return [
            topk.Ranked(
                patch.experts, patch.where, patch.delta.copy(), np.abs(patch.delta).astype(np.float32), patch.experts
            )
            for patch in block.patches
        ]


class Changes:
    """What a scorer asks of a block: experts `values` of a base of zeros."""

    def __init__(self, values, start, kernels):
        active, delta = values != 0, values.astype(np.float64)
        alone = active & (active.sum(axis=0) == 1)
        rows = np.arange(len(values))
        groups = [*zip((rows[k : k + 1] for k in rows), alone), (rows, active.sum(axis=0) > 1)]
        self.patches = [
            Patch(experts, np.flatnonzero(mask).astype(np.int32), np.ascontiguousarray(delta[experts][:, mask]))
            for experts, mask in groups
        ]
        self.start, self.kernels = start, kernels


def measure(values, density, kernels, step, scope="tensor", order=0):
    """Blocks of `step` coordinates, each a unit of its own, the task, and the results of the stages."""
    count, size = values.shape
    task = Task("t", (size,), tuple("abcde"[:count]), {}, {"density": np.full(count, density)},
                np.arange(count).astype(np.uint64), KEY, False)  # fmt: skip
    blocks = [Changes(np.ascontiguousarray(values[:, s : s + step]), s, kernels) for s in range(0, size, step)]
    results = {}
    for stage in topk.top_k(Sizes(), scope, order):
        total = stage.empty(count)
        if stage.needed(task, results):
            for block in blocks:
                part = stage.empty(count)
                stage.measure(block, task, results, part)
                stage.combine(total, part)
        results[stage.name] = stage.reduce(total, task, results)
    return blocks, task, results


def keep(values, density, kernels, step, scope="tensor"):
    """The mask that the stages and the trim leave."""
    blocks, task, results = measure(values, density, kernels, step, scope)
    mask = np.zeros(values.shape, bool)
    for block in blocks:
        for patch, part in zip(block.patches, Sizes().score(block, task, results)):
            where, left, kept, dropped = topk.cut(part, block, task, results)
            assert kept.tolist() == np.count_nonzero(left, axis=1).tolist()
            if patch.alone:
                assert (left != 0).all()
                assert not dropped.size
            else:
                assert (dropped == ((patch.delta != 0) & (left == 0)).any(axis=0)).all()
            mask[np.ix_(patch.experts, block.start + where)] |= left != 0
    return mask


def sorted_keep(row, wanted):
    """The `wanted` largest by sorting; equal ones by the smaller hash."""
    places = np.flatnonzero(row)
    hashes = hash64(KEY, places.astype(np.uint64))
    order = sorted(range(len(places)), key=lambda p: (-abs(float(row[places[p]])), int(hashes[p])))
    mask = np.zeros(row.shape, bool)
    mask[places[order[:wanted]]] = True
    return mask


@pytest.mark.parametrize("kernels", [PLAIN, COMPILED], ids=["numpy", "numba"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.8, 0.999, 1.0])
@given(st.integers(1, 3), st.sampled_from([1, 2, 9, 40]), st.data())
def test_top_k_is_sorting(kernels, density, count, size, data):
    values = data.draw(fp32(count, size))
    expected = np.stack([sorted_keep(row, int(density * np.count_nonzero(row))) for row in values])
    for step in (size, 7):
        assert keep(values, density, kernels, step).tolist() == expected.tolist()


@pytest.mark.parametrize("kernels", [PLAIN, COMPILED], ids=["numpy", "numba"])
def test_neighbouring_floats_in_one_coarse_bin(kernels):
    """The fine histogram separates values that differ in the last bit."""
    bits = np.arange(2000, dtype=np.uint32) * 3 + np.array(1.0, np.float32).view(np.uint32)
    values = np.random.default_rng(0).permutation(bits).view(np.float32)[None] * np.float32(-1)
    for density in (0.001, 0.3335, 0.9995):
        wanted = int(density * 2000)
        assert keep(values, density, kernels, 333)[0].tolist() == sorted_keep(values[0], wanted).tolist()


def test_ties_at_scope_model_are_kept_by_hash_in_proportion():
    """One class of ties: a share q of them stays, within five standard deviations, and always the smallest hashes."""
    values = np.full((1, 2**15), FP32[6], np.float32)
    mask = keep(values, 0.3, COMPILED, 2**12, scope="model")[0]
    wanted = int(0.3 * 2**15)
    assert abs(mask.sum() - wanted) < 5 * np.sqrt(2**15 * 0.3 * 0.7)
    hashes = hash64(KEY, np.arange(2**15, dtype=np.uint64))
    assert hashes[mask].max() < hashes[~mask].min()
    assert hashes[mask].max() < wanted * 2**64 // 2**15 <= hashes[~mask].min()


def test_larger_tensors_do_not_gather_hashes(monkeypatch):
    values = np.full((1, 200), 1.0, np.float32)
    monkeypatch.setattr(topk, "EXACT", 100)
    hashes = hash64(KEY, np.arange(200, dtype=np.uint64))
    expected = hashes < np.uint64(100 * 2**64 // 200)
    assert keep(values, 0.5, PLAIN, 64)[0].tolist() == expected.tolist()
    monkeypatch.setattr(topk, "EXACT", 200)
    assert keep(values, 0.5, PLAIN, 64)[0].sum() == 100


@pytest.mark.parametrize("kernels", [PLAIN, COMPILED], ids=["numpy", "numba"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_histograms_carry_the_norms_of_large_tensors(monkeypatch, kernels, order, scope):
    """Σ before the cut, and after it with the share of the ties that stays, as adding up the sorted values does."""
    monkeypatch.setattr(topk, "EXACT", 50)
    monkeypatch.setattr(topk, "MANY", 1)
    rng = np.random.default_rng(order)
    close = (np.float32(1.0) + np.arange(400) * np.float32(2.0**-23)).astype(np.float32)  # one coarse bin, many values
    for row in (rng.choice([0.0, 1.0, -2.0, 3.0, 0.125], 400), rng.permutation(close), rng.standard_normal(400)):
        values = np.stack([row, row[::-1]]).astype(np.float32)
        for density in (0.1, 0.37, 0.8):
            results = measure(values, density, kernels, 64, scope, order)[2]
            for k, mine in enumerate(values):
                size = np.sort(np.abs(mine[mine != 0]).astype(np.float64))[::-1]
                wanted = int(density * size.size)
                bound = size[wanted - 1]
                share = (wanted - (size > bound).sum()) / (size == bound).sum()
                terms = size**order
                after = terms[size > bound].sum() + share * terms[size == bound].sum()
                assert results["ties"]["norms"]["before"][k] == pytest.approx(terms.sum(), rel=1e-12)
                assert results["ties"]["norms"]["after"][k] == pytest.approx(after, rel=1e-12)
    assert "norms" not in measure(values[:, :40], 0.5, kernels, 64, scope, order)[2]["ties"]
    few = np.where(np.arange(400) < 8, 1.0, 0.0).astype(np.float32)[None]
    assert "norms" in measure(few, 0.5, kernels, 64, scope, order)[2]["ties"]
    monkeypatch.setattr(topk, "MANY", 9)
    assert "norms" not in measure(few, 0.5, kernels, 64, scope, order)[2]["ties"]
