"""A merge method of one's own: the sum of the deltas, no change larger than a limit."""

import numpy as np

from rlmerge.plugins import Parameter, method


@method(
    "clipped",
    "sum of the weighted deltas, no change larger than a limit",
    parameters=[
        Parameter("weight", "number", 1.0, "factor of this model's delta", per_model=True),
        Parameter("limit", "number", 1e-3, "largest change of a weight", above=0),
    ],
)
def clipped(base, deltas, weight, limit):
    """θ = θ0 + clip(Σ wi·δi, −limit, limit)"""
    return base + np.clip(weight @ deltas, -limit, limit)
