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
    source += Path(__file__.replace("twins", "steps")).read_text().replace(".apply_steps(", '"apply_steps')
    source += Path(__file__.replace("twins", "gram")).read_text()
    source += Path(__file__.replace("twins", "geometry")).read_text()
    source += "decode_bf16 decode_f16".replace("decode_", '"decode_') if 'f"decode_{form}"' in source else ""
    missing = [name for name in PLAIN.__all__ if name != "NAME" and f'"{name}' not in source]
    assert not missing


def cut_some(values, data):
    """Some entries set to zero, as a trim does."""
    cut = [data.draw(st.booleans()) for _ in range(values.shape[1])]
    return np.where(np.array(cut, bool)[None] & (np.arange(len(values)) % 2 == 0)[:, None], 0.0, values)


@st.composite
def conflicts(draw):
    """where, deltas with many ties and no empty column; Fishers there, with zeros; their means; shares of pairs."""
    count, size = draw(shapes())
    pool = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1e-45, -1e-45, 6.8e38, *FP64[:8]])
    flat = draw(st.lists(pool, min_size=count * size, max_size=count * size))
    delta = np.array(flat, np.float64).reshape(count, size)
    where = np.flatnonzero((delta != 0).any(axis=0)).astype(np.int32)
    delta = np.ascontiguousarray(delta[:, where])
    weight = np.array(draw(st.lists(st.sampled_from([1.0, 1.0, -1.0, 0.5]), min_size=count, max_size=count)))
    fisher = draw(fp32(count, where.size, least=0.0))
    mean = np.array(draw(st.lists(st.sampled_from([1.0, 0.3, 1e-12, 7.5]), min_size=count, max_size=count)))
    flat = draw(st.lists(st.sampled_from([0.0, 1.0, 0.25, 1 / 3]), min_size=25, max_size=25))
    phi = np.triu(np.array(flat).reshape(5, 5)[:count, :count], 1)
    return where, weight[:, None] * delta + 0.0, fisher, mean, phi + phi.T


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
    """The patches of a block, by the plain kernels: (experts, where, deltas), empty ones too."""
    experts = np.arange(len(expert))
    places, counts = np.zeros((len(expert) + 1, base.size + 8), np.int32), np.zeros(len(expert) + 1, np.int64)
    given_ = (base, expert, reference, which, additive, min_change)
    PLAIN.changes(*given_, places, counts)
    found = []
    for row, group in enumerate([*(experts[k : k + 1] for k in experts), experts]):
        where = places[row, : counts[row]].copy()
        delta = np.empty((len(group), where.size))
        PLAIN.deltas(*given_, group, where, delta)
        found.append((group, where, delta))
    return found


@given(inputs())
def test_changes_and_deltas(given_):
    base, expert, reference, which, additive, min_change = given_
    count, size = expert.shape
    # what they mean, in words of the design: support is "differs", filtered by η; every other coordinate is left out
    exact = expert.astype(np.float64) - reference[which].astype(np.float64)
    old = np.where(additive[:, None], base, reference[which]).astype(np.float64)
    new = np.where(additive[:, None], old + exact, expert)
    active = (exact != 0) & (np.abs(exact) > min_change * np.maximum(np.abs(old), np.abs(new)))
    alone = active & (active.sum(axis=0) == 1)
    expected = [np.flatnonzero(mask).tolist() for mask in [*alone, active.sum(axis=0) > 1]]
    for kernels in (PLAIN, COMPILED):  # "changes": what lies behind the lists is undefined
        places, counts = np.zeros((count + 1, size + 8), np.int32), np.full(count + 1, 7, np.int64)
        kernels.changes(*given_, places, counts)
        assert [places[row, :number].tolist() for row, number in enumerate(counts)] == expected
    for experts, where, delta in reduce(*given_):
        out = np.full(delta.shape, 7.0)
        found = agree("deltas", **named(given_), experts=experts, where=where, out=out)["out"]
        assert (found == np.where(active, exact, 0.0)[np.ix_(experts, where)]).all()
        assert not np.signbit(found[found == 0]).any()


BF16 = [0x0000, 0x8000, 0x3F80, 0x3F81, 0xBF80, 0x0001, 0x8001, 0x7F7F]


