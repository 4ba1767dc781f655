"""regmean against a plain reference and the problem that it solves; what no data reach; Gram matrices that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.small_models import (
    make_recipe,
    merge_values,
    refusal,
    representable,
    same_bits,
    some_grams,
    write_all,
    write_grams,
)  # fmt: skip
from tests.reference.regmean import regmean

import rlmerge
from rlmerge.preflight import check
from rlmerge.settings import whole_cost

SEEDS = st.integers(0, 2**32)
SHAPES = {"l.0.up.weight": (9, 6), "l.0.down.weight": (5, 9), "l.0.square.weight": (7, 7), "bias": (8,), "row": (1, 4)}


def models(rng, count, dtype="F32"):
    base = {name: representable(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    experts = {
        f"e{k}": {n: representable(v + 0.1 * rng.standard_normal(v.shape), dtype) for n, v in base.items()}
        for k in range(count)
    }
    return base, experts


def mean(experts, name, factors):
    """The weighted mean."""
    return sum(f * t[name].astype(np.float64) for f, t in zip(factors, experts.values())) / sum(factors)


@given(SEEDS, st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.9, 1.0]), st.booleans(), st.sampled_from(["F32", "BF16"]))
def test_equals_the_plain_solution(tmp_path_factory, seed, count, alpha, with_base, dtype):
    folder = tmp_path_factory.mktemp("regmean")
    rng = np.random.default_rng(seed)
    base, experts = models(rng, count, dtype)
    write_all(folder, base, experts, dtype=dtype)
    grams = {key: some_grams(f"{key}{seed}", SHAPES) for key in experts}
    write_grams(folder, grams)
    factors = [float(rng.choice([0.5, 1.0, 3.0])) for _ in experts]
    own = {key: {"weight": factor} for key, factor in zip(experts, factors)}
    found = merge_values(
        make_recipe(
            folder, "regmean", list(experts), {"alpha": alpha}, own, base="base" if with_base else None, grams=True,
            out_dtype="float32",
        )
    )  # fmt: skip
    for name, shape in SHAPES.items():
        if len(shape) == 2:
            of = [tensors[name] for tensors in experts.values()]
            # fp32 rounding must decide nothing
            most = 1 - 2.0**-23 * shape[1] ** 0.5
            wanted = regmean(of, [grams[key][name] for key in experts], factors, min(alpha, most))
        else:
            wanted = mean(experts, name, factors)
        np.testing.assert_allclose(found[name], wanted, rtol=2e-6, atol=2e-6)


def test_a_matrix_larger_than_a_piece_of_the_factor(tmp_path, monkeypatch):
    monkeypatch.setattr("rlmerge.methods.regmean.PIECE", 4)
    rng = np.random.default_rng(0)
    base, experts = models(rng, 3)
    write_all(tmp_path, base, experts)
    small = merge_values(make_recipe(tmp_path, "regmean", list(experts)))
    monkeypatch.undo()
    whole = merge_values(make_recipe(tmp_path, "regmean", list(experts)))
    for name, value in whole.items():
        np.testing.assert_allclose(small[name], value, rtol=1e-6, atol=1e-7)
    assert not same_bits({"w": whole["l.0.down.weight"]}, {"w": base["l.0.down.weight"]})


def test_it_minimises_the_distance_of_outputs(tmp_path):
    """With alpha 1 nothing is nearer to all outputs than least squares on the stacked inputs themselves."""
    rng = np.random.default_rng(1)
    base, experts = models(rng, 3)
    write_all(tmp_path, base, experts)
    inputs = {key: {n: rng.standard_normal((40, s[1])) for n, s in SHAPES.items() if len(s) == 2} for key in experts}
    write_grams(tmp_path, {k: {n: (x.T @ x / 40).astype(np.float32) for n, x in t.items()} for k, t in inputs.items()})
    recipe = make_recipe(tmp_path, "regmean", list(experts), {"alpha": 1.0}, grams=True)
    found, averaged = merge_values(recipe), merge_values(make_recipe(tmp_path, "linear", list(experts), {"weight": 1}))
    for name in ("l.0.up.weight", "l.0.down.weight", "l.0.square.weight"):
        stacked = np.vstack([inputs[key][name] for key in experts])
        wanted = np.vstack([inputs[key][name] @ experts[key][name].T.astype(np.float64) for key in experts])
        best = np.linalg.lstsq(stacked, wanted, rcond=None)[0]

        def loss(solution, stacked=stacked, wanted=wanted):
            return float(np.sum((stacked @ solution - wanted) ** 2))

        assert loss(found[name].T.astype(np.float64)) <= loss(best) * (1 + 1e-8)
        assert loss(averaged[name].T.astype(np.float64)) > loss(best) * 1.01


def test_few_data_leave_the_other_directions_to_the_mean(tmp_path):
    """Two inputs for nine: least squares has many solutions; the merge is one of them, and stays near the experts."""
    rng = np.random.default_rng(2)
    base, experts = models(rng, 2)
    write_all(tmp_path, base, experts)
    inputs = {key: rng.standard_normal((2, 9)) for key in experts}
    write_grams(tmp_path, {k: {"l.0.down.weight": (x.T @ x / 2).astype(np.float32)} for k, x in inputs.items()})
    recipe = make_recipe(tmp_path, "regmean", list(experts), {"alpha": 1.0}, grams=True)
    found = merge_values(recipe)["l.0.down.weight"].astype(np.float64)
    for key, x in inputs.items():
        wanted = x @ experts[key]["l.0.down.weight"].T
        apart = x @ (experts["e0"]["l.0.down.weight"] - experts["e1"]["l.0.down.weight"]).T
        assert np.abs(x @ found.T - wanted).max() < 0.01 * np.abs(apart).max()
    assert np.abs(found - base["l.0.down.weight"]).max() < 2.0


def test_inputs_that_are_always_zero_take_the_mean(tmp_path):
    rng = np.random.default_rng(3)
    base, experts = models(rng, 2)
    write_all(tmp_path, base, experts)
    grams = {key: some_grams(key, SHAPES) for key in experts}
    for tensors in grams.values():
        tensors["l.0.up.weight"][2] = tensors["l.0.up.weight"][:, 2] = 0.0
        tensors["l.0.square.weight"][:] = 0.0
    grams["e0"]["l.0.down.weight"][:] = 0.0
    write_grams(tmp_path, grams)
    own = {"e0": {"weight": 1.0}, "e1": {"weight": 3.0}}
    found = merge_values(make_recipe(tmp_path, "regmean", list(experts), {}, own, grams=True))
    np.testing.assert_allclose(
        found["l.0.up.weight"][:, 2], mean(experts, "l.0.up.weight", [1, 3])[:, 2], rtol=1e-6
    )  # nobody's data: by weight
    np.testing.assert_allclose(found["l.0.square.weight"], mean(experts, "l.0.square.weight", [1, 3]), rtol=1e-6)
    # e0 never saw an input there (an expert of a mixture that it never chose): e1 decides
    np.testing.assert_allclose(found["l.0.down.weight"], experts["e1"]["l.0.down.weight"], rtol=1e-5, atol=1e-7)


@given(SEEDS)
def test_without_what_is_off_the_diagonal_it_is_a_weighted_mean(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("regmean")
    base, experts = models(np.random.default_rng(seed), 3)
    write_all(folder, base, experts)
    grams = {key: some_grams(f"{key}{seed}", SHAPES) for key in experts}
    write_grams(folder, grams)
    found = merge_values(make_recipe(folder, "regmean", list(experts), {"alpha": 0.0}, grams=True))
    for name in ("l.0.up.weight", "l.0.down.weight"):
        share = np.stack([np.diag(grams[key][name]).astype(np.float64) for key in experts])
        values = np.stack([experts[key][name].astype(np.float64) for key in experts])
        wanted = (share[:, None] * values).sum(0) / share.sum(0)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=1e-7)


def test_equal_gram_matrices_give_the_mean(tmp_path):
    base, experts = models(np.random.default_rng(4), 3)
    write_all(tmp_path, base, experts)
    write_grams(tmp_path, dict.fromkeys(experts, some_grams("all", SHAPES)))
    found = merge_values(make_recipe(tmp_path, "regmean", list(experts), grams=True))
    for name, value in found.items():
        np.testing.assert_allclose(value, mean(experts, name, [1, 1, 1]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_equal_experts_and_unchanged_rows_come_back_bit_for_bit(tmp_path, dtype):
    base, experts = models(np.random.default_rng(5), 3, dtype)
    experts["e2"] = experts["e1"] = experts["e0"] = {
        # huge steps from small numbers, where adding a base would round, and zeros
        name: representable(np.where(np.arange(value.size).reshape(value.shape) % 3 == 0, 0.0, 1e3 * value), dtype)
        for name, value in experts["e0"].items()
    }
    matrices = [name for name, shape in SHAPES.items() if len(shape) == 2]
    write_all(tmp_path, base, experts, dtype=dtype)
    found = merge_values(make_recipe(tmp_path, "regmean", list(experts)))
    assert all((found[name] == experts["e0"][name]).all() for name in matrices)
    base, experts = models(np.random.default_rng(6), 3, dtype)
    for tensors in experts.values():
        tensors["l.0.up.weight"][3] = base["l.0.up.weight"][3]  # a neuron that nobody trained
    write_all(tmp_path, base, experts, dtype=dtype)
    found = merge_values(make_recipe(tmp_path, "regmean", list(experts)))["l.0.up.weight"]
    assert found[3].tobytes() == base["l.0.up.weight"][3].tobytes()
    assert (found[2] != base["l.0.up.weight"][2]).any()


def test_inputs_along_the_first_dimension_and_aliases(tmp_path):
    """GPT-2 multiplies x·W, and only gram.json can tell it where a matrix is square."""
    base, experts = models(np.random.default_rng(7), 2)
    turned = {
        key: {"w": tensors["l.0.square.weight"].T.copy(), "same": tensors["l.0.square.weight"].T.copy()}
        for key, tensors in {"base": base, **experts}.items()
    }
    write_all(tmp_path, base, experts)
    grams = {key: {"l.0.square.weight": some_grams(key, SHAPES)["l.0.square.weight"]} for key in experts}
    write_grams(tmp_path, grams)
    straight = merge_values(make_recipe(tmp_path, "regmean", list(experts), grams=True))["l.0.square.weight"]
    write_all(tmp_path, turned.pop("base"), turned)
    write_grams(tmp_path, {key: {"w": tensors["l.0.square.weight"]} for key, tensors in grams.items()})
    for key in experts:
        note = {"input_first": ["w", "same"], "aliases": {"same": "w"}}
        (tmp_path / f"gram_{key}" / "gram.json").write_text(json.dumps(note))
    found = merge_values(make_recipe(tmp_path, "regmean", list(experts), grams=True))
    assert found["w"].T.tobytes() == straight.tobytes()
    assert found["same"].tobytes() == found["w"].tobytes()


def test_a_filter_leaves_matrices_to_the_mean(tmp_path):
    base, experts = models(np.random.default_rng(8), 2)
    write_all(tmp_path, base, experts)
    parameters = {"matrix": [{"filter": "up", "value": False}, {"value": True}]}
    found = merge_values(make_recipe(tmp_path, "regmean", list(experts), parameters))
    solved = merge_values(make_recipe(tmp_path, "regmean", list(experts)))
    np.testing.assert_allclose(found["l.0.up.weight"], mean(experts, "l.0.up.weight", [1, 1]), rtol=1e-6)
    assert found["l.0.down.weight"].tobytes() == solved["l.0.down.weight"].tobytes()
    assert found["l.0.up.weight"].tobytes() != solved["l.0.up.weight"].tobytes()


def test_cost_is_foreseen_where_there_is_something_to_solve(tmp_path):
    base, experts = models(np.random.default_rng(9), 2)
    write_all(tmp_path, base, experts)
    recipe = make_recipe(tmp_path, "regmean", list(experts), {"matrix": [{"filter": "down", "value": False}]})
    plan = rlmerge.planner.make_plan(recipe)
    assert len(whole_cost(plan)) == 3  # up, square, row
    assert max(held for _, _, held in whole_cost(plan)) >= 8 * (3 * 49 + 7 * 49)
    bytes_read = check(recipe).estimate["bytes_read"]
    own = {key: {"weight": 1} for key in experts}
    alone = check(make_recipe(tmp_path, "linear", list(experts), {}, own)).estimate["bytes_read"]
    assert bytes_read == alone + 2 * 4 * (36 + 81 + 49 + 16)


def test_the_output_says_what_it_was_made_of(tmp_path):
    base, experts = models(np.random.default_rng(10), 2)
    write_all(tmp_path, base, experts)
    out = rlmerge.merge_to_folder(make_recipe(tmp_path, "regmean", list(experts)), tmp_path / "out").out
    first = json.loads((out / "rlmerge.json").read_text())["inputs"]
    assert [entry["role"] for entry in first] == ["base", "e0", "e1", "gram of e0", "gram of e1"]
    file = tmp_path / "gram_e1" / "gram.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1  # the last entry of a diagonal
    file.write_bytes(raw)
    recipe = make_recipe(tmp_path, "regmean", list(experts), grams=True)
    second = json.loads((rlmerge.merge_to_folder(recipe, tmp_path / "again").out / "rlmerge.json").read_text())[
        "inputs"
    ]
    assert [a["xxh3"] == b["xxh3"] for a, b in zip(first, second)] == [True, True, True, True, False]


# -- what cannot be ----------------------------------------------------------------------------------------------------


def broken(change):
    def spoil(grams):
        change(grams["e1"]["l.0.square.weight"])

    return spoil


def skewed(gram):
    gram[0, 1] += 0.01


def negative(gram):
    gram[2, 2] = -0.5


def nothing(gram):
    gram[3, 4] = np.nan


def impossible(gram):
    gram[0, 1] = gram[1, 0] = 10 * np.sqrt(gram[0, 0] * gram[1, 1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (skewed, "not symmetric"), (negative, "-0.5 on its diagonal"), (nothing, "infinite or none"),
        (impossible, "negative square"),
    ],
)  # fmt: skip
def test_what_is_no_gram_matrix(tmp_path, spoil, words):
    base, experts = models(np.random.default_rng(11), 2)
    write_all(tmp_path, base, experts)
    grams = {key: some_grams(key, SHAPES) for key in experts}
    spoil(grams["e1"]["l.0.square.weight"])
    write_grams(tmp_path, grams)
    message = refusal(lambda: merge_values(make_recipe(tmp_path, "regmean", list(experts), grams=True))) or ""
    assert words in message, message
    assert "l.0.square.weight" in message


def test_bytes_that_gram_json_does_not_speak_of(tmp_path):
    base, experts = models(np.random.default_rng(12), 2)
    write_all(tmp_path, base, experts)
    grams = {key: {"l.0.up.weight": some_grams(key, SHAPES)["l.0.up.weight"]} for key in experts}
    write_grams(tmp_path, grams)
    for key, tensors in grams.items():
        digest = xxhash.xxh3_128_hexdigest(tensors["l.0.up.weight"].data)
        note = {"tensors": {"l.0.up.weight": {"xxh3_128": digest}}}
        (tmp_path / f"gram_{key}" / "gram.json").write_text(json.dumps(note))
    recipe = make_recipe(tmp_path, "regmean", list(experts), grams=True)
    merge_values(recipe)
    write_grams(tmp_path, {"e0": grams["e1"]})
    message = refusal(lambda: merge_values(recipe)) or ""
    assert "gram_e0" in message
    assert "not the one of which the gram.json" in message


def test_gram_folders_that_are_missing(tmp_path):
    base, experts = models(np.random.default_rng(13), 2)
    write_all(tmp_path, base, experts)
    recipe = make_recipe(tmp_path, "regmean", list(experts), grams=False)
    message = refusal(lambda: rlmerge.check(recipe)) or ""
    assert "without `gram:` are: e0, e1" in message
    assert "rlmerge gram MODEL" in message
    message = refusal(lambda: make_recipe(tmp_path, "regmean", list(experts), {"weight": 0}, grams=False)) or ""
    assert "all weights are 0" in message
    write_grams(tmp_path, {key: some_grams(key, SHAPES) for key in experts})
    outcome = rlmerge.check(make_recipe(tmp_path, "linear", list(experts), {"weight": 1}, grams=True))
    assert any("does not read it" in note for note in outcome.notes)


def test_a_base_is_averaged_where_it_is_listed(tmp_path):
    """And never because all models have a weight: it would need Gram matrices of its own."""
    base, experts = models(np.random.default_rng(15), 2)
    write_all(tmp_path, base, experts)
    grams = {key: some_grams(key, SHAPES) for key in ("base", *experts)}
    write_grams(tmp_path, grams)
    name = "l.0.up.weight"
    for keys in (["e0", "e1"], ["base", "e0", "e1"]):
        recipe = make_recipe(tmp_path, "regmean", keys, {"weight": 2.0}, grams=True)
        wanted = regmean([{"base": base, **experts}[key][name] for key in keys], [grams[key][name] for key in keys])
        np.testing.assert_allclose(merge_values(recipe)[name], wanted, rtol=2e-6, atol=2e-6)


def test_tied_copies_stay_equal(tmp_path):
    """Head and embedding stored twice and equal: a lookup has no Gram matrix, so the mean is for both."""
    rng = np.random.default_rng(14)
    base = {"model.embed_tokens.weight": rng.standard_normal((8, 4)).astype(np.float32)}
    base["lm_head.weight"] = base["model.embed_tokens.weight"].copy()
    experts = {}
    for key in ("e0", "e1"):
        value = base["lm_head.weight"] + rng.standard_normal((8, 4)).astype(np.float32)
        experts[key] = {"model.embed_tokens.weight": value, "lm_head.weight": value.copy()}
    for tensors in (base, *experts.values()):
        tensors["up.weight"] = rng.standard_normal((3, 4)).astype(np.float32)
    write_all(tmp_path, base, experts)
    for key in ("base", *experts):
        (tmp_path / key / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    shapes = {name: value.shape for name, value in base.items() if "embed" not in name}
    write_grams(tmp_path, {key: some_grams(key, shapes) for key in experts})
    found = merge_values(make_recipe(tmp_path, "regmean", list(experts), grams=True))
    assert found["lm_head.weight"].tobytes() == found["model.embed_tokens.weight"].tobytes()
    np.testing.assert_allclose(found["lm_head.weight"], mean(experts, "lm_head.weight", [1, 1]), rtol=1e-6)


def test_slices_take_the_gram_matrices_of_their_own_layers(tmp_path):
    rng = np.random.default_rng(16)
    shapes = {f"layers.{n}.up.weight": (5, 4) for n in range(3)}
    base, *others = (
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(3)
    )
    experts = dict(zip(("e0", "e1"), others))
    write_all(tmp_path, base, experts)
    grams = {key: some_grams(key, shapes) for key in experts}
    write_grams(tmp_path, grams)
    sources = [
        [
            {"model": "e0", "gram": "gram_e0", "layer_range": [a, a + 1]},
            {"model": "e1", "gram": "gram_e1", "layer_range": [b, b + 1]},
        ]
        for a, b in ((2, 1), (0, 0))
    ]
    data = {"merge_method": "regmean", "slices": [{"sources": pair} for pair in sources]}
    found = merge_values(rlmerge.parse_recipe(yaml.safe_dump(data), folder=tmp_path))
    for place, (a, b) in enumerate(((2, 1), (0, 0))):
        names = f"layers.{a}.up.weight", f"layers.{b}.up.weight"
        pairs = list(zip(("e0", "e1"), names))
        wanted = regmean([experts[key][name] for key, name in pairs], [grams[key][name] for key, name in pairs])
        np.testing.assert_allclose(found[f"layers.{place}.up.weight"], wanted, rtol=2e-6, atol=2e-6)
