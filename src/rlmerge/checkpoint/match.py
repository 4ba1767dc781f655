"""Matches experts to their base: for every tensor of the base, where each expert's version of it comes from.

The output has the base's tensor set, always. What cannot be matched is an error that says which files disagree, unless
the recipe excludes the tensor or takes it from the base. Tied weights that one side stores twice are recognised by
comparing their bytes: a base whose embedding and head are one matrix stays so, stored once or twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from rlmerge.checkpoint.folder import MERGED_DTYPES, Checkpoint, is_weight_tensor
from rlmerge.checkpoint.header import TensorInfo, equal_bytes
from rlmerge.checkpoint.names import HEAD
from rlmerge.errors import MismatchError, RecipeError

if TYPE_CHECKING:
    from rlmerge.checkpoint.adapter import Adapter, LowRank

_BUFFER = re.compile(r"(^|\.)rotary\w*\.(inv_freq|cos_cached|sin_cached)$|(^|\.)(position_ids|masked_bias)$")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
_VOCABULARY = re.compile(r"(^|\.)(\w*embed\w*|wte|lm_head|output|shared)(\.weight)?$")
_SHOWN = 5
_TRIED = 20
"""Names that are looked for under another beginning; half of all that are missing must then be there."""
_RENAME = "\n  Tensors are matched by their names: store the model again under the names of the base."
_ADVICE = (
    "\n  Merging needs experts trained from this base. If you mean it, leave tensors out with 'exclude:' "
    "(regular expressions), or write 'on_mismatch: base' to take them from the base."
)


@dataclass(frozen=True)
class Source:
    """Where one expert's version of a base tensor comes from.

    tensor    `info` is the tensor itself
    low_rank  the base's tensor plus the product that `low_rank` describes
    sum       the tensor `info` plus that product
    base      the base's tensor, unchanged (an adapter that does not touch it)
    """

    kind: Literal["tensor", "low_rank", "sum", "base"]
    info: TensorInfo | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class Matched:
    """Every tensor of the base, in its order, is in exactly one of `merged` and `carried`.

    merged   base tensor name -> one source per expert
    carried  base tensor name -> why it is copied from the base: 'dtype' (double, integer, boolean), 'empty', 'buffer'
             (recomputed by every model, such as rotary_emb.inv_freq), 'excluded', 'mismatch'
    notes    what the user should know: ignored aliases and buffers, mismatches taken from the base
    tied     base tensors that repeat another one, which a tied base stores twice -> that one
    """

    merged: dict[str, tuple[Source, ...]]
    carried: dict[str, str]
    notes: list[str]
    tied: Mapping[str, str] = field(default_factory=dict)


def match(
    base: Checkpoint,
    experts: list[Checkpoint],
    include: list[str],
    exclude: list[str],
    on_mismatch: Literal["error", "base"],
    chosen: set[str] | None = None,
    resized: Collection[str] = (),
) -> Matched:
    """Match every expert to the base, by names and headers; bytes are read only to recognise tied weights.

    `include` and `exclude` are regular expressions that are searched in tensor names; what they leave out is carried
    from the base, and its mismatches do not matter; `chosen` are the names that they leave, where that is known (see
    `select`). Tensors in `resized` may have other numbers of rows: the output's vocabulary decides. Raises RecipeError
    for a pattern that is none or that finds
    nothing, MismatchError for models that do not fit, AdapterError for an adapter that does not fit.
    """
    if base.adapter:
        raise MismatchError(
            f"{base.folder}: the base is an adapter, which changes a model and is none. "
            "Write the model that it was trained from as base_model."
        )
    if chosen is None:
        chosen = select(names_of(base, experts), include, exclude)
    carried = {n: why for n, info in base.tensors.items() if (why := _why_carried(info, n in chosen))}
    wanted = [name for name in base.tensors if name not in carried]
    split = _split(base, carried)
    if split:
        carried |= dict.fromkeys(split, "excluded")
        wanted = [name for name in wanted if name not in split]
    found = [_match_one(base, expert, wanted, chosen, resized) for expert in experts]
    ties, tie_notes = _ties(base, wanted) if not all(expert.adapter for expert in experts) else ([], [])
    for one in found:
        one.problems += _untied(base, ties, one)
    problems = [problem for one in found for problem in one.problems]
    renamed = _renamings(base, experts, wanted, chosen) if problems else []
    if problems and on_mismatch == "error":
        raise MismatchError(_describe(problems, renamed))
    tie_notes += [f"{name} is tied to an excluded tensor: excluded, too." for name in sorted(split)]
    notes = [*tie_notes, *(note for one in found for note in one.notes)]
    if problems:
        notes.append(
            f"{len(problems)} tensors do not fit and are taken from the base, or ignored where the base does not have "
            "them (on_mismatch: base): " + _list(problem.text for problem in problems)
        )
        notes += renamed
    carried |= {problem.name: "mismatch" for problem in problems if problem.name in base.tensors}
    merged = {n: tuple(one.sources[n] for one in found) for n in wanted if n not in carried}
    tied = {second: first for first, second in reversed(ties)}
    return Matched(merged, {n: carried[n] for n in base.tensors if n in carried}, notes, tied)


@dataclass(frozen=True)
class _Problem:
    name: str
    text: str


@dataclass
class _Found:
    sources: dict[str, Source] = field(default_factory=dict)
    problems: list[_Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def names_of(base: Checkpoint, experts: Iterable[Checkpoint]) -> list[str]:
    """The names of all tensors of a base and its experts, each once."""
    return list(dict.fromkeys([*base.tensors, *(n for e in experts if not e.adapter for n in e.tensors)]))


def select(names: list[str], include: list[str], exclude: list[str]) -> set[str]:
    """The names that some include (all without one) and no exclude finds."""

    def find(key: str, patterns: list[str]) -> set[str]:
        found: set[str] = set()
        for number, pattern in enumerate(patterns):
            try:
                search = re.compile(pattern).search
            except (re.error, RecursionError, OverflowError) as error:
                raise RecipeError(
                    f"{key}: {pattern!r} is not a regular expression ({error}). It is searched in tensor names "
                    f"such as {names[0]!r}; write '.*' for anything and '\\.' for a dot.",
                    (key, number),
                ) from None
            hits = {name for name in names if search(name)}
            if not hits:
                raise RecipeError(
                    f"{key}: {pattern!r} is found in none of the {len(names)} tensor names, which look like "
                    f"{names[0]!r} and {names[-1]!r}. Correct or remove it.",
                    (key, number),
                )
            found |= hits
        return found

    chosen = find("include", include) if include else set(names)
    return chosen - find("exclude", exclude)


def _why_carried(info: TensorInfo, chosen: bool) -> str | None:
    if not chosen:
        return "excluded"
    if info.dtype not in MERGED_DTYPES:
        return "dtype"
    if not is_weight_tensor(info):
        return "empty"
    return "buffer" if is_buffer(info) else None


def is_buffer(info: TensorInfo) -> bool:
    """A tensor that models recompute: rotary frequencies, positions, GPT-2's causal mask [1, 1, n, n]."""
    mask = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    return _BUFFER.search(info.name) is not None or (mask and _CAUSAL_MASK.search(info.name) is not None)