@given(st.integers(1, 5), st.sampled_from([0, 1, 7, 8, 9, 33]), st.data())
def test_changes_and_deltas_of_bf16_words(count, size, data):
    flat = data.draw(st.lists(st.sampled_from(BF16), min_size=(count + 1) * size, max_size=(count + 1) * size))
    stored = np.array(flat, np.uint16).reshape(count + 1, size)
    values = (stored.astype(np.uint32) << 16).view(np.float32)
    which, additive = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    patches = reduce(values[0], values[1:], values[:1], which, additive, 0.0)
    for kernels in (PLAIN, COMPILED):  # "patches_bf16"
        places, counts = np.zeros((count + 1, size + 8), np.int32), np.zeros(count + 1, np.int64)
        alone, several = np.full((count, size), 7.0), np.full(count * size, 7.0)
        assert kernels.patches_bf16(stored, places, counts, alone, several) == 0
        for row, (_, where, delta) in enumerate(patches):
            assert places[row, : counts[row]].tolist() == where.tolist()
            found = several[: delta.size] if row == count else alone[row, : counts[row]]
            assert found.tobytes() == delta.tobytes()
    for _, where, _ in patches:
        agree("take_bf16", words=stored[0], where=where, out=np.full(where.size, 7.0))
        agree("take", values=values[0], where=where, out=np.full(where.size, 7.0))


@pytest.mark.parametrize("place", [0, 4095, 4096, 9000])
def test_words_that_are_no_number_are_counted(place):
    stored = np.full((3, 9001), 0x3F80, np.uint16)
    stored[1, place], stored[2, 5] = 0x7F80, 0xFFC1
    for kernels in (PLAIN, COMPILED):
        places, counts, alone = np.zeros((3, 9009), np.int32), np.zeros(3, np.int64), np.zeros((2, 9001))
        assert kernels.patches_bf16(stored, places, counts, alone, np.zeros(2 * 9001)) == 2


@pytest.mark.parametrize("form", ["words", "values"])
def test_changes_in_more_coordinates_than_a_tile(form):
    rng = np.random.default_rng(1)
    stored = np.full((4, 9001), 0x3F80, np.uint16) + (rng.random((4, 9001)) < 0.3)
    differs = stored[1:] != stored[0]
    values = (stored.astype(np.uint32) << 16).view(np.float32)
    places, counts = np.zeros((4, 9009), np.int32), np.zeros(4, np.int64)
    if form == "words":
        alone, several = np.zeros((3, 9001)), np.zeros(3 * 9001)
        COMPILED.patches_bf16(stored.astype(np.uint16), places, counts, alone, several)
        assert (several[: 3 * counts[3]].reshape(3, -1) == (values[1:] - values[0])[:, places[3, : counts[3]]]).all()
        for k in range(3):
            assert (alone[k, : counts[k]] == (values[1 + k] - values[0])[places[k, : counts[k]]]).all()
    else:
        rest = (values[:1], np.zeros(3, np.int64), np.zeros(3, np.bool_), 0.0)
        COMPILED.changes(values[0], values[1:], *rest, places, counts)
    masks = [*(differs & (differs.sum(axis=0) == 1)), differs.sum(axis=0) > 1]
    for row, mask in enumerate(masks):
        assert places[row, : counts[row]].tolist() == np.flatnonzero(mask).tolist()


@given(inputs(), st.data())
def test_linear(given_, data):
    base, expert, _, _, additive, _ = given_
    weight = np.array([data.draw(WEIGHTS) for _ in expert])
    agree("linear", base=base, expert=expert, additive=additive, weight=weight, out=np.full(base.shape, 7.0))


@given(shapes(), st.data())
def test_linear_bf16(shape, data):
    numbers = data.draw(words(shape[0] * shape[1])).astype(np.uint16).reshape(shape)
    weight = np.array([data.draw(WEIGHTS) for _ in numbers])
    found = agree("linear_bf16", words=numbers, weight=weight, out=np.full(shape[1], 7, np.uint16))
    values, total, out = np.empty(shape, np.float32), np.zeros(shape[1]), np.empty(shape[1], np.uint16)
    if COMPILED.decode_bf16(numbers.reshape(-1), values.reshape(-1)) == 0:
        COMPILED.linear(total.astype(np.float32), values, np.zeros(len(values), np.bool_), weight, total)
        COMPILED.encode_bf16(total, out)
        assert found["out"].tolist() == out.tolist()


