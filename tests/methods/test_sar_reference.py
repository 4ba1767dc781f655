"""sar through the public API against the plain reference (tests/reference/sar.py), in all its choices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.small_models import (
    SHAPES,
    make_recipe,
    read_values,
    representable,
    small_blocks,
    some_fishers,
    sparse_model,
    write_all,
)  # fmt: skip
from tests.reference.sar import sar

import rlmerge
from rlmerge.execute.storing import hash_key
from rlmerge.kernels.plain.hash import hash64
from rlmerge.kernels.plain.sar import ARBITRATION

MATRICES = [name for name, shape in SHAPES.items() if sum(side > 1 for side in shape) >= 2]
CHOICES = {
    "sensitivity": ("fisher_delta2", "fisher", "delta2"),
    "arbitration": ("winner", "soft", "elect", "margin", "random"),
    "agreement": ("sensitivity_mean", "mean", "winner", "sum", "multiplicity"),
    "allies": ("drop", "join"),
    "sparsify": ("magnitude", "magprune", "fisher_magnitude", "none"),
    "score": ("delta", "share", "merged"),
    "scope": ("tensor", "model"),
    "rescale": ("l2", "l1", "inverse_probability", "none"),
}


def hashes(seed: int, sparsify: str):
    """The reference's two hash functions: the product's keys. Ties are shared by all experts, magprune is not."""

    def word(key: int, x: int) -> int:
        return int(hash64(key, np.array([x], np.uint64))[0])

    def cut(key, tensor, x):
        expert = key if sparsify == "magprune" and key is not None else ""
        return word(hash_key(seed, "sar", expert, tensor), x)

    def random(key, tensor, x):
        return word(hash_key(seed, "sar", key, tensor) ^ int(ARBITRATION), x)

    return cut, random


def is_possible(choice: dict[str, str]) -> bool:
    if choice["rescale"] == "inverse_probability" and choice["sparsify"] != "magprune":
        return False
    return not (choice["sparsify"] == "fisher_magnitude" and choice["score"] != "delta")


def compare(folder, base, experts, fishers, own, parameters, seed=0, min_change=0.0, block=None):
    """Merges by both and compares values, counts and factors."""
    write_all(folder, base, experts, fishers)
    keys = list(experts)[::-1]  # written in another order than processed
    uses_fisher = parameters["sensitivity"] != "delta2" or parameters["sparsify"] == "fisher_magnitude"
    recipe = make_recipe(folder, "sar", keys, parameters, own, uses_fisher, seed=seed, min_change=min_change)
    with small_blocks(block or 2**16, 2 * (block or 2**15)):
        outcome = rlmerge.merge_to_folder(recipe, folder / "out", threads=1)
    cut, random = hashes(seed, parameters["sparsify"])
    weight = {key: own.get(key, {}).get("weight", 1.0) for key in experts}
    density = {key: own.get(key, {}).get("density", parameters["density"]) for key in experts}
    options = {key: value for key, value in parameters.items() if key not in ("lambda", "density")}
    expected = sar(
        base, experts, fishers if uses_fisher else None, weight=weight, density=density, lam=parameters["lambda"],
        min_change=min_change, hash64=cut, random_hash64=random, **options,
    )  # fmt: skip
    found = read_values(folder / "out")
    for name, value in expected.merged.items():
        # both round fp64 sums, in another order where there are several; the product's value is then one fp32
        scale = np.abs(expected.delta[name]).max(initial=0.0)
        tolerance = np.maximum(1e-6 * scale, np.spacing(np.abs(value).astype(np.float32)))
        assert (np.abs(found[name] - value) <= tolerance).all(), name
    compare_counts(outcome.report, expected, [key for key in sorted(experts) if weight[key] != 0], parameters)
    for name in MATRICES:
        factors = outcome.report["tensors"][name].get("rescale")
        if factors is not None:
            present = [factors[key] for key in sorted(experts) if weight[key] != 0]
            assert present == pytest.approx(expected.stats["factors"][name], rel=1e-12)
    return outcome, expected


def compare_counts(report: dict[str, Any], expected, keys: list[str], parameters: dict[str, Any]) -> None:
    """Exactly: these are counts."""
    total, stats = report["total"], expected.stats
    assert [total["support"][key]["count"] for key in keys] == stats["support"]
    for name in ("unique", "overlap", "conflict", "agreement", "draws"):
        assert total[name]["count"] == stats[name], name
    assert [total["wins"][key]["count"] for key in keys] == stats["wins"]
    if parameters["sparsify"] == "none":
        return
    shared = {name: expected.shares[name] != 0 for name in MATRICES}
    kept = sum((shared[name] & expected.kept[name]).sum(axis=1) for name in MATRICES)
    assert [total["kept"][key]["count"] for key in keys] == kept.tolist()


@st.composite
def cases(draw):
    """Options of every kind, two to four experts, zero and negative weights, a density an expert or one for all."""
    choice = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items()}
    if choice["sparsify"] != "magprune" and choice["rescale"] == "inverse_probability":
        choice["rescale"] = "l2"
    if choice["sparsify"] == "fisher_magnitude":
        choice["score"] = "delta"
    count = draw(st.integers(1, 4))
    densities = [0.3, 0.5, 0.8] if choice["sparsify"] == "magprune" else [0.05, 0.3, 0.5, 0.8, 1.0]
    parameters: dict[str, Any] = dict(choice)
    parameters["density"] = draw(st.sampled_from(densities))
    parameters["lambda"] = draw(st.sampled_from([1.0, 0.5, 1.7, -0.5]))
    parameters["power"] = draw(st.sampled_from([1.0, 0.0, 0.5, 3.0]))
    parameters["margin"] = draw(st.sampled_from([1.0, 0.0, 2.0, 4.0]))
    parameters["rescale_max"] = draw(st.sampled_from([1.5, 1.0, 10.0]))
    parameters["epsilon"] = draw(st.sampled_from([0.0, 0.1, 0.15]))
    own: dict[str, dict[str, float]] = {}
    for k in range(count):
        weight = draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, 1.3, -1.0, 0.0]))
        own[f"e{k}"] = {"weight": weight}
        if choice["score"] != "merged" and draw(st.booleans()):
            own[f"e{k}"]["density"] = draw(st.sampled_from([*densities, 1.0]))
    seed, min_change = draw(st.integers(0, 5)), draw(st.sampled_from([0.0, 0.0, 0.1]))
    return parameters, own, count, seed, min_change, draw(st.sampled_from([None, 8, 16])), draw(st.booleans())


@settings(max_examples=max(250, settings().max_examples))
@given(cases(), st.integers(0, 2**32), st.sampled_from([2**20, 2**20, 2**20, 10]))
def test_sar_agrees_with_the_reference(tmp_path_factory, case, random, exact):
    """`exact`: up to which size ties are counted out; above it they are kept in proportion, and norms with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.reference.sar.EXACT_TIES_UP_TO", exact)
        patch.setattr("rlmerge.methods.topk.EXACT", exact)
        patch.setattr("rlmerge.methods.topk.MANY", 3)
        patch.setattr("tests.reference.sar.MANY_TIES", 3)
        check_case(tmp_path_factory, case, random)


