"""breadcrumbs, sce, nearswap, arcee_fusion and their kin against slow references, on awkward tensors of every dtype."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tests.checkpoint.checkpoint_files import write_model
from tests.methods.small_models import (
    FORMS,
    make_recipe,
    merge_values,
    representable,
    same_bits,
    small_blocks,
    write_all,
)  # fmt: skip
from tests.reference import selective, sparsified

import rlmerge

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = {
    "matrix": (6, 8), "vector": (9,), "three": (2, 3, 4), "one": (1,), "two": (2,), "column": (5, 1), "row": (1, 7),
    "scalar": (), "empty": (0, 4), "same": (4, 4),
}  # fmt: skip
WEIGHTS = (1.0, 0.5, 1.3, 0.7, 0.25)


def models(seed, count, dtype):
    """A base and experts with continuous deltas; nobody changes `same`, the last of three or more changes nothing."""
    rng = np.random.default_rng(seed)
    base = {name: representable(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    experts = {}
    for k in range(count):
        experts[f"e{k}"] = {}
        for name, value in base.items():
            changed = (rng.random(value.shape) < 0.6) & (name != "same") & (k < 2 or k != count - 1)
            step = rng.standard_normal(value.shape).astype(np.float32) * np.float32(0.1)
            experts[f"e{k}"][name] = np.where(changed, representable(value + step, dtype), value).astype(np.float32)
    return base, experts


def _cut(cut, sign, **options):
    def reference(base, experts):
        weight = dict(zip(sorted(experts), WEIGHTS))
        return sparsified.generalised(base, cut(base, experts), weight=weight, sign=sign, **options)

    return reference


def _band(density, gamma, support=False):
    return partial(sparsified.without_outliers, density=density, gamma=gamma, of_support=support)


CASES = {
    "breadcrumbs": ("breadcrumbs", {"density": 0.5, "gamma": 0.1, "lambda": 1.2},
                    _cut(_band(0.5, 0.1), False, lam=1.2, normalize=False)),
    "breadcrumbs, gamma 0": ("breadcrumbs", {"density": 0.3, "gamma": 0},
                             _cut(_band(0.3, 0), False, lam=1, normalize=False)),
    "breadcrumbs, gamma 1": ("breadcrumbs", {"density": 0.3, "gamma": 1},
                             _cut(_band(0.3, 1), False, lam=1, normalize=False)),
    "breadcrumbs, more than all": ("breadcrumbs", {"density": 0.9, "gamma": 0.3},
                                   _cut(_band(0.9, 0.3), False, lam=1, normalize=False)),
    "breadcrumbs of the support": ("breadcrumbs", {"density": 0.5, "gamma": 0.2, "density_of": "support"},
                                   _cut(_band(0.5, 0.2, True), False, lam=1, normalize=False)),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1, "normalize": True},
                         _cut(_band(0.6, 0.1), True, lam=1, normalize=True)),
    "sce": ("sce", {}, selective.sce),
    "sce, half": ("sce", {"select_topk": 0.5}, partial(selective.sce, select_topk=0.5)),
    "nearswap": ("nearswap", {"t": 0.05}, partial(selective.nearswap, t=0.05)),
    "arcee_fusion": ("arcee_fusion", {}, selective.arcee_fusion),
    "ramplus": ("ramplus", {}, partial(selective.ramplus, r=0.2, alpha=1.0, epsilon=1e-5, scope="model")),
    "ramplus, a large epsilon": ("ramplus", {"r": 0.5, "alpha": 0.3, "epsilon": 0.05},
                                 partial(selective.ramplus, r=0.5, alpha=0.3, epsilon=0.05, scope="model")),
    "ramplus_tl": ("ramplus_tl", {}, partial(selective.ramplus, r=0.1, alpha=0.2, epsilon=1e-5, scope="tensor")),
    "ramplus_tl, unbounded": ("ramplus_tl", {"r": 1, "alpha": 50},
                              partial(selective.ramplus, r=1, alpha=50, epsilon=1e-5, scope="tensor")),
    "dots": ("dots", {"lambda": 0.9}, _cut(partial(sparsified.dots, density=0.3), False, lam=0.9, normalize=False)),
    "dots of tensors": ("dots", {"norm": "tensor", "density": 0.6},
                        _cut(partial(sparsified.dots, density=0.6, norm="tensor"), False, lam=1, normalize=False)),
}  # fmt: skip


def close(found, expected):
    """One rounding to fp32, of fp64 sums in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (np.abs(found[name] - value) <= np.spacing(np.abs(value).astype(np.float32)) + 1e-12).all(), name


