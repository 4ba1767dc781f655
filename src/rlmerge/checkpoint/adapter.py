"""Reads a PEFT LoRA folder as low-rank updates of the base's own tensors, exactly or not at all.

delta = scale * (B @ A) for a linear layer stored [out, in]; its transpose for a layer stored [in, out] (GPT-2's Conv1D,
`fan_in_fan_out`) and for an embedding. What PEFT cannot express as a sum of these is an AdapterError.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlmerge.checkpoint.folder import MERGED_DTYPES, Checkpoint, read_json_object
from rlmerge.checkpoint.header import TensorInfo, equal_bytes
from rlmerge.errors import AdapterError, CheckpointError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_|)(?P<side>[AB])(\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|)"
)
_MERGE_FIRST = "Merge it into its base with PEFT (merge_and_unload, save_pretrained) and write that folder."
_CHUNK = 1 << 18

_REFUSED = {
    "use_dora": "it is a DoRA adapter, whose magnitudes make the update no low-rank sum",
    "lora_bias": "its B matrices have trained biases",
    "trainable_token_indices": "it trains single tokens",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it adapts bare parameters (fused experts), whose stored layout the files do not tell",
    "alora_invocation_tokens": "it is an activated LoRA, which applies only after certain tokens",
    "use_qalora": "it is a QA-LoRA adapter, made for one quantized base",
    "use_bdlora": "it is a block-diagonal LoRA",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it is a KaSA adapter, which also truncates the base",
    "monteclora_config": "it is a Monte Carlo LoRA",
}
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One update: delta = scale * (B @ A), A [r, in], B [out, r]; when `transposed`, (B @ A).T has the base's shape."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter under the base's tensor names: `pairs` are added to the base, `saved` (whole tensors) replace it."""

    pairs: dict[str, LowRank]
    saved: dict[str, TensorInfo]


@dataclass
class _Module:
    """What the file holds for one adapted layer."""

    kind: str
    parts: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pair:
    module: str
    name: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool


def open_adapter(checkpoint: Checkpoint, base: Checkpoint) -> Adapter:
    """Read an opened adapter folder against its base. Raises AdapterError, naming the file and the tensor.

    Bytes are read only to prove that a copy of a base tensor inside the adapter is one.
    """
    settings = _Settings(checkpoint)
    resolve = _Names(base)
    modules, plain, copies = _sort(checkpoint)
    pairs: dict[str, _Pair] = {}
    for module, held in modules.items():
        pair = _pair(module, held, resolve, base)
        if pair.name in pairs:
            raise AdapterError(
                f"{pair.a.file}: {module!r} and {pairs[pair.name].module!r} both mean the base's {pair.name!r}. "
                f"{_MERGE_FIRST}"
            )
        pairs[pair.name] = pair
    saved = _saved(plain, pairs, resolve, base)
    for name, info in copies.items():
        _check_copy(resolve.find(name, info), info, base)
    flipped = _orientations(pairs, base, settings.fan_in_fan_out)
    low_rank = {
        name: LowRank(pair.a, pair.b, settings.scale(pair.module, pair.a, pair.b), flipped[name])
        for name, pair in pairs.items()
    }
    if not low_rank and not saved:
        raise AdapterError(f"{checkpoint.folder}: the adapter changes nothing; it holds no LoRA pair. Save it again.")
    return Adapter(low_rank, saved)


