"""The compiled kernels, by file: what changed, codec, merges, draws, geometry, sums."""

from .census import census, fisher_sums
from .changes import changes, deltas, patches_bf16, take, take_bf16
from .codec import (
    count_nonfinite,
    decode_bf16,
    decode_f16,
    encode_bf16,
    encode_f16,
    encode_f32,
    round_stochastically,
)
from .combine import count_shared, linear, ram, ramplus, task_arithmetic, ties
from .draw import draw, row_ranks
from .geometry import changers, pairs, sizes
from .gram import gram_columns, gram_rows
from .sar import compose, resolve, scores
from .sar_rules import resolve_by
from .settle import add_bf16, linear_bf16, realised, settle_bf16, settle_f16, settle_f32
from .shuffle import draw_permutations, put, sort_by_exponent, targets
from .spread import join, spread, weighted_mean
from .steps import apply_steps, encode_steps, weigh
from .trim import (
    coarse,
    coarse_norms,
    compact,
    count_updates,
    fine,
    fine_norms,
    kept_norms,
    ramp,
    sift,
    tie_hashes,
    trim,
)

NAME = "numba"

__all__ = [
    "NAME",
    "add_bf16",
    "apply_steps",
    "census",
    "changers",
    "changes",
    "coarse",
    "coarse_norms",
    "compact",
    "compose",
    "count_nonfinite",
    "count_shared",
    "count_updates",
    "decode_bf16",
    "decode_f16",
    "deltas",
    "draw",
    "draw_permutations",
    "encode_bf16",
    "encode_f16",
    "encode_f32",
    "encode_steps",
    "fine",
    "fine_norms",
    "fisher_sums",
    "gram_columns",
    "gram_rows",
    "join",
    "kept_norms",
    "linear",
    "linear_bf16",
    "pairs",
    "patches_bf16",
    "put",
    "ram",
    "ramp",
    "ramplus",
    "realised",
    "resolve",
    "resolve_by",
    "round_stochastically",
    "row_ranks",
    "scores",
    "settle_bf16",
    "settle_f16",
    "settle_f32",
    "sift",
    "sizes",
    "sort_by_exponent",
    "spread",
    "take",
    "take_bf16",
    "targets",
    "task_arithmetic",
    "tie_hashes",
    "ties",
    "trim",
    "weigh",
    "weighted_mean",
]