@given(inputs(), st.data())
def test_census(given_, data):
    *_, (_, _, delta) = reduce(*given_)
    count = len(delta)
    sign = np.array([data.draw(st.sampled_from([-1, 0, 1, 1])) for _ in delta], np.int64)
    pairs = {name: np.ones((count, count), np.int64) for name in ("overlap", "conflict")}
    support, regions = np.ones(count, np.int64), np.ones(4, np.int64)
    agree("census", delta=delta, sign=sign, support=support, regions=regions, **pairs)


@pytest.mark.parametrize("count", [5, 8, 9])
def test_census_of_many(count):
    """Up to five experts are counted by patterns, more of them one by one."""
    rng = np.random.default_rng(count)
    delta = rng.integers(-1, 2, (count, 300)).astype(np.float64)
    pairs = {name: np.zeros((count, count), np.int64) for name in ("overlap", "conflict")}
    sign = rng.integers(-1, 2, count)
    agree("census", delta=delta, sign=sign, support=np.zeros(count, np.int64), regions=np.zeros(4, np.int64), **pairs)


SCALES = st.sampled_from([1.0, 0.0, -0.5, 1.3])


@given(conflicts(), st.data(), SCALES)
def test_task_arithmetic(given_, data, scale):
    delta = given_[1]
    weight = np.array([data.draw(WEIGHTS) for _ in delta])
    base, out = data.draw(fp64(delta.shape[1])), np.full(delta.shape[1], 7.0)
    agree("task_arithmetic", base=base, delta=delta, weight=weight, scale=scale, out=out)


@given(conflicts(), st.data(), SCALES, st.booleans(), st.sampled_from([0, 1]))
def test_ties(given_, data, scale, normalize, cancelled):
    delta = cut_some(given_[1], data)
    weight = np.array([data.draw(st.sampled_from([1.0, 1.0, 1.0, -1.0, 0.1, 0.2, -0.3, 0.0])) for _ in delta])
    agree(
        "ties", base=data.draw(fp64(delta.shape[1])), delta=delta, weight=weight, scale=scale, normalize=normalize,
        cancelled=cancelled, out=np.full(delta.shape[1], 7.0), counts=np.ones(2, np.int64),
    )  # fmt: skip


@given(conflicts(), st.data(), st.sampled_from([0.0, 1e-5, 2.0**-9, 1.0]))
def test_ram(given_, data, epsilon):
    delta = given_[1]
    out, counts = np.full(delta.shape[1], 7.0), np.ones(len(delta), np.int64)
    agree("ram", base=data.draw(fp64(delta.shape[1])), delta=delta, epsilon=epsilon, out=out, counts=counts)


@given(conflicts(), st.data(), st.sampled_from([0.0, 1e-5, 2.0**-9, 1.0]))
def test_ramplus(given_, data, epsilon):
    delta = given_[1]
    some = {"delta": cut_some(delta, data), "epsilon": epsilon}
    agree("count_shared", **some, shared=np.ones(len(delta), np.int64), unique=np.ones(len(delta), np.int64))
    agree(
        "ramplus", **some, base=data.draw(fp64(delta.shape[1])), factor=np.linspace(1.0, 1.3, len(delta)),
        out=np.full(delta.shape[1], 7.0), counts=np.ones(len(delta), np.int64),
    )  # fmt: skip


@given(st.sampled_from(SIZES), st.data())
def test_realised(size, data):
    base, stored_base, intended = (data.draw(fp64(size)) for _ in range(3))
    agree(
        "realised", base=base, stored_base=stored_base, intended=intended, stored=data.draw(fp32(size)),
        counts=np.ones(2, np.int64), sums=np.array([0.1, 0.2, 0.3]),
    )  # fmt: skip


