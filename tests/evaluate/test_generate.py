"""Generation against transformers' own, whatever the batch, the order and the lengths of the prompts."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rlmerge.evaluate.backend import Sampling  # noqa: E402
from rlmerge.evaluate.generate import SPARE, Generator, GrowingLayer, Request, _joined, _State, choose  # noqa: E402
from rlmerge.evaluate.run import seed_of  # noqa: E402

VOCABULARY = 97
END = 5


class Tokenizer:
    """Tokens as words, so that stop strings have something to look for."""

    eos_token_id = END

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(f"<{token}>" for token in tokens)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=END, bos_token_id=1, initializer_range=0.4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def requests():
    """Prompts of 1 to 40 tokens; some twice, with other seeds."""
    source = torch.Generator().manual_seed(1)
    found = []
    for number in range(11):
        length = int(torch.randint(1, 41, (1,), generator=source))
        prompt = tuple(torch.randint(6, VOCABULARY, (length,), generator=source).tolist())
        found += [Request((number, k), prompt, seed_of("test", number, k)) for k in range(1 + number % 3)]
    return found


def made(model, requests, sampling, batch):
    return {sample.key: sample for sample in Generator(model, Tokenizer(), batch).run(requests, sampling)}


def test_greedy_is_what_transformers_makes(model, requests):
    found = [made(model, requests, Sampling(max_new_tokens=20), batch) for batch in (1, 3, 32)]
    for request in requests:
        ids = torch.tensor([request.prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        expected = whole[0, ids.shape[1] :].tolist()
        for samples in found:
            sample = samples[request.key]
            assert sample.finish == ("stop" if END in expected else "length")
            assert list(sample.tokens) == (expected[: expected.index(END)] if END in expected else expected)


@pytest.mark.parametrize("sampling", [Sampling(1.0, 24), Sampling(0.7, 24, top_p=0.9), Sampling(1.3, 24, top_k=9)])
def test_samples_depend_on_their_seed_alone(model, requests, sampling):
    """Not on the batch, nor on the order, nor on what else is made."""
    whole = made(model, requests, sampling, 32)
    assert made(model, requests[::-1], sampling, 4) == whole
    assert made(model, requests[3:9], sampling, 5) == {request.key: whole[request.key] for request in requests[3:9]}
    assert whole[2, 0].tokens != whole[2, 1].tokens


def test_stop_strings_are_cut_off(model, requests):
    plain = made(model, requests, Sampling(max_new_tokens=20), 8)
    key, sample = next((key, sample) for key, sample in plain.items() if len(set(sample.tokens)) > 6)
    stop = f"<{sample.tokens[4]}>"
    stopped = made(model, requests, Sampling(max_new_tokens=20, stop=(stop,)), 8)[key]
    assert stopped.finish == "stop"
    assert stopped.text == sample.text[: sample.text.index(stop)]


def test_more_tokens_than_the_first_buffer_holds(model, requests):
    found = made(model, requests[:2], Sampling(max_new_tokens=300), 2)
    assert all(len(sample.tokens) == 300 or sample.finish == "stop" for sample in found.values())


def test_chosen_tokens_have_the_frequencies_of_the_model():
    """20,000 draws: each share within five standard errors; nothing outside top_k and top_p."""
    import numpy as np

    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, -5.0])
    count = 20_000
    sources = [np.random.Generator(np.random.Philox(seed)) for seed in range(count)]
    rows = logits.repeat(count, 1)
    drawn = torch.bincount(choose(rows, sources, Sampling(2.0)), minlength=5) / count
    expected = (logits / 2.0).softmax(0)
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()
    assert set(choose(rows, sources, Sampling(1.0, top_k=2)).tolist()) == {2, 3}
    assert set(choose(rows, sources, Sampling(1.0, top_p=0.5)).tolist()) == {3}


def test_dropped_rows_leave_the_others_as_they_were():
    """Rows and positions of a cache that are kept, moved and appended to, beside a plain copy."""
    source = torch.Generator().manual_seed(2)
    layer = GrowingLayer()
    parts = [torch.randn(rows, 2, length, 4, generator=source) for rows, length in ((5, 9), (4, 6))]
    layer.keys, layer.values, layer.is_initialized = _joined(parts, 9, SPARE), _joined(parts, 9, SPARE), True
    plain = torch.cat([parts[0], torch.nn.functional.pad(parts[1], (0, 0, 3, 0))])
    state = _State(torch.device("cpu"))
    state.rows, state.cache = list(range(9)), type("Cache", (), {"layers": [layer]})()
    state.mask = torch.cat([torch.ones(5, 9), torch.nn.functional.pad(torch.ones(4, 6), (3, 0))]).long()
    for places in ([0, 1, 2, 3, 5, 7, 8], [2, 4, 5, 6], [0, 1, 3], [0, 2]):
        order = state.keep(places)
        assert sorted(order) == places
        plain = plain[order]
        for _ in range(SPARE // 2):
            more = torch.randn(len(plain), 2, 1, 4, generator=source)
            layer.update(more, more)
            plain = torch.cat([plain, more], 2)
            state.mask = torch.cat([state.mask, torch.ones(len(plain), 1, dtype=torch.long)], 1)
        seen = layer.keys.shape[2]
        assert torch.equal(layer.keys, plain[:, :, -seen:])
        assert torch.equal(layer.values, layer.keys)
        assert state.mask.shape == (len(plain), seen)
    assert seen == plain.shape[2] - 3, "what is padding for all that stay is gone"
