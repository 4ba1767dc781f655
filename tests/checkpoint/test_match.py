"""Every tensor of the base gets one source per expert, or is carried for a stated reason, or the models do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import random, write_model, write_tensors

from rlmerge.checkpoint.folder import Checkpoint, open_checkpoint
from rlmerge.checkpoint.match import Matched, Source, match
from rlmerge.errors import AdapterError, MismatchError, RecipeError

EMBED, HEAD = random(0, 12, 4), random(9, 12, 4)
MODEL: dict[str, Any] = {
    "model.embed_tokens.weight": EMBED,
    "model.layers.0.q_proj.weight": random(1, 4, 4),
    "model.layers.0.k_proj.weight": random(2, 4, 4),
    "model.norm.weight": np.ones(4, np.float32),
}
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(name: str, tensors: dict[str, Any], **config: Any) -> Checkpoint:
        return open_checkpoint(write_model(tmp_path / name, tensors, config), name)

    return make


def matched(base: Checkpoint, *experts: Checkpoint, on_mismatch: Any = "error", **patterns: list[str]) -> Matched:
    result = match(base, list(experts), patterns.get("include", []), patterns.get("exclude", []), on_mismatch)
    assert [*result.merged, *result.carried] == sorted(
        base.tensors, key=lambda name: (name in result.carried, list(base.tensors).index(name))
    )
    assert all(len(sources) == len(experts) for sources in result.merged.values())
    return result


def refused(base: Checkpoint, *experts: Checkpoint, words: tuple[str, ...]) -> None:
    with pytest.raises(MismatchError) as caught:
        matched(base, *experts)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_golden_models() -> None:
    base, *experts = (open_checkpoint(GOLDEN / n) for n in ("base", "expert0", "expert1", "expert2"))
    result = matched(base, *experts)
    assert list(result.merged) == list(base.tensors)
    assert result.carried == {}
    assert result.notes == []
    for name, sources in result.merged.items():
        assert [s.info for s in sources] == [e.tensors[name] for e in experts]
        assert {s.kind for s in sources} == {"tensor"}


def test_types_may_differ_and_other_types_are_carried(make: Any) -> None:
    more = {"n": (np.arange(3), "I64"), "d": (np.ones(2), "F64"), "empty": random(0, 0, 4), "m": (np.ones(2), "BOOL")}
    base = make("base", MODEL | more)
    expert = make("e", {k: (v, "BF16") for k, v in MODEL.items()} | {"n": (np.arange(5), "I64")})
    result = matched(base, expert)
    assert list(result.merged) == list(MODEL)
    assert result.carried == {"n": "dtype", "d": "dtype", "empty": "empty", "m": "dtype"}


def test_a_type_that_is_not_merged_on_one_side_only(make: Any) -> None:
    refused(make("base", MODEL), make("e", MODEL | {"model.norm.weight": (np.ones(4), "F64")}), words=("norm", "F64"))


def test_include_and_exclude(make: Any) -> None:
    base, expert = make("base", MODEL), make("e", MODEL | {"model.norm.weight": np.ones(5)})
    result = matched(base, expert, include=["layers", "embed"], exclude=[r"k_proj\.weight$"])
    assert list(result.merged) == ["model.embed_tokens.weight", "model.layers.0.q_proj.weight"]
    assert set(result.carried.values()) == {"excluded"}
    extra = make("x", MODEL | {"score.weight": random(4, 2, 4)})
    assert list(matched(base, extra, exclude=["score"]).merged) == list(MODEL)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_patterns_that_cannot_be_meant(make: Any, key: str) -> None:
    base, expert = make("base", MODEL), make("e", MODEL)
    for pattern in ("(", "mlp", "*.weight"):
        with pytest.raises(RecipeError, match=key) as caught:
            matched(base, expert, **{key: [pattern]})
        assert repr(pattern) in str(caught.value)
        assert caught.value.place == (key, 0)
        assert "model.embed_tokens.weight" in str(caught.value)


def test_missing_and_extra_tensors(make: Any) -> None:
    less = {k: v for k, v in MODEL.items() if "q_proj" not in k}
    base, less, more = (
        make("base", MODEL),
        make("less", less),
        make("more", MODEL | {"adapter.weight": random(5, 3, 3)}),
    )
    advice = ("exclude:", "on_mismatch: base")
    refused(base, less, words=("q_proj", "[4, 4]", str(base.folder / "model.safetensors"), str(less.folder), *advice))
    refused(base, more, words=("adapter.weight", "[3, 3]", str(more.folder / "model.safetensors"), str(base.folder)))
    result = matched(base, less, more, on_mismatch="base")
    assert result.carried == {"model.layers.0.q_proj.weight": "mismatch"}
    assert "q_proj" in result.notes[0]
    assert "adapter.weight" in result.notes[0]


def test_shapes(make: Any) -> None:
    base = make("base", MODEL)
    expert = make("e", MODEL | {"model.layers.0.q_proj.weight": random(1, 2, 4)})
    refused(base, expert, words=("q_proj", "[4, 4]", "[2, 4]", str(base.folder), str(expert.folder)))
    with pytest.raises(MismatchError) as caught:
        matched(base, make("v", MODEL | {"model.embed_tokens.weight": random(1, 14, 4)}))
    assert "vocabularies differ: 12 and 14" in str(caught.value)
    with pytest.raises(MismatchError) as caught:
        matched(base, expert)
    assert "vocabular" not in str(caught.value)


def test_many_problems_are_counted(make: Any) -> None:
    base = make("base", {f"w{i}": random(i, 2) for i in range(30)})
    refused(base, make("e", {f"w{i}": random(i, 3) for i in range(30)}), words=("30 tensors", "w0", "and 25 more"))


def test_tied_base_and_expert_with_a_head(make: Any) -> None:
    base = make("base", MODEL, tie_word_embeddings=True)
    result = matched(base, make("e", MODEL | {"lm_head.weight": EMBED}))
    assert list(result.merged) == list(MODEL)
    assert any("lm_head.weight" in note and "tied" in note for note in result.notes)
    other = EMBED.copy()
    other[-1, -1] += 1
    different = make("d", MODEL | {"lm_head.weight": other})
    refused(base, different, words=("tied base", "lm_head.weight", "differs from", "model.embed_tokens.weight"))
    assert list(matched(base, different, on_mismatch="base").merged) == list(MODEL)
    assert list(matched(base, different, exclude=["lm_head"]).merged) == list(MODEL)


def test_base_with_a_saved_head_and_tied_expert(make: Any) -> None:
    base = make("base", MODEL | {"lm_head.weight": EMBED}, tie_word_embeddings=True)
    trained = MODEL | {"model.embed_tokens.weight": EMBED * 2}
    expert, whole = make("e", trained), make("w", trained | {"lm_head.weight": EMBED * 2})
    result = matched(base, expert, whole)
    assert result.merged["lm_head.weight"] == (
        Source("tensor", expert.tensors["model.embed_tokens.weight"]),
        Source("tensor", whole.tensors["lm_head.weight"]),
    )
    untied = make("u", MODEL | {"lm_head.weight": HEAD})
    refused(untied, expert, words=("lm_head.weight", "missing", "differs from its model.embed_tokens.weight"))


def test_tied_base_that_stores_both_and_an_expert_that_unties_them(make: Any) -> None:
    """A loader of the merged model would use one of the two, so that the other's training is lost without a word."""
    base = make("base", MODEL | {"lm_head.weight": EMBED}, tie_word_embeddings=True)
    same = make("same", MODEL | {"model.embed_tokens.weight": EMBED * 2, "lm_head.weight": EMBED * 2})
    assert matched(base, same).notes == []
    untied = make("untied", MODEL | {"lm_head.weight": HEAD})
    file = str(untied.folder / "model.safetensors")
    refused(base, same, untied, words=("lm_head.weight", file, "differs from model.embed_tokens.weight", "exclude:"))
    assert matched(base, untied, on_mismatch="base").carried == {"lm_head.weight": "mismatch"}
    both = {"lm_head.weight": "excluded", "model.embed_tokens.weight": "excluded"}
    assert matched(base, untied, exclude=["lm_head"]).carried == both
    free = make("free", MODEL | {"lm_head.weight": EMBED}, tie_word_embeddings=False)
    assert "lm_head.weight" in matched(free, untied).merged