@given(st.sampled_from([*SIZES, 2049]), st.data())
def test_add_bf16(size, data):
    """New words are those of `settle_bf16` for the sums; what is left of them, too."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    where = np.sort(rng.permutation(2 * size)[:size]).astype(np.int32)
    out = rng.choice(np.array(BF16, np.uint16), 2 * size)
    update = rng.choice([value for value in FP64 if abs(value) < 60000], size)
    gain, scale = (data.draw(st.sampled_from([1.0, 1.25, -0.3])) for _ in range(2))
    kept = {"counts": np.ones(2, np.int64), "sums": np.array([0.1, 0.2, 0.3])}
    with np.errstate(over="ignore", invalid="ignore"):
        found = agree("add_bf16", update=update, gain=gain, scale=scale, where=where, out=out, **kept)
        old = (out[where].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        new = old + scale * (gain * update)
        same = {"base": old, "intended": new, "values": new, "where": where, "out": out, **kept}
        expected = agree("settle_bf16", **same)
    assert all(found[key].tobytes() == expected[key].tobytes() for key in ("out", "counts", "sums"))
    assert found["result"] == expected["result"]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", np.uint16), ("f16", np.uint16), ("f32", np.float32)])
@given(st.sampled_from([*SIZES, 2049]), st.data())
def test_settle(name, dtype, size, data):
    """ "settle_bf16", "settle_f16", "settle_f32": encoded values at their places, nothing else, what is left."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rng.choice([value for value in FP64 if abs(value) < 60000], size)  # overflows: the codec's tests
    base = np.where(rng.random(size) < 0.5, values, 1.0)
    where = np.sort(rng.permutation(2 * size)[:size]).astype(np.int32)
    out = np.full(2 * size, 7, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        found = agree(
            f"settle_{name}", base=base, intended=values * 1.5, values=values, where=where, out=out,
            counts=np.ones(2, np.int64), sums=np.array([0.1, 0.2, 0.3]),
        )  # fmt: skip
    encoded = np.empty(size, dtype)
    bad = getattr(PLAIN, f"encode_{name}")(values, encoded)
    assert found["result"] == bad
    expected = out.copy()
    expected[where] = encoded
    assert found["out"].tobytes() == expected.tobytes()


@given(shapes(), st.data())
def test_fisher_sums(shape, data):
    fisher = data.draw(fp32(*shape))
    agree("fisher_sums", fisher=fisher, total=np.full(shape[0], 0.1), negative=np.ones(shape[0], np.int64))


@pytest.mark.parametrize("size", [1000, 4099])
def test_fisher_sums_of_long_rows(size):
    fisher = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32) ** 2
    agree("fisher_sums", fisher=fisher, total=np.zeros(3), negative=np.zeros(3, np.int64))


# -- sar -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arbitration", range(5))
@pytest.mark.parametrize("agreement", range(5))
@given(
    conflicts(), st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 60.0]),
    st.sampled_from([0.0, 1.0, 2.0]), st.data(),
)  # fmt: skip
def test_resolve(arbitration, agreement, given_, sensitivity, join, power, margin, data):
    where, delta, fisher, mean, phi = given_
    count, size = delta.shape
    keys, start = data.draw(words(count)), data.draw(START)
    if sensitivity == 2:
        fisher, mean = np.empty((0, 0), np.float32), np.empty(0)
    made = {"out": np.full(delta.shape, 7.0), "whole": np.full(size, 7, np.uint8), "wins": np.ones(count, np.int64)}
    made["counts"] = np.ones(4, np.int64)
    common = {
        "delta": delta,
        "fisher": fisher,
        "mean": mean,
        "sensitivity": sensitivity,
        "agreement": agreement,
        **made,
    }
    found = agree(
        "resolve_by", **common, arbitration=arbitration, join=join, power=power, margin=margin, phi=phi, keys=keys,
        start=start, where=where,
    )  # fmt: skip
    resolved, whole = found["out"], found["whole"]
    assert not resolved[delta == 0].any()
    assert set(whole.tolist()) <= {0, 1}
    if arbitration == 0 and agreement <= 2 and not join:
        usual = agree("resolve", **common)
        for name in made:
            assert usual[name].tobytes() == found[name].tobytes()


@pytest.mark.parametrize("score", range(4))
@given(conflicts(), st.data())
def test_scores(score, given_, data):
    _, delta, fisher, mean, _ = given_
    resolved = cut_some(delta, data) * 0.5
    out = np.full((1 if score == 2 else delta.shape[0], delta.shape[1]), 7.0, np.float32)
    with np.errstate(over="ignore"):
        agree("scores", delta=delta, resolved=resolved, fisher=fisher, mean=mean, score=score, out=out)


