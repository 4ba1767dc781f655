"""What goes in: mixed dtypes, carried and excluded tensors, adapters, numbers that are none."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from tests.checkpoint.checkpoint_files import write_model, write_tensors
from tests.methods.small_models import (
    fitting,
    make_recipe,
    merge_values,
    needed_weights,
    read_values,
    read_words,
    representable,
    small_blocks,
    write_all,
)  # fmt: skip

import rlmerge
from rlmerge.errors import NonFiniteError

SAR = {"sensitivity": "delta2", "density": 1.0}


def rng_values(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def merge(recipe, out, **options):
    return rlmerge.merge_to_folder(recipe, out, kernels="numpy", **options)


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("kernels", ["numba", "numpy"])
def test_a_narrow_expert_that_is_the_cast_base_has_no_support(tmp_path, dtype, kernels):
    """fp32 base + bf16 expert: rounding would pass for training. θi − cast(θ0) is zero, and the base comes back."""
    torch = pytest.importorskip("torch")
    base = rng_values(0, 33, 31) * 3
    kind = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    cast = torch.from_numpy(base).to(kind).to(torch.float32).numpy()
    changed = cast.copy()
    changed[3, 5:9] = 0.5
    write_model(tmp_path / "base", {"w": base})
    write_model(tmp_path / "a", {"w": cast}, dtype=dtype)
    write_model(tmp_path / "b", {"w": changed}, dtype=dtype)
    recipe = make_recipe(tmp_path, "sar", ["a", "b"], SAR)
    outcome = rlmerge.merge_to_folder(recipe, tmp_path / "out", kernels=kernels)
    support = outcome.report["total"]["support"]
    assert (support["a"]["count"], support["b"]["count"]) == (0, np.count_nonzero(cast != changed))
    found = read_words(tmp_path / "out")["w"]
    assert found[0] == "F32"
    same = cast == changed
    assert (found[1] == base)[same].all()


def test_a_wide_expert_of_a_narrow_base(tmp_path):
    """bf16 base + fp32 expert: the delta is exact, the output fp32."""
    base = representable(rng_values(0, 20, 20), "BF16")
    expert = (base + rng_values(1, 20, 20) * 1e-4).astype(np.float32)
    write_model(tmp_path / "base", {"w": base}, dtype="BF16")
    write_model(tmp_path / "a", {"w": expert})
    outcome = merge(make_recipe(tmp_path, "sar", ["a"], SAR), tmp_path / "out")
    kind, values = read_words(tmp_path / "out")["w"]
    assert (kind, values.tobytes()) == ("F32", expert.tobytes())
    assert outcome.report["total"]["support"]["a"]["count"] == np.count_nonzero(base != expert)


def test_a_narrow_and_a_wide_expert_together(tmp_path):
    """One reference an expert: that of the bf16 expert is the cast base, that of the fp32 expert the base."""
    base = rng_values(0, 9, 9)
    narrow = representable(base, "BF16")
    torch = pytest.importorskip("torch")
    narrow = torch.from_numpy(base).to(torch.bfloat16).to(torch.float32).numpy()
    wide = base.copy()
    narrow[0], wide[1] = 2.0, 3.0
    write_model(tmp_path / "base", {"w": base})
    write_model(tmp_path / "narrow", {"w": narrow}, dtype="BF16")
    write_model(tmp_path / "wide", {"w": wide})
    recipe = make_recipe(
        tmp_path, "task_arithmetic", ["narrow", "wide"], {}, needed_weights("task_arithmetic", ["narrow", "wide"])
    )
    found = merge_values(recipe)["w"]
    expected = base.copy()
    cast = torch.from_numpy(base).to(torch.bfloat16).to(torch.float32).numpy()
    expected[0] += 2.0 - cast[0]
    expected[1] = 3.0
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert (found[2:] == base[2:]).all()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(("BF16", "BF16"), "BF16"), (("F16", "F16"), "F16"), (("BF16", "F16"), "F32"), (("F32", "BF16"), "F32")],
)
def test_the_dtype_of_the_output(tmp_path, stored, expected):
    for name, dtype in zip(("base", "a"), stored):
        write_model(tmp_path / name, {"w": representable(rng_values(0, 4, 4), "BF16")}, dtype=dtype)
    merge(make_recipe(tmp_path, "ram", ["a"]), tmp_path / "out")
    assert read_words(tmp_path / "out")["w"][0] == expected
    merge(make_recipe(tmp_path, "ram", ["a"], dtype="float32", out_dtype="float16"), tmp_path / "half")
    assert read_words(tmp_path / "half")["w"][0] == "F16"


def test_survival_counts_what_the_cast_leaves(tmp_path):
    """bf16 output of small updates: 1 + 2⁻⁷ survives, 1 + 2⁻¹⁰ returns to the base."""
    write_model(tmp_path / "base", {"w": np.ones((2, 2), np.float32)}, dtype="BF16")
    write_model(tmp_path / "a", {"w": np.array([[1, 1 + 2**-7], [1 + 2**-10, 1 + 2**-10]], np.float32)})
    outcome = merge(make_recipe(tmp_path, "ram", ["a"], {"epsilon": 0}, dtype="bfloat16"), tmp_path / "out")
    assert outcome.report["total"]["survival"] == {"count": 1, "share": 1 / 3}


# -- tensors that are not merged -------------------------------------------------------------------------------------


def special(seed):
    return {
        "w": rng_values(seed, 4, 6),
        "inv_freq": (np.random.default_rng(7).standard_normal(5), "F64"),
        "position_ids": (np.arange(6), "I64"),
        "mask": (np.array([True, False, True]), "BOOL"),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(2.5 + seed),
    }


@pytest.mark.parametrize("method", rlmerge.method_names())
def test_fp64_and_integers_are_carried(tmp_path, method):
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, special(seed))
    parameters = {"sensitivity": "delta2"} if method == "sar" else {}
    keys = fitting(method, ["a", "b"])
    recipe = make_recipe(tmp_path, method, keys, parameters, needed_weights(method, keys))
    outcome = merge(recipe, tmp_path / "out")
    base, found = read_words(tmp_path / "base"), read_words(tmp_path / "out")
    assert found.keys() == base.keys()
    for name in ("inv_freq", "position_ids", "mask", "empty"):
        assert found[name][0] == base[name][0]
        assert found[name][1].tobytes() == base[name][1].tobytes()
    assert "carried" in outcome.report["tensors"]["position_ids"]
    assert found["w"][1].tobytes() != base["w"][1].tobytes()
    arrays = merge_values(recipe)
    for name, (_, array) in found.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].tobytes() == array.tobytes()
        assert arrays[name].shape == array.shape


def test_excluded_tensors_are_the_bases(tmp_path):
    base = {"layers.0.w": rng_values(0, 3, 4), "embed.w": rng_values(1, 3, 4)}
    expert = {name: value + 1 for name, value in base.items()}
    write_all(tmp_path, base, {"a": expert})
    for options in ({"exclude": ["embed"]}, {"include": ["layers"]}, {"exclude": "^embed"}):
        found = merge_values(make_recipe(tmp_path, "sar", ["a"], SAR, **options))
        assert found["embed.w"].tobytes() == base["embed.w"].tobytes()
        assert found["layers.0.w"].tobytes() == expert["layers.0.w"].tobytes()


def test_a_tied_head(tmp_path):
    """The base is tied; an expert that saved the equal head merges, one with another head is refused."""
    config = {"tie_word_embeddings": True}
    embed, w = rng_values(0, 8, 4), rng_values(1, 4, 4)
    write_model(tmp_path / "base", {"model.embed_tokens.weight": embed, "w": w}, config)
    write_model(tmp_path / "a", {"model.embed_tokens.weight": embed + 1, "lm_head.weight": embed + 1, "w": w}, config)
    found = merge_values(make_recipe(tmp_path, "sar", ["a"], SAR))
    assert sorted(found) == ["model.embed_tokens.weight", "w"]
    assert found["model.embed_tokens.weight"].tobytes() == (embed + 1).tobytes()
    write_model(tmp_path / "a", {"model.embed_tokens.weight": embed + 1, "lm_head.weight": embed + 2, "w": w}, config)
    with pytest.raises(rlmerge.RlmergeError, match="lm_head"):
        merge_values(make_recipe(tmp_path, "sar", ["a"], SAR))


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sar", "task_arithmetic", "ram"])
def test_a_lora_expert_is_what_peft_merges(tmp_path, method):
    """Against merge_and_unload in fp32: its product is in fp32, ours in fp64."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=False, **size))
        model.save_pretrained(tmp_path / "base")
        lora = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], use_rslora=True)
        adapted = peft.get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path / "a")
        expected = {name: value.numpy() for name, value in adapted.merge_and_unload().state_dict().items()}
    parameters = {**SAR} if method == "sar" else {"epsilon": 0} if method == "ram" else {}
    recipe = make_recipe(tmp_path, method, ["a"], parameters, needed_weights(method, ["a"]))
    for block in (2**16, 40):
        with small_blocks(block):
            found = merge_values(recipe)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-7, err_msg=name)
    changed = sum(value.size for name, value in expected.items() if "q_proj" in name or "down_proj" in name)
    outcome = merge(recipe, tmp_path / "out")
    assert outcome.report["total"]["support"]["a"]["count"] == changed


