"""The small files of an output: configuration, tokenizer, model card, and `rlmerge.json`, which says what was merged.

All but run.log are the same bytes every time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.checkpoint.card import model_card, read_licence, rewrite_config, rewrite_tie
from rlmerge.checkpoint.chat_templates import write_template
from rlmerge.checkpoint.copied import other_files
from rlmerge.checkpoint.folder import read_json_object
from rlmerge.checkpoint.header import Header
from rlmerge.checkpoint.hub import origin, split_id
from rlmerge.checkpoint.layout import INDEX, WIDTH, index_json
from rlmerge.checkpoint.reading import json_text, read_file
from rlmerge.checkpoint.restack import restack_config
from rlmerge.checkpoint.token_ids import follow_vocabulary
from rlmerge.checkpoint.tokenizer import plausible
from rlmerge.checkpoint.tokenizer_files import is_tokenizer_file
from rlmerge.errors import CheckpointError
from rlmerge.execute.folder import OutputFolder
from rlmerge.execute.journal import Journal
from rlmerge.plan import Plan
from rlmerge.plugins import origin_of
from rlmerge.recipe import Recipe
from rlmerge.version import VERSION

PROVENANCE = "rlmerge.json"


def write_small_files(
    target: OutputFolder, variant: int, report: dict[str, Any], journal: Journal, sha256: bool
) -> None:
    """Everything of an output but its weights; the provenance last."""
    plan = target.plan
    digests: dict[str, str] = {}

    def put(name: str, data: bytes) -> None:
        target.write_small(variant, name, data)
        digests[name] = xxhash.xxh3_128_hexdigest(data)

    for name, data in given_files(plan).items():
        put(name, data)
    index = index_json(plan.outputs)
    if index is not None:
        put(INDEX, index.encode())
    put("README.md", _card(plan, variant, report).encode())
    provenance = _provenance(plan, variant, report, journal, sha256) | {"files": digests}
    target.write_small(variant, PROVENANCE, (json_lines(provenance) + "\n").encode())


def given_files(plan: Plan) -> dict[str, bytes]:
    """What an output gets from the small files of its inputs, as they are now."""
    files = copied_files(plan)
    return {name: written_config(plan, data) if name == "config.json" else data for name, data in files.items()}


def written_config(plan: Plan, raw: bytes) -> bytes:
    """The donor's config.json, as the output has it: with its dtype, its head, its layers and its tokens."""
    dtype, vocabulary = _main_dtype(plan), plan.vocabulary
    data = rewrite_config(raw, dtype) if dtype else raw
    data = data if plan.tied is None else rewrite_tie(data, plan.tied)
    if vocabulary is not None:
        data = follow_vocabulary("config.json", data, vocabulary.rows, vocabulary.ids, vocabulary.lender)
    for stack in plan.stacks:
        data = restack_config(data, stack)
    return data


def copied_files(plan: Plan) -> dict[str, bytes]:
    """The donor's files beside the weights, with the tokenizer and the chat template that the recipe asks for."""
    home = plan.donor.planned or plan.donor.folder
    found = {path.relative_to(home).as_posix(): read_file(path, None) for path in other_files(home)}
    if (vocabulary := plan.vocabulary) is not None:
        found = {name: data for name, data in found.items() if not is_tokenizer_file(name)} | vocabulary.files
        name = "generation_config.json"
        if name in found:
            read_json_object(home / name)  # it is one, or this says which file is none
            found[name] = follow_vocabulary(name, found[name], vocabulary.rows, vocabulary.ids, vocabulary.lender)
    if plan.chat_template is not None:
        with plausible(home):
            found = write_template(found, plan.chat_template)
    return dict(sorted(found.items()))


def json_lines(data: Any, depth: int = 3) -> str:
    """JSON in which every entry of the outer levels has its own line, and what is below them stays on it.

    A tensor's statistics are a line: shorter, easier to compare than one number a line, and `json` writes it in C.
    """
    if depth == 0 or not data or not isinstance(data, (dict, list)):
        return json_text(data)
    margin = " " * (4 - depth)
    opening, closing = "{}" if isinstance(data, dict) else "[]"
    entries = (
        [f"{json_text(str(key))}: {json_lines(value, depth - 1)}" for key, value in data.items()]
        if isinstance(data, dict)
        else [json_lines(value, depth - 1) for value in data]
    )
    return f"{opening}\n{margin}" + f",\n{margin}".join(entries) + f"\n{margin[1:]}{closing}"


def _card(plan: Plan, variant: int, report: dict[str, Any]) -> str:
    recipe = plan.variants[variant]
    commits = {reference: origin(folder) for reference, folder in recipe.ancestors.items()}
    ids = {reference: split_id(reference) if commit else None for reference, commit in commits.items()}
    licences = {
        named[0] if (named := ids[reference]) else reference: read_licence(folder)
        for reference, folder in recipe.ancestors.items()
    }
    title = recipe.name or f"{recipe.merge_method} merge"
    home = origin_of(recipe.method)
    plugin = f" of a plugin ({home.file})" if home and home.file else " of a plugin" if home else ""
    written = "---\n".join([stage.to_yaml() for _, stage in recipe.all_stages.values()] + [recipe.to_yaml()])
    return model_card(
        title, recipe.to_dict(), len(recipe.models), written, licences, report["total"], plugin,
        list(dict.fromkeys(commit for commit in commits.values() if commit)),
    )  # fmt: skip


