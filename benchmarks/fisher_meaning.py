"""Does F·δ² say what an update is worth? Takes updates of an expert back and measures what its own answers lose.

    python benchmarks/fisher_meaning.py BASE EXPERT FISHER DATA.jsonl --results OUT.json

The loss is −log p of right completions that the expert sampled with another seed than those of the Fisher. Three
experiments on the coordinates that training changed:

    groups    sixteen groups of equal size by rank of a score: does the loss rise in the order that the score predicts?
    layers    attention and MLP of each layer, groups that no score has chosen
    top       the share x with the highest score is taken back, by F·δ², by δ², by F, at random: who hurts most?
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlmerge.evaluate.run import load_model
from rlmerge.evaluate.tasks import load_task
from rlmerge.fisher.combine import read_tensor
from rlmerge.fisher.data import SequenceChoice
from rlmerge.fisher.sequences import log_probability_gradient, make_batches
from rlmerge.fisher.sources import make_units, sample
from rlmerge.fisher.stats import rank_correlation

GROUPS = 16
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


class Expert:
    """A model whose updates can be taken back, at some coordinates of the concatenation of all parameters."""

    def __init__(self, base: Path, folder: Path, fisher: Path) -> None:
        self.model, self.tokenizer = load_model(folder)
        other, _ = load_model(base)
        names = [name for name, _ in self.model.named_parameters()]
        old = dict(other.named_parameters())
        self.parameters = {name: value.detach() for name, value in self.model.named_parameters()}
        deltas = [(self.parameters[name] - old[name].detach()).flatten().numpy() for name in names]
        self.sizes = [delta.size for delta in deltas]
        self.names = names
        self.delta = np.concatenate(deltas).astype(np.float64)
        self.fisher = np.concatenate([read_tensor(fisher, name).flatten().numpy() for name in names]).astype(np.float64)
        self.own = np.concatenate([value.flatten().numpy() for value in self.parameters.values()])
        self.support = np.flatnonzero(self.delta)

    def take_back(self, places: np.ndarray) -> None:
        """Sets these coordinates to the base's values, and all others to the expert's."""
        values = self.own.copy()
        values[places] = (self.own[places].astype(np.float64) - self.delta[places]).astype(np.float32)
        start = 0
        for name, size in zip(self.names, self.sizes):
            parameter = self.parameters[name]
            parameter.copy_(torch.from_numpy(values[start : start + size]).view_as(parameter))
            start += size

    def loss(self, units: list[Any]) -> float:
        """Mean of −log p over the sequences."""
        total = 0.0
        for batch in make_batches(units, 4096, mean=False):
            first, last = batch.scored
            with torch.no_grad():
                logits = self.model(
                    input_ids=batch.ids, attention_mask=batch.mask, use_cache=False,
                    logits_to_keep=torch.arange(first - 1, last - 1),
                ).logits  # fmt: skip
            total -= log_probability_gradient(logits, batch, first, last)[1]
        return total / len(units)


def by_group(expert: Expert, units: list[Any], groups: list[np.ndarray], rest: float) -> dict[str, Any]:
    """Measured rises of the loss, predictions by both scores, and their rank correlations."""
    rises, sensitivity, size = [], [], []
    for places in groups:
        expert.take_back(places)
        rises.append(expert.loss(units) - rest)
        square = expert.delta[places] ** 2
        sensitivity.append(0.5 * float((expert.fisher[places] * square).sum()))
        size.append(float(square.sum()))
    return {
        "rise": rises,
        "half_F_delta2": sensitivity,
        "delta2": size,
        "rank_correlation_F_delta2": rank_correlation(np.array(sensitivity), np.array(rises)),
        "rank_correlation_delta2": rank_correlation(np.array(size), np.array(rises)),
    }


def main() -> None:
    """All three experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "expert", "fisher", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    expert = Expert(given.base, given.expert, given.fisher)
    choice = SequenceChoice("own", sequences=given.sequences, max_new_tokens=given.max_new_tokens, seed=1)
    task = load_task(str(given.data))
    with tempfile.TemporaryDirectory() as folder:
        drawn = sample(expert.model, expert.tokenizer, task.problems, choice, Path(folder) / "drawn.jsonl")
    units = [unit for unit in make_units(drawn, choice) if unit is not None]
    support = expert.support
    rest = expert.loss(units)
    expert.take_back(support)
    report: dict[str, Any] = {"sequences": len(units), "loss_expert": rest, "loss_base": expert.loss(units)}
    scores = {
        "F_delta2": expert.fisher[support] * expert.delta[support] ** 2,
        "delta2": expert.delta[support] ** 2,
        "F": expert.fisher[support],
        "random": np.random.default_rng(0).random(len(support)),
    }
    for name in ("F_delta2", "delta2"):
        order = support[np.argsort(scores[name], kind="stable")]
        report[f"groups_by_{name}"] = by_group(expert, units, np.array_split(order, GROUPS), rest)
        print(name, json.dumps(report[f"groups_by_{name}"]["rise"]), flush=True)
    bounds = np.cumsum([0, *expert.sizes])
    parts: dict[str, list[np.ndarray]] = {}
    for name, start, stop in zip(expert.names, bounds, bounds[1:]):
        if ".layers." in name:
            kind = "mlp" if ".mlp." in name else "attention"
            low, high = np.searchsorted(support, [start, stop])
            parts.setdefault(f"{name.split('.layers.')[1].split('.')[0]} {kind}", []).append(support[low:high])
    report["layers"] = by_group(expert, units, [np.concatenate(places) for places in parts.values()], rest)
    report["top"] = {}
    for name, score in scores.items():
        order = support[np.argsort(-score, kind="stable")]
        rises = []
        for share in SHARES:
            expert.take_back(order[: int(share * len(order))])
            rises.append(expert.loss(units) - rest)
        report["top"][name] = dict(zip(map(str, SHARES), rises))
        print("top", name, rises, flush=True)
    given.results.write_text(json.dumps(report, indent=1) + "\n")
    for key in ("groups_by_F_delta2", "groups_by_delta2", "layers"):
        found = report[key]
        print(key, "F·δ²", found["rank_correlation_F_delta2"], "δ²", found["rank_correlation_delta2"])


if __name__ == "__main__":
    main()
