"""Tokenizer files of outputs: ids that readers agree on, text split as before, and what has no union."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.methods.small_models import read_values, refusal
from tests.token_models import EMBED, MORE, TEXT, byte_bpe, extended, recipe, tensors, with_tokens, write
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rlmerge
from rlmerge.checkpoint.tokenizer import open_tokenizers
from rlmerge.checkpoint.tokenizer_files import NewToken, splitting, write_tokenizer

BASE = byte_bpe()
SENTENCES = ["the cat sat on the mat", "print(x) for 34 in range", "schrödinger equation merging", "  odd   spaces "]


def merged(folder: Path, base: Any, others: dict[str, Any], source: str = "union") -> tuple[Path, list[str]]:
    """The output of a merge of models with these tokenizers, and its notes."""
    for seed, (name, tokenizer) in enumerate({"base": base, **others}.items()):
        rows = 1 + max(tokenizer.get_vocab().values())
        write(folder / name, tokenizer, tensors(seed, rows))
    given = recipe(folder, "task_arithmetic", list(others), tokenizer_source=source)
    outcome = rlmerge.merge_to_folder(given, folder / "out", kernels="numpy")
    assert outcome.out is not None
    return outcome.out, list(outcome.notes)


def check_reading(out: Path, base: Any, new: list[str]) -> Any:
    """Both readers give the base's tokens their ids, the new ones those after them, each with a row; transformers'."""
    tokenizer, vocab = AutoTokenizer.from_pretrained(out), Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    assert tokenizer.get_vocab() == vocab
    first = 1 + max(base.get_vocab().values())
    assert vocab == base.get_vocab() | {token: first + number for number, token in enumerate(new)}
    assert len(read_values(out)[EMBED]) == len(set(vocab.values()))
    assert json.loads((out / "rlmerge.json").read_text())["vocabulary"]["tokens"] == len(vocab)
    return tokenizer


def wordpiece(words: list[str]) -> PreTrainedTokenizerFast:
    tokens = ["[UNK]", "[SEP]", *words]
    tokenizer = Tokenizer(models.WordPiece({t: n for n, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


def unigram(pieces: list[str], spaces: bool = True) -> PreTrainedTokenizerFast:
    listed = [("<unk>", 0.0), *((piece, -float(number)) for number, piece in enumerate(pieces, 1))]
    tokenizer = Tokenizer(models.Unigram(listed, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if spaces else pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def metaspace_bpe(size: int = 60) -> PreTrainedTokenizerFast:
    """As SentencePiece's BPE in Llama 2: spaces are '▁', special tokens stand first, text is normalised."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# -- unions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [BASE, metaspace_bpe(), wordpiece(["the", "cat", "##s"]), unigram(["▁the", "▁c", "at"])]
)
def test_added_tokens_join_every_kind(tmp_path, kind):
    """They are matched in text with their own settings, and all other text is split as before."""
    other = with_tokens(kind)
    other.add_tokens([AddedToken("<a>", special=True, normalized=False), AddedToken("<b>", lstrip=True, rstrip=True)])
    out, notes = merged(tmp_path, kind, {"other": other})
    assert not notes
    tokenizer = check_reading(out, kind, ["<a>", "<b>"])
    for sentence in SENTENCES:
        assert tokenizer.encode(sentence) == kind.encode(sentence)
    text = "the <a>cat <b> s"
    assert tokenizer.encode(text) == other.encode(text)
    for token in ("<a>", "<b>"):
        ours, theirs = (entry.added_tokens_decoder[entry.get_vocab()[token]] for entry in (tokenizer, other))
        assert (ours.special, ours.lstrip, ours.rstrip) == (theirs.special, theirs.lstrip, theirs.rstrip)


def test_pieces_with_their_merges(tmp_path):
    """A tokenizer that was trained on: its text and that of the base are split as by itself, added tokens keep ids."""
    base = with_tokens(BASE, "<pad>")
    more = extended(BASE, ("s", "c"), ("sc", "h"), ("Ġ", "m"))
    out, notes = merged(tmp_path, base, {"more": more})
    tokenizer = check_reading(out, base, ["sc", "sch", "Ġm"])
    for sentence in SENTENCES:
        assert tokenizer.tokenize(sentence) == more.tokenize(sentence)
    assert tokenizer.decode(tokenizer.encode("schema <pad> me")) == "schema <pad> me"
    assert notes == ["base: the output's tokenizer splits text in another way than the one that it was trained with."]


