"""The model as a policy: read and write its folder, probabilities of given completions, under autograd.

`log_probabilities` runs each prompt once and repeats its key-value cache for all completions of a group: with long
prompts, short answers and groups of eight this is a third of the work of running every sequence in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlmerge.evaluate.generate import cache_as
from rlmerge.lab.errors import LabError


@dataclass
class Policy:
    """A causal language model of transformers and its tokenizer.

    adapter   PEFT's model around `model`, where only a LoRA is trained
    """

    model: Any
    tokenizer: Any
    adapter: Any = None

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts before it; as `evaluate` reads it."""
        return list(self.tokenizer(text)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Token ids of what follows a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The exact text of some tokens."""
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


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
        raise LabError(f"{folder}: no config.json there, so this is no model folder: name one that the lab wrote.")
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        policy = Policy(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # whatever transformers or safetensors raise, the folder is at fault
        raise LabError(f"{folder}: transformers cannot load it: {type(error).__name__}: {error}") from None
    if policy.tokenizer.eos_token_id is None:
        raise LabError(f"{folder}: its tokenizer has no end-of-sequence token, which training needs. Give it one.")
    return policy


def check_logits(policy: Policy, folder: Path) -> None:
    """LabError where logits are not just the output layer of the last hidden state, which `completion_logits` takes."""
    ids = torch.tensor([[policy.tokenizer.eos_token_id] * 3])
    with torch.no_grad():
        whole = policy.model(input_ids=ids).logits
        try:
            own = policy.model.lm_head(policy.model.model(input_ids=ids).last_hidden_state)
        except AttributeError:
            own = None
    if own is None or not torch.allclose(whole, own, atol=1e-4, rtol=1e-4):
        kind = policy.model.config.model_type
        raise LabError(f"{folder}: the lab's loop does not know models of type {kind!r}. Use --trainer trl.")


def add_lora(policy: Policy, rank: int, seed: int) -> Policy:
    """The same policy with a LoRA of this rank on every linear layer but the head, which alone is trained; alpha is
    twice the rank. The same numbers for the same seed.
    """
    import warnings

    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names of before
        torch.manual_seed(seed)
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapter = get_peft_model(policy.model, settings)
    return Policy(adapter.base_model.model, policy.tokenizer, adapter)


def write_model(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes a model folder with these weights (by name of the trained parameters, all of one dtype) in place of the
    policy's own. A LoRA is merged in fp32 and the whole rounded once; it lies in `adapter` beside the folder, too.
    """
    import copy

    dtype = next(iter(weights.values())).dtype
    whole = copy.deepcopy(policy.model if policy.adapter is None else policy.adapter)
    model = whole if policy.adapter is None else whole.base_model.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    if policy.adapter is not None:
        whole.save_pretrained(folder.with_name("adapter"))
        model = whole.merge_and_unload()
    model.to(dtype).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def fast_bf16() -> bool:
    """Whether the processor multiplies bf16 natively; without, bf16 products are seven times slower than fp32."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.cpu._is_avx512_bf16_supported())


def arithmetic() -> torch.autocast:
    """The lab's arithmetic: bf16 matrix products where the processor has them, else fp32.

    Use one context for sampling and another for the loss: weights cast inside `no_grad` are cached without gradient.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16())


def document_loss(policy: Policy, rows: Sequence[tuple[Sequence[int], Sequence[int]]], prompt_weight: float) -> Tensor:
    """Mean of −log p over the tokens of (prompt, completion) pairs, those of prompts weighted by `prompt_weight`."""
    ids, mask = _pad([[*prompt, *completion] for prompt, completion in rows])
    places = torch.arange(ids.shape[1])
    starts = torch.tensor([len(prompt) for prompt, _ in rows])
    weights = torch.where(places < starts[:, None], prompt_weight, 1.0) * mask
    logits = policy.model(input_ids=ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


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
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion token, fp32 [B, T], and the mask of real tokens [B, T]; 0 outside the mask.

    The completions of one prompt lie together; B is a multiple of the number of prompts. Differentiable.
    """
    logits, ids, mask = completion_logits(policy, prompts, completions)
    logits = logits if temperature == 1.0 else logits / temperature
    values = -torch.nn.functional.cross_entropy(logits, ids[mask], reduction="none")
    return torch.zeros(mask.shape).masked_scatter(mask, values), mask


def completion_logits(
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all completion tokens, row after row [N, V], their ids padded [B, T], and the mask of real ones [B, T].

    The output layer, a third of a small model, runs on completion tokens only.
    """
    prefix = _prefill(policy, prompts, len(completions) // len(prompts))
    ids, mask = _pad(completions)
    hidden = prefix.hidden[:, None]
    if ids.shape[1] > 1:
        seen = torch.cat([prefix.mask, mask[:, :-1]], 1)
        hidden = torch.cat([hidden, _run(policy, ids[:, :-1], prefix.lengths, seen, prefix.cache)], 1)
    return policy.model.lm_head(hidden[mask]).float(), ids, mask


def expected_pass(policy: Policy, prompts: Sequence[str], completions: Sequence[str], batch: int = 64) -> list[float]:
    """The probability of each completion at temperature 1, its end included: where it is the only right one, pass@1.

    Exact, by teacher forcing: no sampling noise. A right text in an unusual tokenization is not counted.
    """
    chances: list[float] = []
    for start in range(0, len(prompts), batch):
        heads = [policy.encode_prompt(text) for text in prompts[start : start + batch]]
        with torch.no_grad(), arithmetic():
            logs, _ = log_probabilities(policy, heads, [policy.encode(t) for t in completions[start : start + batch]])
        chances += logs.sum(1).exp().tolist()
    return chances
