"""Slices and modules: what is made of which layers, config.json, Fishers, adapters and packs, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.dialect.models import config, shapes
from tests.methods.small_models import merge_values, read_values

import rlmerge
from rlmerge.checkpoint.restack import Stack, restack_config
from rlmerge.errors import MismatchError, RecipeError
from rlmerge.preflight import explain


def model(seed: int, layers: int = 4, near: dict | None = None, share: float = 1.0):
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(layers).items()}
    if near is None:
        return made
    return {
        name: np.where(rng.random(value.shape) < share, value + 0.1 * made[name], value).astype(np.float32)
        for name, value in near.items()
    }


@pytest.fixture
def home(tmp_path):
    base = model(0)
    write_model(tmp_path / "base", base, config(4))
    for seed, name in enumerate(("one", "two"), 1):
        write_model(tmp_path / name, model(seed, near=base, share=0.6), config(4))
        sensitivity = {key: np.abs(value) for key, value in model(seed + 10).items()}
        write_tensors(tmp_path / f"fisher-{name}" / "fisher.safetensors", sensitivity)
    write_model(tmp_path / "deep", model(7, 12), config(12))
    return tmp_path


def source(model: str, first: int, last: int, **more):
    return {"model": model, "layer_range": [first, last], **more}


def recipe(home, **data) -> rlmerge.Recipe:
    return rlmerge.parse_recipe(yaml.safe_dump(data), "r.yml", home)


def fails(home, kind=RecipeError, **data) -> str:
    with pytest.raises(kind) as caught:
        rlmerge.check(recipe(home, **data))
    return str(caught.value)


def slices(*pieces, **more):
    return {"slices": [{"sources": list(piece)} for piece in pieces], **more}


# -- the same as without slices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sar", "ties", "dare_ties", "ramplus", "iso_c", "fisher", "model_stock", "dots"])
def test_slices_of_all_layers_are_the_whole_model(home, method):
    """Also where a method measures the whole model, draws at random, or reads Fishers: bit for bit."""
    per_model = {spec.name: 0.8 for spec in rlmerge.get_method(method).parameters if spec.per_model}
    entries = [{"model": name, "fisher": f"fisher-{name}", "parameters": dict(per_model)} for name in ("one", "two")]
    whole = merge_values(recipe(home, merge_method=method, base_model="base", models=entries))
    pieces = [
        {"sources": [source("base", *layers), *({**entry, "layer_range": list(layers)} for entry in entries)]}
        for layers in ((0, 1), (1, 3), (3, 4))
    ]
    cut = merge_values(recipe(home, merge_method=method, base_model="base", slices=pieces))
    assert cut.keys() == whole.keys()
    for name, value in whole.items():
        assert np.array_equal(cut[name], value), name


@pytest.mark.parametrize("modules", [["default"], ["model", "lm_head"], ["text_decoder"], ["model.layers", "default"]])
def test_modules_of_all_tensors_are_the_whole_model(home, modules):
    entries = [{"model": "one", "parameters": {"weight": 1}}, {"model": "two", "parameters": {"weight": 0.5}}]
    data = {"merge_method": "task_arithmetic", "base_model": "base"}
    whole = merge_values(recipe(home, **data, models=entries))
    cut = merge_values(recipe(home, **data, modules={name: {"models": entries} for name in modules}))
    assert list(cut) == list(whole)
    assert all(np.array_equal(cut[name], value) for name, value in whole.items())


def test_a_module_has_its_own_models_and_parameters(home):
    data = recipe(
        home, merge_method="task_arithmetic", base_model="base", parameters={"lambda": 2},
        modules={
            "lm_head": {"models": [{"model": "two", "parameters": {"weight": 1}}], "parameters": {"lambda": 1}},
            "default": {"models": [{"model": "base"}, {"model": "one", "parameters": {"weight": 0.5}}]},
        },
    )  # fmt: skip
    made, one, two = merge_values(data), read_values(home / "one"), read_values(home / "two")
    assert np.array_equal(made["lm_head.weight"], two["lm_head.weight"])
    np.testing.assert_allclose(made["model.norm.weight"], one["model.norm.weight"], rtol=1e-6)


def test_same_bytes_with_any_threads_and_after_a_sweep(home):
    pieces = slices(
        [source("base", 0, 2), source("one", 0, 2)],
        [source("two", 1, 4), source("base", 1, 4), source("one", 1, 4)],
        merge_method="ties", base_model="base", parameters={"weight": 1, "density": 0.5},
    )  # fmt: skip
    outs = [rlmerge.merge_to_folder(recipe(home, **pieces), home / f"o{k}", threads=k).out for k in (1, 3)]
    swept = rlmerge.merge_to_folder(
        recipe(home, **pieces), home / "swept", sweep=[{"lambda": 1.0}, {"lambda": 0.5}]
    )  # fmt: skip
    first = (outs[0] / "model.safetensors").read_bytes()
    assert first == (outs[1] / "model.safetensors").read_bytes()
    assert first == (swept.out / "lambda=1.0" / "model.safetensors").read_bytes()
    assert first != (swept.out / "lambda=0.5" / "model.safetensors").read_bytes()
    total = swept.report["total"]
    assert total["support"].keys() == {"one", "two"}
    layers = {name: entry for name, entry in swept.report["tensors"].items() if ".layers." in name}
    assert {"two" in entry["support"] for name, entry in layers.items() if "layers.0." in name} == {False}
    assert total["support"]["two"]["count"] == sum(
        entry["support"].get("two", {"count": 0})["count"] for entry in swept.report["tensors"].values()
    )


# -- config.json ------------------------------------------------------------------------------------------------------


def test_lists_of_layers_follow(home):
    """mergekit 0.1.5 writes the new depth beside the old lists, and transformers refuses the model (Qwen2)."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    extra = {"layer_types": kinds, "mlp_only_layers": [1, 3], "max_window_layers": 4, "eos_token_id": [1, 2, 3, 5]}
    (home / "one" / "config.json").write_text(json.dumps({**config(4), **extra}))
    data = slices([source("one", 0, 3)], [source("one", 1, 4)], merge_method="passthrough")
    out = rlmerge.merge_to_folder(recipe(home, **data), home / "out").out
    found = json.loads((out / "config.json").read_text())
    assert found["num_hidden_layers"] == 6
    assert found["layer_types"] == [kinds[k] for k in (0, 1, 2, 1, 2, 3)]
    assert found["mlp_only_layers"] == [1, 3, 5]
    assert found["max_window_layers"] == 6
    assert found["eos_token_id"] == [1, 2, 3, 5]