@pytest.mark.parametrize("case", CASES)
@given(st.integers(0, 2**32), st.sampled_from(FORMS), st.integers(1, 5), st.sampled_from([4, 2**16]))
def test_against_the_reference(tmp_path_factory, case, seed, dtype, count, block):
    """Awkward shapes, any number of experts, every dtype; written as fp32, so that one rounding is left."""
    method, parameters, reference = CASES[case]
    count = min(count, rlmerge.get_method(method).arity.maximum or count)
    folder = tmp_path_factory.mktemp("vectors")
    if case.startswith("breadcrumbs") or case in ("sce, half", "dots", "dots of tensors"):
        dtype = "F32"  # narrow deltas tie, and then the references' order of equals differs from ours
    base, experts = models(seed, count, dtype)
    write_all(folder, base, experts, dtype=dtype)
    specs = {spec.name for spec in rlmerge.get_method(method).parameters}
    own = {key: {"weight": w} for key, w in zip(experts, WEIGHTS)} if "weight" in specs else {}
    recipe = make_recipe(folder, method, list(experts), parameters, own, out_dtype="float32")
    with small_blocks(block):
        close(merge_values(recipe), reference(base, experts))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FORMS)
def test_same_bits_for_threads_blocks_and_kernels(tmp_path, case, dtype):
    method, parameters, _ = CASES[case]
    base, experts = models(7, min(3, rlmerge.get_method(method).arity.maximum or 3), dtype)
    write_all(tmp_path, base, experts, dtype=dtype)
    specs = {spec.name for spec in rlmerge.get_method(method).parameters}
    own = {key: {"weight": 0.5} for key in experts} if "weight" in specs else {}
    recipe = make_recipe(tmp_path, method, list(experts), parameters, own)
    first = merge_values(recipe, kernels="numba")
    assert same_bits(first, merge_values(recipe, kernels="numpy"))
    assert same_bits(first, dict(rlmerge.merge(recipe, threads=2)))
    with small_blocks(4, 8):
        other = merge_values(recipe, kernels="numba")
    if method in ("sce", "dots"):  # fp64 sums of squares are added up block by block: one rounding apart
        assert all(np.allclose(other[name], first[name], rtol=2.0**-7 if dtype != "F32" else 1e-6) for name in first)
    else:
        assert same_bits(first, other)
    assert (first["same"] == base["same"]).all()


# -- golden files that differ from us for a known reason ---------------------------------------------------------------


def test_arcee_fusion_of_an_expert_stored_narrower_than_the_base(tmp_path):
    """What rounding took from the base is no divergence: nearly the same changes are taken as with a base in bf16."""
    rng, name = np.random.default_rng(1), "layers.0.m.weight"
    wide = (rng.standard_normal((64, 256)) * 0.02).astype(np.float32)
    narrow = to_bf16(wide)
    size = 1e-4 * 10.0 ** rng.uniform(-1, 0.5, (64, 1))  # rows that training changed much, and little
    expert = to_bf16((narrow + rng.standard_normal((64, 256)) * size).astype(np.float32))
    write_model(tmp_path / "wide", {name: wide})
    write_model(tmp_path / "narrow", {name: narrow}, dtype="BF16")
    write_model(tmp_path / "e0", {name: expert}, dtype="BF16")
    taken = [
        merge_values(make_recipe(tmp_path, "arcee_fusion", ["e0"], base=key, out_dtype="float32"))[name] != base
        for key, base in (("wide", wide), ("narrow", narrow))
    ]
    assert np.count_nonzero(taken[0] & taken[1]) > 0.97 * np.count_nonzero(taken[0] | taken[1]) > 0


