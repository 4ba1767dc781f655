"""Opens a Hugging Face model folder by its headers: which tensors it has, of what type, and where their bytes lie.

Single or sharded safetensors, or a PEFT adapter. Every other kind of folder is refused with a message that says what it
is and what to do first. Nothing but `config.json`, the index and the headers is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmerge.checkpoint.header import Header, TensorInfo, read_header
from rlmerge.checkpoint.reading import parse_json, read_file
from rlmerge.errors import CheckpointError

if TYPE_CHECKING:
    from rlmerge.checkpoint.pack import Pack

DELTA, NOTE = "delta.safetensors", "pack.json"
"""The two files of a delta pack, see `checkpoint.pack`."""
MERGED_DTYPES = frozenset({"BF16", "F16", "F32"})

_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")
_QUANTIZED_NAME = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|SCB|(nested_)?absmax|(nested_)?quant_map|weight_packed|weight_scale\w*|"
    r"weight_zero_point|input_scale)$|_scale_inv$|\.quant_state\."
)
_QUANTIZED_INTEGER_NAME = re.compile(r"weight$|_blocks$|_scales$")
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
TRAINER_STATE = re.compile(r"optimizer|scheduler|scaler|rng_state|random_states|training_args\.bin")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder. `tensors` is in the order of the shards, then of the offsets.

    reference  the folder as the recipe writes it
    config     config.json, or {} when there is none
    adapter    a PEFT folder: the tensors are the adapter's, see `rlmerge.checkpoint.adapter`
    pack       a delta pack: the tensors are those of the expert that it was made of, see `rlmerge.checkpoint.pack`
    lora       an adapter that is applied to the tensors; `headers` are then those of both
    whole, seen_as  of a view (`rlmerge.checkpoint.restack`): all of it, and {own name: name in the view}
    planned    the folder does not exist yet, see `rlmerge.planned`: where the small files are that it will have
    """

    reference: str
    folder: Path
    tensors: dict[str, TensorInfo]
    headers: tuple[Header, ...]
    config: dict[str, Any]
    adapter: bool
    pack: Pack | None = None
    lora: Checkpoint | None = None
    whole: Checkpoint | None = None
    seen_as: dict[str, str] | None = None
    planned: Path | None = None

    def setting(self, key: str, default: Any = None) -> Any:
        """A key of config.json, or of the text model inside it when the model also sees or hears."""
        if key in self.config:
            return self.config[key]
        nested = self.config.get("text_config")
        return nested.get(key, default) if isinstance(nested, dict) else default


def is_weight_tensor(info: TensorInfo) -> bool:
    """Whether a tensor is merged; doubles, integers, booleans and empty tensors are carried from the base."""
    return info.dtype in MERGED_DTYPES and 0 not in info.shape


def open_checkpoint(folder: Path, reference: str | None = None) -> Checkpoint:
    """Open a model or adapter folder. Raises CheckpointError (HeaderError for a damaged file), naming the culprit."""
    reference = str(folder) if reference is None else reference
    _check_folder(folder, reference)
    config = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    if is_pack(folder):
        from rlmerge.checkpoint.pack import open_pack

        pack = open_pack(folder)
        return Checkpoint(reference, folder, dict(pack.tensors), (pack.header,), config, False, pack)
    full = _weight_files(folder, "model")
    adapted = (folder / "adapter_config.json").exists() and _has_weights(folder, "adapter_model")
    if adapted and full:
        raise CheckpointError(
            f"{folder}: holds both a full model ({full[0].name}) and an adapter (adapter_model.safetensors), so it "
            "does not say which of them is meant. Move one of them to a folder of its own."
        )
    stem = "adapter_model" if adapted else "model"
    if not adapted and not full:
        raise CheckpointError(describe_unusable(folder, reference))
    headers = read_weights(folder, stem)
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    if not tensors:
        raise CheckpointError(f"{headers[0].file}: holds no tensor at all, so there is nothing to merge.")
    _refuse_quantized(folder, config, tensors)
    return Checkpoint(reference, folder, tensors, headers, config, adapted)


def is_pack(folder: Path) -> bool:
    """Whether a folder is a delta pack, perhaps a damaged one."""
    return (folder / DELTA).exists() or ((folder / NOTE).exists() and not any(folder.glob("*.safetensors")))


def read_json_object(file: Path) -> dict[str, Any]:
    """A small JSON file that must hold an object. Raises CheckpointError, naming the file."""
    try:
        parsed = parse_json(read_file(file).decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file}: is not JSON ({str(error)[:200]}). Restore it from the original model."
        ) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(
            f"{file}: holds a JSON {type(parsed).__name__}, and must hold an object {{...}}. "
            "Restore it from the original model."
        )
    return parsed


