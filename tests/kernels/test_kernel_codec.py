"""The codec against exact rounding in integers, and against NumPy and torch where these round once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.kernels.kernel_pairs import COMPILED, FP64, PLAIN, agree

ALL = np.arange(65536, dtype=np.uint16)
BOTH = pytest.mark.parametrize("kernels", [PLAIN, COMPILED], ids=["numpy", "numba"])
FORMATS = {"bf16": (7, -126, 127), "f16": (10, -14, 15), "f32": (23, -126, 127)}


def nearest(value: float, form: str) -> float:
    """Exact rounding to nearest, ties to even, in rational numbers; the overflow threshold of IEEE 754."""
    fraction_bits, low, high = FORMATS[form]
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, low)
    step = Fraction(2) ** (exponent - fraction_bits)
    rounded = round(Fraction(value) / step) * step  # Python's round of a Fraction is to even
    if abs(rounded) >= Fraction(2) ** (high + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def encode(kernels, form, values):
    values = np.asarray(values, np.float64)
    out = np.empty(values.shape, np.float32 if form == "f32" else np.uint16)
    bad = getattr(kernels, f"encode_{form}")(values, out)
    return out, bad


def decode(kernels, form, raw):
    if form == "f32":
        return raw, kernels.count_nonfinite(raw)
    out = np.empty(raw.shape, np.float32)
    return out, getattr(kernels, f"decode_{form}")(raw, out)


@st.composite
def near_ties(draw):
    """fp64 values at, and one fp64 step or one fp32 step beside, the midpoints of bf16, fp16 and fp32 values."""
    fraction_bits, low, high = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    exponent = draw(st.integers(low - fraction_bits, high))
    step = 2.0 ** (max(exponent, low) - fraction_bits)
    value = (draw(st.integers(0, 2 ** (fraction_bits + 1))) + draw(st.sampled_from([0.0, 0.5]))) * step
    nudge = draw(st.sampled_from([0.0, 1.0, -1.0, 2.0**-30, -(2.0**-30)]))
    value = float(np.nextafter(value, nudge * math.inf)) if abs(nudge) == 1.0 else value * (1.0 + nudge)
    return value * draw(st.sampled_from([1.0, -1.0]))


EDGES = [math.inf, -math.inf, 65519.99, 65520.0, -65520.0, 3.3961775e38, 3.39617752923046e38, 3.4028235677973366e38]
VALUES = st.one_of(near_ties(), st.sampled_from([*FP64, *EDGES]), st.floats(allow_nan=False))


@BOTH
@pytest.mark.parametrize("form", ["bf16", "f16", "f32"])
@given(hnp.arrays(np.float64, 64, elements=VALUES))
def test_encode_rounds_once_to_nearest_even(kernels, form, values):
    """The oracle is exact rational arithmetic; no tolerance."""
    raw, bad = encode(kernels, form, values)
    back, _ = decode(kernels, form, raw)
    expected = np.array([nearest(float(value), form) for value in values])
    assert back.astype(np.float64).tobytes() == expected.tobytes()
    assert bad == np.count_nonzero(~np.isfinite(expected))


@given(hnp.arrays(np.float64, 33, elements=VALUES))
def test_twins_encode_alike(values):
    agree("encode_bf16", values=values, out=np.zeros(33, np.uint16))
    agree("encode_f16", values=values, out=np.zeros(33, np.uint16))
    agree("encode_f32", values=values, out=np.zeros(33, np.float32))
    agree("count_nonfinite", values=np.where(values > 1, np.inf, values.clip(-1, 1)).astype(np.float32))


@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_arrays(size):
    for form in ("bf16", "f16"):
        agree(f"decode_{form}", raw=np.full(size, 0x7F80, np.uint16), out=np.zeros(size, np.float32))
        agree(f"encode_{form}", values=np.full(size, np.nan), out=np.zeros(size, np.uint16))


@BOTH
def test_double_rounding_is_avoided(kernels):
    """1 + 2⁻⁸ + 2⁻⁴⁰ lies above the middle of two bf16 values; through fp32 it would become the middle, and go down."""
    value = 1 + 2**-8 + 2**-40
    raw, _ = encode(kernels, "bf16", [value, -value, np.float64(np.float32(value))])
    assert raw.tolist() == [0x3F81, 0xBF81, 0x3F80]


@BOTH
def test_bf16_and_fp16_encoders_agree_with_libraries(kernels):
    """fp16: NumPy rounds fp64 once. bf16: torch rounds fp32 once (from fp64 it rounds twice), so from fp32 values."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = np.ldexp(rng.standard_normal(200_000), rng.integers(-30, 18, 200_000))
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    assert encode(kernels, "f16", values)[0].tobytes() == half.tobytes()
    single = values.astype(np.float32)
    brain = torch.from_numpy(single).to(torch.bfloat16).view(torch.int16).numpy()
    assert encode(kernels, "bf16", single)[0].tobytes() == brain.tobytes()