# -- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["base", "e1"])
def test_a_number_that_is_none_is_an_error_naming_file_and_tensor(tmp_path, dtype, value, where):
    base = {"fine": representable(rng_values(0, 5, 5), dtype), "broken": representable(rng_values(1, 5, 5), dtype)}
    write_all(tmp_path, base, {"e0": base, "e1": base}, dtype=dtype)
    hurt = base | {"broken": base["broken"].copy()}
    hurt["broken"][3, 2] = value
    write_model(tmp_path / where, hurt, dtype=dtype)
    recipe = make_recipe(tmp_path, "ram", ["e0", "e1"])
    for call in (lambda: merge(recipe, tmp_path / "out"), lambda: merge_values(recipe)):
        with pytest.raises(NonFiniteError, match=r"'broken' holds -?(nan|inf) at coordinate 17") as caught:
            call()
        assert str(tmp_path / where / "model.safetensors") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_number_that_is_none_beyond_the_sample_is_found_by_the_merge(tmp_path, monkeypatch):
    monkeypatch.setattr("rlmerge.api.take_sample", lambda plan, kernels: {})
    base = {"w": rng_values(0, 50, 50)}
    hurt = {"w": base["w"].copy()}
    hurt["w"][40, 40] = np.nan
    write_all(tmp_path, base, {"a": hurt, "b": base})
    for method in rlmerge.method_names():
        parameters = {"sensitivity": "delta2"} if method == "sar" else {}
        keys = fitting(method, ["a", "b"])
        recipe = make_recipe(tmp_path, method, keys, parameters, needed_weights(method, keys))
        with small_blocks(100, 200), pytest.raises(NonFiniteError, match="coordinate 2040"):
            merge(recipe, tmp_path / method)


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
@pytest.mark.parametrize("method", rlmerge.method_names())
def test_allowed_if_the_result_stays_finite(tmp_path, method, kernels):
    """An expert of weight 0 is removed, whatever it holds; a carried tensor is nobody's business."""
    base = {"w": rng_values(0, 4, 4)}
    broken = {"w": np.full((4, 4), np.nan, np.float32)}
    write_all(tmp_path, base, {"a": {"w": base["w"] + 1}, "b": broken})
    parameters = {"sensitivity": "delta2", "density": 1.0} if method == "sar" else {}
    if "weight" not in {spec.name for spec in rlmerge.get_method(method).parameters}:
        pytest.skip("has no weights")
    fitting(method, ["a", "b"])
    own = {"a": {"weight": 1.0}, "b": {"weight": 0.0}}
    recipe = make_recipe(tmp_path, method, ["a", "b"], parameters, own, allow_nonfinite=True)
    assert np.isfinite(merge_values(recipe, kernels=kernels)["w"]).all()


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
@pytest.mark.parametrize("method", rlmerge.method_names())
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_allowed_but_in_the_result_it_is_an_error(tmp_path, method, kernels, value):
    """Never swallowed: an expert's NaN that takes part comes out as an error, with both kernels."""
    base = {"w": rng_values(0, 4, 4)}
    hurt = {"w": base["w"] + 1}
    hurt["w"][1, 1] = value
    write_all(tmp_path, base, {"a": hurt, "b": base})
    parameters = {"sensitivity": "delta2", "density": 1.0} if method == "sar" else {}
    keys = fitting(method, ["a", "b"])
    recipe = make_recipe(tmp_path, method, keys, parameters, needed_weights(method, keys), allow_nonfinite=True)
    with pytest.raises(NonFiniteError, match="the merged tensor 'w' holds"):
        merge_values(recipe, kernels=kernels)