def check_case(tmp_path_factory, case, random):
    parameters, own, count, seed, min_change, block, grid = case
    rng = np.random.default_rng(random)
    base, experts = sparse_model(rng, count, grid=grid)
    fishers = some_fishers(rng, list(experts))
    if random % 3 == 0 and own["e0"]["weight"] != 0:  # a tensor that one Fisher lacks is arbitrated by δ²
        del fishers["e0"]["a.weight"]
    compare(tmp_path_factory.mktemp("sar"), base, experts, fishers, own, parameters, seed, min_change, block)


PAIRS = [
    choice
    for choice in (dict(zip(CHOICES, values)) for values in itertools.product(*CHOICES.values()))
    if is_possible(choice) and choice["allies"] == "join" and choice["sensitivity"] == "fisher_delta2"
]


@pytest.mark.long
@pytest.mark.parametrize("choice", PAIRS, ids=lambda choice: "-".join(choice.values()))
def test_every_combination_agrees_with_the_reference(tmp_path, choice):
    rng = np.random.default_rng(len(str(choice)))
    base, experts = sparse_model(rng, 3)
    parameters = {**choice, "density": 0.6, "lambda": 1.0, "power": 2.0, "margin": 2.0}
    compare(tmp_path, base, experts, some_fishers(rng, list(experts)), {}, parameters)