def _match_one(
    base: Checkpoint, expert: Checkpoint, wanted: list[str], chosen: set[str], resized: Collection[str]
) -> _Found:
    if expert.adapter:
        from rlmerge.checkpoint.adapter import open_adapter

        adapter = open_adapter(expert, base.whole or base)
        return _match_adapter(base, expert, adapter if expert.seen_as is None else _seen(adapter, expert), wanted)
    found = _Found()
    alone = sum(name not in expert.tensors for name in wanted) == 1
    for name in wanted:
        theirs = expert.tensors.get(name)
        if theirs is None:
            _missing(base, expert, name, found, resized, alone)
        elif problem := _misfit(base, expert, base.tensors[name], theirs, resized):
            found.problems.append(_Problem(name, problem))
        else:
            found.sources[name] = Source("tensor", theirs)
    extra = [info for name, info in expert.tensors.items() if name not in base.tensors and name in chosen]
    single = sum(not is_buffer(info) for info in extra) == 1
    for info in extra:
        _extra(base, expert, info, found, single)
    if expert.lora is not None:
        _apply_adapter(expert, expert.lora, found)
    return found


def _seen(adapter: Adapter, expert: Checkpoint) -> Adapter:
    """The adapter under the names of a view, without what lies outside of it."""
    names = expert.seen_as or {}
    return replace(
        adapter,
        pairs={names[name]: pair for name, pair in adapter.pairs.items() if name in names},
        saved={names[name]: info for name, info in adapter.saved.items() if name in names},
    )


