"""Which Gram matrices are summed in which pass, so that their sums fit into a bound on memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlmerge.errors import GramError
from rlmerge.figures import size
from rlmerge.fisher.room import AROUND

from .inputs import Weight


@dataclass(frozen=True)
class Room:
    """Groups of weights, a pass each; bytes that all take on disk, and at most at once in memory."""

    groups: list[list[Weight]]
    stored: int
    held: int

    def describe(self) -> str:
        """One line for a user who waits."""
        count, passes = sum(map(len, self.groups)), len(self.groups)
        return (
            f"{count} Gram matrices: {self.stored / 1e9:.3g} GB on disk, {self.held / 1e9:.3g} GB of memory at most, "
            + ("one pass" if passes == 1 else f"{passes} passes over the sequences")
        )


def plan_room(model: Any, widths: Mapping[Weight, int], tokens: int, memory: int | None) -> Room:
    """Groups in the order of use. Raises GramError if the largest matrix alone does not fit.

    Beside the model: sums in fp64, one product in fp32, its fp64 mean and transpose when it is written, and the
    activations of a batch, which are not kept from layer to layer.
    """
    config = model.config.get_text_config()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    heads = getattr(config, "num_attention_heads", 1)
    widest = max(widths.values())
    activations = 4 * tokens * (8 * config.hidden_size + 4 * widest + heads * min(tokens, 4096))
    work = 24 * widest**2
    fixed = AROUND + weights + activations + work
    groups: list[list[Weight]] = [[]]
    sums = most = 0
    for weight, width in widths.items():
        own = 8 * width**2
        if memory is not None and groups[-1] and fixed + sums + own > memory:
            groups.append([])
            sums = 0
        groups[-1].append(weight)
        sums += own
        most = max(most, sums)
    if memory is not None and fixed + most > memory:
        raise GramError(
            f"--memory {size(memory)} is too little: the model takes {weights / 1e9:.2g} GB, and the largest "
            f"Gram matrix, of {widest:,} inputs, {(work + 8 * widest**2) / 1e9:.2g} GB while it is summed and written. "
            f"Give {-(-(fixed + 8 * widest**2) // 10**8) / 10:.1f} GB, or lower --batch-tokens."
        )
    return Room(groups, sum(4 * width**2 for width in widths.values()), fixed + most)
