"""A pack gives back every byte of its expert, merges to the same bytes, and serves no other base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoint.checkpoint_files import write_index
from tests.methods.small_models import make_recipe, needed_weights, small_blocks
from tests.packs.pack_files import CONFIG, KINDS, SHAPES, changed, sha256s, words, write_set, write_words

import rlmerge
from rlmerge.checkpoint.folder import open_checkpoint
from rlmerge.checkpoint.pack import find_base
from rlmerge.errors import MismatchError, OutputError, PackError, RecipeError, RlmergeError
from rlmerge.packs.restore import open_packed, small_files


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, e0 … e2 and their packs p0 … p2."""
    home = write_set(tmp_path_factory.mktemp("packs"))
    for k in range(3):
        rlmerge.pack(home / f"e{k}", home / "base", home / f"p{k}")
    return home


def there_and_back(tmp: Path, base: Any, expert: Any) -> Any:
    """Packs and unpacks name -> (dtype, words); all bytes must be as they were. Returns what the pack holds."""
    for name, tensors in (("base", base), ("expert", expert)):
        shutil.rmtree(tmp / name, ignore_errors=True)
        write_words(tmp / name / "model.safetensors", tensors, {"format": "pt", "more": "ünicode"})
    for name in ("pack", "back"):
        shutil.rmtree(tmp / name, ignore_errors=True)
    rlmerge.pack(tmp / "expert", tmp / "base", tmp / "pack")
    rlmerge.unpack(tmp / "pack", tmp / "back")
    assert sha256s(tmp / "back") == sha256s(tmp / "expert")
    pack = open_checkpoint(tmp / "pack").pack
    assert pack is not None
    return pack


