"""Merges into other vocabularies equal, bit for bit, those of models that were resized by hand; outputs load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.checkpoint.checkpoint_files import random, write_tensors
from tests.methods.small_models import read_values, read_words, refusal, same_bits, small_blocks
from tests.token_models import (
    BIAS,
    EMBED,
    HEAD,
    HIDDEN,
    INNER,
    MORE,
    byte_bpe,
    extended,
    recipe,
    resized,
    tensors,
    with_tokens,
    write,
)  # fmt: skip
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rlmerge
from rlmerge.planner import make_plan

CHAT = ("<|im_start|>", "<|im_end|>")
BASE = byte_bpe()
TOKENIZERS = {
    "base": BASE,
    "chat": with_tokens(BASE, *CHAT),
    "tool": with_tokens(BASE, "<|im_end|>", "<tool>", "<call>"),
    "other": byte_bpe(MORE, 275),
}
VOCABS = {name: tokenizer.get_vocab() for name, tokenizer in TOKENIZERS.items()}
ROWS = {"base": len(BASE) + 5, "chat": len(BASE) + 2, "tool": len(BASE) + 3, "other": 275}
"""The base has five rows of padding."""


def make(folder: Path, names=("base", "chat", "tool", "other"), dtypes=None, tied=False):
    """Models with these tokenizers; their weights by name."""
    found = {}
    for seed, name in enumerate(names):
        dtype = (dtypes or {}).get(name, "F32")
        found[name] = tensors(seed, ROWS[name], tied, dtype)
        write(folder / name, TOKENIZERS[name], found[name], dtype)
    return found


def output_vocab(out: Path):
    """As the tokenizers library reads it, which must be as transformers does."""
    vocab = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == vocab
    return vocab


def twin_merge(folder: Path, method, models, weights, vocab, rows, base, dtypes=None, forced=None, **top):
    """The merge of models that were resized by hand; they have no tokenizer, so nothing is compared."""
    order = [*([base] if base else []), *(name for name in models if name != base)]
    twins = folder / "twins"
    if len(set((dtypes or {}).values())) < 2:
        dtype = next(iter((dtypes or {"": "F32"}).values()))
        made = resized({n: (VOCABS[n], weights[n]) for n in order}, vocab, rows, base, dtype, forced)
    else:  # a row that is taken from elsewhere is rounded to the dtype of who takes it
        made = {
            name: resized({n: (VOCABS[n], weights[n]) for n in order}, vocab, rows, base, dtypes[name], forced)[name]
            for name in order
        }
    for name in order:
        write(twins / name, None, made[name], (dtypes or {}).get(name, "F32"))
    return rlmerge.merge_to_folder(recipe(twins, method, models, base, **top), folder / "twin", kernels="numpy").out


@pytest.mark.parametrize("source", ["union", pytest.param("base", marks=pytest.mark.long), "chat", "other"])
@pytest.mark.parametrize(
    ("method", "base"),
    [("task_arithmetic", "base"), ("ties", "base"), ("linear", None), ("linear", "base"), ("tsv_m", "base")],
)
def test_a_merge_equals_that_of_resized_models(tmp_path, source, method, base):
    models = ["chat", "other", "tool"] if base else ["base", "chat", "other", "tool"]
    weights = make(tmp_path)
    with small_blocks(20, 60):  # blocks end within rows
        out = rlmerge.merge_to_folder(
            recipe(tmp_path, method, models, base, tokenizer_source=source),
            tmp_path / "out",
            kernels="numpy",
            threads=2,
        ).out
        vocab = output_vocab(out)
        rows = len(read_values(out)[EMBED])
        assert rows == {"union": max(ROWS["base"], len(vocab)), "base": ROWS["base"]}.get(source, ROWS.get(source))
        twin = twin_merge(tmp_path, method, models, weights, vocab, rows, base)
    assert same_bits(read_values(out), read_values(twin))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows


@pytest.mark.parametrize("dtypes", [
    dict.fromkeys(ROWS, "BF16"), {"base": "BF16", "chat": "F32", "tool": "BF16", "other": "F16"},
])  # fmt: skip
def test_rows_of_others_come_in_the_dtype_of_who_takes_them(tmp_path, dtypes):
    weights = make(tmp_path, dtypes=dtypes)
    given = recipe(tmp_path, "ties", ["chat", "other", "tool"], tokenizer_source="union")
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    vocab, rows = output_vocab(out), len(read_values(out)[EMBED])
    twin = twin_merge(tmp_path, "ties", ["chat", "other", "tool"], weights, vocab, rows, "base", dtypes)
    assert read_words(out).keys() == read_words(twin).keys()
    for name, (dtype, words) in read_words(twin).items():
        assert read_words(out)[name][0] == dtype
        assert read_words(out)[name][1].tobytes() == words.tobytes(), name


def test_what_a_union_is(tmp_path):
    """Ids of the base, then new tokens model after model; deltas of 0 where a model has nothing of its own."""
    weights = make(tmp_path, ("base", "chat", "tool"), tied=True)
    given = recipe(tmp_path, "task_arithmetic", ["tool", "chat"], tokenizer_source="union", parameters={"weight": 1})
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    vocab, merged, size = output_vocab(out), read_values(out)[EMBED], len(BASE)
    assert {token: number for token, number in vocab.items() if number < size} == VOCABS["base"]
    new = {"<|im_start|>": 0, "<|im_end|>": 1, "<tool>": 2, "<call>": 3}
    assert {token: number - size for token, number in vocab.items() if number >= size} == new
    assert len(merged) == ROWS["base"]
    for token, model in (("<|im_start|>", "chat"), ("<tool>", "tool"), ("<call>", "tool")):
        assert (merged[vocab[token]] == weights[model][EMBED][VOCABS[model][token]]).all()
    both = [weights[model][EMBED][VOCABS[model]["<|im_end|>"]] for model in ("chat", "tool")]
    mean = (both[0].astype(np.float64) + both[1]) / 2
    expected = mean.astype(np.float32) + sum(row - mean.astype(np.float32).astype(np.float64) for row in both)
    assert np.allclose(merged[vocab["<|im_end|>"]], expected, rtol=1e-6)  # the sum of two roundings
    row = size + 4  # the last row of padding
    assert (merged[row] == weights["base"][EMBED][row]).all()
    text = "the cat <|im_start|>sat<|im_end|> <tool>12"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("the cat sat on 12") == BASE.encode("the cat sat on 12")
    assert tokenizer.tokenize(text) == [
        *BASE.tokenize("the cat "), "<|im_start|>", *BASE.tokenize("sat"), "<|im_end|>", *BASE.tokenize(" "), "<tool>",
        *BASE.tokenize("12"),
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizers_that_agree_change_nothing(tmp_path):
    """The same bytes as without a vocabulary: weights and every small file but the recipe's."""
    write(tmp_path / "base", TOKENIZERS["base"], tensors(0, ROWS["base"]))
    write(tmp_path / "chat", TOKENIZERS["base"], tensors(1, ROWS["base"]))
    outs = []
    for name, top in (("plain", {}), ("union", {"tokenizer_source": "union"}), ("model", {"tokenizer_source": "chat"})):
        outs.append(
            rlmerge.merge_to_folder(recipe(tmp_path, "ties", ["chat"], **top), tmp_path / name, kernels="numpy").out
        )
    for out in outs[1:]:
        for file in outs[0].iterdir():
            if file.name not in ("README.md", "rlmerge.json", "run.log"):
                assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_load_the_output(tmp_path, tied):
    """A real Llama of each: logits of texts of both models come from the rows that belong to their tokens."""
    found = {}
    for seed, name in enumerate(("base", "chat")):
        import torch

        torch.manual_seed(seed)
        rows = len(TOKENIZERS[name]) if name == "chat" else ROWS["base"]
        config = LlamaConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        TOKENIZERS[name].save_pretrained(tmp_path / name)
        found[name] = model
    given = recipe(tmp_path, "task_arithmetic", ["chat"], tokenizer_source="union", parameters={"weight": 1})
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    model, loaded = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == ROWS["base"]
    ids = tokenizer("the cat <|im_start|>sat<|im_end|>", return_tensors="pt")["input_ids"]
    theirs = TOKENIZERS["chat"]("the cat <|im_start|>sat<|im_end|>", return_tensors="pt")["input_ids"]
    # an expert alone with weight 1 is that expert, but for one rounding of θ0 + (θ1 − θ0), which is exact in fp64
    wanted, got = found["chat"](theirs).logits, model(ids).logits
    order = [tokenizer.get_vocab()[token] for token, _ in sorted(VOCABS["chat"].items(), key=lambda item: item[1])]
    assert np.allclose(got[..., order].detach().numpy(), wanted.detach().numpy(), atol=1e-6)