def to_bf16(values):
    """Rounded to the nearest bf16, as fp32."""
    words = values.view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_golden_arcee_fusion_but_for_noise_at_the_threshold(monkeypatch):
    """mergekit's divergence is a sum of fp32 terms that cancel, 1 % off here: one coordinate lies within 1 %."""
    monkeypatch.chdir(GOLDEN)
    base, expert = (load_file(f"{name}/model.safetensors") for name in ("base", "expert0"))
    expected = load_file("expected/arcee_fusion.safetensors")
    found = dict(rlmerge.merge("recipes/arcee_fusion.yml"))
    differ = 0
    for name, value in expected.items():
        wrong = np.abs(found[name] - value) > 1e-6
        scores = selective.importance(base[name], expert[name])
        threshold = selective.fusion_threshold(scores)
        near = np.abs(scores - threshold) < 0.01 * threshold
        assert not (wrong & ~near).any(), name
        differ += int(wrong.sum())
    assert differ == 1


# -- what mergekit gets wrong at the sizes of RL updates ---------------------------------------------------------------


def rl_sized(tmp_path, scales, size=4096):
    rng = np.random.default_rng(0)
    base = {"w": np.zeros((64, size // 64), np.float32)}
    deltas = {f"e{k}": {"w": (rng.standard_normal(base["w"].shape) * s).astype(np.float32)}
              for k, s in enumerate(scales)}  # fmt: skip
    write_all(tmp_path, base, deltas)
    return base, deltas


def test_sce_weighs_by_energy_at_any_scale(tmp_path):
    """Experts of RMS s and 3s: shares 0.1 and 0.9, for s of 1 and of 1e-9."""
    for scale in (1.0, 1e-5, 1e-9):
        _, deltas = rl_sized(tmp_path, (scale, 3 * scale))
        found = merge_values(make_recipe(tmp_path, "sce", list(deltas)))["w"]
        a, b = (tensors["w"].astype(np.float64) for tensors in deltas.values())
        agree = a * b > 0
        share = (a**2).sum() / ((a**2).sum() + (b**2).sum())
        assert share == pytest.approx(0.1, abs=0.02)
        np.testing.assert_allclose(found[agree], (share * a + (1 - share) * b)[agree], rtol=1e-6)


def test_sce_of_no_selection_is_the_base_and_of_equal_experts_that_expert(tmp_path):
    base, deltas = rl_sized(tmp_path, (1e-5,))
    write_all(tmp_path, base, {"e0": deltas["e0"], "e1": deltas["e0"], "e2": deltas["e0"]})
    keys = ["e0", "e1", "e2"]
    assert same_bits(merge_values(make_recipe(tmp_path, "sce", keys, {"select_topk": 0})), base)
    found = merge_values(make_recipe(tmp_path, "sce", keys))
    np.testing.assert_allclose(found["w"], deltas["e0"]["w"], rtol=1e-7)
    # below 1, coordinates on which all agree exactly are never selected: SCE as published
    assert same_bits(merge_values(make_recipe(tmp_path, "sce", keys, {"select_topk": 0.9})), base)


def test_breadcrumbs_keep_exact_counts_of_tied_updates(tmp_path):
    """One-step bf16 updates are all equal: int(ρ·n) of them stay."""
    base, expert = {"w": np.zeros((10, 10), np.float32)}, {"w": np.full((10, 10), 2.0**-9, np.float32)}
    write_all(tmp_path, base, {"a": expert}, dtype="BF16")
    for density, gamma, kept in ((0.5, 0.01, 50), (0.5, 0.6, 50), (0.25, 0.0, 25), (0.0, 0.5, 0), (1.0, 0.5, 100)):
        recipe = make_recipe(tmp_path, "breadcrumbs", ["a"], {"density": density, "gamma": gamma, "weight": 1})
        assert np.count_nonzero(merge_values(recipe)["w"]) == kept


def test_breadcrumbs_give_back_the_l1_norm_if_asked(tmp_path):
    base, deltas = rl_sized(tmp_path, (1e-5,))
    recipe = make_recipe(tmp_path, "breadcrumbs", ["e0"], {"density": 0.5, "weight": 1, "rescale": True})
    found = merge_values(recipe)["w"].astype(np.float64)
    assert np.abs(found).sum() == pytest.approx(np.abs(deltas["e0"]["w"].astype(np.float64)).sum(), rel=1e-6)
    assert np.count_nonzero(found) == base["w"].size // 2


def test_nearswap_moves_by_t_at_most(tmp_path):
    _, deltas = rl_sized(tmp_path, (1e-5,))
    found = merge_values(make_recipe(tmp_path, "nearswap", ["e0"], {"t": 1e-5}))["w"]
    delta = deltas["e0"]["w"]
    near = np.abs(delta) <= 1e-5
    assert (found[near] == delta[near]).all()
    assert (found[~near] == np.float32(1e-5) * np.sign(delta[~near])).all()


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-7])
def test_arcee_fusion_selects_by_more_than_noise(tmp_path, scale):
    """Rows whose changes are ten times larger have a hundred times the divergence, so what is taken lies in them."""
    base, deltas = rl_sized(tmp_path, (scale,))
    deltas["e0"]["w"][::8] *= 10
    write_all(tmp_path, base, deltas)
    found = merge_values(make_recipe(tmp_path, "arcee_fusion", ["e0"]))["w"]
    taken = found != 0
    large = np.zeros(len(taken), bool)
    large[::8] = True
    assert taken[large].mean() > 0.5
    assert taken[~large].mean() < 0.1
    assert (found[taken] == deltas["e0"]["w"][taken]).all()


def test_importances_of_rl_sized_changes_are_those_of_long_arithmetic(tmp_path):
    """Weights as in a model, changes of 1e-5: what is taken is what 80-bit numbers and the plain formula take."""
    rng = np.random.default_rng(4)
    base = {"w": (rng.standard_normal((64, 128)) * 0.05).astype(np.float32)}
    expert = {"w": base["w"] + (rng.standard_normal((64, 128)) * 1e-5).astype(np.float32)}
    write_all(tmp_path, base, {"e0": expert})
    found = merge_values(make_recipe(tmp_path, "arcee_fusion", ["e0"]))["w"]
    old, new = (values["w"].astype(np.longdouble) for values in (base, expert))
    p, q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) + np.longdouble(1e-8) for v in (new, old))
    scores = np.abs(new - old) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    threshold = selective.fusion_threshold(scores)
    clear = np.abs(scores - threshold) > 1e-5 * threshold
    changed = (base["w"] != expert["w"]) & clear
    assert clear.mean() > 0.99
    assert ((found != base["w"]) == (scores >= threshold))[changed].all()