# ---- Bit for bit ------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["BF16", "F16", "F32"]), st.sampled_from(["BF16", "F16", "F32"]),
    st.sampled_from([(), (1,), (7,), (3, 5), (300, 120)]), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 2**20),
)  # fmt: skip
def test_any_words_come_back(tmp_path, one, other, shape, density, seed):
    """NaN payloads, zeros of both signs, infinities, subnormals: all 2^16 or 2^32 words, of any two dtypes."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2 ** (8 * KINDS[one]().itemsize), shape).astype(KINDS[one])
    new = rng.integers(0, 2 ** (8 * KINDS[other]().itemsize), shape).astype(KINDS[other])
    if one == other:
        new = np.where(rng.random(shape) < density, new, base)
    common = {"same": ("F32", np.ones((2, 2), np.uint32))}
    there_and_back(tmp_path, {"t": (one, base), **common}, {"t": (other, new), **common})


def test_every_bf16_word_beside_every_special_one(tmp_path):
    every = np.arange(65536, dtype=np.uint16)
    for special in (0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 1):
        pack = there_and_back(tmp_path, {"t": ("BF16", np.full(65536, special, np.uint16))}, {"t": ("BF16", every)})
        assert pack.changed == 65535


def test_zeros_of_other_signs_are_steps(tmp_path):
    zero, minus = np.zeros(5, np.uint16), np.full(5, 0x8000, np.uint16)
    assert there_and_back(tmp_path, {"t": ("BF16", zero)}, {"t": ("BF16", minus)}).changed == 5


def test_what_has_no_steps_is_stored_once_or_not_at_all(tmp_path):
    """Other dtypes and shapes, empty tensors, tensors that the base lacks, a tied head that it does not store."""
    rng = np.random.default_rng(0)
    embed = words(1, (6, 4))
    base = {
        "embed.weight": ("BF16", embed), "ids": ("I64", np.arange(9)), "mask": ("BOOL", rng.random(9) < 0.5),
        "double": ("F64", rng.standard_normal(7)), "none": ("F32", np.zeros((0, 3), np.uint32)),
        "shape": ("BF16", words(2, (4, 4))), "left.out": ("F32", np.zeros(3, np.uint32)),
    }  # fmt: skip
    new = changed(embed, 5, 0.9)
    expert = {
        "embed.weight": ("BF16", new), "lm_head.weight": ("BF16", new), "ids": ("I64", np.arange(9)),
        "mask": ("BOOL", rng.random(9) < 0.5), "double": ("F64", rng.standard_normal(7)),
        "none": ("F32", np.zeros((0, 3), np.uint32)), "shape": ("BF16", words(2, (5, 4))),
        "bytes": ("U8", np.arange(11, dtype=np.uint8)),
    }  # fmt: skip
    pack = there_and_back(tmp_path, base, expert)
    assert {name: info.kind for name, info in pack.tensors.items()} == {
        "embed.weight": "steps", "lm_head.weight": "copy", "ids": "same", "mask": "whole", "double": "whole",
        "none": "same", "shape": "whole", "bytes": "whole",
    }  # fmt: skip


def test_shards_index_and_small_files_come_back(tmp_path):
    """Two files in an order of their own, their index; small files from the pack or from the base."""
    write_set(tmp_path, 0)
    base = {name: ("BF16", words(n, shape, "BF16", 0.05)) for n, (name, shape) in enumerate(SHAPES.items())}
    expert = {name: ("BF16", changed(value, n)) for n, (name, (_, value)) in enumerate(base.items())}
    names = list(expert)[::-1]
    files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for file, part in zip(files, (names[:2], names[2:])):
        write_words(tmp_path / "e" / file, {name: expert[name] for name in part})
    write_index(tmp_path / "e", {name: files[name not in names[:2]] for name in names})
    for folder in ("base", "e"):
        (tmp_path / folder / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "e" / "config.json").write_text(json.dumps(CONFIG | {"more": 1}))
    (tmp_path / "e" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "e" / "additional_chat_templates").mkdir()
    (tmp_path / "e" / "additional_chat_templates" / "tool.jinja").write_text("x")
    rlmerge.pack(tmp_path / "e", tmp_path / "base", tmp_path / "pack")
    assert (tmp_path / "pack" / "config.json").exists()
    assert not (tmp_path / "pack" / "tokenizer.json").exists()
    rlmerge.unpack(tmp_path / "pack", tmp_path / "back", threads=2)
    assert sha256s(tmp_path / "back") == sha256s(tmp_path / "e")


def test_pieces_and_threads_change_nothing(home, tmp_path, monkeypatch):
    monkeypatch.setattr("rlmerge.packs.write.PIECE", 2**15)
    monkeypatch.setattr("rlmerge.packs.restore.PIECE", 1000)
    for threads, kernels in ((1, "numba"), (3, "numpy")):
        rlmerge.pack(
            home / "e0",
            home / "base",
            home / "again",
            threads=threads,
            kernels=kernels,
            overwrite=True,  # type: ignore[arg-type]
        )
        assert (home / "again" / "delta.safetensors").read_bytes() == (home / "p0" / "delta.safetensors").read_bytes()
        rlmerge.unpack(home / "again", tmp_path / f"back{threads}", threads=threads, kernels=kernels)  # type: ignore[arg-type]
        assert sha256s(tmp_path / f"back{threads}") == sha256s(home / "e0")


def test_a_pack_is_small_and_says_what_it_is(home):
    made = rlmerge.pack(home / "e1", home / "base", home / "again", overwrite=True)
    assert made.bytes < made.expert_bytes / 10
    assert made.coordinates == sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert 0.1 < made.changed / made.coordinates < 0.16
    assert made.bits_per_change is not None
    assert 5 < made.bits_per_change < 8
    assert not made.whole


# ---- Merges -----------------------------------------------------------------------------------------------------


def merged(home: Path, keys: list[str], method: str, parameters: Any, out: Path, **top: Any) -> dict[str, Any]:
    """Merges folders or packs, named e0 … in either case; the weights' digests and the provenance."""
    own = needed_weights(method, keys)
    recipe = make_recipe(home, method, keys, parameters, own, **top)
    ordered = sorted(recipe.models, key=lambda entry: entry.model)
    models = tuple(replace(entry, name=f"e{n}") for n, entry in enumerate(ordered))
    rlmerge.merge_to_folder(replace(recipe, models=models), out, threads=2)
    return {"weights": (out / "model.safetensors").read_bytes(), "said": json.loads((out / "rlmerge.json").read_text())}