@given(conflicts(), st.data(), st.sampled_from([1.0, 0.5]))
def test_compose(given_, data, scale):
    _, resolved, fisher, _, _ = given_
    count, size = fisher.shape
    resolved = cut_some(resolved, data)
    base, stored = data.draw(fp64(size)), data.draw(fp64(count, size))
    stored = np.where(stored > 1.0, 1.0, stored)  # equal stored values must be common
    gain = np.array(data.draw(st.lists(st.sampled_from([1.0, 1.2]), min_size=count, max_size=count)))
    unit = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_)
    whole, dropped = (np.array([data.draw(st.integers(0, 1)) for _ in range(size)], np.uint8) for _ in range(2))
    if not unit.any():
        stored = np.empty((0, 0))  # then nobody's stored value can be asked for
    agree(
        "compose", base=base, stored=stored, resolved=resolved, gain=gain, scale=scale, unit=unit, whole=whole,
        dropped=dropped, out=np.full(size, 7.0),
    )  # fmt: skip


# -- trim ------------------------------------------------------------------------------------------------------------


@st.composite
def ranked(draw):
    """where, values and scores as a method gives them: 0 where a value is 0; sometimes one row for all."""
    where, values, *_ = draw(conflicts())
    shared = draw(st.booleans())
    with np.errstate(over="ignore"):
        scores = np.abs(values.astype(np.float32))
    scores = np.where(values != 0.0, np.maximum(scores, np.float32(1e-45)), np.float32(0.0))
    return where, values, np.ascontiguousarray(scores[:1] if shared else scores)


@given(ranked(), st.data())
def test_coarse(given_, data):
    scores = given_[2]
    rows = np.array(data.draw(st.permutations(range(5))), np.int64)[: len(scores)]
    low, high = np.full((5, 65536), 65535, np.uint16), np.zeros((5, 65536), np.uint16)
    agree("coarse", score=scores, rows=rows, count=np.ones((5, 65536), np.int64), low=low, high=high)


@given(ranked(), st.data())
def test_fine(given_, data):
    scores = given_[2]
    present = [-1, *sorted({int(word) >> 15 for word in scores.view(np.uint32).ravel()})]
    rows = np.array(data.draw(st.permutations(range(5))), np.int64)[: len(scores)]
    bins = np.array([data.draw(st.sampled_from(present)) for _ in range(5)], np.int64)
    agree("fine", score=scores, rows=rows, bin_=bins, count=np.ones((5, 32768), np.int64))


@given(ranked(), st.data())
def test_count_updates(given_, data):
    experts = np.array(data.draw(st.permutations(range(5))), np.int64)[: len(given_[1])]
    agree("count_updates", values=given_[1], experts=experts, count=np.ones(5, np.int64))


@given(ranked(), st.data(), st.sampled_from([1, 2]))
def test_norms_by_bin(given_, data, order):
    """ "coarse_norms", "fine_norms": the same bins as the histograms, the same sums in the same order."""
    _, values, scores = given_
    experts = np.array(data.draw(st.permutations(range(5))), np.int64)[: len(values)]
    norm = np.full((2, 5, 65537), 0.1)
    agree("coarse_norms", score=scores, values=values, experts=experts, order=order, norm=norm)
    present = [-1, *sorted({int(word) >> 15 for word in scores.view(np.uint32).ravel()})]
    bins = np.array([data.draw(st.sampled_from(present)) for _ in range(len(scores))], np.int64)
    norm = np.full((5, 32768), 0.1)
    agree("fine_norms", score=scores, values=values, experts=experts, bin_=bins, order=order, norm=norm)


@given(ranked(), st.data(), START, st.sampled_from([0, 2**63, 2**64 - 1]))
def test_sift(given_, data, start, cut):
    where, values, scores = given_
    threshold = threshold_of(scores, data)[0]
    key = np.uint64(data.draw(st.integers(0, 2**64 - 1)))
    found = []
    for kernels in (PLAIN, COMPILED):  # "sift": what lies behind the list is undefined
        left, kept = np.zeros(where.size + 1, np.int32), np.zeros(where.size + 1)
        number = kernels.sift(scores[0], threshold, np.uint64(cut), key, start, where, values[0].copy(), left, kept)
        found.append((number, left[:number].tolist(), kept[:number].tobytes()))
    assert found[0] == found[1]
    # the same coordinates that `trim` leaves
    trimmed, number, dropped = values[:1].copy(), np.zeros(1, np.int64), np.zeros(where.size, np.uint8)
    rest = (np.array([threshold]), np.array([cut], np.uint64), np.array([key]), start, where)
    PLAIN.trim(scores[:1], *rest, trimmed, number, dropped)
    assert found[0][1] == where[trimmed[0] != 0].tolist()