@pytest.mark.parametrize(
    ("method", "points"),
    [
        ("arcee_fusion", [{"epsilon": 1e-8}, {"epsilon": 10.0}]),
        ("breadcrumbs", [{"density": 0.5}, {"density": 0.3, "gamma": 0.2}, {"density": 0.5, "lambda": 0.5}]),
        ("dare_ties", [{"density": 0.5, "rescale": "l1"}, {"density": 0.3, "rescale": "l1", "normalize": True}]),
        ("della", [{"density": 0.5}, {"density": 0.5, "epsilon": 0.3}, {"density": 0.5, "density_of": "support"}]),
        ("dots", [{"density": 0.5}, {"density": 0.3, "lambda": 0.5}]),
        ("ramplus", [{"r": 0.5}, {"r": 0.1, "alpha": 0.1}, {"epsilon": 0.05}]),
        ("sce", [{"select_topk": 0.5}, {"select_topk": 1.0}, {"select_topk": 0.3, "cancelled": "positive"}]),
    ],
)
def test_every_point_of_a_sweep_is_the_merge_alone(tmp_path, method, points):
    base, experts = models(3, min(3, rlmerge.get_method(method).arity.maximum or 3), "F32")
    write_all(tmp_path, base, experts)
    own = {key: {"weight": 0.5} for key in experts} if method not in ("arcee_fusion", "sce", "ramplus") else {}
    recipe = make_recipe(tmp_path, method, list(experts), {}, own)
    outcome = rlmerge.merge_to_folder(recipe, tmp_path / "sweep", sweep=points, threads=2)
    for name, point in zip(outcome.names, points):
        found = load_file(tmp_path / "sweep" / name / "model.safetensors")
        assert same_bits(found, merge_values(recipe.with_settings(point))), point