METHODS = [
    ("sar", {"sensitivity": "delta2"}), ("ties", {"density": 0.4}), ("linear", {}), ("ram", {}), ("task_arithmetic", {})
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[name for name, _ in METHODS])
def test_merges_are_the_same_bytes(home, tmp_path, method, parameters):
    for block in (2**19, 2500):
        with small_blocks(block, 10_000 if block < 10_000 else None):
            folders = merged(home, ["e0", "e1", "e2"], method, parameters, tmp_path / f"f{block}")
            packs = merged(home, ["p0", "p1", "p2"], method, parameters, tmp_path / f"p{block}")
            mixed = merged(home, ["e0", "p1", "p2"], method, parameters, tmp_path / f"m{block}")
        assert folders["weights"] == packs["weights"] == mixed["weights"]
        assert folders["said"]["statistics"] == packs["said"]["statistics"]
        # the provenance knows the experts as the same models
        digests = [[entry["xxh3"] for entry in one["said"]["inputs"]] for one in (folders, packs, mixed)]
        assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("base_dtype", ["BF16", "F16", "F32"])
def test_other_dtypes_merge_to_the_same_bytes(tmp_path, base_dtype):
    """Experts of three dtypes, narrower and wider than the base: each against the base as its dtype has it."""
    write_set(tmp_path, 3, base_dtype, ("BF16", "F32", "F16"))
    for k in range(3):
        rlmerge.pack(tmp_path / f"e{k}", tmp_path / "base", tmp_path / f"p{k}")
    for method, parameters in METHODS[:3]:
        folders = merged(tmp_path, ["e0", "e1", "e2"], method, parameters, tmp_path / f"f-{method}")
        packs = merged(tmp_path, ["p0", "p1", "p2"], method, parameters, tmp_path / f"p-{method}")
        assert folders["weights"] == packs["weights"]


def test_a_filter_a_sweep_and_arrays(home, tmp_path):
    for keys in (["e0", "e1"], ["p0", "p1"]):
        recipe = make_recipe(home, "linear", keys, {}, needed_weights("linear", keys, 0.5), min_change=1e-3)
        arrays = dict(rlmerge.merge(recipe))
        expected = merged(home, ["e0", "e1"], "linear", {}, tmp_path / f"x{keys[0]}", min_change=1e-3)
        assert arrays.keys() == SHAPES.keys()
        assert expected["weights"]


def test_an_unchanged_tensor_and_a_tied_copy(tmp_path):
    """The base stores head and embedding, one expert stores one of them, the other both, and leaves a tensor alone."""
    write_set(tmp_path, 0)
    base = {name: ("BF16", words(n, shape, "BF16", 0.05)) for n, (name, shape) in enumerate(SHAPES.items())}
    embed = "model.embed_tokens.weight"
    write_words(tmp_path / "base" / "model.safetensors", {**base, "lm_head.weight": base[embed]}, {"format": "pt"})
    for k in range(2):
        expert = {name: ("BF16", changed(value, n + 9 * k)) for n, (name, (_, value)) in enumerate(base.items())}
        expert["model.layers.0.up_proj.weight"] = base["model.layers.0.up_proj.weight"]
        if k:
            expert["lm_head.weight"] = expert[embed]
        write_words(tmp_path / f"e{k}" / "model.safetensors", expert, {"format": "pt"})
        (tmp_path / f"e{k}" / "config.json").write_text(json.dumps(CONFIG))
        rlmerge.pack(tmp_path / f"e{k}", tmp_path / "base", tmp_path / f"p{k}")
    for method, parameters in METHODS:
        folders = merged(tmp_path, ["e0", "e1"], method, parameters, tmp_path / f"f-{method}")
        packs = merged(tmp_path, ["p0", "p1"], method, parameters, tmp_path / f"p-{method}")
        assert folders["weights"] == packs["weights"]


