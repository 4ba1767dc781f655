"""The compiled kernels, by subject: codec, census, trim, combine, sar."""

from .census import census, fisher_sums, realised
from .codec import (
    count_nonfinite,
    decode_bf16,
    decode_f16,
    encode_bf16,
    encode_f16,
    encode_f32,
    round_stochastically,
)
from .combine import changed, deltas, linear, ram, task_arithmetic, ties
from .sar import compose, resolve, scores
from .trim import coarse, fine, kept_norms, ramp, tie_hashes, trim

NAME = "numba"

__all__ = [
    "NAME",
    "census",
    "changed",
    "coarse",
    "compose",
    "count_nonfinite",
    "decode_bf16",
    "decode_f16",
    "deltas",
    "encode_bf16",
    "encode_f16",
    "encode_f32",
    "fine",
    "fisher_sums",
    "kept_norms",
    "linear",
    "ram",
    "ramp",
    "realised",
    "resolve",
    "round_stochastically",
    "scores",
    "task_arithmetic",
    "tie_hashes",
    "ties",
    "trim",
]
