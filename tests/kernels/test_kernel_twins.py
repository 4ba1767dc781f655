"""Every compiled kernel makes the bits of its plain twin, for every choice that it takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.kernel_pairs import COMPILED, FP64, PLAIN, SIZES, agree, fp32, fp64, shapes, words

from rlmerge.kernels.compiled.hash import hash64 as compiled_hash
from rlmerge.kernels.plain.hash import hash64 as plain_hash

START = st.sampled_from([0, 1, 65536, 2**33 + 5])
WEIGHTS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.3, 2.0, 1e-3])


def test_both_modules_have_the_same_kernels():
    assert set(PLAIN.__all__) == set(COMPILED.__all__)
    assert (PLAIN.NAME, COMPILED.NAME) == ("numpy", "numba")


def test_every_kernel_is_compared_here():
    source = open(__file__).read() + open(__file__.replace("twins", "codec")).read()
    missing = [name for name in PLAIN.__all__ if name != "NAME" and f'"{name}"' not in source]
    assert not missing


# -- deltas and simple methods ---------------------------------------------------------------------------------------


@st.composite
def inputs(draw):
    """base, expert, reference, which, additive, as the engine makes them; experts often equal their reference."""
    count, size = draw(shapes())
    rows = draw(st.integers(1, 3))
    reference = draw(fp32(rows, size))
    which = np.array(draw(st.lists(st.integers(0, rows - 1), min_size=count, max_size=count)), np.int64)
    expert = draw(fp32(count, size))
    equal = np.array(draw(st.lists(st.booleans(), min_size=count * size, max_size=count * size)), bool)
    expert = np.where(equal.reshape(count, size), reference[which], expert)
    additive = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_)
    weight = np.array(draw(st.lists(WEIGHTS, min_size=count, max_size=count)))
    return reference[0].copy(), expert, reference, which, additive, weight, draw(st.sampled_from([0.0, 0.0, 1e-3, 0.5]))


@given(inputs())
def test_deltas(given_):
    base, expert, reference, which, additive, weight, min_change = given_
    agree("deltas", base, expert, reference, which, additive, weight, min_change, np.full(expert.shape, 7.0))


@given(inputs())
def test_linear(given_):
    base, expert, _, _, additive, weight, _ = given_
    agree("linear", base, expert, additive, weight, np.full(base.shape, 7.0))


@given(inputs())
def test_census(given_):
    base, expert, reference, which, additive, weight, min_change = given_
    count = len(expert)
    sign = np.sign(weight).astype(np.int64)
    pairs = [np.ones((count, count), np.int64) for _ in range(2)]
    counts = [np.ones(count, np.int64), np.ones(4, np.int64)]
    agree("census", expert, reference, which, sign, min_change, base, additive, *counts, *pairs)


def test_census_of_more_coordinates_than_a_tile():
    rng = np.random.default_rng(1)
    reference = rng.integers(-1, 2, (1, 3000)).astype(np.float32)
    expert = rng.integers(-1, 2, (5, 3000)).astype(np.float32)
    counts = [np.zeros(5, np.int64), np.zeros(4, np.int64), np.zeros((5, 5), np.int64), np.zeros((5, 5), np.int64)]
    which, additive = np.zeros(5, np.int64), np.zeros(5, np.bool_)
    found = agree("census", expert, reference, which, np.ones(5, np.int64), 0.0, reference[0], additive, *counts)
    assert found[8].tolist() == (expert != reference).sum(axis=1).tolist()


@st.composite
def weighted_deltas(draw):
    count, size = draw(shapes())
    delta = draw(fp64(count, size))
    weight = np.array(draw(st.lists(WEIGHTS, min_size=count, max_size=count)))
    return draw(fp32(size)), delta, weight, draw(st.sampled_from([1.0, 0.0, -0.5, 1.3]))


@given(weighted_deltas())
def test_task_arithmetic(given_):
    base, delta, weight, scale = given_
    agree("task_arithmetic", base, delta, weight, scale, np.full(base.shape, 7.0))


@given(weighted_deltas(), st.booleans(), st.sampled_from([0, 1]))
def test_ties(given_, normalize, cancelled):
    base, delta, weight, scale = given_
    agree("ties", base, delta, weight, scale, normalize, cancelled, np.full(base.shape, 7.0), np.ones(2, np.int64))


@given(weighted_deltas(), st.sampled_from([0.0, 1e-5, 2.0**-9, 1.0]))
def test_ram(given_, epsilon):
    base, delta, weight, _ = given_
    agree("ram", base, delta, epsilon, np.full(base.shape, 7.0), np.ones(len(weight), np.int64))


@given(st.sampled_from(SIZES), st.data())
def test_realised(size, data):
    base, stored_base, stored = (data.draw(fp32(size)) for _ in range(3))
    intended = data.draw(fp64(size))
    agree("realised", base, stored_base, intended, stored, np.ones(2, np.int64), np.array([0.1, 0.2, 0.3]))


@given(shapes(), st.data())
def test_fisher_sums(shape, data):
    fisher = data.draw(fp32(*shape))
    agree("fisher_sums", fisher, np.full(shape[0], 0.1), np.ones(shape[0], np.int64))


@pytest.mark.parametrize("size", [1000, 4099])
def test_fisher_sums_of_long_rows(size):
    fisher = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32) ** 2
    agree("fisher_sums", fisher, np.zeros(3), np.zeros(3, np.int64))


# -- sar -------------------------------------------------------------------------------------------------------------


@st.composite
def conflicts(draw):
    """Deltas with many zeros and ties, Fishers with zeros."""
    count, size = draw(shapes())
    pool = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1e-160, -1e-160, 5e-324, 6.8e38, *FP64[:8]])
    delta = np.array(draw(st.lists(pool, min_size=count * size, max_size=count * size)), np.float64)
    fisher = draw(fp32(count, size, least=0.0))
    mean = np.array(draw(st.lists(st.sampled_from([1.0, 0.3, 1e-12, 7.5]), min_size=count, max_size=count)))
    flat = draw(st.lists(st.sampled_from([0.0, 1.0, 0.25, 1 / 3]), min_size=25, max_size=25))
    phi = np.triu(np.array(flat).reshape(5, 5)[:count, :count], 1)
    return delta.reshape(count, size), fisher, mean, phi + phi.T


@pytest.mark.parametrize("arbitration", range(5))
@pytest.mark.parametrize("agreement", range(5))
@given(
    conflicts(), st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 60.0]),
    st.sampled_from([0.0, 1.0, 2.0]), st.data(),
)  # fmt: skip
def test_resolve(arbitration, agreement, given_, sensitivity, join, power, margin, data):
    delta, fisher, mean, phi = given_
    count, size = delta.shape
    keys, start = data.draw(words(count)), data.draw(START)
    if sensitivity == 2:
        fisher, mean = np.empty((0, 0), np.float32), np.empty(0)
    found = agree(
        "resolve", delta, fisher, mean, sensitivity, arbitration, agreement, join, power, margin, phi, keys, start,
        np.full(delta.shape, 7.0), np.full(size, 7, np.uint8), np.ones(count, np.int64), np.ones(4, np.int64),
    )  # fmt: skip
    resolved, whole = found[13], found[14]
    assert not resolved[delta == 0].any()
    assert set(whole.tolist()) <= {0, 1}


@pytest.mark.parametrize("score", range(4))
@given(conflicts())
def test_scores(score, given_):
    delta, fisher, mean, _ = given_
    resolved = np.where(np.arange(delta.size).reshape(delta.shape) % 3 == 0, 0.0, delta * 0.5)
    out = np.full((1 if score == 2 else delta.shape[0], delta.shape[1]), 7.0, np.float32)
    with np.errstate(over="ignore"):
        agree("scores", delta, resolved, fisher, mean, score, out)


@given(conflicts(), st.data(), st.sampled_from([1.0, 0.5]))
def test_compose(given_, data, scale):
    resolved = given_[0]
    count, size = resolved.shape
    base, expert = data.draw(fp32(size)), data.draw(fp32(count, size))
    expert = np.where(expert > 1.0, np.float32(1.0), expert)  # equal stored values must be common
    gain = np.array(data.draw(st.lists(st.sampled_from([1.0, 1.2]), min_size=count, max_size=count)))
    unit = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_)
    whole, dropped = (
        np.array(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), np.uint8) for _ in range(2)
    )
    agree("compose", base, expert, resolved, gain, scale, unit, whole, dropped, np.full(size, 7.0))


# -- trim ------------------------------------------------------------------------------------------------------------


@st.composite
def ranked(draw):
    """Values and scores as a method gives them: score 0 exactly where a value is 0; one row for all, sometimes."""
    count, size = draw(shapes())
    values = draw(fp64(count, size))
    shared = draw(st.booleans())
    with np.errstate(over="ignore"):
        scores = np.abs(values.astype(np.float32))
    scores = np.where(values != 0.0, np.maximum(scores, np.float32(1e-45)), np.float32(0.0))
    return values, np.ascontiguousarray(scores[:1] if shared else scores)


@given(ranked())
def test_coarse(given_):
    _, scores = given_
    shape = (len(scores), 65536)
    agree("coarse", scores, np.ones(shape, np.int64), np.full(shape, 65535, np.uint16), np.zeros(shape, np.uint16))


@given(ranked(), st.data())
def test_fine(given_, data):
    _, scores = given_
    present = [-1, *sorted({int(word) >> 15 for word in scores.view(np.uint32).ravel()})]
    bins = np.array([data.draw(st.sampled_from(present)) for _ in scores], np.int64)
    agree("fine", scores, bins, np.ones((len(scores), 32768), np.int64))


def threshold_of(scores, data):
    present = [-1.0, float("inf"), *sorted({float(value) for value in scores.ravel()})]
    return np.array([data.draw(st.sampled_from(present)) for _ in scores], np.float32)


@given(ranked(), st.data(), START)
def test_tie_hashes(given_, data, start):
    _, scores = given_
    key = np.uint64(data.draw(st.integers(0, 2**64 - 1)))
    agree("tie_hashes", scores[0], threshold_of(scores, data)[0], key, start)


@given(ranked(), st.data(), START)
def test_trim(given_, data, start):
    values, scores = given_
    count, size = values.shape
    threshold, keys = threshold_of(scores, data), data.draw(words(len(scores)))
    cut = data.draw(words(len(scores)))
    kept, dropped = np.ones(count, np.int64), np.zeros(size, np.uint8)
    agree("trim", scores, threshold, cut, keys, start, values, kept, dropped)


@given(ranked(), st.data(), START, st.booleans())
def test_ramp(given_, data, start, inverse):
    values, scores = given_
    rank = np.zeros((len(scores), 65536))
    rank[:] = np.arange(65536) / 65536
    low, high = np.full(len(scores), 0.2), np.full(len(scores), 0.9)
    keys = data.draw(words(len(scores)))
    kept, dropped = np.ones(len(values), np.int64), np.zeros(values.shape[1], np.uint8)
    agree("ramp", scores, rank, low, high, keys, start, values, inverse, kept, dropped)


@given(shapes(), st.sampled_from([1, 2]), st.data())
def test_kept_norms(shape, order, data):
    agree("kept_norms", data.draw(fp64(*shape)), order, np.full(shape[0], 0.1))


# -- hash ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), words(33))
def test_hash(key, places):
    expected = [int(compiled_hash(np.uint64(key), place)) for place in places]
    assert plain_hash(key, places).tolist() == expected


def unxor(word: int, shift: int) -> int:
    """Undoes word ^= word >> shift."""
    out = word
    for _ in range(64 // shift + 1):
        out = word ^ (out >> shift)
    return out


@given(st.integers(0, 2**64 - 1), words(9))
def test_hash_is_a_bijection(key, places):
    """It can be undone: so different coordinates have different hashes under one key."""
    for place, word in zip(places.tolist(), plain_hash(key, places).tolist()):
        word = unxor(word, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        word = unxor(word, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        word = (unxor(word, 30) - key) * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64
        assert word == place


def test_hash_bits_are_balanced_and_keys_are_unrelated():
    """2¹⁶ neighbouring coordinates: each bit is set half of the time, and hashes of two keys share half of their bits."""
    size = 2**16
    places = np.arange(size, dtype=np.uint64)
    first, second = plain_hash(1, places), plain_hash(2, places)
    for pattern in (first, first ^ second, first ^ np.roll(first, 1)):
        bits = np.array([np.count_nonzero(pattern >> np.uint64(b) & np.uint64(1)) for b in range(64)])
        assert np.abs(bits - size / 2).max() < 5 * np.sqrt(size) / 2  # five standard deviations
    assert len(np.unique(first)) == size