@pytest.mark.parametrize("depth", [1, 3])
def test_which_lists_have_an_entry_a_layer(depth):
    """A model of one layer has some, too; tokens, names and means of pixels are never cut or repeated."""
    followed = {"layer_types": "abc", "no_rope_layers": "def", "layers_block_type": "ghi", "block_configs": "jkl"}
    by_length = {"intermediate_size": "mno", "activation_sparsity_pattern": "pqr"}
    others = ("eos_token_id", "suppress_tokens", "architectures", "image_mean", "mrope_section", "bad_words_ids")
    data = {key: list(text[:depth]) for key, text in (followed | by_length).items()}
    data |= {key: [1, 2, 3][:depth] for key in others} | {"num_hidden_layers": depth}
    stack = Stack(depth, tuple((data, layer) for layer in (0, depth - 1, 0)))
    found = json.loads(restack_config(json.dumps(data).encode(), stack))
    for key in followed if depth == 1 else followed | by_length:
        assert found[key] == [data[key][0], data[key][-1], data[key][0]], key
    assert found["num_hidden_layers"] == 3
    assert all(found[key] == data[key] for key in others)


def test_layers_of_a_model_of_one_load(home):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    settings = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(settings).save_pretrained(home / "shallow")
    data = slices(*[[source("shallow", 0, 1)]] * 3, merge_method="passthrough")
    out = rlmerge.merge_to_folder(recipe(home, **data), home / "out").out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert len(loaded.model.layers) == len(loaded.config.layer_types) == 3