def test_packs_beside_a_lora(home, tmp_path):
    rng = np.random.default_rng(0)
    rank, inside = 2, "base_model.model.model.layers.0.q_proj"
    lora = {
        f"{inside}.lora_A.weight": ("F32", rng.standard_normal((rank, 24)).astype(np.float32).view(np.uint32)),
        f"{inside}.lora_B.weight": ("F32", rng.standard_normal((24, rank)).astype(np.float32).view(np.uint32)),
    }
    shutil.copytree(home, tmp_path / "home")
    write_words(tmp_path / "home" / "z" / "adapter_model.safetensors", lora)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "home" / "z" / "adapter_config.json").write_text(json.dumps(settings))
    for method, parameters in METHODS:
        folders = merged(tmp_path / "home", ["e0", "e1", "z"], method, parameters, tmp_path / f"f-{method}")
        packs = merged(tmp_path / "home", ["p0", "p1", "z"], method, parameters, tmp_path / f"p-{method}")
        assert folders["weights"] == packs["weights"]


def test_a_resumed_merge_knows_the_sum_of_what_it_read_before(home, tmp_path):
    recipe = make_recipe(home, "sar", ["p0", "p1"], {"sensitivity": "delta2"})

    def stop(step: rlmerge.Step) -> None:
        if step.units >= 3:
            raise KeyboardInterrupt

    with small_blocks(2500, 10_000):
        with pytest.raises(KeyboardInterrupt):
            rlmerge.merge_to_folder(recipe, tmp_path / "out", threads=1, progress=stop)
        done = rlmerge.merge_to_folder(recipe, tmp_path / "out", threads=1)
        whole = rlmerge.merge_to_folder(recipe, tmp_path / "whole", threads=1)
    assert done.resumed_units >= 3
    assert whole.resumed_units == 0
    assert sha256s(tmp_path / "out")["model.safetensors"] == sha256s(tmp_path / "whole")["model.safetensors"]


# ---- The base ---------------------------------------------------------------------------------------------------


def big_base(folder: Path) -> Path:
    """A base of which only pieces are looked at before a merge, an expert of it, and its pack."""
    base = {"a.weight": ("BF16", words(1, (600, 500))), "b.weight": ("BF16", words(2, (64, 8)))}
    expert = {name: (dtype, changed(value, 7)) for name, (dtype, value) in base.items()}
    write_words(folder / "base" / "model.safetensors", base)
    write_words(folder / "e0" / "model.safetensors", expert)
    rlmerge.pack(folder / "e0", folder / "base", folder / "p0")
    return folder