def read_weights(folder: Path, stem: str) -> tuple[Header, ...]:
    """The headers of `stem`.safetensors or of its shards, in shard order, proven to agree with their index.

    Raises CheckpointError for a missing shard, an index that disagrees with its files or leaves its folder, a tensor
    that is stored twice, or files of which it is not said how they belong together.
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        placed = _read_index(index)
        headers = _read_single(single, index, placed) if single.exists() else _read_shards(index, placed)
    else:
        headers = tuple(read_header(file) for file in _weight_files(folder, stem))
    owner: dict[str, Path] = {}
    for header in headers:
        for name in header.tensors:
            if name in owner:
                raise CheckpointError(
                    f"{header.file}: tensor {name!r} is also in {owner[name].name}, so it is not clear which one is "
                    "meant. Save the model again."
                )
            owner[name] = header.file
    return headers


def _has_weights(folder: Path, stem: str) -> bool:
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    return any((folder / name).exists() for name in names)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files that make up the weights; the index alone when there is one; [] when there are none."""
    if (folder / f"{stem}.safetensors.index.json").exists():
        return [folder / f"{stem}.safetensors.index.json"]
    single = folder / f"{stem}.safetensors"
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(".")]
    if stem == "model":
        files = [file for file in files if not file.name.startswith(("adapter_model", "fisher"))]
        numbered = [file for file in files if _SHARD.fullmatch(file.name)]
    else:
        numbered = [file for file in files if (m := _SHARD.fullmatch(file.name)) and m[1] == stem]
    if single.exists():
        if any(_SHARD.fullmatch(file.name)[1] == stem for file in numbered):  # type: ignore[index]
            raise CheckpointError(
                f"{folder}: holds both {single.name} and {numbered[0].name} without an index, so it does not say which "
                "of them is the model. Remove the one that is not."
            )
        return [single]
    if numbered:
        return _complete(folder, numbered)
    if stem != "model" or len(files) <= 1:
        return files if stem == "model" else []
    raise CheckpointError(
        f"{folder}: holds {len(files)} safetensors files ({files[0].name}, {files[1].name}, ...) and neither "
        f"{stem}.safetensors nor {stem}.safetensors.index.json, so it does not say which of them are the model. "
        "Keep the model's file, or restore its index."
    )


def _complete(folder: Path, numbered: list[Path]) -> list[Path]:
    """Numbered shards without an index: of one model, and all of them there."""
    found: dict[int, Path] = {}
    kinds: dict[tuple[str, str], Path] = {}
    for file in numbered:
        stem, number, total = _SHARD.fullmatch(file.name).groups()  # type: ignore[union-attr]
        kinds.setdefault((stem, total), file)
        found[int(number)] = file
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise CheckpointError(
            f"{folder}: {first.name} and {second.name} are shards of different models, and there is no index to say "
            "which one is meant. Remove the shards of one, or restore its index."
        )
    stem, total = next(iter(kinds))
    missing = [n for n in range(1, min(int(total), 100_000) + 1) if n not in found]
    if missing or len(found) != int(total) or len(numbered) != int(total):
        name = f"{stem}-{missing[0] if missing else 0:0{len(total)}d}-of-{total}.safetensors"
        raise CheckpointError(
            f"{folder}: shard {name} is missing ({len(found)} of {int(total)} are there). Download it again."
        )
    return [found[number] for number in sorted(found)]


def _read_index(index: Path) -> dict[str, str]:
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(
            f"{index}: has no 'weight_map' from tensor names to file names, so it does not say where the tensors are. "
            "Restore it from the original model."
        )
    for name in set(placed.values()):
        if "/" in name or "\\" in name or "\0" in name or name.startswith(".") or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: names the file {name!r}; an index may name only safetensors files of its own folder. "
                "Do not use this model unless you know why it does."
            )
    return placed


def _read_single(single: Path, index: Path, placed: dict[str, str]) -> tuple[Header, ...]:
    """A single file beside an index: usable only when both tell of the same tensors."""
    header = read_header(single)
    others = [
        file for name in sorted(set(placed.values())) if (file := index.parent / name).exists() and file != single
    ]
    same = placed.keys() == header.tensors.keys() and all(
        (twin := header.tensors.get(name)) is not None and (twin.dtype, twin.shape) == (info.dtype, info.shape)
        for file in others
        for name, info in read_header(file).tensors.items()
    )
    if not same:
        raise CheckpointError(
            f"{index}: disagrees with {single.name}, which lies beside it, so it is not clear which of them is the "
            f"model. Remove {single.name}, or the index with its shards."
        )
    return (header,)


def _read_shards(index: Path, placed: dict[str, str]) -> tuple[Header, ...]:
    """All shards that the index names, each holding exactly the tensors that the index says."""
    expected: dict[str, set[str]] = {}
    for name, file in placed.items():
        expected.setdefault(file, set()).add(name)
    missing = [name for name in sorted(expected) if not (index.parent / name).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{index.parent / missing[0]}: this shard{more} is missing; {index.name} names {len(expected)} files. "
            "Download it again."
        )
    headers = tuple(read_header(index.parent / name) for name in sorted(expected))
    for header in headers:
        names = expected[header.file.name]
        for name in sorted(names - header.tensors.keys()):
            raise CheckpointError(
                f"{index}: says that tensor {name!r} is in {header.file.name}, which does not hold it. "
                "The files belong to different savings of the model: download or save it again."
            )
        for name in sorted(header.tensors.keys() - names):
            where = f"says that it is in {placed[name]}" if name in placed else "does not know it"
            raise CheckpointError(
                f"{header.file}: holds tensor {name!r}, but {index.name} {where}. "
                "The files belong to different savings of the model: download or save it again."
            )
    return headers


