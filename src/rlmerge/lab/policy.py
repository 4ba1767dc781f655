"""The model as a policy over short answers: read and write its folder, sample completions, score given completions.

Prompts are run once and their key-value cache is repeated for all completions of a group, also under autograd: with
long prompts, short answers and groups of eight this is a third of the work of running every sequence in full.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlmerge.evaluate.generate import cache_as

MAX_NEW_TOKENS = 8


@dataclass
class Policy:
    """A causal language model of transformers and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def newline(self) -> int:
        """The token that ends an answer."""
        return self.encode("\n")[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The exact text of some tokens."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


@dataclass
class Samples:
    """Completions of a batch, one list of token ids each, stop token included, and their mean entropy per token."""

    tokens: list[list[int]]
    entropy: float


@dataclass
class _Prefix:
    """The prompts' cache, repeated for each group: mask [B, L], lengths [B], hidden state of the last token [B, H]."""

    cache: Any
    mask: Tensor
    lengths: Tensor
    hidden: Tensor


def read_policy(folder: Path) -> Policy:
    """Read a model folder into fp32 tensors; compute with it inside `arithmetic()`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there, so this is no model folder: name one that the lab wrote.")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return Policy(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def write_policy(policy: Policy, out: Path, origin: dict[str, Any]) -> None:
    """Write model (rounded to bf16), tokenizer and `origin`, as lab.json, to the new folder `out`, which appears whole.

    The model itself is rounded in place: train no further with it.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.unfinished")
    policy.model.to(torch.bfloat16).save_pretrained(unfinished)
    policy.tokenizer.save_pretrained(unfinished)
    origin = {**origin, "arithmetic": "bf16" if fast_bf16() else "fp32"}
    (unfinished / "lab.json").write_text(json.dumps(origin, indent=2) + "\n")
    os.rename(unfinished, out)


def refuse_existing(out: Path) -> None:
    """Raise ValueError if `out` exists: the lab writes over nothing."""
    if out.exists():
        raise ValueError(f"{out}: exists, and the lab writes over nothing: name another folder or remove this one.")


def fast_bf16() -> bool:
    """Whether the processor multiplies bf16 natively; without, bf16 products are seven times slower than fp32."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.cpu._is_avx512_bf16_supported())


def arithmetic() -> torch.autocast:
    """The lab's arithmetic: bf16 matrix products where the processor has them, else fp32.

    Use one context for sampling and another for the loss: weights cast inside `no_grad` are cached without gradient.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16())


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and a boolean mask, both [rows, longest row]."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < lengths[:, None]


def _run(policy: Policy, ids: Tensor, first: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Hidden states [B, T, H] of new tokens at positions first[B], ...; extends the cache. mask: [B, cached + T]."""
    positions = first[:, None] + torch.arange(ids.shape[1])
    inner = policy.model.model
    output = inner(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=True, **cache_as(inner, cache)
    )
    return output.last_hidden_state


def _prefill(policy: Policy, prompts: Sequence[Sequence[int]], group: int) -> _Prefix:
    from transformers import DynamicCache

    # Right padding: with left padding some attention rows would see nothing at all. The gap stays masked afterwards.
    ids, mask = _pad(prompts)
    lengths = mask.sum(1)
    cache = DynamicCache(config=policy.model.config)
    hidden = _run(policy, ids, torch.zeros_like(lengths), mask, cache)
    hidden = hidden[torch.arange(len(ids)), lengths - 1]
    if group > 1:
        cache.batch_repeat_interleave(group)
    return _Prefix(
        cache,
        mask.repeat_interleave(group, 0),
        lengths.repeat_interleave(group, 0),
        hidden.repeat_interleave(group, 0),
    )


def log_probabilities(
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion token, fp32 [B, T], and the mask of real tokens [B, T]; 0 outside the mask.

    The completions of one prompt lie together; B is a multiple of the number of prompts. Differentiable. The output
    layer, a third of this small model, runs on completion tokens only.
    """
    prefix = _prefill(policy, prompts, len(completions) // len(prompts))
    ids, mask = _pad(completions)
    hidden = prefix.hidden[:, None]
    if ids.shape[1] > 1:
        seen = torch.cat([prefix.mask, mask[:, :-1]], 1)
        hidden = torch.cat([hidden, _run(policy, ids[:, :-1], prefix.lengths, seen, prefix.cache)], 1)
    logits = policy.model.lm_head(hidden[mask]).float()
    values = -torch.nn.functional.cross_entropy(logits, ids[mask], reduction="none")
    return torch.zeros(mask.shape).masked_scatter(mask, values), mask


@torch.no_grad()
def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], group: int = 1, generator: torch.Generator | None = None
) -> Samples:
    """`group` completions of each prompt, in order, at temperature 1; greedy if there is no generator.

    A completion ends with a newline, the end-of-text token, or after MAX_NEW_TOKENS.
    """
    stops = torch.tensor([policy.newline, policy.tokenizer.eos_token_id])
    prefix = _prefill(policy, prompts, group)
    hidden, mask, ended = prefix.hidden, prefix.mask, torch.zeros(len(prefix.mask), dtype=torch.bool)
    tokens: list[list[int]] = [[] for _ in range(len(mask))]
    entropies: list[float] = []
    for place in range(MAX_NEW_TOKENS):
        logs = policy.model.lm_head(hidden).float().log_softmax(-1)
        chances = logs.exp()
        chosen = logs.argmax(-1) if generator is None else torch.multinomial(chances, 1, generator=generator)[:, 0]
        entropies += (-(chances * logs).sum(-1))[~ended].tolist()
        for row, token, over in zip(tokens, chosen.tolist(), ended.tolist(), strict=True):
            if not over:
                row.append(token)
        ended = ended | torch.isin(chosen, stops)
        if ended.all():
            break
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], 1)
        hidden = _run(policy, chosen[:, None], prefix.lengths + place, mask, prefix.cache)[:, 0]
    return Samples(tokens, sum(entropies) / len(entropies))