def test_a_stacked_model_loads_and_speaks(home):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    kinds = ["full_attention", "sliding_attention"] * 2
    settings = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, layer_types=kinds, sliding_window=4, use_sliding_window=True, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    for name in ("q1", "q2"):
        transformers.Qwen2ForCausalLM(settings).save_pretrained(home / name)
    data = slices([source("q1", 0, 3)], [source("q2", 1, 4)], merge_method="passthrough")
    out = rlmerge.merge_to_folder(recipe(home, **data), home / "qq").out
    loaded, report = transformers.Qwen2ForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.layer_types == [kinds[k] for k in (0, 1, 2, 1, 2, 3)]
    assert loaded(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)


def test_only_the_part_that_speaks_of_the_module_changes():
    raw = json.dumps({
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
        "vision_config": {"num_hidden_layers": 2, "depths": [5, 6]},
    }).encode()  # fmt: skip
    source = json.loads(raw)
    text = json.loads(restack_config(raw, Stack(2, ((source, 1), (source, 0), (source, 1)))))
    assert text["text_config"] == {"num_hidden_layers": 3, "layer_types": ["b", "a", "b"]}
    assert text["vision_config"] == source["vision_config"]
    eyes = json.loads(restack_config(raw, Stack(2, ((source, 1),), "vision_config")))
    assert eyes["vision_config"] == {"num_hidden_layers": 1, "depths": [6]}
    assert eyes["text_config"] == source["text_config"]


# -- adapters and packs -----------------------------------------------------------------------------------------------


def test_packs_give_what_the_models_give(home):
    rlmerge.pack(home / "one", home / "base", home / "packed")
    made = []
    for name in ("one", "packed"):
        pieces = slices(
            [source("base", 2, 4), source(name, 2, 4)], merge_method="task_arithmetic", base_model="base",
            parameters={"weight": 0.5},
        )  # fmt: skip
        made.append(merge_values(recipe(home, **pieces)))
    assert all(np.array_equal(made[0][name], value) for name, value in made[1].items())
    pieces = slices(
        [source("base", 0, 2), source("packed", 2, 4)], merge_method="task_arithmetic", base_model="base",
        parameters={"weight": 0.5},
    )  # fmt: skip
    assert "delta pack changes the layers of its base" in fails(home, **pieces)