def _refuse_quantized(folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    advice = "Merging needs the unquantized weights: use the original model, or dequantize it first."
    nested = config.get("text_config")
    for settings in (config, nested if isinstance(nested, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            value = settings.get(key)
            if isinstance(value, dict) and value and (value.keys() & _QUANTIZATION_KEYS):
                method = value.get("quant_method") or "unnamed"
                raise CheckpointError(
                    f"{folder / 'config.json'}: '{key}' says that the model is quantized (method {method!r}), so its "
                    f"stored numbers are not its weights. {advice}"
                )
    for info in tensors.values():
        integer = info.dtype in ("I8", "U8") and len(info.shape) >= 2 and _QUANTIZED_INTEGER_NAME.search(info.name)
        if integer or info.dtype.startswith(("F8_", "F6_", "F4")) or _QUANTIZED_NAME.search(info.name):
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} ({info.dtype} {list(info.shape)}) belongs to a quantized model, "
                f"whose stored numbers are not its weights. {advice}"
            )


_QUANTIZATION_KEYS = frozenset({"quant_method", "load_in_4bit", "load_in_8bit", "bits", "config_groups"})


def _check_folder(folder: Path, reference: str) -> None:
    try:
        if folder.is_dir():
            next(folder.iterdir(), None)  # raises when it may not be listed
            if (folder / "journal.jsonl").exists() and (folder / "lock").exists():
                raise CheckpointError(
                    f"{folder}: is an unfinished merge, whose weights are not all there. Finish it with its own "
                    "command."
                )
            return
        exists = folder.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if exists:
        raise CheckpointError(f"{folder}: this is a file, and a model is a folder. Write the folder that it lies in.")
    message = f"{reference}: there is no such folder."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", reference) and not reference.startswith("."):
        message += (
            " If it is a model of the Hugging Face Hub: nothing is downloaded unless asked. Add --download, or run "
            f"'hf download {reference} --local-dir FOLDER' and write FOLDER."
        )
    else:
        message += " Write the folder that holds model.safetensors; relative paths begin at the recipe's folder."
    raise CheckpointError(message)


def describe_unusable(folder: Path, reference: str) -> str:
    """What a folder without safetensors is, and what to run first, as a message."""
    names = sorted(entry.name for entry in folder.iterdir())
    below = {f"{name}/{sub.name}" for name in names if (folder / name).is_dir() for sub in _listing(folder / name)}
    both = " ".join([*names, *below])
    for name in sorted(below):
        if name.endswith(("/model.safetensors", "/adapter_model.safetensors", "/model.safetensors.index.json")):
            inner = f"{reference.rstrip('/')}/{name.rsplit('/', 1)[0]}"
            return f"{folder}: holds no weights itself, but a folder below it does. Did you mean {inner!r}?"
    for pattern, kind, advice in _TRAINER_FOLDERS:
        if re.search(pattern, both):
            return f"{folder}: this is {kind}, not a model folder. {advice}"
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES and not TRAINER_STATE.match(name)]
    if pickles:
        return (
            f"{folder}: holds its weights as pickle only ({pickles[0]}), which can run code when it is read and is "
            f"never loaded by a merge. Make safetensors of it first: rlmerge convert {reference} OUT"
        )
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        return (
            f"{folder}: holds GGUF only ({gguf[0]}), a format for inference that is usually quantized. "
            "Use the model that it was made from, as safetensors."
        )
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    return f"{folder}: holds no safetensors file (found: {found}). Write the folder that holds model.safetensors."


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


_TRAINER_FOLDERS = (
    (
        r"model_world_size_\d+_rank_\d+\.pt",
        "a checkpoint of verl (FSDP shards)",
        "Run 'python -m verl.model_merger merge --backend fsdp --local_dir ACTOR --target_dir OUT', then write OUT.",
    ),
    (
        r"dist_ckpt\b|\.distcp\b|pytorch_model_fsdp_\d+",
        "a sharded checkpoint of a trainer (FSDP or Megatron, torch's distributed format)",
        "Export it first: 'accelerate merge-weights pytorch_model_fsdp_0 OUT' for accelerate, the exporter of your "
        "trainer otherwise; then write OUT with config.json beside it.",
    ),
    (
        r"zero_to_fp32\.py|_optim_states\.pt|mp_rank_\d+_model_states\.pt",
        "a checkpoint of DeepSpeed ZeRO",
        "Run 'python zero_to_fp32.py . OUT --safe_serialization' in it, then write OUT with config.json beside it.",
    ),
    (
        r"(^|[ /])global_step_?\d+",
        "a folder of training steps (verl or DeepSpeed)",
        "Export the step that you want to a Hugging Face folder with the trainer's own tool, then write that folder.",
    ),
)