# -- what recipes can say of tokens ------------------------------------------------------------------------------------


def test_tokens_that_are_forced(tmp_path):
    """One row for all models, so it is the merged row, whatever the method."""
    weights = make(tmp_path, ("base", "chat"))
    tokens = {
        "the": {"source": "chat", "force": True},
        "Ġcat": {"source": "base", "force": True},
        "Ġ12": {"source": {"kind": "model_token", "model": "chat", "token_id": len(BASE) + 1}, "force": True},
        "Ġand": {"source": {"kind": "model_token", "model": "base", "token": "<eos>"}, "force": True},
        "a": {"source": {"kind": "zero"}, "force": True},
    }
    given = recipe(tmp_path, "task_arithmetic", ["chat"], tokenizer={"source": "base", "tokens": tokens})
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    for name in (EMBED, HEAD, BIAS):
        merged = read_values(out)[name]
        expected = {
            "the": weights["chat"][name][VOCABS["chat"]["the"]],
            "Ġcat": weights["base"][name][VOCABS["base"]["Ġcat"]],
            "Ġ12": weights["chat"][name][len(BASE) + 1],
            "Ġand": weights["base"][name][0],
            "a": np.zeros_like(weights["base"][name][0]),
        }
        for token in tokens:
            assert (merged[VOCABS["base"][token]] == expected[token]).all(), token


def test_a_source_without_force_is_for_models_that_lack_the_token(tmp_path):
    weights = make(tmp_path, ("base", "chat", "tool"))
    tokens = {"<|im_end|>": {"source": "tool"}}
    given = recipe(
        tmp_path, "linear", ["base", "chat", "tool"], None, tokenizer={"source": "union", "tokens": tokens},
    )  # fmt: skip
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    chat, tool = (weights[m][EMBED][VOCABS[m]["<|im_end|>"]].astype(np.float64) for m in ("chat", "tool"))
    merged = read_values(out)[EMBED][output_vocab(out)["<|im_end|>"]]
    assert np.allclose(merged, (chat + 2 * tool) / 3, rtol=1e-6)