class _Settings:
    """adapter_config.json: what it rules out, and the scale of each layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.file = checkpoint.folder / "adapter_config.json"
        config = read_json_object(self.file)
        self._refuse(config)
        self.fan_in_fan_out = config.get("fan_in_fan_out") is True
        self._rslora = config.get("use_rslora") is True
        self._ranks = {None: self._number(config, "r", 8)} | self._patterns(config, "rank_pattern")
        self._alphas = {None: self._number(config, "lora_alpha", 8)} | self._patterns(config, "alpha_pattern")

    def scale(self, module: str, a: TensorInfo, b: TensorInfo) -> float:
        """alpha / r, or alpha / sqrt(r) for rslora, once the stored rank agrees with the configured one."""
        rank, alpha = self._look_up(self._ranks, module), self._look_up(self._alphas, module)
        if a.shape[0] != rank:
            raise AdapterError(
                f"{a.file}: {a.name!r} has rank {a.shape[0]}, but {self.file.name} says {rank:g} for {module!r}, so "
                f"its scale is not known. Use the adapter_config.json that was saved with these weights."
            )
        return alpha / (math.sqrt(rank) if self._rslora else rank)

    def _refuse(self, config: dict[str, Any]) -> None:
        kind = config.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"{self.file}: 'peft_type' is {kind!r}, and only LORA can be read here. {_MERGE_FIRST}")
        for key, what in _REFUSED.items():
            if config.get(key):
                raise AdapterError(f"{self.file}: '{key}' is set: {what}. {_MERGE_FIRST}")
        if config.get("bias", "none") not in ("none", None):
            raise AdapterError(f"{self.file}: 'bias' is {config['bias']!r}: biases were trained too. {_MERGE_FIRST}")
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
            raise AdapterError(
                f"{self.file}: 'init_lora_weights' is {init!r}, which changed the base before training, so base + "
                "B @ A is not the trained model. Save it with path_initial_model_for_weight_conversion, which makes it "
                "a plain LoRA, or merge it into its own base with PEFT."
            )

    def _number(self, config: dict[str, Any], key: str, default: float) -> float:
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{self.file}: '{key}' must be a number and is {value!r}. Correct it.")
        if key in ("r", "rank_pattern") and value < 1:
            raise AdapterError(f"{self.file}: '{key}' must be at least 1 and is {value!r}. Correct it.")
        return value

    def _patterns(self, config: dict[str, Any], key: str) -> dict[Any, float]:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{self.file}: '{key}' must map layer names to numbers and is {patterns!r}.")
        compiled: dict[Any, float] = {}
        for pattern, value in patterns.items():
            try:  # as PEFT does: the pattern must reach the end of the path and begin at a component
                compiled[re.compile(rf"(.*\.)?({pattern})$")] = self._number({key: value}, key, 0)
            except (re.error, RecursionError, OverflowError) as error:
                raise AdapterError(f"{self.file}: '{key}' has {pattern!r}, no regular expression ({error}).") from None
        return compiled

    @staticmethod
    def _look_up(patterns: dict[Any, float], module: str) -> float:
        """The first pattern that matches decides, in the order of the file."""
        return next((value for key, value in patterns.items() if key is not None and key.match(module)), patterns[None])


def _sort(checkpoint: Checkpoint) -> tuple[dict[str, _Module], dict[str, TensorInfo], dict[str, TensorInfo]]:
    """The file's tensors as LoRA modules, whole tensors, and copies of adapted base tensors, by in-memory names."""
    modules: dict[str, _Module] = {}
    plain: dict[str, TensorInfo] = {}
    copies: dict[str, TensorInfo] = {}
    for key, info in checkpoint.tensors.items():
        name = key.removeprefix("base_model.model.")
        if info.dtype not in MERGED_DTYPES:
            raise AdapterError(f"{info.file}: {key!r} is {info.dtype}; an adapter's tensors are BF16, F16 or F32.")
        if part := _LOW_RANK.fullmatch(name):
            _add_part(modules, part, info)
        elif "lora_magnitude_vector" in name:
            raise AdapterError(f"{info.file}: {key!r} belongs to a DoRA adapter. {_MERGE_FIRST}")
        elif "trainable_tokens" in name or "token_adapter." in name:
            raise AdapterError(f"{info.file}: {key!r} holds single trained tokens. {_MERGE_FIRST}")
        elif "lora_" in name:
            what = "a trained bias" if name.endswith(".bias") else "not part of a plain LoRA"
            raise AdapterError(f"{info.file}: {key!r} is {what}, which cannot be merged as a product. {_MERGE_FIRST}")
        elif ".original_module." in name:
            continue
        elif ".base_layer." in name:
            copies[name.replace(".base_layer.", ".")] = info
        else:
            name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
            if name in plain and not equal_bytes(plain[name], info):
                raise AdapterError(f"{info.file}: {key!r} and {plain[name].name!r} are two versions of one tensor.")
            plain[name] = info
    return modules, plain, copies