def test_foreign_pieces_have_rows_and_no_merges(tmp_path):
    """Of a tokenizer that splits by other merges: the base's text is split as before, ids of new pieces are text."""
    other = byte_bpe(MORE, 280)
    out, notes = merged(tmp_path, BASE, {"other": other})
    vocab = BASE.get_vocab()
    new = [token for token, _ in sorted(other.get_vocab().items(), key=lambda item: item[1]) if token not in vocab]
    tokenizer = check_reading(out, BASE, new)
    for sentence in SENTENCES:
        assert tokenizer.encode(sentence) == BASE.encode(sentence)
    assert (
        tokenizer.decode(tokenizer.convert_tokens_to_ids(other.tokenize("schrödinger merging")))
        == "schrödinger merging"
    )
    assert any(f"so {len(new)} of its tokens have ids" in note for note in notes)
    assert any(note.startswith("other: the output's tokenizer splits text in another way") for note in notes)


def test_words_join(tmp_path):
    out, notes = merged(tmp_path, wordpiece(["the", "cat"]), {"other": wordpiece(["the", "dog", "##s"])})
    tokenizer = check_reading(out, wordpiece(["the", "cat"]), ["dog", "##s"])
    assert tokenizer.tokenize("the cats dogs") == ["the", "cat", "##s", "dog", "##s"]
    assert len(notes) == 2


def test_sets_of_pieces_that_have_no_union(tmp_path):
    cases = {
        "scores": (unigram(["▁the"]), unigram(["▁the", "▁a"]), "a Unigram and a Unigram tokenizer"),
        "kinds": (BASE, wordpiece(["the", "zebra"]), "a BPE and a WordPiece tokenizer"),
        "spaces": (BASE, metaspace_bpe(), "spell spaces in different ways (bytes as letters and '▁')"),
    }
    for name, (one, two, words) in cases.items():
        message = refusal(lambda one=one, two=two, name=name: merged(tmp_path / name, one, {"other": two}))
        assert message is not None, name
        assert words in message
        assert "`tokenizer_source: base`" in message


def test_other_kinds_can_still_lend_rows(tmp_path):
    """With the base's tokenizer, tokens of one spelling are one token, and the rest is the base's."""
    out, notes = merged(tmp_path, BASE, {"other": wordpiece(["the", "cat"])}, "base")
    check_reading(out, BASE, [])
    assert any("splits text in another way" in note for note in notes)
    base, other = (read_values(tmp_path / name)[EMBED] for name in ("base", "other"))
    row, mine = BASE.get_vocab()["the"], read_values(out)[EMBED]
    assert np.allclose(mine[row], (base[row].astype(np.float64) + other[2]) / 2, rtol=1e-6)
    assert (
        np.delete(mine, [row, BASE.get_vocab()["cat"]], 0) == np.delete(base, [row, BASE.get_vocab()["cat"]], 0)
    ).all()


# -- files -------------------------------------------------------------------------------------------------------------


def test_every_file_of_the_tokenizer_follows(tmp_path):
    """Old forms beside tokenizer.json are the same tokenizer; SentencePiece's own file stays while it is true."""
    base, other = tmp_path / "base", tmp_path / "other"
    write(base, BASE, tensors(0, len(BASE)))
    write(
        other,
        extended(
            with_tokens(BASE, "<a>"),
        ),
        tensors(1, len(BASE) + 1),
    )
    whole = json.loads((base / "tokenizer.json").read_text())
    (base / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "added_tokens.json").write_text(json.dumps({"<eos>": 0}))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    eos = {
        "content": "<eos>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": {"0": eos}}))
    (tokenizer,) = open_tokenizers([base])
    (origin,) = open_tokenizers([other])
    files, notes = write_tokenizer(tokenizer, set(), [NewToken("<a>", len(BASE), origin, True)])
    assert not notes
    assert json.loads(files["added_tokens.json"]) == {"<eos>": 0, "<a>": len(BASE)}
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert decoder == {"0": eos, str(len(BASE)): eos | {"content": "<a>"}}
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        assert files[name] == (base / name).read_bytes()

    more = extended(BASE, ("s", "c"))
    write(tmp_path / "more", more, tensors(2, len(more)))
    (origin,) = open_tokenizers([tmp_path / "more"])
    files, notes = write_tokenizer(tokenizer, set(), [NewToken("sc", len(BASE), origin, False)])
    assert json.loads(files["vocab.json"]) == more.get_vocab()
    assert files["merges.txt"].decode().splitlines() == ["#version: 0.2", *merges, "s c"]
    assert "tokenizer.model" not in files
    assert notes == ["tokenizer.model cannot hold the vocabulary of the output and is left out; tokenizer.json has it."]