@pytest.mark.parametrize("arbitration", CHOICES["arbitration"])
@pytest.mark.parametrize("agreement", CHOICES["agreement"])
def test_every_pair_of_arbitration_and_agreement(tmp_path, arbitration, agreement):
    """Four experts, allies join, bf16 values: draws, ties and allies all occur, and the counts say so."""
    rng = np.random.default_rng(5)
    base, experts = sparse_model(rng, 4, "BF16", density=0.7)
    parameters = {"sensitivity": "delta2", "arbitration": arbitration, "agreement": agreement, "allies": "join",
                  "sparsify": "magnitude", "score": "share", "scope": "tensor", "rescale": "l2", "density": 0.6,
                  "lambda": 1.0, "margin": 2.0}  # fmt: skip
    outcome, _ = compare(tmp_path, base, experts, {}, {}, parameters)
    total = outcome.report["total"]
    assert total["conflict"]["count"] > 20
    assert total["agreement"]["count"] > 20
    if arbitration in ("winner", "elect"):
        assert total["draws"]["count"] > 0


def test_shares_of_the_hash_between_experts(tmp_path):
    """Two identical experts: what is cut at a tie is cut for both, so a consensus is kept or lost as a whole."""
    base = {"w": np.zeros((40, 50), np.float32)}
    expert = {"w": np.full((40, 50), 0.5, np.float32)}
    write_all(tmp_path, base, {"a": expert, "b": expert})
    recipe = make_recipe(tmp_path, "sar", ["a", "b"], {"sensitivity": "delta2", "density": 0.5, "rescale": "none"})
    values = dict(rlmerge.merge(recipe))["w"]
    assert sorted(set(values.ravel().tolist())) == [0.0, 0.5]
    assert np.count_nonzero(values) == 1000


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_inputs_agree_with_the_reference(tmp_path, dtype):
    """The merge of bf16 and fp16 inputs, written as fp32, against the reference on the same values."""
    rng = np.random.default_rng(9)
    base, experts = sparse_model(rng, 3, dtype, grid=False)
    write_all(tmp_path, base, experts, dtype=dtype)
    parameters = {"sensitivity": "delta2", "density": 0.5}
    recipe = make_recipe(tmp_path, "sar", list(experts), parameters, out_dtype="float32")
    cut, random = hashes(0, "magnitude")
    expected = sar(base, experts, sensitivity="delta2", density=0.5, hash64=cut, random_hash64=random)
    found = dict(rlmerge.merge(recipe))
    for name, value in expected.merged.items():
        assert (value.astype(np.float32) == found[name]).mean() > 0.9
        assert np.abs(found[name] - value).max() <= 1e-6
    assert representable(base["a.weight"], dtype).tobytes() == base["a.weight"].tobytes()


def test_survivors_of_magprune_are_divided_by_their_chance_though_their_share_is_one(tmp_path):
    """Found by hypothesis: an update that nobody contests came back as stored, not divided."""
    rng = np.random.default_rng(3)
    base, experts = sparse_model(rng, 1)
    parameters = {"sensitivity": "delta2", "sparsify": "magprune", "rescale": "inverse_probability", "density": 0.7,
                  "lambda": 1.0, "epsilon": 0.1}  # fmt: skip
    compare(tmp_path, base, experts, {}, {}, parameters)