def test_sift_of_many():
    rng = np.random.default_rng(3)
    scores = rng.choice(np.array([0.0, 0.5, 1.0, 2.0], np.float32), 9001)
    where, values = np.arange(9001, dtype=np.int32), rng.standard_normal(9001)
    found = []
    for kernels in (PLAIN, COMPILED):
        left, kept = np.zeros(9002, np.int32), np.zeros(9002)
        rest = (np.float32(1.0), np.uint64(2**63), np.uint64(9), 2**33, where, values, left, kept)
        number = kernels.sift(scores, *rest)
        found.append((number, left[:number].tolist(), kept[:number].tobytes()))
    assert found[0] == found[1]
    assert 0.4 < (found[0][0] - (scores == 2).sum()) / (scores == 1).sum() < 0.6


def threshold_of(scores, data):
    present = [-1.0, float("inf"), *sorted({float(value) for value in scores.ravel() if value > 0})]
    return np.array([data.draw(st.sampled_from(present)) for _ in scores], np.float32)


@given(ranked(), st.data(), START)
def test_tie_hashes(given_, data, start):
    where, _, scores = given_
    key = np.uint64(data.draw(st.integers(0, 2**64 - 1)))
    agree(
        "tie_hashes", score=scores[0], threshold=threshold_of(scores, data)[0], key=key, start=start, where=where,
        out=np.zeros(where.size, np.uint64),
    )  # fmt: skip


@given(ranked(), st.data(), START)
def test_trim(given_, data, start):
    where, values, scores = given_
    threshold, keys = threshold_of(scores, data), data.draw(words(len(scores)))
    cut = data.draw(words(len(scores)))
    kept, dropped = np.ones(len(values), np.int64), np.zeros(where.size, np.uint8)
    found = agree(
        "trim", score=scores, threshold=threshold, cut=cut, keys=keys, start=start, where=where, values=values,
        kept=kept, dropped=dropped,
    )  # fmt: skip
    after = found["values"]
    assert (found["kept"] - 1).tolist() == np.count_nonzero(after, axis=1).tolist()
    assert found["dropped"].astype(bool).tolist() == ((values != 0) & (after == 0)).any(axis=0).tolist()


@given(ranked(), st.data(), START, st.booleans())
def test_ramp(given_, data, start, inverse):
    where, values, scores = given_
    rank = np.zeros((len(scores), 65536))
    rank[:] = np.arange(65536) / 65536
    low, high = np.full(len(scores), 0.2), np.full(len(scores), 0.9)
    keys = data.draw(words(len(scores)))
    kept, dropped = np.ones(len(values), np.int64), np.zeros(where.size, np.uint8)
    agree(
        "ramp", score=scores, rank=rank, low=low, high=high, keys=keys, start=start, where=where,
        values=values, inverse=inverse, kept=kept, dropped=dropped,
    )  # fmt: skip


@given(ranked(), st.data())
def test_compact(given_, data):
    where, values = given_[0], cut_some(given_[1], data)
    left, kept = np.full(where.size, 7, np.int32), np.full(values.size, 7.0)
    found = agree("compact", values=values, where=where, left=left, kept=kept)
    some = (values != 0.0).any(axis=0)
    assert found["left"][: some.sum()].tolist() == where[some].tolist()


@given(conflicts(), st.sampled_from([1, 2]), st.data())
def test_kept_norms(given_, order, data):
    delta = given_[1]
    agree("kept_norms", values=cut_some(delta, data), order=order, total=np.full(len(delta), 0.1))


# -- spread and join ---------------------------------------------------------------------------------------------------