def test_base_that_is_tied_in_name_only(make: Any) -> None:
    """Its two matrices differ, so they are two: both are merged, and it is said."""
    base = make("base", MODEL | {"lm_head.weight": HEAD}, tie_word_embeddings=True)
    result = matched(base, make("e", MODEL | {"lm_head.weight": HEAD * 2}))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= result.merged.keys()
    assert any("different values: both are merged" in note for note in result.notes)


def test_equal_vectors_are_not_tied(make: Any) -> None:
    ones = {"model.norm2.weight": np.ones(4, np.float32)}
    refused(make("base", MODEL), make("e", MODEL | ones), words=("model.norm2.weight",))
    refused(make("b2", MODEL | ones), make("e2", MODEL), words=("model.norm2.weight",))


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("model.layers.", "model.language_layers.", ("'model.language_layers'", "begin with 'model.layers'")),
        ("model.", "model.language_model.", ("begin with 'model.language_model'", "they begin with 'model'")),
        ("", "x.", ("begin with 'x'", "they have nothing before them")),
        ("model.", "", ("names in", "have nothing before them", "they begin with 'model'")),
    ],
)
def test_names_that_begin_otherwise_are_said_to(make: Any, ours: str, theirs: str, said: tuple[str, ...]) -> None:
    """No word of tied weights then, and none of `on_mismatch`, which would make a copy of the base of it."""
    tensors = {**MODEL, "model.lm_head.weight": HEAD}
    expert = make("expert", {
        theirs + name.removeprefix(ours) if name.startswith(ours) else name: value for name, value in tensors.items()
    })  # fmt: skip
    base = make("base", tensors, tie_word_embeddings=False)
    refused(base, expert, words=(*said, "store the model again"))
    with pytest.raises(MismatchError) as caught:
        matched(base, expert)
    assert "tied" not in str(caught.value)
    assert "on_mismatch" not in str(caught.value)
    assert any(said[0] in note for note in matched(base, expert, on_mismatch="base").notes)


