"""Arrays, folders and loaded models get the same merge; outputs load elsewhere; verify sees every change."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tests.checkpoint.checkpoint_files import write_model
from tests.methods.small_models import (
    fitting,
    make_recipe,
    needed_weights,
    read_values,
    read_words,
    representable,
    same_bits,
    small_blocks,
    small_shards,
    some_fishers,
    sparse_model,
    write_all,
)  # fmt: skip

import rlmerge
from rlmerge.errors import MismatchError, OutputError, RlmergeError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def recipe(tmp_path):
    rng = np.random.default_rng(0)
    base, experts = sparse_model(rng, 2, "BF16")
    write_all(tmp_path, base, experts, some_fishers(rng, list(experts)), "BF16")
    return make_recipe(tmp_path, "sar", ["e0", "e1"], {"density": 0.5}, fishers=True)


def golden_recipe(**top):
    return make_recipe(GOLDEN, "sar", ["expert0", "expert1", "expert2"], {"sensitivity": "delta2"}, **top)


# -- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_merge_yields_what_the_folder_holds(recipe, tmp_path, dtype, threads):
    recipe = recipe.with_settings({"dtype": dtype}) if dtype else recipe
    with small_blocks(8, 16):
        arrays = dict(rlmerge.merge(recipe, threads=threads))
        out = rlmerge.merge_to_folder(recipe, tmp_path / "out", threads=threads).out
    stored = read_values(out)
    assert arrays.keys() == stored.keys()
    for name, array in arrays.items():
        kind = read_words(out)[name][0]
        assert array.dtype == (np.float16 if kind == "F16" else np.float32)
        assert array.shape == stored[name].shape
        assert (array == stored[name]).all()
        if kind == "BF16":
            assert representable(array, "BF16").tobytes() == array.tobytes()


def test_merge_takes_a_path_and_keeps_the_order_of_the_base(recipe, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(recipe.to_yaml())
    for source in (path, str(path)):
        assert [name for name, _ in rlmerge.merge(source)] == list(read_words(tmp_path / "base"))


def test_a_mapping_stands_for_its_recipe(recipe, tmp_path, monkeypatch):
    """In every function that takes a recipe; its paths start at the working directory."""
    monkeypatch.chdir(tmp_path)
    data = recipe.to_dict()
    found = dict(rlmerge.merge(data, kernels="numpy"))
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in rlmerge.merge(recipe, kernels="numpy")
    }
    assert rlmerge.check(data).summary == rlmerge.check(recipe).summary
    assert rlmerge.explain(data) == rlmerge.explain(recipe)
    assert rlmerge.merge_to_folder(data, "out", kernels="numpy").report == rlmerge.merge_to_folder(
        recipe, "out2", kernels="numpy"
    ).report  # fmt: skip
    for function in (rlmerge.check, rlmerge.explain, lambda given: list(rlmerge.merge(given))):
        with pytest.raises(RlmergeError, match="expected a recipe or the path of one, found a list"):
            function([data])


def test_merge_can_be_left_early(recipe):
    """Nothing hangs and no file stays open (warnings are errors)."""
    generator = rlmerge.merge(recipe)
    next(generator)
    generator.close()


def test_arrays_are_the_callers(recipe):
    """A yielded array is not written again by later tensors."""
    arrays, copies = [], []
    for _, array in rlmerge.merge(recipe, threads=2):
        arrays.append(array)
        copies.append(array.copy())
    assert all(array.tobytes() == copy.tobytes() for array, copy in zip(arrays, copies))


def test_progress_reaches_all_units(recipe, tmp_path):
    steps: list[rlmerge.Step] = []
    with small_blocks(8, 16):
        outcome = rlmerge.merge_to_folder(recipe, tmp_path / "out", progress=steps.append, threads=2)
    last = steps[-1]
    assert (last.units, last.total_units) == (outcome.total_units, outcome.total_units)
    assert last.bytes_read == outcome.bytes_read > 0
    assert outcome.report == outcome.reports[0]


@pytest.mark.parametrize(("memory", "enough"), [(10**6, False), (10**10, True)])
def test_memory_bounds_threads_and_changes_nothing(recipe, tmp_path, memory, enough):
    if not enough:
        with pytest.raises(RlmergeError, match="--memory 1 MB"):
            rlmerge.merge_to_folder(recipe, tmp_path / "out", memory=memory)
        return
    rlmerge.merge_to_folder(recipe, tmp_path / "out", memory=memory, threads=3)
    rlmerge.merge_to_folder(recipe, tmp_path / "free", threads=1)
    assert same_bits(read_values(tmp_path / "out"), read_values(tmp_path / "free"))


def test_sha256_of_inputs_is_the_hubs(recipe, tmp_path):
    out = rlmerge.merge_to_folder(recipe, tmp_path / "out", sha256=True).out
    inputs = json.loads((out / "rlmerge.json").read_text())["inputs"]
    assert [entry["role"] for entry in inputs] == ["base", "e0", "e1", "fisher of e0", "fisher of e1"]
    for entry, name in zip(inputs, ("base", "e0", "e1")):
        data = (tmp_path / name / "model.safetensors").read_bytes()
        assert [file["sha256"] for file in entry["files"]] == [hashlib.sha256(data).hexdigest()]


def test_provenance_hashes_all_bytes_of_all_inputs(recipe, tmp_path):
    """Whatever the method needed to read: a changed bit anywhere in an input changes its hash."""
    first = json.loads((rlmerge.merge_to_folder(recipe, tmp_path / "out").out / "rlmerge.json").read_text())["inputs"]
    for k, file in enumerate(
        ["base/model.safetensors", "e0/model.safetensors", "e1/model.safetensors", "fisher_e0/fisher.safetensors"]
    ):
        path = tmp_path / file
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        second = json.loads((rlmerge.merge_to_folder(recipe, tmp_path / f"o{k}").out / "rlmerge.json").read_text())[
            "inputs"
        ]
        assert [a["xxh3"] == b["xxh3"] for a, b in zip(first, second)] == [place != k for place in range(5)], file
        path.write_bytes(data)


@pytest.mark.parametrize("method", rlmerge.method_names())
def test_provenance_hashes_do_not_depend_on_the_method_or_kernels(recipe, tmp_path, method):
    """The bytes of base and experts are the same, so are their hashes, for every method."""
    own, found = needed_weights(method, ["e0", "e1"]), []
    if len(fitting(method, ["e0", "e1"])) < 2:
        pytest.skip("takes one model")
    for parameters, kernels in (({}, "numba"), ({}, "numpy")):
        parameters = {"sensitivity": "delta2", "arbitration": "soft", "lambda": 0.5} if method == "sar" else parameters
        other = make_recipe(tmp_path, method, ["e0", "e1"], parameters, own, base="base")
        out = rlmerge.merge_to_folder(other, tmp_path / kernels, kernels=kernels).out
        read = {entry["role"]: entry["xxh3"] for entry in json.loads((out / "rlmerge.json").read_text())["inputs"]}
        found.append({role: read.get(role) for role in ("base", "e0", "e1")})
    out = rlmerge.merge_to_folder(recipe, tmp_path / "sar").out
    read = {entry["role"]: entry["xxh3"] for entry in json.loads((out / "rlmerge.json").read_text())["inputs"]}
    expected = {role: read[role] for role in ("base", "e0", "e1")}
    assert found == [expected, expected]


# -- loaded models and transformers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def load(transformers, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def state_of(model):
    import torch

    return {name: value.to(torch.float32).numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_to_a_model_equals_the_folder(transformers, tmp_path, dtype):
    import torch

    recipe = golden_recipe(dtype=dtype)
    kind = getattr(torch, dtype)
    model = load(transformers, GOLDEN / "base", dtype=kind)
    assert rlmerge.merge_to(model, recipe) is model
    out = rlmerge.merge_to_folder(recipe, tmp_path / "out").out
    expected = load(transformers, out, dtype=kind)
    assert {value.dtype for value in model.state_dict().values()} == {kind}
    assert same_bits(state_of(model), state_of(expected))
    assert not same_bits(state_of(model), state_of(load(transformers, GOLDEN / "base", dtype=kind)))


def test_merge_to_a_model_keeps_gradients_off_and_parameters_in_place(transformers):
    model = load(transformers, GOLDEN / "base")
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    rlmerge.merge_to(model, golden_recipe())
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


def test_merge_to_another_model_is_refused(transformers):
    import torch

    with pytest.raises(MismatchError, match="no parameter"):
        rlmerge.merge_to(torch.nn.Linear(3, 3), golden_recipe())
    config = transformers.LlamaConfig.from_pretrained(GOLDEN / "base", vocab_size=161)
    with pytest.raises(MismatchError, match="shape"):
        rlmerge.merge_to(transformers.LlamaForCausalLM(config), golden_recipe())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sharded_output_loads_in_transformers(transformers, tmp_path, dtype):
    import torch

    with small_shards(20_000):
        out = rlmerge.merge_to_folder(golden_recipe(dtype=dtype), tmp_path / "out").out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    arrays = read_words(out)
    assert index["weight_map"].keys() == arrays.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in arrays.values())
    model = load(transformers, out)
    assert str(model.dtype) == f"torch.{dtype}"
    assert same_bits(state_of(model), read_values_as_fp32(out))
    whole = rlmerge.merge_to_folder(golden_recipe(dtype=dtype), tmp_path / "whole").out
    assert same_bits(read_values(whole), read_values(out))
    with safe_open(files[0], "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def read_values_as_fp32(folder):
    return {name: value.astype(np.float32) for name, value in read_values(folder).items()}


# -- verify ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(recipe, tmp_path):
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
    with small_blocks(8, 16), small_shards(100):
        return rlmerge.merge_to_folder(recipe, tmp_path / "out").out


def test_verify_accepts_what_was_written_and_moved(finished, tmp_path):
    found = rlmerge.verify(finished)
    size = sum(path.stat().st_size for path in finished.glob("*.safetensors"))
    assert (found["tensors"], found["bytes"]) == (4, size)
    shutil.copytree(finished, tmp_path / "elsewhere")
    assert rlmerge.verify(tmp_path / "elsewhere") == found
    assert rlmerge.verify(str(finished)) == found


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_verify_sees_every_flipped_byte_of_the_weights(finished):
    for path in sorted(finished.glob("*.safetensors")):
        data = path.read_bytes()
        for place in range(0, len(data), 1 if len(data) < 600 else 7):
            flip(path, place)
            with pytest.raises(OutputError, match=path.name):
                rlmerge.verify(finished)
            path.write_bytes(data)
    rlmerge.verify(finished)


def test_verify_names_the_tensor_and_the_coordinates(finished):
    path = next(path for path in finished.glob("*.safetensors") if b"c.weight" in path.read_bytes())
    flip(path, -1)
    with pytest.raises(OutputError, match=r"tensor '.*', coordinates \d+ to \d+, was changed"):
        rlmerge.verify(finished)


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors.index.json"])
@pytest.mark.parametrize("change", ["missing", "changed", "folder"])
def test_verify_sees_small_files(finished, name, change):
    path = finished / name
    data = path.read_bytes()
    path.unlink()
    if change == "changed":
        path.write_bytes(data + b" ")
    elif change == "folder":
        path.mkdir()
    with pytest.raises(OutputError, match=name):
        rlmerge.verify(finished)


@pytest.mark.parametrize("change", ["missing", "truncated", "longer", "swapped", "no weights"])
def test_verify_sees_weight_files(finished, change):
    files = sorted(finished.glob("*.safetensors"))
    if change == "missing":
        files[1].unlink()
    elif change == "truncated":
        files[1].write_bytes(files[1].read_bytes()[:-1])
    elif change == "longer":
        files[1].write_bytes(files[1].read_bytes() + b"\0")
    elif change == "swapped":
        first, second = files[0].read_bytes(), files[1].read_bytes()
        files[0].write_bytes(second)
        files[1].write_bytes(first)
    else:
        for file in files:
            file.unlink()
    with pytest.raises(OutputError, match=files[1].name):
        rlmerge.verify(finished)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00009-of-00009.safetensors"])
def test_verify_sees_weights_that_were_added(finished, name):
    """Loaders take model.safetensors before an index: a file too many is a change."""
    write_model(finished / "x", {"w": np.zeros(3, np.float32)})
    (finished / "x" / "model.safetensors").rename(finished / name)
    (finished / "x").rmdir()
    with pytest.raises(OutputError, match=name):
        rlmerge.verify(finished)


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"weights": 1}'])
def test_verify_without_provenance(finished, text):
    if text is None:
        (finished / "rlmerge.json").unlink()
    else:
        (finished / "rlmerge.json").write_text(text)
    with pytest.raises(OutputError):
        rlmerge.verify(finished)


def test_verify_of_nothing(tmp_path):
    with pytest.raises(OutputError, match="there is no such folder"):
        rlmerge.verify(tmp_path / "nothing")
    (tmp_path / "out.unfinished").mkdir()
    with pytest.raises(OutputError, match="unfinished"):
        rlmerge.verify(tmp_path / "out")


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_other_tokenizers_are_refused_unless_accepted(tmp_path):
    base = {"w": np.ones((3, 3), np.float32)}
    write_all(tmp_path, base, {"a": base})
    for name, word in (("base", "x"), ("a", "y")):
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": word}))
    recipe = make_recipe(tmp_path, "ram", ["a"])
    with pytest.raises(MismatchError, match="--accept-tokenizers"):
        rlmerge.merge_to_folder(recipe, tmp_path / "out")
    outcome = rlmerge.merge_to_folder(recipe, tmp_path / "out", accept_tokenizers=True)
    assert len(outcome.notes) == 1  # and none on a template that is lost
    with pytest.raises(MismatchError, match="--accept-tokenizers"):
        next(rlmerge.merge(recipe, kernels="numpy"))
    merged = dict(rlmerge.merge(recipe, kernels="numpy", accept_tokenizers=True))
    assert merged["w"].tobytes() == base["w"].tobytes()


def test_a_chat_template_that_would_be_lost_is_said_to(tmp_path):
    """As TRL saves an expert: with a pad token and a template that the base lacks. Messages say how to keep them."""
    base = {"model.embed_tokens.weight": np.ones((3, 3), np.float32)}
    write_all(tmp_path, base, {"a": base})
    words = {"model": {"type": "BPE", "vocab": {"x": 0, "y": 1, "</s>": 2}, "merges": []}}
    for name, config in (("base", {}), ("a", {"pad_token": "</s>", "chat_template": "{{ x }}"})):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(words))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": 3}))
    with pytest.raises(MismatchError) as caught:
        rlmerge.check(make_recipe(tmp_path, "ram", ["a"]))
    message = str(caught.value)
    assert "Their tokens are the same" in message
    assert "may mean different" not in message
    assert "add --accept-tokenizers: the output then has the tokenizer of base, and no chat template." in message
    (note,) = [text for text in rlmerge.check(make_recipe(tmp_path, "ram", ["a"]), accept_tokenizers=True).notes
               if text.startswith("the output has the tokenizer of base, and no chat template.")]  # fmt: skip
    for said in ("`tokenizer_source: MODEL`", "`chat_template: auto`"):  # and both do what the note says of them
        assert said in note
    kept = [
        make_recipe(tmp_path, "ram", ["a"], tokenizer_source="a"),
        make_recipe(tmp_path, "ram", ["a"], chat_template="auto"),
    ]
    for number, recipe in enumerate(kept):
        out = rlmerge.merge_to_folder(recipe, tmp_path / f"out{number}", accept_tokenizers=number == 1).out
        held = json.loads((out / "tokenizer_config.json").read_text())
        assert held["chat_template"] == "{{ x }}"
        assert held.get("pad_token") == ("</s>" if number == 0 else None)