def alter(file: Path, place: int) -> None:
    """Adds 1 to the last bit of a stored word."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


def test_another_base_is_refused_before_any_weight_moves(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    base = {name: ("BF16", words(70 + n, shape)) for n, (name, shape) in enumerate(SHAPES.items())}
    write_words(tmp_path / "home" / "base" / "model.safetensors", base, {"format": "pt"})
    recipe = make_recipe(
        tmp_path / "home", "ties", ["p0", "e1"], {"density": 0.5}, needed_weights("ties", ["p0", "e1"])
    )
    known = json.loads((home / "p0" / "pack.json").read_text())["base"]["hash"]
    for call in (lambda: rlmerge.check(recipe), lambda: rlmerge.merge_to_folder(recipe, tmp_path / "out")):
        with pytest.raises(MismatchError, match=f"p0: this pack was made for another base: .*{known}.*has hash"):
            call()
    with pytest.raises(MismatchError, match="another base"):
        rlmerge.unpack(tmp_path / "home" / "p0", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_another_layout_of_the_same_base_is_the_same_base(home, tmp_path):
    """Saved again, with other metadata and in another order."""
    shutil.copytree(home, tmp_path / "home")
    base = {name: ("BF16", words(n, shape, "BF16", 0.05)) for n, (name, shape) in enumerate(SHAPES.items())}
    write_words(tmp_path / "home" / "base" / "model.safetensors", dict(reversed(base.items())), {"saved": "again"})
    rlmerge.unpack(tmp_path / "home" / "p0", tmp_path / "back")
    assert sha256s(tmp_path / "back") == sha256s(home / "e0")


@pytest.mark.parametrize("method", ["linear", "sar"])
def test_one_other_coordinate_where_nobody_looked_is_refused_before_the_rename(tmp_path, method):
    """Coordinate 70,000 of 300,000 lies between the pieces that are compared first."""
    big_base(tmp_path)
    alter(tmp_path / "base" / "model.safetensors", 8 + 160 + 140_000)
    own = needed_weights(method, ["p0"])
    recipe = make_recipe(tmp_path, method, ["p0"], {"sensitivity": "delta2"} if method == "sar" else {}, own)
    rlmerge.check(recipe)
    with small_blocks(20_000, 50_000), pytest.raises(MismatchError, match=r"'a.weight' is not that of the base .*p0"):
        rlmerge.merge_to_folder(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MismatchError, match=r"'a.weight' is not that of the base"):
        dict(rlmerge.merge(recipe))
    with pytest.raises(MismatchError, match=r"'a.weight' is not that of the base"):
        rlmerge.unpack(tmp_path / "p0", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_packs_of_bases_that_differ_do_not_merge(tmp_path):
    big_base(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "base2")
    alter(tmp_path / "base2" / "model.safetensors", 8 + 160 + 140_000)
    rlmerge.pack(tmp_path / "e0", tmp_path / "base2", tmp_path / "p1")
    recipe = make_recipe(tmp_path, "linear", ["p0", "p1"], {}, needed_weights("linear", ["p0", "p1"]))
    with pytest.raises(MismatchError, match=r"made for bases that differ in tensor 'a.weight'"):
        rlmerge.check(recipe)


def test_a_pack_is_no_base_and_needs_one(home):
    keys = ["e1", "e2"]
    with pytest.raises(MismatchError, match="p0: a delta pack cannot be the base"):
        rlmerge.check(make_recipe(home, "linear", keys, {}, needed_weights("linear", keys), base="p0"))
    keys = ["p0", "e1"]
    with pytest.raises(RecipeError, match=r"what changed in a model. Write that model as `base_model:`"):
        rlmerge.check(make_recipe(home, "linear", keys, {}, needed_weights("linear", keys), base=None))


def test_the_base_is_found_from_the_pack_or_said(home, tmp_path, monkeypatch):
    shutil.copytree(home / "p0", tmp_path / "far" / "p0")
    with pytest.raises(PackError, match=r"its base is not at .* Say where it is: --base FOLDER"):
        rlmerge.unpack(tmp_path / "far" / "p0", tmp_path / "back")
    rlmerge.unpack(tmp_path / "far" / "p0", tmp_path / "back", base=home / "base")
    assert sha256s(tmp_path / "back") == sha256s(home / "e0")
    shutil.copytree(home, tmp_path / "moved")  # together: the pack says where the base lies, seen from itself
    rlmerge.unpack(tmp_path / "moved" / "p0", tmp_path / "back2")
    with pytest.raises(PackError, match="is a delta pack, which changes a model and is none"):
        rlmerge.unpack(home / "p0", tmp_path / "back3", base=home / "p1")


# ---- What is refused --------------------------------------------------------------------------------------------


def test_what_cannot_be_packed(home, tmp_path):
    for expert, base, text in (
        ("p0", "base", "is a delta pack already"), ("e0", "p0", "is a delta pack already"), ("none", "base", "no such"),
    ):  # fmt: skip
        with pytest.raises(RlmergeError, match=text):
            rlmerge.pack(home / expert, home / base, tmp_path / "out")
    write_words(tmp_path / "other" / "model.safetensors", {"x": ("BF16", words(0, (3, 3)))})
    with pytest.raises(MismatchError, match="has no tensor in common with"):
        rlmerge.pack(tmp_path / "other", home / "base", tmp_path / "out")
    write_words(tmp_path / "odd" / "model.safetensors", {"x#steps": ("BF16", words(0, (3, 3)))})
    with pytest.raises(PackError, match="has a meaning of its own for '#'"):
        rlmerge.pack(tmp_path / "odd", tmp_path / "odd", tmp_path / "out")
    with pytest.raises(PackError, match="is a full model and no delta pack"):
        rlmerge.unpack(home / "e0", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_outputs_are_never_over_anything_else(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    home = tmp_path / "home"
    before = sha256s(home)
    for out, text in (
        ("base", "Inputs are never written"), ("e0", "Inputs are never written"), ("e0/x", "Inputs are never written"),
        ("e1", "exists and is not empty"), ("p1", "exists and is not empty"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=text):
            rlmerge.pack(home / "e0", home / "base", home / out)
    with pytest.raises(OutputError, match="--overwrite does not replace it"):
        rlmerge.pack(home / "e0", home / "base", home / "e1", overwrite=True)
    with pytest.raises(OutputError, match="exists and is not empty"):
        rlmerge.unpack(home / "p0", home / "e2")
    (home / "link").symlink_to(home / "e1")
    with pytest.raises(OutputError, match="is a symbolic link"):
        rlmerge.unpack(home / "p0", home / "link")
    (home / "link").unlink()
    (home / "new.unfinished").mkdir()
    (home / "new.unfinished" / "mine").write_text("x")
    with pytest.raises(OutputError, match="is in the way"):
        rlmerge.pack(home / "e0", home / "base", home / "new")
    shutil.rmtree(home / "new.unfinished")
    assert sha256s(home) == before


def test_a_failed_pack_leaves_nothing(home, tmp_path):
    def stop(step: rlmerge.Packing) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rlmerge.pack(home / "e0", home / "base", tmp_path / "out", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        rlmerge.unpack(home / "p0", tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir())


def test_small_files_of_a_base_that_changed(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    (tmp_path / "home" / "base" / "config.json").write_text("{}")
    with pytest.raises(PackError, match=r"config.json: is not what the expert had: the base's file was changed"):
        rlmerge.unpack(tmp_path / "home" / "p0", tmp_path / "back")


def test_links_on_the_way_to_the_base_do_no_harm(tmp_path: Path) -> None:
    """`..` in the recorded path goes up from where the pack really lies."""
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    models = write_set(tmp_path / "models", count=1)
    base, expert = models / "base", models / "e0"
    rlmerge.pack(expert, base, tmp_path / "link" / "pack")
    rlmerge.unpack(tmp_path / "link" / "pack", tmp_path / "again")
    rlmerge.unpack(tmp_path / "real" / "deep" / "pack", tmp_path / "again-2")


def test_a_model_card_of_the_base_that_changed_later_hinders_no_loading(tmp_path: Path) -> None:
    models = write_set(tmp_path / "models", count=1)
    base, expert = models / "base", models / "e0"
    for folder in (base, expert):
        (folder / "README.md").write_text("# a card\n")
    rlmerge.pack(expert, base, tmp_path / "pack")
    (base / "README.md").write_text("# a better card\n")
    packed = open_packed(tmp_path / "pack")
    found = find_base(packed)
    assert packed.pack is not None
    assert "README.md" not in dict(small_files(packed.pack, found, prose=False))
    with pytest.raises(PackError, match=r"the base's file was changed"):
        rlmerge.unpack(tmp_path / "pack", tmp_path / "again")


def test_a_pack_has_the_tokenizer_files_that_it_shares_with_its_base(tmp_path: Path) -> None:
    """A configuration that differs is in the pack, a template that does not is the base's: the expert has both."""
    models = write_set(tmp_path / "models", count=1)
    for folder, name in ((models / "base", "Fast"), (models / "e0", "Slow")):
        (folder / "chat_template.jinja").write_text("{{ messages }}\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    rlmerge.pack(models / "e0", models / "base", tmp_path / "pack")
    assert not (tmp_path / "pack" / "chat_template.jinja").exists()
    recipe = rlmerge.recipe_from_parts(str(models / "base"), [str(tmp_path / "pack")], "ties", {"weight": 1.0})
    rlmerge.check(recipe)
    (models / "e0" / "chat_template.jinja").write_text("another\n")
    rlmerge.pack(models / "e0", models / "base", tmp_path / "pack", overwrite=True)
    with pytest.raises(MismatchError, match="chat template"):
        rlmerge.check(recipe)
