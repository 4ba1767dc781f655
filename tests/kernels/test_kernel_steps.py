"""Steps of delta packs: what is encoded comes back, by either twin, in any cut; what is damaged is refused by both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.kernel_pairs import COMPILED, PLAIN, agree

from rlmerge.checkpoint.pack import CHUNK
from rlmerge.checkpoint.pack_steps import SCRATCH
from rlmerge.kernels.compiled import steps as compiled
from rlmerge.kernels.plain import steps as plain

BOTH = pytest.mark.parametrize("kernels", [PLAIN, COMPILED], ids=["numpy", "numba"])
SPECIAL = {
    np.uint16: [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7FFF, 0x3F80],
    np.uint32: [0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 0x3F800000],
}


def make_words(kind: Any, size: int, density: float, spread: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Words before and after; `spread`: to neighbours, far, anywhere, or to and from special ones."""
    rng = np.random.default_rng(seed)
    top = np.iinfo(kind).max
    old = rng.integers(0, top, size, dtype=kind, endpoint=True)
    changed = rng.random(size) < density
    new = old.copy()
    count = int(changed.sum())
    if spread == "anywhere":
        new[changed] = rng.integers(0, top, count, dtype=kind, endpoint=True)
    elif spread == "special":
        old, new = rng.choice(np.array(SPECIAL[kind], kind), (2, size))
        new = np.where(changed, new, old)
    else:
        size_of = rng.geometric(0.7 if spread == "near" else 0.01, count).astype(kind)
        new[changed] = np.where(rng.random(count) < 0.5, old[changed] + size_of, old[changed] - size_of)
    return old, new


def encode(kernels: Any, old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(data with one word more, table with one row more)."""
    chunks = -(-old.size // CHUNK)
    data, table = np.zeros(chunks * CHUNK * old.itemsize // 8 + 1, np.uint64), np.zeros((chunks + 1, 4), np.uint32)
    used = kernels.encode_steps(old, new, data, table[:chunks])
    table[chunks, 0] = used
    return data[: used + 1].copy(), table


def apply(kernels: Any, data: np.ndarray, table: np.ndarray, old: np.ndarray, start: int, stop: int) -> Any:
    """What becomes of old[start:stop], and the kernel's answer."""
    first, last = start // CHUNK, -(-stop // CHUNK)
    rows = table[first : last + 1].copy()
    begin, end = int(rows[0, 0]), int(rows[-1, 0])
    rows[:, 0] -= rows[0, 0]
    words = old[start:stop].copy()
    part = np.append(data[begin:end], np.uint64(0))
    skip, total = start - first * CHUNK, old.size - first * CHUNK
    return words, kernels.apply_steps(part, rows, skip, total, words, np.zeros(SCRATCH, np.uint64))


def test_both_twins_have_the_same_format():
    assert plain.CHUNK == compiled.CHUNK == CHUNK
    assert (plain.ESCAPE, plain.GAP_WIDTH) == (compiled.ESCAPE, compiled.GAP_WIDTH)
    assert compiled.SCRATCH == SCRATCH


@given(
    st.sampled_from([np.uint16, np.uint32]),
    st.sampled_from([1, 2, 63, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77]),
    st.sampled_from([0.0, 0.001, 0.13, 0.5, 1.0]),
    st.sampled_from(["near", "far", "anywhere", "special"]),
    st.integers(0, 2**20),
)
def test_what_is_encoded_comes_back_in_any_cut(kind, size, density, spread, seed):
    old, new = make_words(kind, size, density, spread, seed)
    agree(
        "encode_steps", old=old, new=new, data=np.zeros(-(-size // CHUNK) * CHUNK * old.itemsize // 8 + 1, np.uint64),
        table=np.zeros((-(-size // CHUNK), 4), np.uint32),
    )  # fmt: skip
    data, table = encode(COMPILED, old, new)
    assert int(table[:, 1].sum()) == np.count_nonzero(old != new)
    start = seed % size
    for low, high in ((0, size), (start, size), (start, min(size, start + 1 + seed % 40_000))):
        for kernels in (PLAIN, COMPILED):
            words, wrong = apply(kernels, data, table, old, low, high)
            assert wrong == 0
            assert words.tobytes() == new[low:high].tobytes()


def test_no_chunk_is_longer_than_its_words():
    for kind in (np.uint16, np.uint32):
        old, new = make_words(kind, CHUNK + 5, 1.0, "anywhere", 3)
        data, table = encode(COMPILED, old, new)
        assert (np.diff(table[:, 0].astype(np.int64)) <= CHUNK * old.itemsize // 8).all()
        assert data.size - 1 <= -(-new.nbytes // 8)


def test_sparse_bf16_steps_take_few_bits():
    """The entropy of the positions of 13 % is 4.3 bits a change, that of such steps 2.3: within 3 % of their sum."""
    old, new = make_words(np.uint16, 2**18, 0.13, "near", 1)
    data, _ = encode(COMPILED, old, new)
    assert 64 * (data.size - 1) / np.count_nonzero(old != new) < 6.75


@given(st.sampled_from([np.uint16, np.uint32]), st.integers(0, 2**20))
def test_damage_is_refused_alike_and_never_leaves_the_words(kind, seed):
    """Bits flipped in the stream, numbers put into the table: both twins say the same of every chunk."""
    rng = np.random.default_rng(seed)
    old, new = make_words(kind, 3000, 0.3, ("near", "far", "anywhere")[seed % 3], seed)
    data, table = encode(COMPILED, old, new)
    if seed % 2 and data.size > 1:
        data[rng.integers(0, data.size - 1)] ^= np.uint64(1) << np.uint64(rng.integers(0, 64))
    else:
        value = rng.choice([0, 1, 7, 2999, 3000, 3001, 2**15, 2**17, 2**18, 2**31, 2**32 - 1])
        table[rng.integers(0, 2), rng.integers(0, 4)] = value
    found = []
    for kernels in (PLAIN, COMPILED):
        words = old.copy()
        wrong = kernels.apply_steps(data, table, 0, old.size, words, np.zeros(SCRATCH, np.uint64))
        found.append((wrong, words.tobytes() if wrong == 0 else b""))
    assert found[0] == found[1]


@given(st.sampled_from([np.uint16, np.uint32]), st.integers(0, 300), st.integers(0, 2**33), st.integers(0, 2**20))
def test_the_weighted_sum_adds_up_and_sees_every_change(kind, size, start, seed):
    words, other = make_words(kind, size, 0.5, "anywhere", seed)
    whole = int(agree("weigh", words=words, start=start)["result"])
    cut = seed % (size + 1)
    parts = int(PLAIN.weigh(words[:cut], start)) + int(COMPILED.weigh(words[cut:], start + cut))
    assert parts % 2**64 == whole
    for place in range(0, size, 37):
        one = words.copy()
        one[place] = other[place]
        assert (int(PLAIN.weigh(one, start)) == whole) == (one[place] == words[place])


@BOTH
def test_twins_share_scratch_between_calls(kernels):
    """The second call uses what the first looked up."""
    scratch = np.zeros(SCRATCH, np.uint64)
    for seed, density in enumerate((0.13, 0.001, 0.13, 0.9)):
        old, new = make_words(np.uint16, 5000, density, "near", seed)
        data, table = encode(kernels, old, new)
        words = old.copy()
        assert kernels.apply_steps(data, table, 0, 5000, words, scratch) == 0
        assert words.tobytes() == new.tobytes()