def _add_part(modules: dict[str, _Module], part: re.Match[str], info: TensorInfo) -> None:
    held = modules.setdefault(part["module"], _Module(part["kind"]))
    if part["kind"] != held.kind or part["side"] in held.parts:
        raise AdapterError(
            f"{info.file}: {part['module']!r} has more than one lora_{part['kind']}{part['side']} "
            f"({info.name!r} is the second), so more than one adapter is stored. Save each in a folder of its own."
        )
    if len(info.shape) > 2:
        raise AdapterError(
            f"{info.file}: {info.name!r} has {len(info.shape)} dimensions: a LoRA of a convolution. {_MERGE_FIRST}"
        )
    if len(info.shape) < 2 or 0 in info.shape:
        raise AdapterError(
            f"{info.file}: {info.name!r} has the shape {list(info.shape)} and must be a matrix. Its shards were not "
            "gathered when it was saved (ZeRO-3, FSDP): save it again with the full parameters."
        )
    held.parts[part["side"]] = info


def _pair(module: str, held: _Module, resolve: _Names, base: Checkpoint) -> _Pair:
    """A and B of one layer, proven to fit each other and the base tensor."""
    some = next(iter(held.parts.values()))
    if len(held.parts) < 2:
        missing = "B" if "A" in held.parts else "A"
        raise AdapterError(f"{some.file}: {some.name!r} has no lora_{held.kind}{missing} beside it. Save it again.")
    name = resolve.find(f"{module}.weight", some)
    a, b, target = held.parts["A"], held.parts["B"], base.tensors[name]
    embedding = held.kind == "embedding_"
    fits = {(b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])}
    if embedding:
        fits = {(a.shape[1], b.shape[0])}
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{a.file}: {a.name!r} {list(a.shape)} and {b.name!r} {list(b.shape)} have different ranks. Save it again."
        )
    if target.shape not in fits or target.dtype not in MERGED_DTYPES:
        raise AdapterError(
            f"{a.file}: {module!r} changes a matrix of {b.shape[0]} x {a.shape[1]}, but {name!r} in {target.file} is "
            f"{target.dtype} {list(target.shape)}. The adapter was trained on another base."
        )
    return _Pair(module, name, a, b, embedding)


def _orientations(pairs: dict[str, _Pair], base: Checkpoint, flag: bool) -> dict[str, bool]:
    """Whether each update must be transposed. Shapes decide; a square matrix goes by its nearest relatives' shapes.

    `fan_in_fan_out` decides only without them: PEFT stores there what its last layer needed, not what each one needs.
    """
    known: dict[str, bool] = {}
    for name, pair in pairs.items():
        shape = base.tensors[name].shape
        if pair.embedding or shape[0] != shape[1]:
            known[name] = pair.embedding or shape != (pair.b.shape[0], pair.a.shape[1])
    evidence = {
        tuple(pairs[name].module.split(".")): turned for name, turned in known.items() if not pairs[name].embedding
    }
    families = {(_family(module), turned) for module, turned in evidence.items()}
    flipped: dict[str, bool] = {}
    for name, pair in pairs.items():
        if name in known:
            flipped[name] = known[name]
            continue
        family = _family(tuple(pair.module.split(".")))
        nearest = {turned for other, turned in families if other == family} or {turned for _, turned in families}
        if len(nearest) > 1:
            raise AdapterError(
                f"{pair.a.file}: {pair.module!r} is square, and other adapted layers are stored both ways round, so it "
                f"is not clear whether its update must be transposed. {_MERGE_FIRST}"
            )
        flipped[name] = next(iter(nearest), flag)
    return flipped


def _family(path: tuple[str, ...]) -> tuple[str, ...]:
    """The part of a module's path before its layer number: layers of one stack are stored the same way."""
    return next((path[:i] for i, part in enumerate(path) if part.isdigit()), ("", *path))