def _misfit(
    base: Checkpoint, expert: Checkpoint, ours: TensorInfo, theirs: TensorInfo, resized: Collection[str]
) -> str | None:
    """Why two tensors of one name do not fit, or None."""
    first = 1 if ours.name in resized and ours.shape and theirs.shape else 0
    if ours.shape[first:] != theirs.shape[first:]:
        text = f"{ours.name}: {list(ours.shape)} in {ours.file}, {list(theirs.shape)} in {theirs.file}"
        if ours.shape[1:] == theirs.shape[1:] and _is_vocabulary(base, expert, ours, theirs):
            text += (
                f" (the vocabularies differ: {ours.shape[0]} and {theirs.shape[0]} rows; 'tokenizer_source: base' or "
                "'union' brings them together)"
            )
        return text
    if theirs.dtype not in MERGED_DTYPES:
        return (
            f"{ours.name}: {ours.dtype} in {ours.file}, {theirs.dtype} in {theirs.file}, "
            "and only BF16, F16 and F32 are merged"
        )
    return None


def _is_vocabulary(base: Checkpoint, expert: Checkpoint, ours: TensorInfo, theirs: TensorInfo) -> bool:
    if not ours.shape or not theirs.shape:
        return False
    sizes = (base.setting("vocab_size"), expert.setting("vocab_size"))
    return (ours.shape[0], theirs.shape[0]) == sizes or _VOCABULARY.search(ours.name) is not None


def _missing(
    base: Checkpoint, expert: Checkpoint, name: str, found: _Found, resized: Collection[str], alone: bool
) -> None:
    """A tensor of the base that the expert lacks, `alone` or not: fine when the base stores a tied one twice."""
    twins = _twins(base.tensors[name], base.tensors, expert.tensors)
    for twin in twins:
        fits = not _misfit(base, expert, twin, expert.tensors[twin.name], resized)
        if fits and equal_bytes(base.tensors[name], twin):
            found.sources[name] = Source("tensor", expert.tensors[twin.name])
            found.notes.append(f"{name} is tied to {twin.name} in {base.reference}; {expert.reference} stores it once.")
            return
    text = f"{name}: {list(base.tensors[name].shape)} in {base.tensors[name].file}, missing in {expert.folder}"
    if alone and twins and _VOCABULARY.search(name):
        text += f" (tied expert? the base's {name} differs from its {twins[0].name})"
    found.problems.append(_Problem(name, text))


def _extra(base: Checkpoint, expert: Checkpoint, info: TensorInfo, found: _Found, alone: bool) -> None:
    """A tensor of the expert that the base lacks, `alone` or not: fine when it is a buffer or repeats a tied tensor."""
    if is_buffer(info) or not is_weight_tensor(info):
        found.notes.append(f"{info.name} is only in {expert.reference}, a buffer ({info.dtype}): ignored.")
        return
    twins = _twins(info, expert.tensors, base.tensors)
    for twin in twins:
        if equal_bytes(info, twin):
            found.notes.append(f"{info.name} of {expert.reference} repeats {twin.name}, which is tied to it: ignored.")
            return
    text = f"{info.name}: {list(info.shape)} in {info.file}, missing in {base.folder}"
    if alone and twins and _VOCABULARY.search(info.name):
        text += f" (tied base, but the expert's {info.name} differs from its {twins[0].name})"
    found.problems.append(_Problem(info.name, text))