@BOTH
def test_all_words_survive_the_round_trip(kernels):
    for form, exponent, quiet in (("bf16", 0x7F80, 0x7FC0), ("f16", 0x7C00, 0x7E00)):
        values, bad = decode(kernels, form, ALL)
        special = (ALL & exponent) == exponent
        nan = special & ((ALL & (0x7FFF ^ exponent)) != 0)
        assert bad == np.count_nonzero(special)
        assert np.isnan(values).tolist() == nan.tolist()
        with np.errstate(invalid="ignore"):  # a signalling NaN, made quiet by the conversion to fp64
            raw, bad = encode(kernels, form, values)
        assert bad == np.count_nonzero(special)
        assert raw[~nan].tobytes() == ALL[~nan].tobytes()
        assert set(raw[nan].tolist()) <= {quiet, quiet | 0x8000}  # any NaN becomes the quiet one


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_decoding_is_what_the_format_means(form):
    fraction_bits, low, _ = FORMATS[form]
    found = agree(f"decode_{form}", raw=ALL, out=np.zeros(65536, np.float32))
    raw, values = found["raw"], found["out"]
    finite = np.isfinite(values)
    bits = raw.astype(np.int64) & 0x7FFF
    exponent, fraction = bits >> fraction_bits, bits & (2**fraction_bits - 1)
    mantissa = np.where(exponent > 0, fraction + 2**fraction_bits, fraction)
    size = np.ldexp(mantissa.astype(np.float64), np.maximum(exponent, 1) - 1 + low - fraction_bits)
    expected = np.where(raw >> 15, -size, size)
    assert values[finite].astype(np.float64).tobytes() == expected[finite].tobytes()


# -- stochastic rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bf16", "f16", "f32"])
@given(st.lists(st.one_of(near_ties(), st.sampled_from(FP64)), min_size=1, max_size=33), st.integers(0, 2**40))
def test_stochastic_rounding_goes_to_neighbours_only(form, values, start):
    fraction_bits, low, high = FORMATS[form]
    values = np.array([value for value in values if abs(value) < 2.0**high] or [0.0])
    found = agree(
        "round_stochastically", values=values, where=np.arange(values.size, dtype=np.int32), start=start,
        key=np.uint64(99), fraction_bits=fraction_bits,
        smallest_exponent=low,
    )  # fmt: skip
    for value, rounded in zip(values.tolist(), found["values"].tolist()):
        step = Fraction(2) ** (max(math.frexp(value)[1] - 1, low) - fraction_bits)
        assert Fraction(rounded) % step == 0
        assert abs(Fraction(rounded) - Fraction(value)) < step
        if Fraction(value) % step == 0:
            assert math.copysign(1, rounded) == math.copysign(1, value)
            assert rounded == value


@BOTH
@pytest.mark.parametrize("form", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("value", [1.0 + 2**-26, -0.3, 1e-40, 3.001, 6e-6])
def test_stochastic_rounding_is_unbiased(kernels, form, value):
    """Over 2¹⁶ coordinates the mean is the value, within five standard deviations of a Bernoulli mean."""
    fraction_bits, low, _ = FORMATS[form]
    size = 2**16
    values = np.full(size, value)
    kernels.round_stochastically(values, np.arange(size, dtype=np.int32), 10**6, np.uint64(7), fraction_bits, low)
    step = 2.0 ** (max(math.frexp(value)[1] - 1, low) - fraction_bits)
    rest = value / step - math.floor(value / step)
    ups = np.count_nonzero(values == (math.floor(value / step) + 1) * step)
    assert abs(ups - size * rest) <= 5 * math.sqrt(size * rest * (1 - rest)) + 1
    assert len(np.unique(values)) <= 2


@BOTH
def test_stochastic_rounding_does_not_depend_on_blocks(kernels):
    values = np.random.default_rng(5).standard_normal(1000)
    whole, parts = values.copy(), [values[:300].copy(), values[300:].copy()]
    every = np.arange(1000, dtype=np.int32)
    kernels.round_stochastically(whole, every, 50, np.uint64(3), 7, -126)
    kernels.round_stochastically(parts[0], every[:300], 50, np.uint64(3), 7, -126)
    kernels.round_stochastically(parts[1], every[:700], 350, np.uint64(3), 7, -126)
    assert np.concatenate(parts).tobytes() == whole.tobytes()