def _saved(
    plain: dict[str, TensorInfo], pairs: dict[str, _Pair], resolve: _Names, base: Checkpoint
) -> dict[str, TensorInfo]:
    saved: dict[str, TensorInfo] = {}
    for key, info in plain.items():
        name = resolve.find(key, info, optional=True)
        if name is None and not _is_repeated(info, plain):
            resolve.find(key, info)  # raises
        if name is None:
            continue
        target = base.tensors[name]
        if target.shape != info.shape:
            grown = target.shape[1:] == info.shape[1:]
            raise AdapterError(
                f"{info.file}: {info.name!r} is {list(info.shape)}, but {name!r} in {target.file} is "
                f"{list(target.shape)}. " + ("The vocabulary was resized in training." if grown else "")
                + " Give the base the shape that it had in training."
            )  # fmt: skip
        if name in pairs or name in saved:
            raise AdapterError(f"{info.file}: {info.name!r} is stored whole, and {name!r} is adapted as well.")
        saved[name] = info
    return saved


def _is_repeated(info: TensorInfo, plain: dict[str, TensorInfo]) -> bool:
    """Whether the adapter holds the same matrix under another name too, as it does when it keeps a tie."""
    twins = (other for other in plain.values() if other is not info and other.shape == info.shape)
    return len(info.shape) == 2 and any(equal_bytes(other, info) for other in twins)


class _Names:
    """Finds a base tensor by an in-memory name: the name itself, or the only one that ends alike."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._endings: dict[str, list[str]] | None = None

    def find(self, name: str, info: TensorInfo, optional: bool = False) -> Any:
        """The base's name. Prefixes may differ (`model.`, `language_model.`), layer numbers may not."""
        if name in self._base.tensors:
            return name
        if self._endings is None:
            self._endings = self._index()
        parts = name.split(".")
        for start in range(len(parts) - 1):
            if start and parts[start - 1].isdigit():
                break
            found = self._endings.get(".".join(parts[start:]), [])
            if len(found) == 1:
                return found[0]
            if found:
                raise AdapterError(
                    f"{info.file}: {info.name!r} may mean {found[0]!r} or {found[1]!r} of {self._base.reference}. "
                    f"{_MERGE_FIRST}"
                )
        if optional:
            return None
        tied = "lm_head" in name and self._base.setting("tie_word_embeddings") is not False
        why = (
            " If the base ties its head to its embedding, a change of the head alone would change the embedding too."
            if tied
            else ""
        )
        raise AdapterError(
            f"{info.file}: {info.name!r} changes {name!r}, which {self._base.folder} does not have."
            f"{why or did_you_mean(name, self._base.tensors)} Write the base that the adapter was trained on."
        )

    def _index(self) -> dict[str, list[str]]:
        """Every ending of every base name that leaves out no layer number and is not a bare 'weight'."""
        endings: dict[str, list[str]] = {}
        for name in self._base.tensors:
            parts = name.split(".")
            for start in range(max(1, len(parts) - 1)):
                if start and parts[start - 1].isdigit():
                    break
                endings.setdefault(".".join(parts[start:]), []).append(name)
        return endings


def _check_copy(name: str, info: TensorInfo, base: Checkpoint) -> None:
    """An adapter may carry a copy of an adapted embedding; if it is another one, the base is not the trained one."""
    target = base.tensors[name]
    if target.shape != info.shape or not _same_values(target, info):
        raise AdapterError(
            f"{info.file}: {info.name!r} is the adapter's copy of {name!r}, and it differs from {target.file}: "
            f"the adapter was trained on another or a changed base. {_MERGE_FIRST}"
        )


def _same_values(base: TensorInfo, copy: TensorInfo) -> bool:
    """Whether `copy` is `base`, perhaps stored in another type."""
    if base.dtype == copy.dtype:
        return equal_bytes(base, copy)
    try:
        starts = range(0, base.size, _CHUNK)
        return all((_read(base, start, copy.dtype) == _read(copy, start, copy.dtype)).all() for start in starts)
    except (OSError, ValueError) as error:  # ValueError: the file became shorter
        raise CheckpointError(f"{copy.file}: cannot be compared with {base.file}: {error}.") from error


def _read(info: TensorInfo, start: int, dtype: str) -> NDArray[np.float32]:
    """Up to a chunk of coordinates, rounded to what `dtype` can store, as fp32, which holds all three types."""
    import numpy as np  # only here: headers are read without it

    count, width = min(_CHUNK, info.size - start), 4 if info.dtype == "F32" else 2
    stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info.dtype]
    raw = np.fromfile(info.file, stored, count, offset=info.start + start * width)
    values = (raw.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else raw.astype(np.float32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return values
