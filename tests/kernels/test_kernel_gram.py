"""Inner products of experts: both kernels have the same bits, and these are the products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.kernel_pairs import SIZES, agree, fp32, fp64

SHAPES = st.tuples(st.integers(1, 4), st.integers(0, 3), st.sampled_from(SIZES))


@given(SHAPES, st.booleans(), st.data())
def test_gram_rows(shape, wide, data):
    values = data.draw(fp64(*shape) if wide else fp32(*shape))
    start = data.draw(fp64(shape[1], shape[0], shape[0]))
    agree("gram_rows", values=values, total=start)


@given(SHAPES, st.integers(1, 5), st.integers(0, 9), st.data())
def test_gram_columns(shape, columns, start, data):
    values = data.draw(fp64(shape[0], shape[1] * shape[2]))
    agree("gram_columns", values=values, start=start, total=np.zeros((columns, shape[0], shape[0])))


@pytest.mark.parametrize("columns", [1, 7, 40])
def test_they_are_inner_products(columns):
    values = np.random.default_rng(0).standard_normal((3, 5, columns))
    found = agree("gram_rows", values=values, total=np.zeros((5, 3, 3)))["total"]
    np.testing.assert_allclose(found, np.einsum("irc,jrc->rij", values, values), rtol=1e-13, atol=1e-13)
    found = agree("gram_columns", values=values.reshape(3, -1), start=0, total=np.zeros((columns, 3, 3)))["total"]
    np.testing.assert_allclose(found, np.einsum("irc,jrc->cij", values, values), rtol=1e-13, atol=1e-13)