def _renamings(base: Checkpoint, experts: Iterable[Checkpoint], wanted: list[str], chosen: set[str]) -> list[str]:
    """What to say of experts that lack tensors of the base and have the same ones under another beginning."""
    said = []
    for expert in experts:
        missing = [name for name in wanted if name not in expert.tensors]
        extra = {n: info.shape for n, info in expert.tensors.items() if n in chosen and n not in base.tensors}
        if expert.adapter or not missing or not extra:
            continue
        best = (0, "", "")
        for ours, theirs in {pair for name in missing[:_TRIED] if (pair := _beginnings(name, extra, base))}:
            of = [name for name in missing if name.startswith(ours)]
            fits = sum(extra.get(theirs + name.removeprefix(ours)) == base.tensors[name].shape for name in of)
            best = max(best, (fits, ours, theirs))
        fits, ours, theirs = best
        if fits > 1 and 2 * fits >= len(missing):
            own = f"begin with {ours.rstrip('.')!r}" if ours else "have nothing before them"
            other = f"begin with {theirs.rstrip('.')!r}" if theirs else "have nothing before them"
            said.append(
                f"{fits} names in {expert.folder} {other}, and in {base.folder} they {own}: the tensors may be "
                "the same, under other names."
            )
    return said


def _beginnings(name: str, extra: Mapping[str, tuple[int, ...]], base: Checkpoint) -> tuple[str, str] | None:
    """What the two names begin with, up to where they are equal, for the name of a like tensor that ends most alike."""
    parts = name.split(".")
    best, found = 0, None
    for other, shape in extra.items():
        if shape != base.tensors[name].shape:
            continue
        theirs = other.split(".")
        alike = 0
        while alike < min(len(parts), len(theirs)) and parts[-1 - alike] == theirs[-1 - alike]:
            alike += 1
        if alike > best:
            tail = ".".join(parts[len(parts) - alike :])
            best, found = alike, (name.removesuffix(tail), other.removesuffix(tail))
    return found


def _twins(info: TensorInfo, own: dict[str, TensorInfo], other: dict[str, TensorInfo]) -> list[TensorInfo]:
    """Tensors of the same model that both models have and that could be the same matrix under another name.

    Matrices only: vectors of ones are equal without being tied.
    """
    if len(info.shape) != 2:
        return []
    return [
        twin
        for name, twin in own.items()
        if twin.shape == info.shape and twin.dtype == info.dtype and name != info.name and name in other
    ]