def test_equal_infinities_are_no_change(tmp_path):
    """A mask of -inf that nobody trained: allowed, it is the base's; in the result it is an error, which says so."""
    base = {"w": rng_values(0, 2, 2), "mask": np.array([0, -np.inf], np.float32)}
    write_all(tmp_path, base, {"a": base})
    recipe = make_recipe(tmp_path, "ram", ["a"], allow_nonfinite=True)
    with pytest.raises(NonFiniteError, match="mask"):
        merge_values(recipe)
    found = merge_values(make_recipe(tmp_path, "ram", ["a"], allow_nonfinite=True, exclude="mask"))
    assert found["mask"].tobytes() == base["mask"].tobytes()


# -- Fishers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "message"), [(0.0, "zero everywhere"), (-1.0, "negative"), (np.nan, "holds nan")])
def test_a_fisher_that_cannot_arbitrate(tmp_path, monkeypatch, value, message):
    base = {"w": rng_values(0, 4, 4)}
    fisher = {"w": np.full((4, 4), value, np.float32)}
    good = {"w": np.ones((4, 4), np.float32)}
    write_all(tmp_path, base, {"a": base, "b": {"w": base["w"] + 1}}, {"a": good, "b": fisher})
    recipe = make_recipe(tmp_path, "sar", ["a", "b"], fishers=True)
    with pytest.raises(rlmerge.RlmergeError, match=message):
        merge(recipe, tmp_path / "one")
    monkeypatch.setattr(
        "rlmerge.api.take_sample", lambda plan, kernels: {}
    )  # the merge itself says it too, and by name
    with pytest.raises(rlmerge.RlmergeError, match=message) as caught:
        merge(recipe, tmp_path / "two")
    assert "b" in str(caught.value)