def _provenance(plan: Plan, variant: int, report: dict[str, Any], journal: Journal, sha256: bool) -> dict[str, Any]:
    home = origin_of(plan.variants[variant].method)
    return {
        "format": 1,
        "rlmerge": VERSION,
        "recipe": plan.variants[variant].to_dict(),
        **({"plugin": {"file": home.file, "xxh3": home.digest}} if home else {}),
        "inputs": _inputs(plan, journal, sha256),
        **({"stages": stages} if (stages := _stages(plan.variants[variant])) else {}),
        "files": {},
        "weights": [
            {"file": file.name, "size": file.size, "header": xxhash.xxh3_128_hexdigest(file.header)}
            for file in plan.outputs
        ],
        "units": _written_units(plan, journal, variant),
        "notes": [portable(note, plan) for note in plan.notes],
        "statistics": report,
    } | ({"vocabulary": plan.vocabulary.report} if plan.vocabulary else {})


def _stages(recipe: Recipe) -> dict[str, Any]:
    """What the stages of a recipe were made of, by name, each after its own stages: recipe, inputs, weights."""
    found: dict[str, Any] = {}
    for name, (folder, _) in recipe.stages.items():
        said = read_json_object(folder / PROVENANCE)
        found |= said.get("stages", {})
        found[name] = {key: said[key] for key in ("recipe", "plugin", "inputs", "weights", "notes") if key in said}
    return found


def portable(note: str, plan: Plan) -> str:
    """A note without paths of this machine: folders as the recipe writes them, the recipe by its file name."""
    for checkpoint in (plan.donor, *plan.models):
        for folder in (str(checkpoint.folder.absolute()), str(checkpoint.folder)):
            note = note.replace(folder, checkpoint.reference)
    source = plan.recipe.source_name
    return note.replace(source, Path(source).name) if source else note


def _main_dtype(plan: Plan) -> str | None:
    """The dtype of most merged bytes."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.carry is None:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size * WIDTH[tensor.dtype]
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _inputs(plan: Plan, journal: Journal, sha256: bool) -> list[dict[str, Any]]:
    """Every model: reference as written, files with sizes and header digests, the digest of the bytes read, and for
    what came from the hub the commit that it is of.

    `xxh3` is the xxh3-128 of the digests of the units in plan order, each of which is the xxh3-128 of the unit's bytes.
    A file that two models share is listed with both.
    """
    hubs: dict[Path, str] = {}
    found = []
    for role, reference, headers, number in _roles(plan):
        state = xxhash.xxh3_128()
        for unit in plan.unit_list():
            read = journal.units[unit].read
            state.update((read[number] if number < len(read) else "-").encode())
        listed = [{"file": header.file.name, "size": header.size, "header": header.digest} for header in headers]
        for item, header in zip(listed, headers if sha256 else ()):
            if header.file not in hubs:
                try:
                    with open(header.file, "rb") as file:
                        hubs[header.file] = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise CheckpointError(f"{header.file}: cannot be read: {error.strerror or error}.") from error
            item["sha256"] = hubs[header.file]
        commits = dict(known for header in headers if (known := origin(header.file.parent)))
        entry = {"role": role, "reference": reference, "files": listed, "xxh3": state.hexdigest()}
        found.append(entry | ({"commits": commits} if commits else {}))
    return found


def _roles(plan: Plan) -> list[tuple[str, Any, Sequence[Header], int]]:
    """Base, experts, Fishers, Gram matrices: role, reference, files, and number among the inputs of a unit."""
    written = {entry.key: entry for entry in plan.recipe.models}
    count = len(plan.experts)
    roles: list[tuple[str, Any, Sequence[Header], int]] = []
    if plan.base is not None:
        roles.append(("base", plan.recipe.base_model, plan.base.headers, 0))
    for k, (key, model) in enumerate(zip(plan.experts, plan.models)):
        roles.append((key, written[key].model, model.headers, 1 + k))
    for k, (key, fisher) in enumerate(zip(plan.experts, plan.fishers)):
        roles.append((f"fisher of {key}", written[key].fisher, fisher.headers, 1 + count + k))
    first = 1 + count + len(plan.fishers)
    for k, (key, gram) in enumerate(zip(plan.experts, plan.grams)):
        roles.append((f"gram of {key}", written[key].gram, gram.headers, first + k))
    return roles


def _written_units(plan: Plan, journal: Journal, variant: int) -> dict[str, Any]:
    """Per tensor, its units as [start, stop, xxh3 of the bytes written]."""
    return {
        tensor.name: [[*tensor.units[u], journal.units[t, u].written[variant]] for u in range(len(tensor.units))]
        for t, tensor in enumerate(plan.tensors)
    }


def write_log(
    target: OutputFolder, seconds: float, threads: int, kernels: str, resumed: int, units: int, bytes_read: int,
    executor: str = "local",
) -> None:  # fmt: skip
    """run.log of the first variant: the only file of an output that differs from run to run."""
    line = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "executor": executor,
        "threads": threads,
        "kernels": kernels,
        "units_resumed": resumed,
        "units": units,
        "bytes_read": bytes_read,
    }
    target.write_small(0, "run.log", (json.dumps(line) + "\n").encode())