def test_tokens_that_are_named_are_added(tmp_path):
    """To the base's tokenizer: one that an expert has, and one that nobody has."""
    weights = make(tmp_path, ("base", "chat"))
    tokens = {"<|im_end|>": None, "<new>": {"source": {"kind": "model_token", "model": "base", "token": "the"}}}
    given = recipe(tmp_path, "task_arithmetic", ["chat"], tokenizer={"source": "base", "tokens": tokens})
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    vocab, merged = output_vocab(out), read_values(out)[EMBED]
    assert (vocab["<|im_end|>"], vocab["<new>"]) == (len(BASE), len(BASE) + 1)
    assert "<|im_start|>" not in vocab
    assert (merged[vocab["<|im_end|>"]] == weights["chat"][EMBED][VOCABS["chat"]["<|im_end|>"]]).all()
    assert (merged[vocab["<new>"]] == weights["base"][EMBED][VOCABS["base"]["the"]]).all()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("<new>the<|im_end|>") == ["<new>", "the", "<|im_end|>"]
    assert "<|im_end|>" not in tokenizer.decode(tokenizer.encode("the<|im_end|>"), skip_special_tokens=True)


@pytest.mark.parametrize("multiple", [None, 1, 16, 3])
def test_padding_is_kept_unless_told(tmp_path, multiple):
    tokenizer = with_tokens(BASE, "<x>")
    size = len(tokenizer)
    rows = size + 4 if multiple is None else -(-size // multiple) * multiple
    weights = tensors(0, size + 4)
    write(tmp_path / "base", tokenizer, weights)
    write(tmp_path / "expert", tokenizer, tensors(1, size + 4))
    policy = {"source": "base"} | ({"pad_to_multiple_of": multiple} if multiple else {})
    given = recipe(tmp_path, "task_arithmetic", ["expert"], tokenizer=policy)
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    merged, plain = read_values(out), rlmerge.merge(recipe(tmp_path, "task_arithmetic", ["expert"]), kernels="numpy")
    for name, array in plain:
        kept = min(rows, size + 4) if name != INNER else len(array)
        assert (merged[name][:kept] == array[:kept]).all()
        if name != INNER:
            assert len(merged[name]) == rows
            mean = weights[name][:size].astype(np.float64).mean(axis=0)
            assert np.allclose(merged[name][kept:], mean, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_tokens_without_a_row_are_no_tokens(tmp_path):
    """A tokenizer that was given tokens while the model was not: they are dropped, and the output does without."""
    long = with_tokens(BASE, "<U0>", "<U1>")
    write(tmp_path / "base", BASE, tensors(0, len(BASE)))
    write(tmp_path / "long", long, tensors(1, len(BASE)))
    for source in ("union", "long"):
        given = recipe(tmp_path, "task_arithmetic", ["long"], tokenizer_source=source)
        outcome = rlmerge.merge_to_folder(given, tmp_path / f"out-{source}", kernels="numpy")
        assert outcome.out is not None
        assert output_vocab(outcome.out) == VOCABS["base"]
        assert len(read_values(outcome.out)[EMBED]) == len(BASE)
        assert any("2 tokens have no row" in note for note in outcome.notes)


def test_ids_in_configurations_follow_their_tokens(tmp_path):
    """eos moves with its token; a token that the output lacks gets what the tokenizer's own model says."""
    weights = make(tmp_path, ("base", "other"))
    x = VOCABS["base"]["the"]
    moved = next(t for t, n in VOCABS["base"].items() if VOCABS["other"].get(t, n) != n)
    settings = {"eos_token_id": [0, VOCABS["base"][moved]], "bos_token_id": x, "pad_token_id": None, "x_token_id": -1}
    write(tmp_path / "base", BASE, weights["base"], text_config={"vocab_size": 3, "pad_token_id": 0}, **settings)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    write(tmp_path / "other", TOKENIZERS["other"], weights["other"], bos_token_id=77)
    assert "the" not in VOCABS["other"]
    given = recipe(tmp_path, "task_arithmetic", ["other"], tokenizer_source="other")
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == ROWS["other"]
    assert config["eos_token_id"] == [0, VOCABS["other"][moved]]
    assert (config["bos_token_id"], config["pad_token_id"], config["x_token_id"]) == (77, None, -1)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, VOCABS["other"][moved]]


# -- the engine --------------------------------------------------------------------------------------------------------


def test_fishers_follow(tmp_path):
    """As Fishers that were resized by hand: 0 where a model has no such token."""
    weights = make(tmp_path, ("base", "chat", "tool"))
    rng, names = np.random.default_rng(9), ("chat", "tool")
    fishers = {n: {t: rng.random(a.shape).astype(np.float32) for t, a in weights[n].items()} for n in names}
    models = [{"model": n, "fisher": f"f-{n}"} for n in names]
    for name in names:
        write_tensors(tmp_path / f"f-{name}" / "fisher.safetensors", fishers[name])
    given = rlmerge.parse_recipe(
        json.dumps({"merge_method": "sar", "base_model": "base", "models": models, "tokenizer_source": "union"}),
        folder=tmp_path,
    )
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    vocab, rows = output_vocab(out), ROWS["base"]
    made = resized({n: (VOCABS[n], weights[n]) for n in weights}, vocab, rows, "base")
    by_id = {number: token for token, number in vocab.items()}
    for name in made:
        write(tmp_path / "twins" / name, None, made[name])
    for name in names:
        for tensor in (EMBED, HEAD, BIAS):
            new = np.zeros((rows, *fishers[name][tensor].shape[1:]), np.float32)
            for row in range(rows):
                if by_id.get(row) in VOCABS[name]:
                    new[row] = fishers[name][tensor][VOCABS[name][by_id[row]]]
            fishers[name][tensor] = new
        write_tensors(tmp_path / "twins" / f"f-{name}" / "fisher.safetensors", fishers[name])
    plain = rlmerge.parse_recipe(
        json.dumps({"merge_method": "sar", "base_model": "base", "models": models}), folder=tmp_path / "twins"
    )
    twin = rlmerge.merge_to_folder(plain, tmp_path / "twin", kernels="numpy").out
    assert same_bits(read_values(out), read_values(twin))


def test_kernels_threads_and_arrays_agree(tmp_path):
    dtypes = dict.fromkeys(ROWS, "BF16")
    make(tmp_path, dtypes=dtypes)
    given = recipe(tmp_path, "ties", ["chat", "other", "tool"], tokenizer_source="union")
    outs = []
    for name, kernels, threads in (("a", "numpy", 1), ("b", "numba", 3)):
        with small_blocks(24, 48):
            outs.append(rlmerge.merge_to_folder(given, tmp_path / name, kernels=kernels, threads=threads).out)
    for file in outs[0].iterdir():
        if file.name != "run.log":
            assert (outs[1] / file.name).read_bytes() == file.read_bytes(), file.name
    arrays = dict(rlmerge.merge(given, kernels="numpy"))
    assert same_bits(arrays, read_values(outs[0]))
    rlmerge.verify(outs[0])


def test_excluded_embeddings_follow_too(tmp_path):
    """What is only copied from the base is copied row by row."""
    weights = make(tmp_path, ("base", "chat"))
    given = recipe(tmp_path, "task_arithmetic", ["chat"], tokenizer_source="chat", exclude=["embed", "lm_head"])
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    vocab, merged = output_vocab(out), read_values(out)
    for name in (EMBED, HEAD, BIAS):
        for token, row in vocab.items():
            donor = "base" if token in VOCABS["base"] else "chat"
            assert (merged[name][row] == weights[donor][name][VOCABS[donor][token]]).all()


def test_another_vocabulary_is_another_plan(tmp_path):
    """An unfinished merge is not continued when a tokenizer file has changed what rows mean."""
    make(tmp_path, ("base", "chat"))
    given = recipe(tmp_path, "ties", ["chat"], tokenizer_source="union")
    first = make_plan(given).digest()
    assert make_plan(given).digest() == first
    whole = json.loads((tmp_path / "chat" / "tokenizer.json").read_text())
    whole["added_tokens"][-1]["content"] = "<renamed>"
    (tmp_path / "chat" / "tokenizer.json").write_text(json.dumps(whole))
    assert make_plan(given).digest() == first  # the same rows under another name
    vocab = whole["model"]["vocab"]
    one, two = [token for token in vocab if token.isalpha()][:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (tmp_path / "chat" / "tokenizer.json").write_text(json.dumps(whole))
    assert make_plan(given).digest() != first


def test_check_and_explain_report(tmp_path):
    make(tmp_path, ("base", "chat", "other"))
    given = recipe(tmp_path, "ties", ["chat", "other"], tokenizer_source="chat")
    report = rlmerge.check(given).summary["vocabulary"]
    assert (report["rows"], report["tokens"], report["padding"]) == (ROWS["chat"], len(VOCABS["chat"]), 0)
    other = report["models"]["other"]
    assert other["dropped"]["count"] == len(VOCABS["other"].keys() - VOCABS["chat"].keys()) > 0
    assert set(other["dropped"]["tokens"]) == VOCABS["other"].keys() - VOCABS["chat"].keys()
    moved = {t for t, n in VOCABS["other"].items() if VOCABS["chat"].get(t, n) != n} - set(other["dropped"]["tokens"])
    assert other["moved"] == len(moved)
    assert report["models"]["base"]["taken_from"] == {"chat": 2}
    assert report["models"]["chat"]["added"]["tokens"] == list(CHAT)
    last = rlmerge.explain(given)[-1]
    assert last["vocabulary"] == report
    assert set(last["tensors"]) == {EMBED, HEAD, BIAS}


def test_a_report_without_a_base_starts_at_the_first_model(tmp_path):
    """Models are processed by name; the first as written lends tokenizer and configuration all the same."""
    make(tmp_path, ("base", "chat", "tool"))
    given = recipe(tmp_path, "linear", ["tool", "chat", "base"], None, tokenizer_source="union")
    plan = make_plan(given)
    assert plan.vocabulary is not None
    assert [model.key for model in plan.vocabulary.members] == ["base", "chat", "tool"]
    added = {key: entry["added"]["tokens"] for key, entry in plan.vocabulary.report["models"].items()}
    assert added == {"base": [], "chat": ["<|im_start|>"], "tool": []}
    new = {n: t for t, n in json.loads(plan.vocabulary.files["tokenizer.json"])["model"]["vocab"].items()}
    assert plan.vocabulary.rows == ROWS["tool"] + 1 > len(new)


def test_an_expert_that_is_called_base(tmp_path):
    """Its Fisher has its own rows, and the report tells the two apart."""
    weights = make(tmp_path, ("base", "chat"))
    for name in ("base", "chat"):
        ones = {tensor: np.ones_like(array) for tensor, array in weights[name].items()}
        write_tensors(tmp_path / f"f-{name}" / "fisher.safetensors", ones)
    models = [{"model": "chat", "name": "base", "fisher": "f-chat"}]
    data = {"merge_method": "sar", "base_model": "base", "models": models, "tokenizer_source": "union"}
    plan = make_plan(rlmerge.parse_recipe(json.dumps(data), folder=tmp_path))
    assert plan.vocabulary is not None
    assert list(plan.vocabulary.report["models"]) == ["base_model", "base"]
    data["models"] = [models[0] | {"fisher": "f-base"}]
    message = refusal(lambda: make_plan(rlmerge.parse_recipe(json.dumps(data), folder=tmp_path)))
    assert message is not None
    assert "A Fisher has one value per weight" in message


def test_files_of_other_formats_go_with_their_tokenizer(tmp_path):
    """The base's SentencePiece file beside another tokenizer would be another tokenizer."""
    make(tmp_path, ("base", "other"))
    for name, other in (("spiece.model", "tokenizer.model"), ("preprocessor_config.json", "processor_config.json")):
        (tmp_path / "base" / name).write_text("{}")
        (tmp_path / "other" / other).write_text("{}")
    given = recipe(tmp_path, "task_arithmetic", ["other"], tokenizer_source="other")
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    names = {file.name for file in out.iterdir()}
    assert {"tokenizer.model", "preprocessor_config.json"} <= names
    assert not {"spiece.model", "processor_config.json"} & names


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_vocabularies_that_differ_need_a_word(tmp_path):
    make(tmp_path, ("base", "chat"))
    message = refusal(lambda: rlmerge.check(recipe(tmp_path, "ties", ["chat"])))
    assert message is not None
    assert "'tokenizer_source: base' or 'union'" in message


@pytest.mark.parametrize(("tokenizer", "words"), [
    ({"source": "chta"}, ["'chta' does not exist", "Did you mean 'chat'?"]),
    ({"tokens": {"<x>": {}}}, ["tokens.<x>: no model has this token", "kind: zero"]),
    ({"tokens": {"the": {"source": "chta"}}}, ["tokens.the: 'chta' is no model of this merge", "Did you mean 'chat'"]),
    ({"tokens": {"<x>": {"source": "base"}}}, ["tokens.<x>: '<x>' is no token of base"]),
    ({"tokens": {"the": {"source": {"kind": "model_token", "model": "chat", "token_id": 999}}}},
     ["tokens.the: chat has no token_id 999", "282 rows"]),
    ({"tokens": {"the": {"source": {"kind": "model_token", "model": "chat", "token": "<y>"}}}},
     ["'<y>' is no token of chat"]),
])  # fmt: skip
def test_models_and_tokens_that_are_nowhere(tmp_path, tokenizer, words):
    make(tmp_path, ("base", "chat"))
    message = refusal(lambda: rlmerge.check(recipe(tmp_path, "ties", ["chat"], tokenizer=tokenizer)))
    assert message is not None
    words = [word.replace("282", str(ROWS["chat"])) for word in words]
    assert all(word in message for word in words), message


def test_adapters_and_packs_cannot_follow_row_by_row(tmp_path):
    from rlmerge.packs.write import pack

    make(tmp_path, ("base", "chat"))
    write(tmp_path / "expert", BASE, tensors(5, ROWS["base"]))
    pack(tmp_path / "expert", tmp_path / "base", tmp_path / "packed")
    given = recipe(tmp_path, "ties", ["packed", "chat"], tokenizer={"source": "union", "pad_to_multiple_of": 1})
    message = refusal(lambda: rlmerge.check(given))
    assert message is not None
    assert "packed is a delta pack" in message
    # with the base's own rows there is nothing to follow
    same = recipe(tmp_path, "ties", ["packed"], tokenizer_source="base")
    unpacked = recipe(tmp_path, "ties", ["expert"], tokenizer_source="base")
    a, b = (dict(rlmerge.merge(one, kernels="numpy")) for one in (same, unpacked))
    assert same_bits(a, b)


def test_a_lora_beside_a_model_with_new_tokens(tmp_path):
    """It does not touch the embedding, so it has the base's rows, new ones included; one that does is refused."""
    weights = make(tmp_path, ("base", "chat"))
    for name, target in (("inner", INNER), ("outer", EMBED)):
        stem = f"base_model.model.{target.removesuffix('.weight')}"
        rows = weights["base"][target].shape[0]
        kinds = ("lora_A.weight", "lora_B.weight") if name == "inner" else ("lora_embedding_A", "lora_embedding_B")
        shapes = ((2, HIDDEN), (rows, 2)) if name == "inner" else ((2, rows), (HIDDEN, 2))
        values = {f"{stem}.{kind}": random(k, *shape) for k, (kind, shape) in enumerate(zip(kinds, shapes))}
        write_tensors(tmp_path / name / "adapter_model.safetensors", values)
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [target.split(".")[-2]]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
    given = recipe(tmp_path, "task_arithmetic", ["inner", "chat"], tokenizer_source="chat")
    alone = recipe(tmp_path, "task_arithmetic", ["chat"], tokenizer_source="chat")
    one, two = (dict(rlmerge.merge(entry, kernels="numpy")) for entry in (given, alone))
    assert (one[EMBED] == two[EMBED]).all()
    assert (one[INNER] != two[INNER]).any()
    message = refusal(lambda: rlmerge.check(recipe(tmp_path, "ties", ["outer", "chat"], tokenizer_source="chat")))
    assert message is not None
    assert "outer has it not, or as a low-rank update" in message
    # models with an adapter on them
    given = recipe(tmp_path, "linear", ["base+inner", "chat"], None, tokenizer_source="chat")
    alone = recipe(tmp_path, "linear", ["base", "chat"], None, tokenizer_source="chat")
    one, two = (dict(rlmerge.merge(entry, kernels="numpy")) for entry in (given, alone))
    assert (one[EMBED] == two[EMBED]).all()
    assert (one[INNER] != two[INNER]).any()
    message = refusal(
        lambda: rlmerge.check(recipe(tmp_path, "linear", ["base+outer", "chat"], None, tokenizer_source="chat"))
    )
    assert message is not None
    assert "base+outer has it not, or as a low-rank update" in message
    # where nothing moves, nothing is refused
    for model in ("outer", "base+outer"):
        same = recipe(tmp_path, "task_arithmetic", [model], tokenizer_source="base")
        plain = recipe(tmp_path, "task_arithmetic", [model])
        assert same_bits(*(dict(rlmerge.merge(entry, kernels="numpy")) for entry in (same, plain)))
    TOKENIZERS["other"].save_pretrained(tmp_path / "inner")
    message = refusal(lambda: rlmerge.check(recipe(tmp_path, "ties", ["inner", "chat"], tokenizer_source="chat")))
    assert message is not None
    assert "inner is an adapter whose tokens are not those of its base" in message


def test_a_base_whose_rows_are_unclear(tmp_path):
    weights = tensors(0, ROWS["base"])
    write(tmp_path / "base", BASE, weights | {HEAD: np.ones((300, HIDDEN), np.float32)}, vocab_size=ROWS["base"])
    write(tmp_path / "chat", TOKENIZERS["chat"], tensors(1, ROWS["chat"]))
    message = refusal(lambda: rlmerge.check(recipe(tmp_path, "ties", ["chat"], tokenizer_source="base")))
    assert message is not None
    assert f"lm_head.weight is [300, 8] beside an embedding of {ROWS['base']} rows" in message


def test_evaluation_wants_a_folder(tmp_path):
    from rlmerge.evaluate.run import load_model

    make(tmp_path, ("base", "chat"))
    message = refusal(lambda: load_model(recipe(tmp_path, "ties", ["chat"], tokenizer_source="union")))
    assert message is not None
    assert "merge to a folder" in message


def test_extended_vocabularies(tmp_path):
    """New pieces come with their merges, so the text of that model is split as by itself."""
    more = extended(BASE, ("t", "r"), ("tr", "u"), ("Ġ", "tru"))
    write(tmp_path / "base", with_tokens(BASE, "<pad>"), tensors(0, len(BASE) + 1))
    write(tmp_path / "more", more, tensors(1, len(more)))
    given = recipe(tmp_path, "task_arithmetic", ["more"], tokenizer_source="union")
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    tokenizer, vocab = AutoTokenizer.from_pretrained(out), output_vocab(out)
    assert (vocab["<pad>"], vocab["tr"], vocab["Ġtru"]) == (len(BASE), len(BASE) + 1, len(BASE) + 3)
    assert tokenizer.tokenize("the true <pad>") == [*more.tokenize("the true"), "Ġ", "<pad>"]


def test_fishers_at_some_coordinates_only(tmp_path):
    """Coordinates of the output are none of the model that a Fisher is estimated on."""
    from rlmerge.fisher.only import tensors_asked

    make(tmp_path, ("base", "chat"))
    given = recipe(tmp_path, "sar", ["chat"], tokenizer_source="union")
    (tmp_path / "recipe.yml").write_text(given.to_yaml())
    message = refusal(lambda: tensors_asked(tmp_path / "recipe.yml"))
    assert message is not None
    assert "Estimate without --only" in message


def test_slices(tmp_path):
    """Embedding and head of different models: rows of tokens that neither has come from a model of another slice."""
    weights = make(tmp_path, ("base", "chat", "tool"))

    def slices(folder, **top):
        ranged = [
            {"sources": [{"model": name, "layer_range": [0, 1], "parameters": {"weight": 0.5}} for name in names]}
            for names in (("base", "chat"), ("chat", "tool"))
        ]
        data = {"merge_method": "linear", "slices": ranged, **top}
        return rlmerge.parse_recipe(json.dumps(data), folder=folder)

    given = slices(tmp_path, tokenizer_source="union")
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    vocab, values = output_vocab(out), read_values(out)
    assert len(vocab) == len(BASE) + 4
    tool = weights["tool"][EMBED][VOCABS["tool"]["<tool>"]]
    assert np.allclose(values[EMBED][vocab["<tool>"]], tool, rtol=1e-6)
    made = resized({n: (VOCABS[n], weights[n]) for n in weights}, vocab, len(values[EMBED]), None)
    for name in made:
        write(tmp_path / "twins" / name, None, made[name])
    twin = rlmerge.merge_to_folder(slices(tmp_path / "twins"), tmp_path / "twin", kernels="numpy").out
    assert same_bits(values, read_values(twin))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(values[EMBED])


def test_a_tokenizer_from_elsewhere(tmp_path):
    """A folder without weights may lend its tokenizer; tokens of its own that no model has get zeros, which is said."""
    weights = make(tmp_path, ("base", "chat"))
    with_tokens(BASE, "<|im_end|>", "<mine>").save_pretrained(tmp_path / "lender")
    given = recipe(tmp_path, "task_arithmetic", ["chat"], tokenizer_source="lender")
    outcome = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy")
    vocab, merged = output_vocab(outcome.out), read_values(outcome.out)[EMBED]
    assert len(merged) == len(vocab) == len(BASE) + 2  # the lender has no padding
    assert (merged[vocab["<|im_end|>"]] == weights["chat"][EMBED][VOCABS["chat"]["<|im_end|>"]]).all()
    assert (merged[vocab["<mine>"]] == 0.0).all()
    assert any("1 tokens are in no model and get rows of zeros ('<mine>')" in note for note in outcome.notes)


def test_an_expert_without_tokenizer_files_has_the_bases(tmp_path):
    """As trainers leave them."""
    make(tmp_path, ("base", "chat"))
    write(tmp_path / "bare", None, tensors(7, ROWS["base"]))
    write(tmp_path / "dressed", BASE, tensors(7, ROWS["base"]))
    outs = [
        dict(rlmerge.merge(recipe(tmp_path, "ties", ["chat", name], tokenizer_source="chat"), kernels="numpy"))
        for name in ("bare", "dressed")
    ]
    assert same_bits(*outs)


@pytest.mark.parametrize("stops", [[0], 0, [0, len(BASE) + 1]])
def test_a_tokenizer_that_ends_where_the_model_does_not_stop(tmp_path, stops):
    weights = make(tmp_path, ("base", "chat"))
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    chat = with_tokens(BASE, *CHAT)
    chat.eos_token = "<|im_end|>"
    write(tmp_path / "chat", chat, weights["chat"])
    notes = rlmerge.check(recipe(tmp_path, "ties", ["chat"], tokenizer_source="chat")).notes
    said = [note for note in notes if "ends with '<|im_end|>'" in note]
    assert bool(said) == (stops in ([0], 0))
    assert all(f"which is {len(BASE) + 1}, and the output stops at 0" in note for note in said)


def test_pieces_of_a_tokenizer_that_looks_words_up_whole(tmp_path):
    """With ignore_merges (Llama 3) a word that is a piece is found without merges, so its union splits otherwise."""
    whole = json.loads(BASE.backend_tokenizer.to_str())
    whole["model"]["ignore_merges"] = True
    looking = type(BASE)(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token="<eos>")
    write(tmp_path / "base", looking, tensors(0, len(BASE)))
    write(tmp_path / "other", TOKENIZERS["other"], tensors(1, 275))
    outcome = rlmerge.merge_to_folder(
        recipe(tmp_path, "task_arithmetic", ["other"], tokenizer_source="union"), tmp_path / "out", kernels="numpy"
    )
    assert any(note.startswith("base: the output's tokenizer splits text in another way") for note in outcome.notes)


def test_a_merge_that_is_continued(tmp_path):
    """The same bytes as in one go; another policy does not continue it."""
    make(tmp_path)
    given = recipe(tmp_path, "ties", ["chat", "other", "tool"], tokenizer_source="union")

    def stop(step):
        if step.units >= 20:
            raise KeyboardInterrupt

    with small_blocks(20, 60):
        with pytest.raises(KeyboardInterrupt):
            rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy", threads=1, progress=stop)
        other = recipe(tmp_path, "ties", ["chat", "other", "tool"], tokenizer_source="base")
        assert refusal(lambda: rlmerge.merge_to_folder(other, tmp_path / "out", kernels="numpy")) is not None
        outcome = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy", threads=2)
        assert outcome.resumed_units >= 20
        fresh = rlmerge.merge_to_folder(given, tmp_path / "fresh", kernels="numpy", threads=2)
    for file in fresh.out.iterdir():
        if file.name != "run.log":
            assert (outcome.out / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_command_line_shows_the_vocabulary(tmp_path):
    from tests.cli.command_line import rlmerge as command

    make(tmp_path, ("base", "chat"))
    given = recipe(tmp_path, "ties", ["chat"], tokenizer_source="union")
    (tmp_path / "recipe.yml").write_text(given.to_yaml())
    lines = [
        f"vocabulary (union): {len(BASE) + 2} tokens, {ROWS['base']} rows, 3 of them padding",
        "  base: 2 rows from chat",
        "  chat: 2 tokens added ('<|im_start|>', '<|im_end|>'), 3 rows from base",
    ]
    checked, explained = command("check", tmp_path / "recipe.yml"), command("explain", tmp_path / "recipe.yml")
    assert "\n".join(lines) in checked.out
    assert "\n".join(f"  {line}" for line in lines) in explained.out


def test_padding_of_the_model_that_lends_its_tokenizer(tmp_path):
    """It stays, and models without it have the same rows, so they change nothing in them."""
    write(tmp_path / "base", BASE, tensors(0, len(BASE) + 2))
    weights = tensors(1, len(BASE) + 6)
    write(tmp_path / "chat", TOKENIZERS["chat"], weights)
    given = recipe(tmp_path, "task_arithmetic", ["chat"], tokenizer_source="chat")
    out = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy").out
    for name in (EMBED, HEAD, BIAS):
        merged = read_values(out)[name]
        assert len(merged) == len(BASE) + 6
        assert (merged[len(BASE) :] == weights[name][len(BASE) :]).all()


def test_records_of_fishers_are_of_rows_that_may_be_left_out(tmp_path):
    """Sums in fisher.json count all rows of the model, and the merge reads those of the output."""
    weights = make(tmp_path, ("base", "chat"))
    fisher = {tensor: np.ones_like(array) for tensor, array in weights["chat"].items()}
    write_tensors(tmp_path / "fisher" / "fisher.safetensors", fisher)
    sums = {tensor: {"sum": float(array.sum()), "count": array.size} for tensor, array in fisher.items()}
    (tmp_path / "fisher" / "fisher.json").write_text(json.dumps({"tensors": sums}))
    data = {"merge_method": "sar", "base_model": "base", "models": [{"model": "chat", "fisher": "fisher"}]}
    given = rlmerge.parse_recipe(json.dumps(data | {"tokenizer_source": "base"}), folder=tmp_path)
    outcome = rlmerge.merge_to_folder(given, tmp_path / "out", kernels="numpy")
    size = sum(array.size for array in weights["chat"].values()) - 2 * (2 * HIDDEN + 1)
    padding = 5 * (2 * HIDDEN + 1)  # of the base, where the expert's Fisher is 0
    assert outcome.report["total"]["fisher_mean"]["chat"] == pytest.approx(size / (size + padding))


def test_stages_with_vocabularies(tmp_path):
    """A stage with a tokenizer of its own is foreseen with it, and what is made of it has its tokens."""
    weights = make(tmp_path, ("base", "chat", "tool"))
    stage = {"name": "both", "merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 1}}
    stage |= {"models": [{"model": "chat"}], "tokenizer_source": "union", "chat_template": "{{ 7 }}"}
    final = {"merge_method": "task_arithmetic", "base_model": "both", "parameters": {"weight": 1}}
    final |= {"models": [{"model": "tool"}], "tokenizer_source": "union"}
    (tmp_path / "recipe.yml").write_text(f"{json.dumps(stage)}\n---\n{json.dumps(final)}\n")
    report = rlmerge.check(tmp_path / "recipe.yml")
    assert report.summary["vocabulary"]["models"]["tool"]["added"]["tokens"] == ["<tool>", "<call>"]
    out = rlmerge.merge_to_folder(tmp_path / "recipe.yml", tmp_path / "out", kernels="numpy").out
    vocab, merged = output_vocab(out), read_values(out)[EMBED]
    assert len(vocab) == len(BASE) + 4 == report.summary["vocabulary"]["tokens"]
    assert (merged[vocab["<tool>"]] == weights["tool"][EMBED][VOCABS["tool"]["<tool>"]]).all()
    assert (merged[vocab["<|im_start|>"]] == weights["chat"][EMBED][VOCABS["chat"]["<|im_start|>"]]).all()
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ 7 }}"


def test_the_recipes_of_the_page_run(tmp_path):
    """docs/tokenizers.md: its recipe, and the same with all that `tokenizer` may say; rows are what comments say."""
    page = (Path(__file__).parents[1] / "docs/tokenizers.md").read_text(encoding="utf-8")
    first, more = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    weights = make(tmp_path, ("base", "chat", "tool"))
    rlmerge.merge_to_folder(rlmerge.parse_recipe(yaml.safe_dump(first), folder=tmp_path), tmp_path / "first")
    del first["tokenizer_source"]
    given = rlmerge.parse_recipe(yaml.safe_dump({**first, **more}), folder=tmp_path)
    out = rlmerge.merge_to_folder(given, tmp_path / "out").out
    vocab, made = output_vocab(out), read_values(out)[EMBED]
    assert len(made) % 64 == 0
    assert (made[vocab["<tool>"]] == weights["tool"][EMBED][VOCABS["tool"]["<tool>"]]).all()
    assert (made[vocab["<pad>"]] == 0).all()
    assert output_vocab(tmp_path / "first").keys() == vocab.keys() - {"<pad>"}


@pytest.mark.parametrize("names", [("chat", "tool"), ("tool", "chat")])
def test_slices_of_tied_and_untied_models_in_one_vocabulary(tmp_path, names):
    """The head is the last slice's, row by row; a token that only the other model has gets that one's row, of a tied
    model its embedding's."""
    weights = make(tmp_path, ("tool",)) | {"chat": tensors(7, ROWS["chat"], tied=True)}
    write(tmp_path / "chat", TOKENIZERS["chat"], weights["chat"])
    del weights["tool"][BIAS]
    write(tmp_path / "tool", TOKENIZERS["tool"], weights["tool"])
    pieces = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in names]
    text = yaml.safe_dump({"merge_method": "passthrough", "slices": pieces, "tokenizer_source": "union"})
    out = rlmerge.merge_to_folder(rlmerge.parse_recipe(text, folder=tmp_path), tmp_path / "out").out
    vocab, made = output_vocab(out), read_values(out)
    assert len(made[HEAD]) == len(made[EMBED]) == len(vocab)
    for token, number in vocab.items():
        owner = names[1] if token in VOCABS[names[1]] else names[0]
        given = weights[owner]
        assert (made[HEAD][number] == given.get(HEAD, given[EMBED])[VOCABS[owner][token]]).all(), token
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
