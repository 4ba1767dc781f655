"""Steps of delta packs: what is encoded comes back, by either twin, in any cut; what is damaged is refused by both."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.kernel_pairs import COMPILED, PLAIN, agree

from rlmerge.checkpoint import pack_steps
from rlmerge.checkpoint.pack import CHUNK
from rlmerge.kernels.compiled import steps as compiled
from rlmerge.kernels.plain import steps as plain

ROOM = np.zeros((4, compiled.ROOM), np.int64)
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
    """(data with two words more, table with one row more)."""
    chunks = -(-old.size // CHUNK)
    data, table = np.zeros(chunks * CHUNK * old.itemsize // 8 + 2, np.uint64), np.zeros((chunks + 1, 4), np.uint32)
    used = kernels.encode_steps(old, new, data, table[:chunks])
    table[chunks, 0] = used
    return data[: used + 2].copy(), table


def apply(kernels: Any, data: np.ndarray, table: np.ndarray, old: np.ndarray, start: int, stop: int) -> Any:
    """What becomes of old[start:stop], and the kernel's answer."""
    first, last = start // CHUNK, -(-stop // CHUNK)
    rows = table[first : last + 1].copy()
    begin, end = int(rows[0, 0]), int(rows[-1, 0])
    words = np.empty(stop - start, old.dtype)
    part = np.append(data[begin:end], np.zeros(2, np.uint64))
    skip, total = start - first * CHUNK, old.size - first * CHUNK
    return words, kernels.apply_steps(part, rows, skip, total, old[start:stop], words, ROOM)


def test_both_twins_have_the_same_format():
    assert plain.CHUNK == compiled.CHUNK == CHUNK
    assert plain.GAP_WIDTH == compiled.GAP_WIDTH
    assert compiled.ROOM == pack_steps.ROOM


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
        assert data.size - 2 <= -(-new.nbytes // 8)


def test_sparse_bf16_steps_take_few_bits():
    """The entropy of the positions of 13 % is 4.3 bits a change, that of such steps 2.3: within 3 % of their sum."""
    old, new = make_words(np.uint16, 2**18, 0.13, "near", 1)
    data, _ = encode(COMPILED, old, new)
    assert 64 * (data.size - 2) / np.count_nonzero(old != new) < 6.75


@given(st.sampled_from([np.uint16, np.uint32]), st.integers(0, 2**20))
def test_damage_is_refused_alike_and_never_leaves_the_words(kind, seed):
    """Bits flipped in the stream, numbers put into the table: both twins say the same of every chunk."""
    rng = np.random.default_rng(seed)
    old, new = make_words(kind, 3000, 0.3, ("near", "far", "anywhere")[seed % 3], seed)
    data, table = encode(COMPILED, old, new)
    if seed % 2 and data.size > 2:
        data[rng.integers(0, data.size - 2)] ^= np.uint64(1) << np.uint64(rng.integers(0, 64))
    else:
        value = rng.choice([0, 1, 7, 2999, 3000, 3001, 2**15, 2**17, 2**18, 2**31, 2**32 - 1])
        table[rng.integers(0, 2), rng.integers(0, 4)] = value
    found = []
    for kernels in (PLAIN, COMPILED):
        words = np.empty_like(old)
        wrong = kernels.apply_steps(data, table, 0, old.size, old, words, ROOM)
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


@given(st.sampled_from([np.uint16, np.uint32]), st.integers(0, 2**20))
def test_noise_is_refused_alike(kind, seed):
    """A stream of random words under a plausible row: codes of every parameter, most of which lead nowhere."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, np.iinfo(kind).max, 3000, dtype=kind)
    data = np.zeros(int(rng.integers(2, 80)), np.uint64)
    data[:-2] = rng.integers(0, 2**64, data.size - 2, dtype=np.uint64)
    count = int(rng.choice([0, 1, int(np.unpackbits(data[:8].view(np.uint8)).sum())]))
    ones = int(rng.integers(0, 9)) | int(rng.integers(0, 9)) << 16
    kinds = int(rng.integers(0, 16)) | int(rng.integers(0, 36)) << 8 | int(rng.integers(0, 2)) << 16
    table = np.array([[0, count, ones, kinds], [data.size - 2, 0, 0, 0]], np.uint32)
    found = []
    for kernels in (PLAIN, COMPILED):
        words = np.empty_like(old)
        wrong = kernels.apply_steps(data, table, 0, old.size, old, words, ROOM)
        found.append((wrong, words.tobytes() if wrong == 0 else b""))
    assert found[0] == found[1]


@given(st.integers(0, 2**20), st.booleans())
def test_golomb_steps_without_lower_parts_at_the_end_of_a_word(seed, heavy):
    """Numbers of no bits are read where the stream has ended."""
    rng = np.random.default_rng(seed)
    old = np.full(CHUNK, 0x3F80, np.uint16)
    new = old.copy()
    changed = rng.random(CHUNK) < 0.2
    changed[: CHUNK // 2] &= heavy
    new[changed] += rng.choice(np.array([1, 3, 200], np.uint16), int(changed.sum()), p=[0.9, 0.09, 0.01])
    new[-1] = 0x3F81
    data, table = encode(COMPILED, old, new)
    for kernels in (PLAIN, COMPILED):
        words, wrong = apply(kernels, data, table, old, 0, CHUNK)
        assert wrong == 0
        assert words.tobytes() == new.tobytes()
