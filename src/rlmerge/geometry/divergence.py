"""How far an expert's answers are from the base's: KL in both directions and entropies, exact over the vocabulary.

Means over the scored tokens of a set's sequences: KL(expert ‖ base) on sequences that the expert drew estimates, token
by token, the KL that RL with a penalty would pay; the reverse asks what of the base's answers was given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .landscape import Landscape
from .passes import divergences, score, slabs
from .weights import make_point

KEPT = 2**28
"""Bytes of the base's logits that are kept while the experts are asked."""


def measure_divergence(
    space: Landscape, experts: Sequence[str], number: int, heard: Callable[[], None]
) -> list[dict[str, Any]]:
    """KL and entropies of each expert beside the base on one set, in nats per token."""
    one, model = space.sets[number], space.weights.model
    sums = {key: np.zeros((4, len(one.tokens))) for key in experts}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for places in slabs(one.batches, vocabulary, KEPT):
        space.weights.place(())
        base = {place: score(model, one.batches[place]) for place in places}
        for key in experts:
            space.weights.place(make_point([(key, 1.0)]))
            for place, scored in base.items():
                owners = one.owners[place]
                rows = divergences(score(model, one.batches[place]), scored, len(owners))
                for total, values in zip(sums[key], rows):
                    np.add.at(total, owners, values.numpy())
    names = ("kl_expert_base", "kl_base_expert", "entropy", "entropy_base")
    found = []
    for key in experts:
        estimates = {name: space.resampled[number].estimate(row) for name, row in zip(names, sums[key])}
        found.append({"expert": key, "set": one.name} | estimates)
        heard()
    return found
