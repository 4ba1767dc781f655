"""The kernels of geometry against their plain twins, and both against exact integers and sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.kernels.kernel_pairs import COMPILED, PLAIN, agree, fp64, shapes

BOTH = pytest.mark.parametrize("kernels", [PLAIN, COMPILED], ids=["numpy", "numba"])
ABSOLUTE, RELATIVE = np.array([1e-8, 1e-5, 1.0]), np.array([1e-3, 0.5])
DTYPES = (("bf16", 0, np.uint16, 0x7F80), ("f16", 1, np.uint16, 0x7C00), ("f32", 2, np.uint32, 0x7F800000))


def stored(words, form):
    """The values of stored words, as fp64."""
    if form == 0:
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return words.view(np.float16 if form == 1 else np.float32).astype(np.float64)


@st.composite
def two_stored(draw):
    """Finite words of one dtype, and others a few steps, or any number of steps, away."""
    _, form, kind, infinity = draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from([0, 1, 7, 33]))
    top = np.iinfo(kind).max // 2 + 1
    finite = st.integers(0, infinity - 1)
    old = np.array([draw(finite) + draw(st.sampled_from([0, top])) for _ in range(size)], kind)
    near = st.integers(-3, 3)
    new = [
        draw(finite) if draw(st.booleans()) else min(max(int(word % top) + draw(near), 0), infinity - 1) for word in old
    ]
    signs = [draw(st.sampled_from([0, top])) for _ in range(size)]
    return form, old, np.array(new, kind) + np.array(signs, kind), top


@given(two_stored())
def test_sizes(drawn):
    form, old, new, top = drawn
    before, after = stored(old, form), stored(new, form)
    above, steps = np.zeros(5, np.int64), np.zeros(34, np.int64)
    found = agree(
        "sizes", old=before, new=after, delta=after - before, form=form, absolute=ABSOLUTE, relative=RELATIVE,
        above=above, steps=steps,
    )  # fmt: skip

    def number(word):
        return -(int(word) - top) if word >= top else int(word)

    apart = [abs(number(b) - number(a)) for a, b in zip(old, new)]
    for place in range(1, 34):
        assert found["steps"][place] == sum(2 ** (place - 1) <= step < 2**place for step in apart)
    change, larger = np.abs(after - before), np.maximum(np.abs(before), np.abs(after))
    assert found["above"].tolist() == [
        *((change > bound).sum() for bound in ABSOLUTE),
        *((change > bound * larger).sum() for bound in RELATIVE),
    ]
    if form == 0:
        assert found["result"] == sum(step > 0 for step in apart)


def test_sizes_cast_to_bf16():
    """2^-9 is half a step at 1: a tie that stays; a little more moves. Zeros that rounding makes are no change."""
    old = np.array([1.0, 1.0, 1.0, 1e-45, 0.0])
    new = np.array([1.0 + 2.0**-8, 1.0 + 2.0**-8 + 2.0**-20, 1.0 + 2.0**-23, -1e-45, -0.0])
    found = agree(
        "sizes", old=np.float32(old).astype(float), new=np.float32(new).astype(float), delta=new - old, form=2,
        absolute=ABSOLUTE, relative=RELATIVE, above=np.zeros(5, np.int64), steps=np.zeros(34, np.int64),
    )  # fmt: skip
    assert found["result"] == 1


@given(st.data())
def test_pairs_and_changers(data):
    count, size = data.draw(shapes())
    delta = data.draw(st.sampled_from([fp64, lambda *s: hnp.arrays(np.float64, s, elements=st.integers(-2, 2))]))
    values = np.where(np.abs(delta_ := data.draw(delta(count, size))) < 1e100, delta_, 0.0) + 0.0
    zeros = {"overlap": np.zeros((count, count), np.int64), "conflict": np.zeros((count, count), np.int64)}
    found = agree("pairs", delta=values, sums=np.zeros((count, count, 7)), **zeros)
    for b in range(count):
        for a in range(b):
            both = [(x, y) for x, y in zip(values[a], values[b]) if x and y]
            apart = [(x, y) for x, y in both if (x > 0) != (y > 0)]
            assert found["overlap"][a, b] == len(both)
            assert found["conflict"][a, b] == len(apart)
            wanted = [
                math.fsum(x * y for x, y in both),
                math.fsum(x * x for x, y in both),
                math.fsum(y * y for x, y in both),
                math.fsum(min(abs(x), abs(y)) for x, y in both),
                math.fsum(min(abs(x), abs(y)) for x, y in apart),
                math.fsum((x * y) ** 2 for x, y in both),
                math.fsum((x * y) ** 2 for x, y in apart),
            ]
            largest = max((abs(x * y) for x, y in both), default=0.0)
            np.testing.assert_allclose(found["sums"][a, b], wanted, rtol=1e-12, atol=1e-12 * largest)
    made = agree("changers", delta=values, number=np.zeros(count + 1, np.int64), agreement=np.zeros(1, np.int64))
    number = (values != 0).sum(axis=0)
    assert made["number"].tolist() == [int((number == n).sum()) for n in range(count + 1)]
    one_way = (values >= 0).all(axis=0) | (values <= 0).all(axis=0)
    assert made["agreement"][0] == int(((number > 1) & one_way).sum())


@given(st.data())
def test_the_order_and_the_permutation(data):
    """Sorted stably by exponent; every change goes to a place of its own within its bin."""
    kind, fraction = data.draw(st.sampled_from([(np.uint16, 7), (np.uint32, 23)]))
    size = data.draw(st.sampled_from([0, 1, 2, 7, 64, 301]))
    exponents = data.draw(hnp.arrays(kind, size, elements=st.sampled_from([0, 1, 120, 121, 255, 256 + 120])))
    mantissa = data.draw(hnp.arrays(kind, size, elements=st.sampled_from([0, 0, 1, 2, 127])))
    bits = (exponents << kind(fraction)) | mantissa
    places = {"place": np.zeros(size, np.int32), "ordered": np.zeros(size, kind), "first": np.zeros(769, np.int64)}
    found = agree("sort_by_exponent", bits=bits, fraction=fraction, **places)
    place, first = found["place"], found["first"]
    assert sorted(place.tolist()) == list(range(size))
    assert (found["ordered"][place] == bits).all()
    wide = bits.astype(np.int64) >> fraction
    bins = (wide & 255) * 3 + (mantissa == 0) * (1 + (wide >> 8))
    assert (place == np.argsort(np.argsort(bins, kind="stable"), kind="stable")).all()
    key = np.uint64(data.draw(st.integers(0, 2**64 - 1)))
    drawn = {"factor": np.zeros(768, np.int64), "shift": np.zeros(768, np.int64)}
    drawn = agree("draw_permutations", first=first, key=key, **drawn)
    where = np.arange(size, dtype=np.int32)
    made = agree(
        "targets", where=where, bits=bits, fraction=fraction, place=place, first=first, factor=drawn["factor"],
        shift=drawn["shift"], out=np.zeros(size, np.int32),
    )["out"]  # fmt: skip
    assert sorted(made.tolist()) == list(range(size))
    assert (np.sort(bins)[made] == bins).all()
    agree("put", values=np.arange(size, dtype=np.float32), where=made, out=np.zeros(size, np.float32))


@BOTH
def test_large_bins_are_permuted_exactly(kernels):
    """The quotient by multiplication is the exact one for products up to the square of a run."""
    size = 2**18 - 5
    bits = np.full(size, 0x3F81, np.uint16)
    place, ordered, first = np.empty(size, np.int32), np.empty(size, np.uint16), np.empty(769, np.int64)
    kernels.sort_by_exponent(bits, 7, place, ordered, first)
    factor, shift = np.ones(768, np.int64), np.zeros(768, np.int64)
    factor[381], shift[381] = size - 1, size - 1
    out = np.empty(size, np.int32)
    kernels.targets(np.arange(size, dtype=np.int32), bits, 7, place, first, factor, shift, out)
    assert (out == (np.arange(size) * (size - 1) + size - 1) % size).all()
