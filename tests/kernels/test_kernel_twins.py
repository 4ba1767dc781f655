"""Every compiled kernel makes the bits of its plain twin, for every choice that it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.kernel_pairs import COMPILED, FP64, PLAIN, SIZES, agree, fp32, fp64, grid, shapes, words

from rlmerge.kernels.compiled.hash import hash64 as compiled_hash
from rlmerge.kernels.plain.hash import hash64 as plain_hash

START = st.sampled_from([0, 1, 65536, 2**33 + 5])
WEIGHTS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.3, 2.0, 1e-3])


def test_both_modules_have_the_same_kernels():
    assert set(PLAIN.__all__) == set(COMPILED.__all__)
    assert (PLAIN.NAME, COMPILED.NAME) == ("numpy", "numba")


def test_every_kernel_is_compared_here():
    source = Path(__file__).read_text() + Path(__file__.replace("twins", "codec")).read_text()
    source += "decode_bf16 decode_f16".replace("decode_", '"decode_') if 'f"decode_{form}"' in source else ""
    missing = [name for name in PLAIN.__all__ if name != "NAME" and f'"{name}' not in source]
    assert not missing


# -- changes and simple methods --------------------------------------------------------------------------------------


@st.composite
def inputs(draw):
    """base, expert, reference, which, additive, min_change, as the engine makes them; many equal their reference."""
    count, size = draw(shapes())
    rows = draw(st.integers(1, 3))
    numbers = draw(st.sampled_from([fp32, grid]))
    reference = draw(numbers(rows, size))
    which = np.array(draw(st.lists(st.integers(0, rows - 1), min_size=count, max_size=count)), np.int64)
    expert = draw(numbers(count, size))
    equal = np.array(draw(st.lists(st.booleans(), min_size=count * size, max_size=count * size)), bool)
    expert = np.where(equal.reshape(count, size), reference[which], expert)
    additive = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_)
    return reference[0].copy(), expert, reference, which, additive, draw(st.sampled_from([0.0, 0.0, 1e-3, 0.5]))


def named(given_):
    return dict(zip(("base", "expert", "reference", "which", "additive", "min_change"), given_))


def reduce(base, expert, reference, which, additive, min_change):
    """where, delta, owner of a block, by the plain kernels."""
    where = np.zeros(base.size, np.int32)
    where = where[: PLAIN.changed(base, expert, reference, which, additive, min_change, where)]
    delta, owner = np.empty((len(expert), where.size)), np.empty(where.size, np.int32)
    PLAIN.deltas(base, expert, reference, which, additive, min_change, where, delta, owner)
    return where, delta, owner


@given(inputs())
def test_changed_and_deltas(given_):
    base, expert, reference, which, additive, min_change = given_
    buffers = [np.zeros(base.size, np.int32) for _ in range(2)]
    found = [k.changed(*given_, where) for k, where in zip((PLAIN, COMPILED), buffers)]  # "changed"
    assert found[0] == found[1]
    where = buffers[0][: found[0]]
    assert where.tolist() == buffers[1][: found[1]].tolist()  # what lies behind is undefined
    out, owner = np.full((len(expert), where.size), 7.0), np.full(where.size, 7, np.int32)
    found = agree("deltas", **named(given_), where=where, out=out, owner=owner)
    out, owner = found["out"], found["owner"]
    # what they mean, in words of the design: support is "differs", filtered by η; every other coordinate is left out
    exact = expert.astype(np.float64) - reference[which].astype(np.float64)
    old = np.where(additive[:, None], base, reference[which]).astype(np.float64)
    new = np.where(additive[:, None], old + exact, expert)
    active = (exact != 0) & (np.abs(exact) > min_change * np.maximum(np.abs(old), np.abs(new)))
    assert where.tolist() == np.flatnonzero(active.any(axis=0)).tolist()
    assert (out == np.where(active, exact, 0.0)[:, where]).all()
    sole = active[:, where].sum(axis=0) == 1
    assert owner.tolist() == np.where(sole, active[:, where].argmax(axis=0), -1).tolist()


def test_zeros_of_other_signs_are_no_change_and_leave_no_sign():
    base, expert = np.array([0.0, -0.0, 1.0], np.float32), np.array([[-0.0, 0.0, 2.0], [0.0, 0.0, 1.0]], np.float32)
    expert = np.vstack([expert, np.array([[1.0, 1.0, 1.0]], np.float32)])
    which, additive = np.zeros(3, np.int64), np.zeros(3, np.bool_)
    where = np.arange(3, dtype=np.int32)
    given_ = (base, expert, base[None], which, additive, 0.0)
    found = agree("deltas", **named(given_), where=where, out=np.full((3, 3), 7.0), owner=np.zeros(3, np.int32))
    assert not np.signbit(found["out"]).any()
    assert found["owner"].tolist() == [2, 2, 0]


def test_changes_in_more_coordinates_than_a_tile():
    rng = np.random.default_rng(1)
    base = rng.integers(-1, 2, 5001).astype(np.float32)
    expert = np.where(rng.random((3, 5001)) < 0.3, base + 1, base).astype(np.float32)
    where = np.zeros(5001, np.int32)
    which, additive = np.zeros(3, np.int64), np.zeros(3, np.bool_)
    found = COMPILED.changed(base, expert, base[None], which, additive, 0.0, where)
    assert where[:found].tolist() == np.flatnonzero((expert != base).any(axis=0)).tolist()


@given(inputs(), st.data())
def test_linear(given_, data):
    base, expert, _, _, additive, _ = given_
    weight = np.array([data.draw(WEIGHTS) for _ in expert])
    agree("linear", base=base, expert=expert, additive=additive, weight=weight, out=np.full(base.shape, 7.0))


@given(inputs(), st.data())
def test_census(given_, data):
    _, delta, owner = reduce(*given_)
    count = len(delta)
    sign = np.array([data.draw(st.sampled_from([-1, 0, 1, 1])) for _ in delta], np.int64)
    pairs = {name: np.ones((count, count), np.int64) for name in ("overlap", "conflict")}
    support, regions = np.ones(count, np.int64), np.ones(4, np.int64)
    agree("census", delta=delta, owner=owner, sign=sign, support=support, regions=regions, **pairs)


@given(inputs(), st.data(), st.sampled_from([1.0, 0.0, -0.5, 1.3]))
def test_task_arithmetic(given_, data, scale):
    where, delta, _ = reduce(*given_)
    weight = np.array([data.draw(WEIGHTS) for _ in delta])
    base, out = given_[0], np.full(given_[0].shape, 7.0)
    agree("task_arithmetic", base=base, delta=delta, where=where, weight=weight, scale=scale, out=out)


@given(inputs(), st.data(), st.sampled_from([1.0, 0.0, -0.5, 1.3]), st.booleans(), st.sampled_from([0, 1]))
def test_ties(given_, data, scale, normalize, cancelled):
    where, delta, owner = reduce(*given_)
    delta = cut_some(delta, data)
    weight = np.array([data.draw(st.sampled_from([1.0, 1.0, 1.0, -1.0, 0.3, 0.0])) for _ in delta])
    agree(
        "ties", base=given_[0], delta=delta, where=where, owner=owner, weight=weight, scale=scale, normalize=normalize,
        cancelled=cancelled, out=np.full(given_[0].shape, 7.0), counts=np.ones(2, np.int64),
    )  # fmt: skip


@given(inputs(), st.sampled_from([0.0, 1e-5, 2.0**-9, 1.0]))
def test_ram(given_, epsilon):
    where, delta, _ = reduce(*given_)
    out, counts = np.full(given_[0].shape, 7.0), np.ones(len(delta), np.int64)
    agree("ram", base=given_[0], delta=delta, where=where, epsilon=epsilon, out=out, counts=counts)


@given(st.sampled_from(SIZES), st.data())
def test_realised(size, data):
    base, stored_base, stored = (data.draw(fp32(size)) for _ in range(3))
    intended = data.draw(fp64(size))
    where = np.array([i for i in range(size) if data.draw(st.booleans())], np.int32)
    agree(
        "realised", base=base, stored_base=stored_base, intended=intended, stored=stored, where=where,
        counts=np.ones(2, np.int64), sums=np.array([0.1, 0.2, 0.3]),
    )  # fmt: skip


@given(shapes(), st.data())
def test_fisher_sums(shape, data):
    fisher = data.draw(fp32(*shape))
    agree("fisher_sums", fisher=fisher, total=np.full(shape[0], 0.1), negative=np.ones(shape[0], np.int64))


@pytest.mark.parametrize("size", [1000, 4099])
def test_fisher_sums_of_long_rows(size):
    fisher = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32) ** 2
    agree("fisher_sums", fisher=fisher, total=np.zeros(3), negative=np.zeros(3, np.int64))


# -- sar -------------------------------------------------------------------------------------------------------------


def cut_some(values, data):
    """Some entries set to zero, as a trim does: owners stay."""
    cut = [data.draw(st.booleans()) for _ in range(values.shape[1])]
    return np.where(np.array(cut, bool)[None] & (np.arange(len(values)) % 2 == 0)[:, None], 0.0, values)


@st.composite
def conflicts(draw):
    """where, deltas with many ties and no empty column, owners; Fishers of the whole block, with zeros."""
    count, size = draw(shapes())
    pool = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1e-45, -1e-45, 6.8e38, *FP64[:8]])
    flat = draw(st.lists(pool, min_size=count * size, max_size=count * size))
    delta = np.array(flat, np.float64).reshape(count, size)
    where = np.flatnonzero((delta != 0).any(axis=0)).astype(np.int32)
    delta = np.ascontiguousarray(delta[:, where])
    sole = (delta != 0).sum(axis=0) == 1
    owner = np.where(sole, (delta != 0).argmax(axis=0), -1).astype(np.int32)
    weight = np.array(draw(st.lists(st.sampled_from([1.0, 1.0, -1.0, 0.5]), min_size=count, max_size=count)))
    fisher = draw(fp32(count, size, least=0.0))
    mean = np.array(draw(st.lists(st.sampled_from([1.0, 0.3, 1e-12, 7.5]), min_size=count, max_size=count)))
    flat = draw(st.lists(st.sampled_from([0.0, 1.0, 0.25, 1 / 3]), min_size=25, max_size=25))
    phi = np.triu(np.array(flat).reshape(5, 5)[:count, :count], 1)
    return where, weight[:, None] * delta + 0.0, owner, fisher, mean, phi + phi.T


@pytest.mark.parametrize("arbitration", range(5))
@pytest.mark.parametrize("agreement", range(5))
@given(
    conflicts(), st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 60.0]),
    st.sampled_from([0.0, 1.0, 2.0]), st.data(),
)  # fmt: skip
def test_resolve(arbitration, agreement, given_, sensitivity, join, power, margin, data):
    where, delta, owner, fisher, mean, phi = given_
    count, size = delta.shape
    keys, start = data.draw(words(count)), data.draw(START)
    if sensitivity == 2:
        fisher, mean = np.empty((0, 0), np.float32), np.empty(0)
    found = agree(
        "resolve", delta=delta, fisher=fisher, mean=mean, sensitivity=sensitivity, arbitration=arbitration,
        agreement=agreement, join=join, power=power, margin=margin, phi=phi, keys=keys, start=start, where=where,
        owner=owner, out=np.full(delta.shape, 7.0), whole=np.full(size, 7, np.uint8), wins=np.ones(count, np.int64),
        counts=np.ones(4, np.int64),
    )  # fmt: skip
    resolved, whole = found["out"], found["whole"]
    assert not resolved[delta == 0].any()
    assert set(whole.tolist()) <= {0, 1}


@pytest.mark.parametrize("score", range(4))
@given(conflicts(), st.data())
def test_scores(score, given_, data):
    where, delta, _, fisher, mean, _ = given_
    resolved = cut_some(delta, data) * 0.5
    out = np.full((1 if score == 2 else delta.shape[0], delta.shape[1]), 7.0, np.float32)
    with np.errstate(over="ignore"):
        agree("scores", delta=delta, resolved=resolved, fisher=fisher, where=where, mean=mean, score=score, out=out)


@given(conflicts(), st.data(), st.sampled_from([1.0, 0.5]))
def test_compose(given_, data, scale):
    where, resolved, owner, fisher, _, _ = given_
    count, size = fisher.shape
    resolved = cut_some(resolved, data)
    base, expert = data.draw(fp32(size)), data.draw(fp32(count, size))
    expert = np.where(expert > 1.0, np.float32(1.0), expert)  # equal stored values must be common
    gain = np.array(data.draw(st.lists(st.sampled_from([1.0, 1.2]), min_size=count, max_size=count)))
    unit = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_)
    whole, dropped = (np.array([data.draw(st.integers(0, 1)) for _ in where], np.uint8) for _ in range(2))
    # what has one owner is whole, and is kept or gone
    whole[owner >= 0] = 1
    dropped[owner >= 0] = (resolved == 0).all(axis=0)[owner >= 0]
    if not unit.any():
        expert = np.empty((0, 0), np.float32)  # then nobody's stored value can be asked for
    agree(
        "compose", base=base, expert=expert, resolved=resolved, where=where, owner=owner, gain=gain, scale=scale,
        unit=unit, whole=whole, dropped=dropped, out=np.full(size, 7.0),
    )  # fmt: skip


# -- trim ------------------------------------------------------------------------------------------------------------


@st.composite
def ranked(draw):
    """where, values, owners and scores as a method gives them: 0 where a value is 0; sometimes one row for all."""
    where, values, owner, *_ = draw(conflicts())
    shared = draw(st.booleans())
    with np.errstate(over="ignore"):
        scores = np.abs(values.astype(np.float32))
    scores = np.where(values != 0.0, np.maximum(scores, np.float32(1e-45)), np.float32(0.0))
    return where, values, owner, np.ascontiguousarray(scores[:1] if shared else scores)


@given(ranked())
def test_coarse(given_):
    _, _, owner, scores = given_
    shape = (len(scores), 65536)
    low, high = np.full(shape, 65535, np.uint16), np.zeros(shape, np.uint16)
    agree("coarse", score=scores, owner=owner, count=np.ones(shape, np.int64), low=low, high=high)


@given(ranked(), st.data())
def test_fine(given_, data):
    scores = given_[3]
    present = [-1, *sorted({int(word) >> 15 for word in scores.view(np.uint32).ravel()})]
    bins = np.array([data.draw(st.sampled_from(present)) for _ in scores], np.int64)
    agree("fine", score=scores, bin_=bins, count=np.ones((len(scores), 32768), np.int64))


def threshold_of(scores, data):
    present = [-1.0, float("inf"), *sorted({float(value) for value in scores.ravel()})]
    return np.array([data.draw(st.sampled_from(present)) for _ in scores], np.float32)


@given(ranked(), st.data(), START)
def test_tie_hashes(given_, data, start):
    where, _, _, scores = given_
    key = np.uint64(data.draw(st.integers(0, 2**64 - 1)))
    agree("tie_hashes", score=scores[0], threshold=threshold_of(scores, data)[0], key=key, start=start, where=where)


@given(ranked(), st.data(), START)
def test_trim(given_, data, start):
    where, values, owner, scores = given_
    threshold, keys = threshold_of(scores, data), data.draw(words(len(scores)))
    cut = data.draw(words(len(scores)))
    kept, dropped = np.ones(len(values), np.int64), np.zeros(where.size, np.uint8)
    found = agree(
        "trim", score=scores, threshold=threshold, cut=cut, keys=keys, start=start, where=where, owner=owner,
        values=values, kept=kept, dropped=dropped,
    )  # fmt: skip
    after = found["values"]
    assert (found["kept"] - 1).tolist() == np.count_nonzero(after, axis=1).tolist()
    assert found["dropped"].astype(bool).tolist() == ((values != 0) & (after == 0)).any(axis=0).tolist()


@given(ranked(), st.data(), START, st.booleans())
def test_ramp(given_, data, start, inverse):
    where, values, owner, scores = given_
    rank = np.zeros((len(scores), 65536))
    rank[:] = np.arange(65536) / 65536
    low, high = np.full(len(scores), 0.2), np.full(len(scores), 0.9)
    keys = data.draw(words(len(scores)))
    kept, dropped = np.ones(len(values), np.int64), np.zeros(where.size, np.uint8)
    agree(
        "ramp", score=scores, rank=rank, low=low, high=high, keys=keys, start=start, where=where, owner=owner,
        values=values, inverse=inverse, kept=kept, dropped=dropped,
    )  # fmt: skip


@given(conflicts(), st.sampled_from([1, 2]), st.data())
def test_kept_norms(given_, order, data):
    _, delta, owner, *_ = given_
    agree("kept_norms", values=cut_some(delta, data), owner=owner, order=order, total=np.full(len(delta), 0.1))


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
    """2¹⁶ neighbouring coordinates: each bit is set half of the time; hashes of two keys share half of their bits."""
    size = 2**16
    places = np.arange(size, dtype=np.uint64)
    first, second = plain_hash(1, places), plain_hash(2, places)
    for pattern in (first, first ^ second, first ^ np.roll(first, 1)):
        bits = np.array([np.count_nonzero(pattern >> np.uint64(b) & np.uint64(1)) for b in range(64)])
        assert np.abs(bits - size / 2).max() < 5 * np.sqrt(size) / 2  # five standard deviations
    assert len(np.unique(first)) == size