def test_an_adapter_is_sliced_with_its_base(home):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 4)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32)
    pairs = {}
    for layer in (1, 2):
        inside = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        pairs |= {f"{inside}.lora_A.weight": a * layer, f"{inside}.lora_B.weight": b}
    write_tensors(home / "lora" / "adapter_model.safetensors", pairs)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (home / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    pieces = slices(
        [source("base", 2, 4), source("lora", 2, 4)], merge_method="task_arithmetic", base_model="base",
        parameters={"weight": 1},
    )  # fmt: skip
    made, base = merge_values(recipe(home, **pieces)), read_values(home / "base")
    name = "model.layers.{}.self_attn.q_proj.weight"
    np.testing.assert_allclose(made[name.format(0)], base[name.format(2)] + 2 * b @ a, rtol=0, atol=1e-5)
    assert np.array_equal(made[name.format(1)], base[name.format(3)])


# -- outside of the layers --------------------------------------------------------------------------------------------


def test_more_sources_in_the_last_slice(home):
    """mergekit 0.1.5 pairs the sources of the last slice with the number of those of the first (its row 19)."""
    data = slices(
        [source("one", 0, 2)], [source("one", 2, 4), source("two", 2, 4)], merge_method="linear",
        parameters={"weight": 1},
    )  # fmt: skip
    made, one, two = merge_values(recipe(home, **data)), read_values(home / "one"), read_values(home / "two")
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_allclose(made[name], (one[name] + two[name]) / 2, rtol=1e-6)
    assert np.array_equal(made["model.embed_tokens.weight"], one["model.embed_tokens.weight"])


def test_a_tied_head_goes_with_its_embedding(home):
    tied = {**config(4), "tie_word_embeddings": True}
    for name in ("one", "two"):
        tensors = read_values(home / name)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        write_model(home / name, tensors, tied)
    data = slices([source("one", 0, 2)], [source("two", 2, 4)], merge_method="passthrough")
    made = merge_values(recipe(home, **data))
    assert np.array_equal(made["lm_head.weight"], made["model.embed_tokens.weight"])


def tie(home, *names, copy=False):
    """Makes models tied: their head is their embedding, stored twice or once."""
    for name in names:
        tensors = read_values(home / name)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        if not copy:
            del tensors["lm_head.weight"]
        write_model(home / name, tensors, {**config(4), "tie_word_embeddings": True})


def ends(made, out, home, first, last):
    """Asserts whose embedding and whose head a merge has, and that config.json says that they are two matrices."""
    embedding, head = (read_values(home / name) for name in (first, last))
    assert np.array_equal(made["model.embed_tokens.weight"], embedding["model.embed_tokens.weight"])
    assert np.array_equal(made["lm_head.weight"], head.get("lm_head.weight", head["model.embed_tokens.weight"]))
    assert np.array_equal(made["model.norm.weight"], head["model.norm.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize(("tied", "notes"), [
    ("one", ["embedding and head are two matrices: config.json says "
             "tie_word_embeddings: false."]),
    ("two", ["lm_head.weight is the embedding of two, which ties the two."]),
])  # fmt: skip
def test_one_end_is_tied_and_the_other_is_not(home, tied, notes, module, copy):
    """The head is that of the last slice, be it an embedding: without one, a loader would draw it at random."""
    tie(home, tied, copy=copy)
    data = slices([source("one", 0, 2)], [source("two", 2, 4)])
    data = {"modules": {"text_decoder": data}} if module else data
    merged = rlmerge.merge_to_folder(recipe(home, merge_method="passthrough", **data), home / "out")
    ends(read_values(merged.out), merged.out, home, "one", "two")
    said = json.loads((merged.out / "rlmerge.json").read_text())["notes"]
    assert said == (notes if not copy or tied == "one" else [])


def test_a_tied_base_of_the_last_slice_has_a_head(home):
    """Its delta to an untied expert's head is that to its embedding."""
    tie(home, "two")
    data = slices([source("base", 0, 2), source("one", 0, 2)], [source("two", 2, 4), source("deep", 2, 4)])
    data["slices"][1]["base_model"] = "two"
    data |= {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 0.5}}
    made, two, deep = merge_values(recipe(home, **data)), read_values(home / "two"), read_values(home / "deep")
    expected = (two["model.embed_tokens.weight"] + deep["lm_head.weight"]) / 2
    np.testing.assert_allclose(made["lm_head.weight"], expected, rtol=1e-5, atol=1e-6)