def test_what_is_left_out_goes_everywhere(tmp_path):
    """Tokens without a row: from the vocabulary, its merges, and the settings that name them."""
    more = with_tokens(extended(BASE, ("s", "c"), ("sc", "h")), "<pad>")
    more.pad_token = "<pad>"
    write(tmp_path / "base", more, tensors(0, len(BASE)))
    (tokenizer,) = open_tokenizers([tmp_path / "base"])
    files, notes = write_tokenizer(tokenizer, {"sc", "sch", "<pad>"}, [])
    whole = json.loads(files["tokenizer.json"])
    assert not notes
    assert whole["model"]["vocab"] == {t: n for t, n in more.get_vocab().items() if n < len(BASE)}
    assert splitting(whole) == splitting(json.loads(BASE.backend_tokenizer.to_str()))
    assert "pad_token" not in json.loads(files["tokenizer_config.json"])
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<eos>"
    listed = json.loads(unigram(["a", "b", "c"]).backend_tokenizer.to_str())
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(listed))
    (tokenizer,) = open_tokenizers([tmp_path / "base"])
    files, _ = write_tokenizer(tokenizer, {"b", "c"}, [])
    assert [piece for piece, _ in json.loads(files["tokenizer.json"])["model"]["vocab"]] == ["<unk>", "a"]


def test_merges_keep_their_spelling(tmp_path):
    """Older readers know 'a b' only; pieces with spaces inside can only be listed."""
    for name, spell in (("base", " ".join), ("lists", list)):
        write(tmp_path / name, BASE, tensors(0, len(BASE)))
        whole = json.loads((tmp_path / name / "tokenizer.json").read_text())
        whole["model"]["merges"] = [spell(merge) for merge in whole["model"]["merges"]]
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(whole))
    write(tmp_path / "more", extended(BASE, ("s", "c")), tensors(0, len(BASE) + 1))
    (origin,) = open_tokenizers([tmp_path / "more"])
    for name, expected in (("base", "s c"), ("lists", ["s", "c"])):
        (tokenizer,) = open_tokenizers([tmp_path / name])
        files, _ = write_tokenizer(tokenizer, set(), [NewToken("sc", len(BASE), origin, False)])
        assert json.loads(files["tokenizer.json"])["model"]["merges"][-1] == expected


def test_tokenizers_without_a_list_of_tokens(tmp_path):
    write(tmp_path / "base", None, tensors(0, 20))
    write(tmp_path / "other", BASE, tensors(1, len(BASE)))
    ask = lambda: rlmerge.check(recipe(tmp_path, "ties", ["other"], tokenizer_source="union"))  # noqa: E731
    message = refusal(ask)
    assert message is not None
    assert f"{tmp_path / 'base'}: holds no tokenizer" in message
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    message = refusal(ask)
    assert message is not None
    assert "holds only tokenizer.model, and its tokens are read from tokenizer.json" in message
    write(tmp_path / "base", None, tensors(0, len(BASE)))
    (tmp_path / "base" / "tokenizer.model").unlink()
    (tmp_path / "base" / "vocab.json").write_text(json.dumps({t: n for t, n in BASE.get_vocab().items() if n < 200}))
    message = refusal(ask)
    assert message is not None
    assert "there is no tokenizer.json to write the change into" in message
    (tmp_path / "base" / "vocab.json").write_text("[1]")
    message = refusal(ask)
    assert message is not None
    assert "must hold a JSON object" in message