def test_a_bf16_fisher_counts_as_its_values(tmp_path):
    base = {"w": np.zeros((2, 2), np.float32)}
    a, b = {"w": np.ones((2, 2), np.float32)}, {"w": -np.ones((2, 2), np.float32)}
    high, low = np.array([[4, 4], [1, 1]], np.float32), np.array([[1, 1], [4, 4]], np.float32)
    write_all(tmp_path, base, {"a": a, "b": b})
    for dtype in ("F32", "BF16"):
        for key, values in (("a", high), ("b", low)):
            write_tensors(tmp_path / f"fisher_{key}" / "fisher.safetensors", {"w": values}, dtype)
        found = merge_values(make_recipe(tmp_path, "sar", ["a", "b"], {"density": 1.0}, fishers=True))
        assert found["w"].tolist() == [[1, 1], [-1, -1]]


def test_config_is_optional_and_kept(tmp_path):
    base = {"w": representable(rng_values(0, 4, 4), "BF16")}
    write_all(tmp_path, base, {"a": base}, dtype="BF16")
    recipe = make_recipe(tmp_path, "ram", ["a"], dtype="float32")
    assert not (merge(recipe, tmp_path / "none").out / "config.json").exists()
    config = {"model_type": "x", "torch_dtype": "bfloat16", "odd": [1, {"a": None}]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    found = json.loads((merge(recipe, tmp_path / "some").out / "config.json").read_text())
    assert found == config | {"torch_dtype": "float32"}
    assert read_values(tmp_path / "some").keys() == base.keys()