def test_other_names_that_end_alike_are_no_renaming(make: Any) -> None:
    """One tensor more and one less is another model, such as a classifier."""
    tensors = {name: value for name, value in MODEL.items() if "norm" not in name}
    base = make("base", {**tensors, "lm_head.weight": HEAD})
    expert = make("expert", {**tensors, "score.weight": HEAD})
    refused(base, expert, words=("lm_head.weight", "on_mismatch: base", "tied expert?"))
    less = make("less", {"score.weight": HEAD, "model.embed_tokens.weight": EMBED})
    with pytest.raises(MismatchError) as caught:
        matched(base, less)
    assert "tied" not in str(caught.value)


def test_buffers(make: Any) -> None:
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": random(3, 2), "h.0.attn.bias": random(3, 1, 1, 4, 4)}
    result = matched(make("base", MODEL), make("e", MODEL | rotary))
    assert list(result.merged) == list(MODEL)
    assert sum("buffer" in note for note in result.notes) == 2
    assert matched(make("b2", MODEL | rotary), make("e2", MODEL)).carried == dict.fromkeys(rotary, "buffer")
    bias = {"h.0.attn.bias": random(3, 4)}
    refused(make("b3", MODEL), make("e3", MODEL | bias), words=("h.0.attn.bias",))


def adapter(tmp_path: Path, tensors: dict[str, Any], **config: Any) -> Checkpoint:
    write_tensors(tmp_path / "lora" / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    return open_checkpoint(tmp_path / "lora", "lora")


def test_adapter_as_expert(make: Any, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.0.q_proj"
    lora = adapter(
        tmp_path,
        {f"{module}.lora_A.weight": random(1, 2, 4), f"{module}.lora_B.weight": random(2, 4, 2),
         "base_model.model.model.norm.weight": np.ones(4)},
    )  # fmt: skip
    base = make("base", MODEL)
    result = matched(base, lora, make("e", MODEL))
    assert {name: sources[0].kind for name, sources in result.merged.items()} == {
        "model.embed_tokens.weight": "base",
        "model.layers.0.q_proj.weight": "low_rank",
        "model.layers.0.k_proj.weight": "base",
        "model.norm.weight": "tensor",
    }
    pair = result.merged["model.layers.0.q_proj.weight"][0].low_rank
    assert pair is not None
    assert (pair.scale, pair.transposed) == (2.0, False)
    left = matched(base, lora, exclude=["q_proj"])
    assert any("q_proj" in note and "left out" in note for note in left.notes)
    with pytest.raises(AdapterError):
        matched(make("b2", {"model.norm.weight": np.ones(4)}), lora)
    with pytest.raises(MismatchError, match="the base is an adapter"):
        match(lora, [], [], [], "error")


def test_adapter_of_a_tied_embedding_changes_both_copies(make: Any, tmp_path: Path) -> None:
    module = "base_model.model.model.embed_tokens.lora_embedding_"
    lora = adapter(tmp_path, {f"{module}A": random(1, 2, 12), f"{module}B": random(2, 4, 2)})
    tied = make("tied", MODEL | {"lm_head.weight": EMBED}, tie_word_embeddings=True)
    result = matched(tied, lora)
    assert result.merged["lm_head.weight"] == result.merged["model.embed_tokens.weight"]
    assert result.merged["lm_head.weight"][0].kind == "low_rank"
    assert any("ties embedding and head" in note for note in result.notes)
    untied = make("untied", MODEL | {"lm_head.weight": EMBED}, tie_word_embeddings=False)
    assert matched(untied, lora).merged["lm_head.weight"] == (Source("base"),)