def test_a_lender_that_ties_other_than_the_slices(home):
    """The config of `base_model` is made to say what the weights are."""
    tie(home, "one", "two")
    data = slices([source("one", 0, 2)], [source("two", 2, 4)], merge_method="passthrough", base_model="base")
    out = rlmerge.merge_to_folder(recipe(home, **data), home / "out").out
    assert "lm_head.weight" not in read_values(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    tie(home, "base")
    data = slices([source("deep", 0, 2)], [source("deep", 2, 4)], merge_method="passthrough", base_model="base")
    out = rlmerge.merge_to_folder(recipe(home, **data), home / "other").out
    ends(read_values(out), out, home, "deep", "deep")


def test_a_last_slice_without_a_head(home):
    tensors = read_values(home / "two")
    del tensors["lm_head.weight"]
    write_model(home / "two", tensors, config(4))
    data = slices([source("one", 0, 2)], [source("two", 2, 4)], merge_method="passthrough")
    assert "Take the last slice from a model with a head" in fails(home, MismatchError, **data)


def test_names_that_no_pattern_knows(home):
    for name in ("one", "two"):
        write_model(home / name, {**read_values(home / name), "model.strange": np.ones(3)}, config(4))
    data = slices([source("one", 0, 2)], [source("two", 2, 4)], merge_method="passthrough")
    message = fails(home, **data)
    assert "'model.strange'" in message
    assert "`pre_weights:` or `post_weights:`" in message
    for key, scale in (("pre_weights", 1), ("post_weights", 2)):
        write_model(home / "two", {**read_values(home / "two"), "model.strange": np.full(3, 2.0)}, config(4))
        made = merge_values(recipe(home, **data, **{key: "strange"}))
        assert (made["model.strange"] == scale).all()


def test_explain_shows_where_tensors_come_from(home):
    data = slices([source("one", 0, 3)], [source("deep", 5, 6)], merge_method="passthrough")
    first, second = explain(recipe(home, **data))
    assert first["layers"] == {"one": [0, 3]}
    assert first["before"] == ["model.embed_tokens.weight"]
    assert second["layers"] == {"deep": [5, 6]}
    assert second["after"] == ["model.norm.weight", "lm_head.weight"]


# -- refused ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "both": ({"models": [{"model": "one"}], "slices": []}, "either 'models' or 'slices'"),
    "no list": ({"slices": {"sources": []}}, "expected a list of slices"),
    "no sources": ({"slices": [{"models": []}]}, "a slice is a mapping with 'sources'"),
    "no layers": ({"slices": [{"sources": [{"model": "one"}]}]}, "[0, 4]', found nothing"),
    "empty": (slices([source("one", 3, 3)]), "[3, 3] holds no layer"),
    "backwards": (slices([source("one", 3, 1)]), "holds no layer"),
    "lengths": (slices([source("one", 0, 2), source("two", 0, 3)]), "the same number of layers each"),
    "too deep": (slices([source("one", 2, 6)]), "has layers 0 to 3, so layer_range: [2, 6] ends beyond them"),
    "unknown key": ({"slices": [{"sources": [source("one", 0, 2)], "parametrs": {}}]}, "Did you mean 'parameters'"),
    "layers of models": ({"models": [source("one", 0, 2)]}, "layers are chosen under 'slices: - sources:'"),
    "modules": ({"modules": {"model": {"models": [{"model": "one"}]}}}, "tensor 'lm_head.weight'"),
    "no module": (
        {"modules": {"eyes": {"models": [{"model": "one"}]}, "default": {"models": [{"model": "one"}]}}},
        "'eyes' is the beginning of no tensor's name. They begin with: model, lm_head",
    ),
    "two ways": ({"modules": {"default": {"models": [], "slices": []}}}, "either 'slices' or 'models'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(home, case):
    data, wanted = MISTAKES[case]
    many = any(len(piece.get("sources", ())) > 1 for piece in data.get("slices", ()) if isinstance(piece, dict))
    message = fails(home, merge_method="linear" if many else "passthrough", **data)
    assert wanted in message
    assert message.startswith("r.yml")


def test_a_base_of_which_layers_nobody_knows(home):
    data = slices([source("one", 0, 2), source("two", 2, 4)], merge_method="ties", base_model="base")
    assert "list it among them" in fails(home, **data, parameters={"weight": 1})


def test_methods_of_the_whole_model_want_the_same_models_everywhere(home):
    data = slices(
        [source("base", 0, 2), source("one", 0, 2)], [source("base", 2, 4), source("two", 2, 4)],
        merge_method="sar", base_model="base",
    )  # fmt: skip
    for piece in data["slices"]:
        piece["sources"][1]["fisher"] = f"fisher-{piece['sources'][1]['model']}"
    assert "list the same models in every slice" in fails(home, **data)


def test_one_key_is_one_model(home):
    data = slices(
        [source("one", 0, 2, name="x")], [source("two", 2, 4, name="x")], merge_method="passthrough"
    )  # fmt: skip
    assert "'x' is another model" in fails(home, **data)


def test_two_stacks_of_layers(home):
    tensors = {**read_values(home / "one"), "eyes.blocks.0.weight": np.ones((2, 2))}
    write_model(home / "one", tensors, config(4))
    message = fails(home, MismatchError, merge_method="passthrough", **slices([source("one", 0, 2)]))
    assert "more than one stack of layers: model.layers.* (4), eyes.blocks.* (1)" in message
    modules = {"eyes": {"models": [{"model": "one"}]}, "default": slices([source("one", 0, 2)])}
    made = merge_values(recipe(home, merge_method="passthrough", modules=modules))
    assert "eyes.blocks.0.weight" in made
    assert "model.layers.2.mlp.up_proj.weight" not in made
