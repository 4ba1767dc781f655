"""The references themselves: hand-computed cases, one or more for each choice, and the design's identities on them."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.reference.sar import EXACT_TIES_UP_TO, mean_inverse_count, sar
from tests.reference.simple import linear, ram, task_arithmetic, ties

GOLDEN = Path(__file__).parent / "golden"


def f32(*values):
    return np.array(values, dtype=np.float32)


def model(*values, name="v"):
    """A model of one 1-D tensor (never sparsified)."""
    return {name: f32(*values)}


def matrix(*values):
    """A model of one 2 x n/2 tensor (sparsified)."""
    return {"m": f32(*values).reshape(2, -1)}


def hash64(key, tensor, coordinate):
    text = f"{key}|{tensor}|{coordinate}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def delta(outcome):
    (values,) = outcome.delta.values()
    return values.reshape(-1).tolist()


def shares(outcome):
    (values,) = outcome.shares.values()
    return values.tolist()


def resolve(deltas, fisher=None, **options):
    """Merge experts a, b, c… of a zero base, given as lists of deltas, without sparsifying."""
    names = "abcdef"[: len(deltas)]
    experts = {key: model(*values) for key, values in zip(names, deltas)}
    fishers = fisher and {key: model(*values) for key, values in zip(names, fisher)}
    if fisher is None:
        options.setdefault("sensitivity", "delta2")
    options.setdefault("density", 1.0)
    return sar(model(*[0.0] * len(deltas[0])), experts, fishers, **options)


# -- supports, counts, weights -----------------------------------------------------------------------------------------


def test_counts_of_support_regions():
    #           unique a, agreement, conflict (b larger), draw, nothing
    outcome = resolve([[1, 1, 1, 2, 0], [0, 3, -2, -2, 0]])
    stats = outcome.stats
    assert stats["support"] == [4, 3]
    assert (stats["unique"], stats["overlap"], stats["conflict"], stats["agreement"]) == (1, 3, 2, 1)
    assert (stats["draws"], stats["wins"]) == (1, [0, 1])
    # agreement, s = 1 and 9: (1·1 + 9·3)/10 = 2.8
    assert delta(outcome) == pytest.approx([1, 2.8, -2, 0, 0], abs=1e-15)


def test_minus_zero_equals_zero_and_the_base_is_returned_bit_for_bit():
    outcome = sar(model(-0.0, 0.0), {"a": model(0.0, -0.0)}, sensitivity="delta2")
    assert outcome.stats["support"] == [0]
    assert np.signbit(outcome.merged["v"]).tolist() == [True, False]


def test_min_change_is_relative_to_the_larger_value_and_strict():
    # base 4: changes of 1/4 of the larger value: 3 -> |Δ| = 1 = 0.25·4 (not above), 2 -> 2 > 1, 5 -> 1 < 1.25
    base, expert = model(4, 4, 4), {"a": model(3, 2, 5)}
    outcome = sar(base, expert, sensitivity="delta2", min_change=0.25)
    assert outcome.stats["support"] == [1]
    assert outcome.merged["v"].tolist() == [4, 2, 4]


def test_min_change_does_not_see_the_weight():
    outcome = sar(model(4), {"a": model(2)}, sensitivity="delta2", min_change=0.25, weight={"a": 0.001})
    assert outcome.stats["support"] == [1]


def test_weight_zero_removes_the_expert_and_its_fisher():
    base, experts = model(0, 0), {"a": model(1, 1), "b": model(-5, 0)}
    outcome = sar(base, experts, {"a": model(1, 1)}, weight={"b": 0.0})
    assert outcome.merged["v"].tolist() == [1, 1]
    assert outcome.stats["support"] == [2]
    assert outcome.stats["conflict"] == 0


def test_negative_weight_turns_agreement_into_conflict():
    # d = 1 and -2: s = 1, 4: b wins
    outcome = resolve([[1], [2]], weight={"b": -1.0})
    assert (outcome.stats["conflict"], delta(outcome)) == (1, [-2])


def test_weight_enters_sensitivity_and_lambda_does_not():
    # d = 2 and -1.5: a wins although δ_b is larger; λ = 0.5 -> 1
    outcome = resolve([[1], [-1.5]], weight={"a": 2.0}, lam=0.5)
    assert delta(outcome) == [1]


def test_no_expert_left_returns_the_base():
    outcome = sar(model(1, 2), {"a": model(3, 4)}, weight={"a": 0})
    assert outcome.merged["v"].tolist() == [1, 2]


# -- sensitivity -------------------------------------------------------------------------------------------------------


def test_fisher_is_divided_by_its_own_mean():
    # F_a = 1, 3 (mean 2): F̂ = .5, 1.5. F_b = 100, 100: F̂ = 1, 1. d = 1 | -1 everywhere.
    # s_a = .5, 1.5; s_b = 1, 1: b wins the first coordinate, a the second
    outcome = resolve([[1, 1], [-1, -1]], fisher=[[1, 3], [100, 100]])
    assert delta(outcome) == [-1, 1]
    assert outcome.stats["wins"] == [1, 1]


def test_sensitivities_differ():
    # F̂_a = 3, (1 elsewhere), d = 1; F̂_b = 1, d = -2. F̂·d²: 3 < 4 b. F̂ alone: a. d²: b.
    deltas, fisher = [[1, 0, 0], [-2, 0, 0]], [[3, 0, 0], [1, 1, 1]]
    assert delta(resolve(deltas, fisher))[0] == -2
    assert delta(resolve(deltas, fisher, sensitivity="fisher"))[0] == 1
    assert delta(resolve(deltas, fisher, sensitivity="delta2"))[0] == -2


def test_mean_runs_over_common_tensors_weighted_by_count_and_the_rest_uses_delta2():
    # common: u (1 entry), v (3 entries). F_a: 6 | 2, 0, 0: mean 8/4 = 2 (not the mean of tensor means).
    # v[0]: F̂_a = 1, F̂_b = .5 (b: 4 | 1, 1, 2: mean 2): a wins with d = ±1.
    # w: only a has a Fisher (huge): d² decides, b with -2 wins
    base = {"u": f32(0), "v": f32(0, 0, 0), "w": f32(0)}
    a = {"u": f32(0), "v": f32(1, 0, 0), "w": f32(1)}
    b = {"u": f32(0), "v": f32(-1, 0, 0), "w": f32(-2)}
    fisher_a = {"u": f32(6), "v": f32(2, 0, 0), "w": f32(1e9)}
    fisher_b = {"u": f32(4), "v": f32(1, 1, 2)}
    outcome = sar(base, {"a": a, "b": b}, {"a": fisher_a, "b": fisher_b})
    assert outcome.merged["v"].tolist() == [1, 0, 0]
    assert outcome.merged["w"].tolist() == [-2]


@pytest.mark.parametrize(
    ("fishers", "message"),
    [
        (None, "delta2"),
        ({}, "delta2"),
        ({"a": model(1)}, "some"),
        ({"a": model(1), "b": model(0)}, "all zero"),
        ({"a": model(1), "b": model(1, name="other")}, "no tensor"),
    ],
)
def test_fisher_errors(fishers, message):
    with pytest.raises(ValueError, match=message):
        sar(model(0), {"a": model(1), "b": model(1)}, fishers)


def test_unknown_choices_are_errors():
    for option in ("sensitivity", "arbitration", "agreement", "allies", "sparsify", "score", "scope", "rescale"):
        with pytest.raises(ValueError, match=option):
            resolve([[1]], **{option: "no such thing"})
    with pytest.raises(ValueError, match="magprune"):
        resolve([[1]], rescale="inverse_probability")
    with pytest.raises(ValueError, match="one density"):
        resolve([[1], [1]], score="merged", density={"a": 0.5, "b": 0.4})


# -- conflict ----------------------------------------------------------------------------------------------------------


def test_winner_of_equal_sensitivity_is_the_longer_update():
    # F̂_a = 4 (mean of 4,0,0,0 is 1), d = 1; F̂_b = 1, d = -2: both s = 4; |d| decides for b
    outcome = resolve([[1, 0, 0, 0], [-2, 0, 0, 0]], fisher=[[4, 0, 0, 0], [1, 1, 1, 1]])
    assert delta(outcome) == [-2, 0, 0, 0]


def test_equal_sensitivity_and_length_of_opposite_signs_is_a_draw():
    outcome = resolve([[1], [-1], [0.5]])
    assert (delta(outcome), outcome.stats["draws"], outcome.stats["wins"]) == ([0], 1, [0, 0, 0])
    assert outcome.merged["v"].tolist() == [0]


def test_zero_sensitivity_everywhere_still_lets_the_longer_win():
    outcome = resolve([[1, 0], [-2, 0]], fisher=[[0, 1], [0, 1]])
    assert delta(outcome) == [-2, 0]


def test_equal_winners_share_the_update():
    # a and b: s = 4, d = 2; c loses
    outcome = resolve([[2], [2], [-1]])
    assert shares(outcome) == [[0.5], [0.5], [0]]
    assert (delta(outcome), outcome.stats["wins"]) == ([2], [1, 1, 0])


def test_allies_drop_and_join():
    # d = 3 | 1 | -2, s = 9, 1, 4: a wins, b is its ally
    deltas = [[3], [1], [-2]]
    assert delta(resolve(deltas)) == [3]
    assert delta(resolve(deltas, allies="join")) == pytest.approx([2.8])  # (9·3 + 1·1)/10
    assert delta(resolve(deltas, allies="join", agreement="mean")) == [2]
    assert delta(resolve(deltas, allies="join", agreement="sum")) == [4]
    assert delta(resolve(deltas, allies="join", agreement="winner")) == [3]
    # a and b conflict nowhere in the model: φ = 1, shares 1/2 each
    assert delta(resolve(deltas, allies="join", agreement="multiplicity")) == [2]
    assert resolve(deltas, allies="join").stats["wins"] == [1, 0, 0]


def test_random_takes_the_largest_hash():
    order = {"a": 5, "b": 2**63 + 9, "c": 7}
    outcome = resolve([[3, 1], [-1, 0], [2, -1]], arbitration="random", hash64=lambda key, tensor, x: order[key])
    # coordinate 0: b; coordinate 1: only a and c are active, c
    assert delta(outcome) == [-1, -1]
    assert outcome.stats["wins"] == [0, 1, 1]
    with pytest.raises(ValueError, match="hash64"):
        resolve([[1], [-1]], arbitration="random")


def test_random_may_have_a_hash_of_its_own_and_knows_allies():
    outcome = resolve(
        [[3], [-1], [2]], arbitration="random", allies="join", agreement="sum",
        hash64=lambda key, tensor, x: {"a": 0, "b": 9, "c": 0}[key],
        random_hash64=lambda key, tensor, x: {"a": 3, "b": 1, "c": 2}[key],
    )  # fmt: skip
    assert (delta(outcome), outcome.stats["wins"]) == ([5], [1, 0, 0])


def test_soft():
    # d = 2 | -1, s = 4, 1. a = 1: weights 4/5, 1/5 -> 1.6 - .2; a = 0: .5, .5; a = 2: 16/17, 1/17
    deltas = [[2], [-1]]
    assert delta(resolve(deltas, arbitration="soft")) == pytest.approx([1.4])
    assert delta(resolve(deltas, arbitration="soft", power=0)) == [0.5]
    assert delta(resolve(deltas, arbitration="soft", power=2)) == pytest.approx([31 / 17])
    assert delta(resolve(deltas, arbitration="soft", power=1e4)) == [2]
    outcome = resolve([[2, 0], [-1, 0]], fisher=[[0, 1], [0, 1]], arbitration="soft")
    assert shares(outcome) == [[0.5, 0], [0.5, 0]]  # all sensitivities zero
    assert outcome.stats["wins"] == [1, 0]  # the larger |d| leads the blend
    assert resolve([[2], [-2]], arbitration="soft").stats["wins"] == [0, 0]


def test_margin():
    # s = 9, 4: κ = 2.25 still a winner, above it soft (9·3 - 4·2)/13
    deltas = [[3], [-2]]
    assert delta(resolve(deltas, arbitration="margin", margin=2.25)) == [3]
    soft = resolve(deltas, arbitration="margin", margin=2.5)
    assert delta(soft) == pytest.approx([19 / 13])
    assert soft.stats["wins"] == [1, 0]
    # the second largest may be an ally: s = 9, 6.25, 1
    assert delta(resolve([[3], [2.5], [-1]], arbitration="margin", margin=2))[0] != 3
    # κ = 1 is `winner`, draws included
    assert resolve([[1], [-1]], arbitration="margin").stats["draws"] == 1
    # κ > 1: equal s never has a margin, so no draw but a soft 0
    outcome = resolve([[1], [-1]], arbitration="margin", margin=2)
    assert (delta(outcome), outcome.stats["draws"]) == ([0], 0)


def test_elect():
    # s = 9 | 4 | 4, d = 3 | -2 | -2: sums 9 > 8: a.   d = 3 | -2 | -2.5: 9 < 10.25: b and c
    assert delta(resolve([[3], [-2], [-2]], arbitration="elect")) == [3]
    deltas = [[3], [-2], [-2.5]]
    assert delta(resolve(deltas, arbitration="elect", agreement="mean")) == [-2.25]
    assert delta(resolve(deltas, arbitration="elect", agreement="sum")) == [-4.5]
    assert delta(resolve(deltas, arbitration="elect", agreement="winner")) == [-2.5]
    # sensitivity_mean: (4·2 + 6.25·2.5)/10.25
    assert delta(resolve(deltas, arbitration="elect")) == pytest.approx([-(8 + 15.625) / 10.25])
    # 25 = 9 + 16: a draw; so are sensitivities that are all zero
    assert resolve([[5], [-3], [-4]], arbitration="elect").stats["draws"] == 1
    assert resolve([[2, 0], [-1, 0]], fisher=[[0, 1], [0, 1]], arbitration="elect").stats["draws"] == 1


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_agreement_rules():
    # F̂_a = 3 (3, 0, 0), F̂_b = 1: d = 1 | 2: s = 3, 4
    deltas, fisher = [[1, 0, 0], [2, 0, 0]], [[3, 0, 0], [1, 1, 1]]
    assert delta(resolve(deltas, fisher))[0] == pytest.approx((3 * 1 + 4 * 2) / 7)
    assert delta(resolve(deltas, fisher, agreement="mean"))[0] == 1.5
    assert delta(resolve(deltas, fisher, agreement="winner"))[0] == 2
    assert delta(resolve(deltas, fisher, agreement="sum"))[0] == 3
    assert shares(resolve([[2], [2], [1]], agreement="winner")) == [[0.5], [0.5], [0]]


def test_sensitivity_mean_of_zeros_is_the_mean():
    outcome = resolve([[1, 0], [3, 0]], fisher=[[0, 1], [0, 1]])
    assert delta(outcome) == [2, 0]


def test_multiplicity_of_two():
    # overlap 4, conflict 1: c = 1/4, φ = 1 - (1/4)/(3/4) = 2/3, r = φ/2 + (1 - φ) = 2/3 each
    outcome = resolve([[1, 1, 1, 2, 5], [1, 2, 1, -1, 0]], agreement="multiplicity")
    assert delta(outcome) == pytest.approx([4 / 3, 2, 4 / 3, 2, 5])
    # conflict in half of the overlap or more: nothing is shared, so the sum
    assert delta(resolve([[1, 1], [2, -2]], agreement="multiplicity")) == [3, -2]


def test_multiplicity_of_three_counts_pairs_over_the_whole_model():
    # u: all three agree once. v: a,b agree once more and conflict never; a,c conflict once; b,c conflict twice in 3.
    #   a,b: overlap u0 v0     conflict 0 -> φ = 1
    #   a,c: overlap u0 v1 v4  conflict 1 -> c = 1/3 -> φ = 1 - 1/2 = 1/2
    #   b,c: overlap u0 v2 v3  conflict 2 -> φ = 0
    #   r_a = E 1/(1+N), φ 1, 1/2: N = 1 or 2: (1/2 + 1/3)/2 = 5/12;  r_b: φ 1, 0: 1/2;  r_c: φ 1/2, 0: 3/4
    base = {"u": f32(0), "v": f32(0, 0, 0, 0, 0)}
    a = {"u": f32(12), "v": f32(1, 1, 0, 0, 1)}
    b = {"u": f32(2), "v": f32(1, 0, 1, 1, 0)}
    c = {"u": f32(4), "v": f32(0, -2, -2, -2, 1)}
    outcome = sar(base, {"a": a, "b": b, "c": c}, sensitivity="delta2", agreement="multiplicity", density=1)
    assert outcome.shares["u"].ravel() == pytest.approx([5 / 12, 1 / 2, 3 / 4])
    assert outcome.merged["u"] == pytest.approx([5 + 1 + 3])


def test_mean_inverse_count():
    assert mean_inverse_count([]) == 1
    assert mean_inverse_count([1, 1]) == pytest.approx(1 / 3)
    assert mean_inverse_count([0.5, 0.5]) == pytest.approx(0.25 + 0.5 / 2 + 0.25 / 3)
    # equal p: (1 - (1-p)^(n+1)) / ((n+1) p)
    assert mean_inverse_count([0.3] * 5) == pytest.approx((1 - 0.7**6) / (6 * 0.3))


# -- sparsify ----------------------------------------------------------------------------------------------------------


def one(*values, **options):
    """Merge one expert of a zero base, a 2 x n/2 matrix."""
    options.setdefault("sensitivity", "delta2")
    options.setdefault("rescale", "none")
    options.setdefault("hash64", hash64)
    return sar(matrix(*[0] * len(values)), {"a": matrix(*values)}, **options)


def test_density_counts_non_zero_updates():
    # 5 of 8 are not zero: k = int(.5·5) = 2
    outcome = one(0, 5, 0, -4, 3, 2, 0, 1, density=0.5)
    assert delta(outcome) == [0, 5, 0, -4, 0, 0, 0, 0]
    assert (outcome.stats["eligible"], outcome.stats["kept"]) == ([5], [2])


def test_at_least_one_is_kept_and_int_is_of_the_float_product():
    assert one(1, 2, 3, 4, density=0.01).stats["kept"] == [1]
    values = np.arange(1, 101)
    assert one(*values, density=0.29).stats["kept"] == [28]  # 0.29·100 = 28.999999999999996
    assert one(*values, density=0.3).stats["kept"] == [30]
    assert one(0, 0, density=0.5).stats["kept"] == [0]


def test_density_one_keeps_everything_and_needs_no_hash():
    outcome = one(1, 1, 1, 1, density=1.0, rescale="l2", hash64=None)
    assert (delta(outcome), outcome.stats["factors"]) == ([1, 1, 1, 1], {"m": [1.0]})


def test_tensors_with_fewer_than_two_long_dimensions_are_never_sparsified():
    shapes = {"row": (1, 4), "deep": (1, 4, 1), "flat": (4,), "scalar": (), "square": (2, 2), "box": (2, 1, 2)}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    expert = {name: 1 + np.arange(math.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    for scope in ("tensor", "model"):
        outcome = sar(base, {"a": expert}, sensitivity="delta2", density=0.5, rescale="l2", scope=scope, hash64=hash64)
        kept = {name: int((outcome.merged[name] != 0).sum()) for name in shapes}
        assert kept == {"row": 4, "deep": 4, "flat": 4, "scalar": 1, "square": 2, "box": 2}
        assert (outcome.stats["eligible"], outcome.stats["kept"]) == ([8], [4])
        # before 1+4+9+16 = 30, after 25
        assert outcome.stats["factors"]["row"] == [1.0]
        assert outcome.stats["factors"]["box"] == pytest.approx([math.sqrt(30 / 25)])


def test_score_delta_share_and_merged():
    # agreement by mean: t_a = 2, 3, 0, 0 / t_b = 2, 0, 1.5, 0 (shares 1/2, 1). n = 2 each, density .5 keeps one.
    # delta: |d_a| = 4 > 3, |d_b| = 4 > 1.5: both keep coordinate 0
    # share: |t_a| = 2 < 3: coordinate 1; |t_b| = 2 > 1.5: coordinate 0
    # merged: sums 4, 3, 1.5: n = 3, int(1.5) = 1: coordinate 0 keeps both
    base, experts = matrix(0, 0, 0, 0), {"a": matrix(4, 3, 0, 0), "b": matrix(4, 0, 1.5, 0)}

    def run(score):
        return sar(base, experts, sensitivity="delta2", agreement="mean", density=0.5, rescale="none", score=score)

    assert delta(run("delta")) == [4, 0, 0, 0]
    assert delta(run("share")) == [2, 3, 0, 0]
    merged = run("merged")
    assert delta(merged) == [4, 0, 0, 0]
    assert (merged.stats["eligible"], merged.stats["kept"]) == ([3, 3], [1, 1])


def test_score_merged_drops_updates_that_cancel():
    # soft, a = 0: t = ±1/2 at 0 (sum 0: not eligible); the rest unique, n = 2, k = max(1, int(1.8)) = 1
    base, experts = matrix(0, 0, 0, 0), {"a": matrix(1, 3, 0, 0), "b": matrix(-1, 0, 2, 0)}
    outcome = sar(base, experts, sensitivity="delta2", arbitration="soft", power=0, density=0.9, score="merged",
                  rescale="l2")  # fmt: skip
    assert outcome.stats["eligible"] == [2, 2]
    assert outcome.kept["m"].tolist() == [[False, True, False, False]] * 2
    # the norm before includes the cancelling update: a: sqrt(.25 + 9)/3; b keeps nothing: 1
    assert outcome.stats["factors"]["m"] == pytest.approx([math.sqrt(9.25) / 3, 1.0])


def test_score_is_compared_in_float32():
    # δ = 1 and -(1 + 2^-30) differ in fp64 and are one float32: the hash decides, here for coordinate 0
    base, experts = matrix(0, 1, 0, 0), {"a": matrix(1, -(2.0**-30), 0, 0)}
    outcome = sar(base, experts, sensitivity="delta2", density=0.5, rescale="none", hash64=lambda key, tensor, x: x)
    assert outcome.kept["m"].tolist() == [[True, False, False, False]]


def test_ties_at_the_threshold_go_to_the_smallest_hashes():
    # one 2, five 1s: k = int(.5·6) = 3: the 2 and the two smallest hashes
    hashes = {0: 50, 1: 10, 2: 40, 3: 2**64 - 1, 4: 30, 5: 20}
    outcome = one(1, -1, 2, 1, 1, 1, density=0.5, hash64=lambda key, tensor, x: hashes[x])
    assert delta(outcome) == [0, -1, 2, 0, 0, 1]


def test_ties_at_model_scope_are_kept_below_a_hash_threshold():
    # 6 ties, wanted 3: hash < 2^63 (strictly): 4 are kept, one is on the threshold
    values = [1, 2**63 - 1, 2**63, 2**64 - 1, 5, 6]
    outcome = one(1, 1, 1, 1, 1, 1, density=0.5, scope="model", hash64=lambda key, tensor, x: values[x])
    assert delta(outcome) == [1, 1, 0, 0, 1, 1]
    assert outcome.stats["kept"] == [4]


def test_large_tensors_use_the_hash_threshold_too(monkeypatch):
    assert EXACT_TIES_UP_TO == 2**20
    monkeypatch.setattr("tests.reference.sar.EXACT_TIES_UP_TO", 5)
    outcome = one(1, 1, 1, 1, 1, 1, density=0.5, hash64=lambda key, tensor, x: 0)
    assert outcome.stats["kept"] == [6]


def test_hash_knows_expert_tensor_and_coordinate():
    asked = set()

    def spy(key, tensor, x):
        asked.add((key, tensor, x))
        return x

    base, experts = matrix(0, 0, 0, 0), {"b": matrix(1, 1, 0, 0), "a": matrix(0, 0, 1, 1)}
    sar(base, experts, sensitivity="delta2", density=0.5, hash64=spy)
    assert asked == {("a", "m", 2), ("a", "m", 3), ("b", "m", 0), ("b", "m", 1)}
    asked.clear()
    sar(base, experts, sensitivity="delta2", density=0.5, score="merged", hash64=spy)
    assert asked == {(None, "m", x) for x in range(4)}


def test_scope_model_compares_across_tensors():
    base = {"m": np.zeros((2, 2), np.float32), "n": np.zeros((2, 2), np.float32)}
    expert = {"m": f32(1, 2, 3, 4).reshape(2, 2), "n": f32(5, 6, 7, 8).reshape(2, 2)}
    outcome = sar(base, {"a": expert}, sensitivity="delta2", density=0.5, scope="model", rescale="l1")
    # k = 4: all of n; l1: 36/26, one factor for both
    assert outcome.delta["m"].ravel().tolist() == [0, 0, 0, 0]
    assert outcome.delta["n"].ravel() == pytest.approx([v * 36 / 26 for v in (5, 6, 7, 8)])
    assert outcome.stats["factors"] == {"m": [pytest.approx(36 / 26)], "n": [pytest.approx(36 / 26)]}
    assert sar(base, {"a": expert}, sensitivity="delta2", density=0.5).stats["kept"] == [4]


def test_density_per_expert():
    base, experts = matrix(0, 0, 0, 0), {"a": matrix(1, 2, 0, 0), "b": matrix(0, 0, 3, 4)}
    outcome = sar(base, experts, sensitivity="delta2", density={"a": 1.0, "b": 0.5})
    assert outcome.stats["kept"] == [2, 1]
    assert delta(outcome) == pytest.approx([1, 2, 0, 5])  # b: 5/4 · 4
    assert outcome.stats["factors"]["m"] == [1.0, 1.25]


def test_fisher_magnitude():
    # |d|·sqrt(F̂), F = 4, 4, 64, 0 (mean 18): d = 3, 2, 1, 9: 6, 4, 8, 0 over sqrt(18): keeps 2 and 0
    base, expert = matrix(0, 0, 0, 0), {"a": matrix(3, 2, 1, 9)}
    fisher = {"a": matrix(4, 4, 64, 0)}
    options = {"density": 0.5, "rescale": "none", "sparsify": "fisher_magnitude"}
    assert delta(sar(base, expert, fisher, **options)) == [3, 0, 1, 0]
    # the root counts: |d|·sqrt(F) = 9, 4, 8, 0 keeps coordinate 0, |d|·F = 9, 8, 64, 0 would keep coordinate 2
    expert, other = {"a": matrix(9, 2, 1, 9)}, {"a": matrix(1, 4, 64, 0)}
    assert delta(sar(base, expert, other, **(options | {"density": 0.3}))) == [9, 0, 0, 0]
    expert = {"a": matrix(3, 2, 1, 9)}
    # it needs a Fisher even where the sensitivity does not
    assert delta(sar(base, expert, fisher, sensitivity="delta2", **options)) == [3, 0, 1, 0]
    with pytest.raises(ValueError, match="Fisher"):
        sar(base, expert, sensitivity="delta2", **options)


def test_sparsify_none():
    outcome = one(1, 2, 3, 4, sparsify="none", density=0.1, rescale="l2")
    assert (delta(outcome), outcome.stats["kept"], outcome.stats["factors"]) == ([1, 2, 3, 4], [4], {"m": [1.0]})


# -- magprune ----------------------------------------------------------------------------------------------------------


def test_magprune_probabilities_and_inverse_rescale():
    # |d| = 1, 2, 2, 4: mid-ranks .5, 2, 2, 3.5 over 4; density .5, epsilon .2: p = .3 + .4·midrank = .35, .5, .5, .65
    expected = [0.35, 0.5, 0.5, 0.65]

    def run(fraction):
        return one(1, -2, 2, 4, density=0.5, epsilon=0.2, sparsify="magprune", rescale="inverse_probability",
                   hash64=lambda key, tensor, x: int(fraction[x] * 2**64))  # fmt: skip

    assert delta(run([p - 0.01 for p in expected])) == pytest.approx([1 / 0.35, -4, 4, 4 / 0.65])
    assert delta(run([p + 0.01 for p in expected])) == [0, 0, 0, 0]
    assert delta(run([0.5] * 4)) == pytest.approx([0, 0, 0, 4 / 0.65])  # hash < p strictly
    assert run([0.4] * 4).stats["kept"] == [3]
    assert run([0.4] * 4).stats["factors"] == {"m": [1.0]}


def test_magprune_ranks_see_eight_mantissa_bits():
    # 1 and 1 + 2^-9 rank as equal (p = .5 each), 1 + 2^-8 does not
    options = {"density": 0.5, "epsilon": 0.2, "sparsify": "magprune"}
    half = {"hash64": lambda key, tensor, x: int(0.45 * 2**64)}
    assert one(1, 1 + 2**-9, 0, 0, **options, **half).stats["kept"] == [2]
    assert one(1, 1 + 2**-8, 0, 0, **options, **half).stats["kept"] == [1]


def test_magprune_is_unbiased_and_keeps_the_density():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000)
    outcome = one(*values, density=0.6, sparsify="magprune", rescale="inverse_probability")
    # n·p(1-p) is at most 2000·.25: sd of the share below .0112; 4 sd
    assert outcome.stats["kept"][0] / 2000 == pytest.approx(0.6, abs=0.045)
    kept = one(*values, density=0.6, sparsify="magprune", rescale="l1")
    assert kept.stats["factors"]["m"][0] == pytest.approx(
        np.abs(values).sum() / np.abs(values[np.array(delta(kept)) != 0]).sum(), rel=1e-6  # values are float32 in there
    )  # fmt: skip


def test_magprune_at_density_one_keeps_everything():
    outcome = one(1, 2, 3, 4, density=1.0, sparsify="magprune", rescale="inverse_probability", hash64=None)
    assert (delta(outcome), outcome.stats["kept"]) == ([1, 2, 3, 4], [4])


def test_magprune_nothing_kept():
    outcome = one(1, 2, 0, 0, density=0.5, sparsify="magprune", rescale="l2", hash64=lambda key, tensor, x: 2**64 - 1)
    assert (delta(outcome), outcome.stats["factors"]) == ([0, 0, 0, 0], {"m": [1.0]})


def test_magprune_probability_is_capped_at_one():
    # density .95, epsilon .2, mid-ranks 1/4, 3/4: p = .85, 1.05 -> 1
    outcome = one(1, 2, 0, 0, density=0.95, epsilon=0.2, sparsify="magprune", rescale="inverse_probability",
                  hash64=lambda key, tensor, x: 2**63)  # fmt: skip
    assert delta(outcome) == pytest.approx([1 / 0.85, 2, 0, 0])


# -- rescale -----------------------------------------------------------------------------------------------------------


def test_rescale():
    # d = 3, 4, 0, 0: density .5 keeps 4. l2: 5/4; l1: 7/4, capped at 1.5
    assert delta(one(3, 4, 0, 0, density=0.5, rescale="l2")) == [0, 5, 0, 0]
    assert delta(one(3, 4, 0, 0, density=0.5, rescale="l1")) == [0, 6, 0, 0]
    assert delta(one(3, 4, 0, 0, density=0.5, rescale="l1", rescale_max=9)) == [0, 7, 0, 0]
    assert delta(one(3, 4, 0, 0, density=0.5, rescale="l2", rescale_max=1.125)) == [0, 4.5, 0, 0]
    assert delta(one(3, 4, 0, 0, density=0.5, rescale="none")) == [0, 4, 0, 0]


def test_norms_are_of_the_resolved_updates():
    # a = 4, 6 | b = 4, 0: mean in agreement: t_a = 2, 6; a keeps 6: sqrt(40)/6
    base, experts = matrix(0, 0, 0, 0), {"a": matrix(4, 6, 0, 0), "b": matrix(4, 0, 0, 0)}
    outcome = sar(base, experts, sensitivity="delta2", agreement="mean", density=0.5)
    assert outcome.stats["factors"]["m"] == [pytest.approx(math.sqrt(40) / 6), 1.0]
    assert delta(outcome) == pytest.approx([2, math.sqrt(40), 0, 0])


# -- stored values -----------------------------------------------------------------------------------------------------

FAR = (1e20, 1e-20)  # base and expert so far apart that base + (expert - base) is 0 in fp64


@pytest.mark.parametrize(
    ("options", "copied"),
    [
        ({}, True),
        ({"lam": 2.0, "weight": {"a": 0.5, "b": 0.5}}, True),
        ({"lam": 0.5}, False),
        ({"agreement": "mean"}, True),
        ({"agreement": "winner"}, True),
        ({"agreement": "sum"}, False),
        ({"agreement": "multiplicity"}, False),
        ({"weight": {"a": 1.0, "b": 0.5}}, False),
    ],
)
def test_a_whole_update_is_the_stored_value(options, copied):
    base, expert = model(FAR[0]), model(FAR[1])
    outcome = sar(base, {"a": expert, "b": expert}, sensitivity="delta2", **options)
    assert (outcome.merged["v"][0] == float(expert["v"][0])) == copied


def test_unique_and_winner_copy_and_rescaled_or_half_kept_updates_do_not():
    assert sar(model(FAR[0]), {"a": model(FAR[1])}, sensitivity="delta2").merged["v"][0] == np.float32(FAR[1])
    experts = {"a": model(FAR[1]), "b": model(1.5e20)}
    assert sar(model(FAR[0]), experts, sensitivity="delta2").merged["v"][0] == np.float32(FAR[1])
    base, expert = matrix(FAR[0], 0, 0, 0), {"a": matrix(FAR[1], 1e19, 0, 0)}
    outcome = sar(base, expert, sensitivity="delta2", density=0.5)
    assert outcome.stats["factors"]["m"][0] > 1
    assert outcome.merged["m"].ravel()[0] != np.float32(FAR[1])
    # two experts agree at 0, but b keeps only coordinate 1: half of the update remains
    base, a, b = matrix(0, 0, 0, 0), matrix(2, 0, 0, 0), matrix(2, 3, 0, 0)
    outcome = sar(base, {"a": a, "b": b}, sensitivity="delta2", density=0.5, rescale="none")
    assert delta(outcome) == [1, 3, 0, 0]


def test_half_kept_agreement_is_not_copied():
    # coordinate 0: both go from 1e20 to 1e-20 and share by the mean; b's only kept update is the longer one at 1
    base, a, b = matrix(FAR[0], 0, 0, 0), matrix(FAR[1], 0, 0, 0), matrix(FAR[1], 3e20, 0, 0)
    outcome = sar(base, {"a": a, "b": b}, sensitivity="delta2", agreement="mean", density=0.5, rescale="none")
    assert outcome.kept["m"][:, 0].tolist() == [True, False]
    assert outcome.merged["m"].ravel()[0] == pytest.approx(5e19)  # base + δ/2


@pytest.mark.parametrize("options", [{"arbitration": "soft"}, {"arbitration": "elect", "agreement": "sum"}])
def test_a_single_share_of_one_is_copied_under_every_rule(options):
    # a has all the sensitivity (F̂_b is 0 at coordinate 0), so r = 1, 0
    base, a, b = model(FAR[0], 0), model(FAR[1], 0), model(1.5e20, 0)
    outcome = sar(base, {"a": a, "b": b}, {"a": model(1, 1), "b": model(0, 1)}, **options)
    assert outcome.merged["v"][0] == np.float32(FAR[1])


# -- identities of the design ------------------------------------------------------------------------------------------


def random_models(K=3, seed=0, density=0.5, steps=False, zero_base=False):
    """A base, K experts and K Fishers, two matrices and a vector; deltas are ±1, ±2 ulp-like steps if `steps`."""
    rng = np.random.default_rng(seed)
    shapes = {"m": (6, 8), "n": (5, 7), "v": (9,)}
    base = {name: rng.normal(size=shape).astype(np.float32) * (not zero_base) for name, shape in shapes.items()}
    experts, fishers = {}, {}
    for i in range(K):
        experts[f"e{i}"], fishers[f"e{i}"] = {}, {}
        for name, shape in shapes.items():
            change = rng.choice([-2, -1, 1, 2], size=shape) / 1024 if steps else rng.normal(size=shape) / 100
            change = change * (rng.random(shape) < density)
            experts[f"e{i}"][name] = (base[name] + change).astype(np.float32)
            fishers[f"e{i}"][name] = (rng.exponential(size=shape) ** 3 * 1e-9).astype(np.float32)
    return base, experts, fishers


def assert_bits(first, second):
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


CHOICES = [
    {},
    {"allies": "join"},
    {"allies": "join", "agreement": "multiplicity"},
    {"arbitration": "random"},
    {"arbitration": "soft", "power": 0.7},
    {"arbitration": "elect", "agreement": "mean"},
    {"arbitration": "margin", "margin": 3.0, "agreement": "winner"},
    {"agreement": "sum", "score": "share", "scope": "model"},
    {"score": "merged", "rescale": "l1"},
    {"sensitivity": "delta2", "score": "merged", "scope": "model"},
    {"sensitivity": "fisher", "sparsify": "fisher_magnitude", "scope": "model"},
    {"sparsify": "magprune", "rescale": "inverse_probability"},
    {"sparsify": "magprune", "score": "merged", "rescale": "l2"},
    {"sparsify": "none", "agreement": "multiplicity"},
]


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("options", CHOICES)
def test_order_of_experts_is_irrelevant(options, steps):
    base, experts, fishers = random_models(steps=steps)
    one = sar(base, experts, fishers, density=0.6, hash64=hash64, **options)
    two = sar(base, dict(reversed(experts.items())), fishers, density=0.6, hash64=hash64, **options)
    assert_bits(one.merged, two.merged)
    assert one.stats == two.stats


@pytest.mark.parametrize("options", CHOICES)
def test_scale_of_a_fisher_is_irrelevant(options):
    base, experts, fishers = random_models(steps=True)
    one = sar(base, experts, fishers, density=0.6, hash64=hash64, **options)
    fishers["e1"] = {name: values * np.float32(2**-20) for name, values in fishers["e1"].items()}
    assert_bits(one.merged, sar(base, experts, fishers, density=0.6, hash64=hash64, **options).merged)
    fishers["e1"] = {name: values * np.float32(3) for name, values in fishers["e1"].items()}
    two = sar(base, experts, fishers, density=0.6, hash64=hash64, **options).merged
    for name in base:  # F·3 is itself rounded to float32 (2^-24), so more than an ulp of fp64
        np.testing.assert_allclose(two[name], one.merged[name], rtol=1e-6)


@pytest.mark.parametrize("options", CHOICES)
def test_scale_of_the_updates_is_the_scale_of_the_merged_update(options):
    base, experts, fishers = random_models(zero_base=True)
    small = {key: {name: v * np.float32(2**-9) for name, v in expert.items()} for key, expert in experts.items()}
    one = sar(base, experts, fishers, density=0.6, hash64=hash64, **options)
    two = sar(base, small, fishers, density=0.6, hash64=hash64, **options)
    assert_bits({name: v * 2**-9 for name, v in one.delta.items()}, two.delta)


FULL = [
    {key: value for key, value in options.items() if key not in {"sparsify", "rescale", "scope", "score"}}
    for options in CHOICES
]


@pytest.mark.parametrize("options", FULL)
def test_one_expert_is_returned(options):
    base, experts, fishers = random_models(K=1)
    merged = sar(base, experts, fishers, density=1.0, hash64=hash64, **options).merged
    assert_bits(merged, experts["e0"])


@pytest.mark.parametrize("options", FULL)
@pytest.mark.parametrize("K", [2, 3])
def test_identical_experts_are_returned(options, K):
    if options.get("agreement") == "sum":
        pytest.skip("the sum of identical experts is K times their update, by definition")
    base, experts, fishers = random_models(K=K)
    same = dict.fromkeys(experts, experts["e0"])
    merged = sar(base, same, fishers, density=1.0, hash64=hash64, **options).merged
    assert_bits({name: v.astype(np.float32) for name, v in merged.items()}, experts["e0"])


@pytest.mark.parametrize("options", FULL)
def test_disjoint_supports_add_up(options):
    base, experts, fishers = random_models(K=3, density=1.0)
    for i, expert in enumerate(experts.values()):
        for name, values in expert.items():
            flat = values.reshape(-1)
            mine = np.arange(flat.size) % 3 == i
            flat[~mine] = base[name].reshape(-1)[~mine]
    merged = sar(base, experts, fishers, density=1.0, hash64=hash64, **options).merged
    for name in base:
        expected = base[name].copy().reshape(-1)
        for i, expert in enumerate(experts.values()):
            expected[i::3] = expert[name].reshape(-1)[i::3]
        np.testing.assert_array_equal(merged[name].reshape(-1), expected)


@pytest.mark.parametrize("steps", [False, True])
def test_soft_without_power_is_ram(steps):
    base, experts, fishers = random_models(K=3, steps=steps)
    merged = sar(base, experts, fishers, density=1.0, arbitration="soft", power=0, agreement="mean").merged
    expected = ram(base, experts, epsilon=0.0)
    for name in base:  # Σ (1/m)·δ against (Σ δ)/m: the rounding of 1/3
        np.testing.assert_allclose(merged[name], expected[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("steps", [False, True])
def test_winner_in_both_gives_stored_values(steps):
    base, experts, fishers = random_models(K=4, steps=steps, density=0.8)
    merged = sar(base, experts, fishers, density=1.0, agreement="winner").merged
    for name in base:
        inputs = np.stack([base[name], *(expert[name] for expert in experts.values())]).astype(np.float64)
        assert (merged[name] == inputs).any(axis=0).all()


def test_large_power_is_winner():
    base, experts, fishers = random_models(K=3)
    one = sar(base, experts, fishers, density=1.0, arbitration="soft", power=1e6).merged
    two = sar(base, experts, fishers, density=1.0).merged
    for name in base:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-15)


# -- the simple methods ------------------------------------------------------------------------------------------------


def test_linear_by_hand():
    models = {"a": model(1, 2), "b": model(3, 6)}
    assert linear(models, weight={"a": 1, "b": 3})["v"].tolist() == [2.5, 5]
    assert linear(models, weight={"a": 1, "b": 3}, normalize=False)["v"].tolist() == [10, 20]


def test_task_arithmetic_by_hand():
    merged = task_arithmetic(model(1, 1), {"a": model(2, 1), "b": model(1, 5)}, weight={"a": 0.5, "b": 1}, lam=2)
    assert merged["v"].tolist() == [2, 9]


def test_ram_by_hand():
    # only the experts that changed a coordinate by more than epsilon are averaged
    merged = ram(model(0, 0, 0), {"a": model(1, 2, 0.1), "b": model(0.25, -4, 0)}, epsilon=0.25)
    assert merged["v"].tolist() == [1, -1, 0]


def test_ties_by_hand():
    # n = 3 non-zero each, int(.7·3) = 2: a keeps 4, -2; b keeps 3, 5
    # elect: + (4+3), - , +: mean of those who agree: 3.5, -2, 5
    base, experts = model(0, 0, 0, 0), {"a": model(4, -2, 1, 0), "b": model(3, 0.5, 5, 0)}
    assert ties(base, experts, density=0.7)["v"].tolist() == [3.5, -2, 5, 0]
    assert ties(base, experts, density=0.7, normalize=False, lam=2)["v"].tolist() == [14, -4, 10, 0]
    # count all: int(.25·4) = 1
    assert ties(base, experts, density=0.25, count="all")["v"].tolist() == [4, 0, 5, 0]
    # conflicts: the larger weighted sum wins; cancelling: +
    assert ties(model(0, 0), {"a": model(2, 1), "b": model(-3, -1)}, density=1)["v"].tolist() == [-3, 1]
    merged = ties(model(0), {"a": model(2), "b": model(4)}, density=1, weight={"a": 3, "b": 1})
    assert merged["v"].tolist() == [2.5]


@pytest.mark.parametrize(
    ("name", "merge"),
    [
        ("linear", lambda base, e: linear(e, weight=dict(zip(e, (1.0, 0.5, 0.25))))),
        ("linear_unnormalized", lambda base, e: linear(e, weight=dict(zip(e, (0.5, 0.3, 0.4))), normalize=False)),
        ("task_arithmetic", lambda base, e: task_arithmetic(base, e, weight=dict(zip(e, (0.5, 0.7, 0.3))), lam=0.8)),
        ("ram", lambda base, e: ram(base, e)),
        ("ties", lambda base, e: ties(base, e, density=0.3, count="all")),
        (
            "ties_weighted_lambda",
            lambda base, e: ties(
                base, e, weight=dict(zip(e, (1.0, 0.5, 0.8))), density=dict(zip(e, (0.5, 0.3, 0.2))), lam=1.3,
                normalize=False, count="all",
            ),
        ),
        ("ties_global", lambda base, e: ties(base, e, density=0.2, scope="model", count="all")),
    ],
)  # fmt: skip
def test_simple_references_agree_with_the_golden_files(name, merge):
    base = load_file(next((GOLDEN / "base").glob("*.safetensors")))
    experts = {f"expert{i}": load_file(next((GOLDEN / f"expert{i}").glob("*.safetensors"))) for i in range(3)}
    expected = load_file(GOLDEN / "expected" / f"{name}.safetensors")
    merged = merge(base, experts)
    assert merged.keys() == expected.keys()
    for tensor in expected:  # the golden files' tolerance: float32 sums in another order
        np.testing.assert_allclose(merged[tensor], expected[tensor], rtol=0, atol=1e-6, err_msg=tensor)
