"""Tokenizers that do the same are equal however they are written; a difference is a sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlmerge.checkpoint.tokenizer import compare_tokenizers
from rlmerge.errors import CheckpointError

VOCAB = {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}
MERGES = ["a b", "ab c"]
ADDED = [{"id": 5, "content": "<|end|>", "special": True}]
CONFIG = {
    "bos_token": None,
    "eos_token": "<|end|>",
    "pad_token": {"content": "<|end|>"},
    "chat_template": "{{ x }}\nyes",
}


def fast(folder: Path, vocab: Any = VOCAB, merges: Any = MERGES, added: Any = ADDED, config: Any = CONFIG,
         indent: int | None = None, **further: Any) -> Path:  # fmt: skip
    folder.mkdir(exist_ok=True)
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        **further,
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole, indent=indent))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=indent))
    return folder


def slow(folder: Path, config: Any = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "added_tokens.json").write_text('{"<|end|>": 5}')
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def only_difference(a: Path, b: Path, *words: str) -> None:
    (sentence,) = compare_tokenizers([a, b])
    for word in (str(a), str(b), *words):
        assert word in sentence, sentence


def test_the_same_however_written(tmp_path: Path) -> None:
    base = fast(tmp_path / "base")
    others = [
        fast(tmp_path / "same"),
        fast(tmp_path / "indented", indent=2),
        fast(tmp_path / "pairs", merges=[m.split() for m in MERGES], vocab=dict(reversed(VOCAB.items()))),
        fast(tmp_path / "padding", padding={"strategy": "BatchLongest"}, truncation={"max_length": 5}),
        fast(tmp_path / "no config", config=None),
        slow(tmp_path / "slow"),
    ]
    assert compare_tokenizers([base, *others]) == []


def test_folders_without_tokenizer_are_skipped(tmp_path: Path) -> None:
    empty, base, other = tmp_path / "empty", fast(tmp_path / "base"), fast(tmp_path / "other", merges=MERGES[:1])
    empty.mkdir()
    assert compare_tokenizers([]) == compare_tokenizers([empty]) == compare_tokenizers([empty, base, empty]) == []
    assert len(compare_tokenizers([empty, base, empty, other])) == 1


def test_tokens(tmp_path: Path) -> None:
    base = fast(tmp_path / "base")
    moved = fast(tmp_path / "moved", vocab=VOCAB | {"c": 4, "abc": 3})
    only_difference(base, moved, "2 with other ids", "'c' is 3 and 4")
    renamed = {("new" if k == "c" else k): v for k, v in VOCAB.items()}
    only_difference(base, fast(tmp_path / "renamed", vocab=renamed), "'c' = 3", "'new' = 3", f"1 only in {base}")
    added = fast(tmp_path / "added", added=[*ADDED, {"id": 6, "content": "<think>"}])
    only_difference(base, added, "'<think>' = 6")
    many = fast(tmp_path / "many", vocab=VOCAB | {f"t{i}": 10 + i for i in range(50)})
    only_difference(base, many, "50 only in", ", ...)")


def test_unigram_scores(tmp_path: Path) -> None:
    vocab = [["a", -1.0], ["b", -2.0]]
    base = fast(tmp_path / "base", vocab=vocab, merges=None)
    assert compare_tokenizers([base, fast(tmp_path / "same", vocab=vocab, merges=None, indent=1)]) == []
    other = fast(tmp_path / "other", vocab=[["a", -1.0], ["b", -2.5]], merges=None)
    only_difference(base, other, "scores")


def test_merges(tmp_path: Path) -> None:
    base = fast(tmp_path / "base")
    only_difference(base, fast(tmp_path / "x", merges=["a b", "a bc"]), "number 2", "'ab c'", "'a bc'")
    only_difference(base, fast(tmp_path / "y", merges=["a b"]), "(2)", "(1)", "no more")


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_special_tokens(tmp_path: Path, key: str) -> None:
    base = fast(tmp_path / "base")
    other = fast(tmp_path / "other", config=CONFIG | {key: {"content": "a"}})
    only_difference(base, other, key, "'a'")


def test_special_tokens_map_counts_where_the_configuration_is_silent(tmp_path: Path) -> None:
    base = fast(tmp_path / "base")
    less = {key: value for key, value in CONFIG.items() if key != "eos_token"}
    old = fast(tmp_path / "old", config=less)
    only_difference(base, old, "eos_token", "not set")
    (old / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    assert compare_tokenizers([base, old]) == []


def test_chat_templates(tmp_path: Path) -> None:
    base = fast(tmp_path / "base")
    without = {key: value for key, value in CONFIG.items() if key != "chat_template"}
    moved = fast(tmp_path / "moved", config=without)
    only_difference(base, moved, "chat template", "has none")
    (moved / "chat_template.jinja").write_bytes(b"{{ x }}\r\nyes\n")
    assert compare_tokenizers([base, moved]) == []
    (moved / "chat_template.jinja").write_text("{{ x }}\nno")
    only_difference(base, moved, "line 2", "'yes'", "'no'")
    named = [{"name": "default", "template": CONFIG["chat_template"]}, {"name": "tools", "template": "t"}]
    listed = fast(tmp_path / "listed", config=CONFIG | {"chat_template": named})
    only_difference(base, listed, "chat template 'tools'", f"{base} has none")


def test_long_lines_are_cut_around_the_difference(tmp_path: Path) -> None:
    base = fast(tmp_path / "base", config=CONFIG | {"chat_template": "x" * 500 + "this" + "y" * 500})
    other = fast(tmp_path / "other", config=CONFIG | {"chat_template": "x" * 500 + "that" + "y" * 500})
    (sentence,) = compare_tokenizers([base, other])
    assert "this" in sentence
    assert "that" in sentence
    assert len(sentence) < 300 + 2 * len(str(tmp_path))


def test_sentencepiece_alone(tmp_path: Path) -> None:
    for name, raw in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(raw)
    a, b, c = (tmp_path / name for name in "abc")
    assert compare_tokenizers([a, b]) == []
    only_difference(a, c, "tokenizer.model")


def test_wordpiece(tmp_path: Path) -> None:
    for name, text in (("a", "[PAD]\nx\ny\n"), ("b", "[PAD]\r\nx\r\ny"), ("c", "[PAD]\ny\nx\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_bytes(text.encode())
    a, b, c = (tmp_path / name for name in "abc")
    assert compare_tokenizers([a, b]) == []
    only_difference(a, c, "'x' is 1 and 2")


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"{}", b'{"model": []}', b'{"model": {"vocab": [1]}}',
                                  b'{"model": {"vocab": {}, "merges": [1]}}', b"[" * 200_000])  # fmt: skip
def test_broken_files(tmp_path: Path, text: bytes) -> None:
    base = fast(tmp_path / "base")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="bad"):
        compare_tokenizers([base, tmp_path / "bad"])


def test_broken_configuration(tmp_path: Path) -> None:
    for config in ({"chat_template": 5}, {"chat_template": [5]}, {"eos_token": {"x": 1}}):
        with pytest.raises(CheckpointError, match="bad"):
            compare_tokenizers([fast(tmp_path / "base"), fast(tmp_path / "bad", config=config)])
