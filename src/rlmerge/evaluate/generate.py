"""Generation with a transformers model: prompts are read once, finished sequences make room, caches grow in place.

Every sample has its own stream of random numbers, so that neither the batch nor the order it was made in shows in the
result (but for roundings: matrix products of other shapes add up in another order, which can turn a token at a
near-tie; docs/log.md says how often that was seen).
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from rlmerge.errors import NonFiniteError
from rlmerge.evaluate.backend import Sampling

SPARE = 128
"""Positions by which a cache grows at least."""


@dataclass(frozen=True)
class Request:
    """One sample to make: token ids of the prompt, the seed of its random numbers, strings that end it beside those of
    the sampling. `key` comes back with it.
    """

    key: Any
    prompt: tuple[int, ...]
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """What became of a request: new token ids (without the one that ends, which is `end`, None where a string or the
    limit ended it), their text, and 'stop' or 'length'.
    """

    key: Any
    tokens: tuple[int, ...]
    text: str
    finish: str
    end: int | None = None


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer [batch, heads, positions, size] in a buffer with spare positions at the end.

    The layer it extends copies the whole cache for every token.
    """

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Appends positions; returns views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        old = keys.shape[-2] if keys.numel() else 0
        if old == 0:  # read prompts: `_State.add` makes room
            keys, values = key_states, value_states
        else:
            if not _has_room(keys, old + key_states.shape[-2]):
                spare = max(SPARE, old // 2)
                keys, values = _grown(keys, spare), _grown(values, spare)
            keys, values = _appended(keys, key_states), _appended(values, value_states)
        self.keys, self.values = keys, values
        return self.keys, self.values


def _grown(states: torch.Tensor, spare: int) -> torch.Tensor:
    """A view of a larger buffer that holds these states."""
    return _joined([states], states.shape[2], spare)


def _joined(parts: Sequence[torch.Tensor], length: int, spare: int) -> torch.Tensor:
    """A view [all rows, heads, length, size] of a larger buffer; shorter parts are padded with zeros on the left."""
    _, heads, _, size = parts[0].shape
    rows = sum(map(len, parts))
    view = parts[0].new_empty((rows, heads, length + spare, size))[:, :, :length]
    start = 0
    for part in parts:
        own, padding = view[start : start + len(part)], length - part.shape[2]
        own[:, :, :padding] = 0
        own[:, :, padding:] = part
        start += len(part)
    return view


def _has_room(view: torch.Tensor, length: int) -> bool:
    """Whether so many positions fit before the next head's. A view begins at the first row of its own buffer, perhaps
    after positions that were dropped: its offset is those.
    """
    return view.stride(1) >= length * view.stride(2) + view.storage_offset()


def _appended(view: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    batch, heads, length, size = view.shape
    longer = view.as_strided((batch, heads, length + states.shape[-2], size), view.stride(), view.storage_offset())
    longer[:, :, length:] = states
    return longer


@dataclass
class _Row:
    """A sequence under way."""

    request: Request
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False
    end: int | None = None


class Generator:
    """Makes samples with a model of transformers and its tokenizer, at most `batch` at a time.

    The tokenizer only turns tokens into text; prompts come as ids (see `prompts`). A sequence ends at one of the
    tokenizer's or the model's end tokens, at a stop string (cut off), or at `max_new_tokens`.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int = 32) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch = batch
        self.device = next(model.parameters()).device
        self.ends = end_tokens(model, tokenizer)

    @torch.no_grad()  # in inference mode autocast casts every weight anew for every token: a fifth of the time
    def run(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Sample]:
        """Samples in the order in which they are finished."""
        # neighbours of one length need no padding; equal prompts come together and are read once
        waiting = deque(sorted(requests, key=lambda request: (len(request.prompt), request.prompt)))
        state = _State(self.device)
        while waiting or state.rows:
            if waiting and len(state.rows) <= self.batch * 3 // 4:
                count = min(self.batch - len(state.rows), len(waiting))
                self._admit([waiting.popleft() for _ in range(count)], state)
            if not bool(torch.isfinite(state.logits.amax(-1)).all()):
                raise NonFiniteError(
                    "the model answers with NaN or infinity: its weights are damaged, or a merge has broken it. "
                    "Look at `rlmerge check` of the recipe, or evaluate in float32."
                )
            chosen = choose(state.logits, [row.random for row in state.rows], sampling)
            for row, token in zip(state.rows, chosen.tolist()):
                self._take(row, token, sampling)
            yield from (self._finished(row, sampling) for row in state.rows if row.done)
            keep = [place for place, row in enumerate(state.rows) if not row.done]
            if len(keep) < len(state.rows):
                chosen = chosen[state.keep(keep)]
            if state.rows:
                state.advance(self.model, chosen)

    def _admit(self, requests: Sequence[Request], state: _State) -> None:
        """Reads the prompts of some requests and adds them to the batch."""
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        length = max(map(len, prompts))
        ids = torch.zeros((len(prompts), length), dtype=torch.long)
        mask = torch.zeros((len(prompts), length), dtype=torch.long)
        for place, prompt in enumerate(prompts):
            ids[place, length - len(prompt) :] = torch.tensor(prompt)
            mask[place, length - len(prompt) :] = 1
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            **cache_as(self.model, cache),
            use_cache=True,
            logits_to_keep=1,
        )
        order = {prompt: place for place, prompt in enumerate(prompts)}
        places = [order[request.prompt] for request in requests]
        rows = [_Row(request, np.random.Generator(np.random.Philox(request.seed))) for request in requests]
        index = torch.tensor(places, device=self.device)
        state.add(rows, cache, mask.to(self.device)[index], found.logits[:, -1][index], index)

    def _take(self, row: _Row, token: int, sampling: Sampling) -> None:
        if token in self.ends:
            row.done, row.end = True, token
            row.text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
            return
        row.tokens.append(token)
        stops = (*sampling.stop, *row.request.stop)
        if stops:
            row.text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
            row.done = any(stop in row.text for stop in stops)
        row.done |= len(row.tokens) >= sampling.max_new_tokens

    def _finished(self, row: _Row, sampling: Sampling) -> Sample:
        text = row.text or self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        cuts = [text.index(stop) for stop in (*sampling.stop, *row.request.stop) if stop in text]
        ended = bool(cuts) or len(row.tokens) < sampling.max_new_tokens
        text = text[: min(cuts)] if cuts else text
        return Sample(row.request.key, tuple(row.tokens), text, "stop" if ended else "length", row.end)


class _State:
    """The batch: rows, their cache, which positions are padding, and the logits of the next token."""

    def __init__(self, device: torch.device) -> None:
        self.rows: list[_Row] = []
        self.cache: Any = None
        self.device = device
        self.mask = torch.zeros((0, 0), dtype=torch.long, device=device)
        self.logits = torch.zeros((0, 0), device=device)

    def add(self, rows: list[_Row], cache: Any, mask: torch.Tensor, logits: torch.Tensor, index: torch.Tensor) -> None:
        """Joins new rows; the shorter side is padded on the left. `index` says which row of `cache` is whose."""
        own = self.mask.shape[1] if self.rows else 0
        length = max(own, mask.shape[1])
        for number, layer in enumerate(cache.layers):
            old = self.cache.layers[number] if self.rows else None
            for name in ("keys", "values"):
                parts = [] if old is None else [getattr(old, name)]
                setattr(layer, name, _joined([*parts, getattr(layer, name)[index]], length, SPARE))
        masks = [_padded_mask(part, length) for part in ((self.mask, mask) if self.rows else (mask,))]
        self.logits = torch.cat([self.logits, logits]) if self.rows else logits
        self.rows, self.cache, self.mask = self.rows + rows, cache, torch.cat(masks)

    def keep(self, places: list[int]) -> list[int]:
        """Drops the other rows, and positions that are padding for all that stay; returns whose place each row had.

        Only what fills a gap is moved, the last rows: to copy all of a cache for each row that ends took a third of
        the time of a small model. What is dropped keeps its memory until rows are added, or the cache grows.
        """
        count = len(places)
        gaps = sorted(set(range(count)).difference(places))
        last = [place for place in places if place >= count]
        moved = dict(zip(gaps, last, strict=True))
        order = [moved.get(place, place) for place in range(count)]
        self.rows = [self.rows[place] for place in order]
        if not places:
            return order
        self.mask = self.mask[torch.tensor(order, device=self.device)]
        first = int(self.mask.any(0).nonzero()[0])
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                if gaps:
                    states[gaps] = states[last]
                setattr(layer, name, states[:count, :, first:])
        return order

    def advance(self, model: Any, tokens: torch.Tensor) -> None:
        """One token further in every row."""
        ones = torch.ones((len(self.rows), 1), dtype=torch.long, device=self.device)
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, ones], dim=1)
        found = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=positions,
            **cache_as(model, self.cache),
            use_cache=True,
        )
        self.logits = found.logits[:, -1]


def cache_as(model: Any, cache: Any) -> dict[str, Any]:
    """The cache under the name that the model's forward has for it: transformers 5.24 renamed past_key_values."""
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    return {name: cache}


def _padded_mask(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))


def choose(logits: torch.Tensor, random: Sequence[np.random.Generator], sampling: Sampling) -> torch.Tensor:
    """The next token of each row, int64[B], from logits [B, V]: the best, or the one at a uniform place of the
    cumulative distribution in fp64 (tokens in the order of their ids). One random number a row and step.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    uniform = torch.tensor([source.random() for source in random], dtype=torch.float64, device=logits.device)
    scores = logits.double() / sampling.temperature
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    mass = scores.softmax(dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = mass.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        mass = mass.masked_fill(beyond.gather(1, order.argsort()), 0.0)
    cumulative = mass.cumsum(-1)
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return place.clamp(max=logits.shape[-1] - 1)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a text, as the tokenizer and the model's generation settings have it."""
    found: set[int] = set()
    config = getattr(model, "generation_config", None)
    for value in (getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(token) for token in value)
    return frozenset(found)