def _ties(base: Checkpoint, names: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of vocabulary matrices that a tied base stores twice, and notes on those that it ties in name only."""
    if base.setting("tie_word_embeddings") is not True:
        return [], []
    pairs: list[tuple[str, str]] = []
    notes: list[str] = []
    own = {name: base.tensors[name] for name in names if _VOCABULARY.search(name)}
    for place, name in enumerate(own):
        later = dict(list(own.items())[place:])
        for twin in _twins(own[name], later, base.tensors):
            if equal_bytes(own[name], twin):
                pairs.append((name, twin.name))
            else:
                notes.append(
                    f"{base.reference} says tie_word_embeddings, but stores {name} and {twin.name} with different "
                    "values: both are merged, and a loader that ties them will use one."
                )
    return pairs, notes


def _split(base: Checkpoint, carried: dict[str, str]) -> set[str]:
    """Matrices whose tied copy is excluded while they are not: a loader would use one of the two."""
    pairs, _ = _ties(base, [name for name in base.tensors if carried.get(name, "excluded") == "excluded"])
    return {name for pair in pairs for name, other in (pair, pair[::-1]) if other in carried and name not in carried}


def _untied(base: Checkpoint, ties: list[tuple[str, str]], found: _Found) -> list[_Problem]:
    """Matrices that are one in the base and two in an expert: a loader of the merged model would use one of them."""
    problems = []
    for pair in ties:
        sources = [source for name in pair if (source := found.sources.get(name)) is not None]
        infos = [source.info for source in sources if source.info is not None]
        if len(infos) < 2:
            continue
        same = sources[0].low_rank == sources[1].low_rank and (infos[0] == infos[1] or equal_bytes(*infos))
        if not same:
            twin, head = sorted(infos, key=lambda info: HEAD.search(info.name) is not None)
            text = f"{head.name}: in {head.file} it differs from {twin.name}, and {base.folder} ties the two"
            problems.append(_Problem(head.name, f"{text} (tie_word_embeddings: true)"))
    return problems


def _match_adapter(base: Checkpoint, expert: Checkpoint, adapter: Adapter, wanted: list[str]) -> _Found:
    """An adapter's sources; where the base stores a tied tensor twice, a low-rank update goes into both copies."""
    found = _Found()
    for name in wanted:
        if pair := adapter.pairs.get(name):
            found.sources[name] = Source("low_rank", low_rank=pair)
        elif saved := adapter.saved.get(name):
            found.sources[name] = Source("tensor", saved)
        else:
            found.sources[name] = Source("base")
    changed = adapter.pairs.keys() | adapter.saved.keys()
    for name in sorted(changed - set(wanted)):
        found.notes.append(f"{expert.reference} changes {name}, which is not merged: its change is left out.")
    if base.setting("tie_word_embeddings") is True:
        _follow_ties(base, expert, changed, found)
    return found


def _apply_adapter(model: Checkpoint, lora: Checkpoint, found: _Found) -> None:
    """Puts an adapter on the tensors of a full model, which may lie under other names than the base's."""
    from rlmerge.checkpoint.adapter import open_adapter

    whole, names = model.whole or model, {seen: own for own, seen in (model.seen_as or {}).items()}
    used = {
        name: names.get(source.info.name, source.info.name) for name, source in found.sources.items() if source.info
    }
    wanted = list(whole.tensors) if model.whole else [name for name in whole.tensors if name in used.values()]
    adapted = _match_adapter(whole, lora, open_adapter(lora, whole), wanted)
    for name, own in used.items():
        source, update = found.sources[name], adapted.sources[own]
        if update.kind == "low_rank":
            found.sources[name] = Source("sum", source.info, update.low_rank)
        elif update.kind == "tensor":
            found.sources[name] = update
    found.notes += adapted.notes


def _follow_ties(base: Checkpoint, expert: Checkpoint, changed: set[str], found: _Found) -> None:
    for name in sorted(changed):
        ours = base.tensors[name]
        if _VOCABULARY.search(name) is None or len(ours.shape) != 2 or name not in found.sources:
            continue
        for twin in _twins(ours, base.tensors, base.tensors):
            if _VOCABULARY.search(twin.name) and found.sources.get(twin.name) == Source("base"):  # noqa: SIM102
                if equal_bytes(ours, twin):
                    found.sources[twin.name] = found.sources[name]
        found.notes.append(
            f"{expert.reference} changes {name}, and {base.reference} ties embedding and head: the merged model uses "
            "the changed one for both, while PEFT changes one of them in training."
        )


def _describe(problems: list[_Problem], renamed: list[str]) -> str:
    count = "1 tensor does" if len(problems) == 1 else f"{len(problems)} tensors do"
    return (
        f"These models do not fit together: {count} not match.\n  "
        + _list((problem.text for problem in problems), "\n  ")
        + "".join(f"\n  {text}" for text in renamed)
        + (_RENAME if renamed else _ADVICE)
    )


def _list(lines: Iterable[str], separator: str = "; ") -> str:
    lines = list(lines)
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return separator.join([*lines[:_SHOWN], *more])