@given(conflicts(), st.integers(0, 2), st.sampled_from([0, 1]), st.data())
def test_spread_and_join(given_, absent, cancelled, data):
    where, delta = given_[:2]
    agree("spread", delta=delta, count=len(delta) + absent, out=np.full(where.size, 7.0, np.float32))
    agree(
        "join", base=data.draw(fp64(where.size)), delta=cut_some(delta, data), cancelled=cancelled,
        coefficient=np.array([0.5, 0.25, 0.0, 1 / 3, 1.0])[: len(delta)], out=np.full(where.size, 7.0),
        counts=np.ones(2, np.int64),
    )  # fmt: skip


@given(conflicts(), st.data())
def test_weighted_mean(given_, data):
    where, delta = given_[:2]
    share = np.random.default_rng(data.draw(st.integers(0, 9))).choice([0.0, 0.5, 1 / 3, 2.0], delta.shape)
    agree(
        "weighted_mean", base=data.draw(fp64(where.size)), delta=delta, share=share, total=share.sum(axis=0),
        out=np.full(where.size, 7.0),
    )  # fmt: skip


# -- random cuts -----------------------------------------------------------------------------------------------------


@given(conflicts(), st.data(), START, st.booleans(), st.booleans())
def test_draw(given_, data, start, inverse, shared):
    where, delta = given_[:2]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    chance = rng.choice([0.0, 0.1, 0.5, 1.0], (len(delta), 1 if shared else where.size))
    keys, kept = data.draw(words(len(delta))), np.ones(len(delta), np.int64)
    found = agree("draw", values=delta, chance=chance, keys=keys, start=start, where=where, inverse=inverse, kept=kept)
    assert (found["kept"] - 1).tolist() == np.count_nonzero(found["values"], axis=1).tolist()


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.data())
def test_row_ranks(length, stride, slices, of_support, data):
    number = slices * stride * length
    values = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, -2.0, 0.5, -1e-300]), min_size=number,
                                         max_size=number)), np.float64)  # fmt: skip
    second = np.array(data.draw(st.lists(st.booleans(), min_size=number, max_size=number)), np.bool_)
    found = ranks_of(values, second, length, stride, of_support)
    for row, mine in zip(*(rows_of(array, slices, length, stride) for array in (np.abs(values), found))):
        before = 0 if of_support else np.count_nonzero(row == 0.0)
        steps = (np.count_nonzero(row) if of_support else length) - 1
        for size, rank in zip(row, mine):
            low, equal = np.count_nonzero((row < size) & (row > 0.0)), np.count_nonzero(row == size)
            expected = (before + low + (equal - 1) / 2) / steps if steps > 0 else 0.5
            assert rank == (expected if size else 0.0)


@pytest.mark.parametrize("magnitudes", [1, 127, 128, 129, 500])
def test_ranks_of_few_magnitudes_and_of_many(magnitudes):
    rng = np.random.default_rng(magnitudes)
    values = rng.integers(1, magnitudes + 1, 3 * 500) * rng.choice([-1.0, 1.0], 1500) * 2.0**-20
    values[:magnitudes] = 2.0**-20 * np.arange(1, magnitudes + 1)  # the first row has all of them
    found = ranks_of(values, rng.random(1500) < 0.3, 500, 1, False).reshape(3, 500)
    for row, mine in zip(np.abs(values).reshape(3, 500), found):
        ordered = np.sort(row)
        middle = (np.searchsorted(ordered, row) + np.searchsorted(ordered, row, "right") - 1) / 2
        np.testing.assert_array_equal(mine, middle / 499)


def rows_of(array, slices, length, stride):
    return array.reshape(slices, length, stride).swapaxes(1, 2).reshape(-1, length)


def ranks_of(values, second, length, stride, of_support):
    """What both kernels say of deltas, some of which stand in the second list."""
    lists = [np.flatnonzero(chosen).astype(np.int32) for chosen in (~second, second)]
    outs = [np.full(where.size, 7.0) for where in lists]
    found = agree(
        "row_ranks", where=lists[0], values=values[lists[0]], others_where=lists[1], others=values[lists[1]],
        length=length, stride=stride, of_support=of_support, out=outs[0], others_out=outs[1],
    )  # fmt: skip
    ranks = np.empty(values.size)
    ranks[lists[0]], ranks[lists[1]] = found["out"], found["others_out"]
    return ranks


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
