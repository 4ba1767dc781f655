"""Rows read through a map equal those that plain indexing gives, whatever part of them is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.small_models import representable
from tests.token_models import rounded

from rlmerge.checkpoint.row_maps import MEAN, ZERO, Mapper, RowMap, Rows, RowTable, count_origins
from rlmerge.execute import rows as reading
from rlmerge.execute.rows import RowReader, runs
from rlmerge.kernels import load_kernels
from rlmerge.plan import GatheredPlace, Place

WIDTH = {"F32": 4, "BF16": 2, "F16": 2}


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of fp32 values that the dtype holds."""
    if dtype == "BF16":
        return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8).reshape(-1)
    kind = np.float16 if dtype == "F16" else np.float32
    return np.ascontiguousarray(values.astype(kind)).view(np.uint8).reshape(-1)


@st.composite
def cases(draw):
    """Models of several dtypes, a map of rows of them, zeros and means, and a range of coordinates."""
    columns = draw(st.sampled_from([1, 3, 8]))
    dtypes = draw(st.lists(st.sampled_from(["F32", "BF16", "F16"]), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    models = [representable(rng.standard_normal((rng.integers(1, 9), columns)), dtype) for dtype in dtypes]
    any_row = st.integers(0, len(models) - 1).flatmap(
        lambda m: st.integers(0, len(models[m]) - 1).map(lambda row: (m, row))
    )
    means = draw(st.lists(st.lists(any_row, min_size=1, max_size=6), max_size=2))
    kinds = [any_row, st.just((ZERO, 0))] + ([st.integers(0, len(means) - 1).map(lambda n: (MEAN, n))] if means else [])
    # runs of neighbours, which chance alone seldom draws
    entries = draw(st.lists(st.one_of(*kinds), min_size=1, max_size=8))
    entries = [
        (m, row + (k if m >= 0 else 0)) for m, row in entries for k in range(3) if m < 0 or row + k < len(models[m])
    ]
    dtype, size = draw(st.sampled_from(["F32", "BF16", "F16"])), len(entries) * columns
    start = draw(st.integers(0, size - 1))
    return dtypes, models, entries, means, dtype, start, draw(st.integers(start + 1, size))


def as_map(entries) -> RowMap:
    origin, row = np.array(entries, np.int64).reshape(-1, 2).T
    return RowMap(origin.astype(np.int32), row.copy())


@given(cases())
def test_a_range_of_gathered_rows(case):
    dtypes, models, entries, means, dtype, start, stop = case
    files = [stored(model, kind) for model, kind in zip(models, dtypes)]
    places = tuple(Place(k, 0, kind, file.size) for k, (kind, file) in enumerate(zip(dtypes, files)))

    def read(place, first, out):
        assert first + out.size <= files[place.file].size
        out[:] = files[place.file][first : first + out.size]

    table = RowTable((as_map(entries),), tuple(map(as_map, means)))
    columns, width = models[0].shape[1], WIDTH[dtype]
    place = GatheredPlace(0, 0, dtype, len(entries) * columns * width, rows=0, origins=places)
    lines = []
    for origin, row in entries:
        line = np.zeros(columns)
        if origin >= 0:
            line = models[origin][row].astype(np.float64)
        elif origin == MEAN:
            for m, r in means[row]:
                line = line + models[m][r]
            line = line / len(means[row])
        lines.append(rounded(line, dtype))
    expected = stored(np.array(lines, np.float32), dtype)[start * width : stop * width]
    for kernels in ("numpy", "numba"):
        data = np.full((stop - start) * width, 255, np.uint8)
        RowReader(table, load_kernels(kernels), read).read_into(place, start * width, data)
        assert data.tobytes() == expected.tobytes(), kernels


def test_neighbours_are_read_at_once():
    entries = [(0, 3), (0, 4), (0, 5), (0, 9), (1, 10), (1, 11), (ZERO, 0), (ZERO, 7), (MEAN, 1), (MEAN, 1), (MEAN, 0)]
    assert list(runs(as_map(entries), 0, 11)) == [
        (0, 3, 0, 3), (3, 4, 0, 9), (4, 6, 1, 10), (6, 8, ZERO, 0), (8, 10, MEAN, 1), (10, 11, MEAN, 0),
    ]  # fmt: skip
    assert list(runs(as_map(entries), 1, 2)) == [(1, 2, 0, 4)]
    assert list(runs(as_map(entries), 4, 4)) == []


def test_means_of_many_rows_are_read_in_pieces(monkeypatch):
    """The same sum whatever the pieces, and never more than a piece at once."""
    values = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    raw, asked = stored(values, "F32"), []

    def read(place, first, out):
        asked.append(out.size)
        out[:] = raw[first : first + out.size]

    table = RowTable((as_map([(MEAN, 0)] * 3),), (as_map([(0, row) for row in range(500)]),))
    place = GatheredPlace(0, 0, "F32", 3 * 16, rows=0, origins=(Place(0, 0, "F32", raw.size),))
    results = []
    for piece in (2**20, 160, 16):
        monkeypatch.setattr(reading, "PIECE", piece)
        asked.clear()
        data = np.empty(48, np.uint8)
        RowReader(table, load_kernels("numpy"), read).read_into(place, 0, data)
        assert max(asked) <= max(piece, 16)
        assert sum(asked) == raw.size  # once for three rows
        results.append(data.tobytes())
    assert len(set(results)) == 1


TOKENS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 11), max_size=8).map(
    lambda found: {token: row for row, token in {row: token for token, row in found.items()}.items()}
)


@given(st.lists(TOKENS, min_size=1, max_size=4), TOKENS, st.booleans(), st.data())
def test_maps_follow_the_rule(vocabs, out, has_base, data):
    """Own rows first; else the base's, else the only one's, else the mean; rows without a token are padding."""
    counts = [data.draw(st.integers(1 + max(vocab.values(), default=0), 12)) for vocab in vocabs]
    rows = data.draw(st.integers(1 + max(out.values(), default=0), 14))
    if not vocabs[0]:
        vocabs[0] = {"a": 0}
    models = [Rows(vocab, count) for vocab, count in zip(vocabs, counts)]
    mapper = Mapper(models, out, rows, 0 if has_base else None, 0, [0], {}, frozenset())
    for number, entry in enumerate(mapper.maps()):
        for row in range(rows):
            token = next((t for t, r in out.items() if r == row), None)
            found = int(entry.origin[row]), int(entry.row[row])
            if token is None:
                spare = [m for m in (number, 0) if row < counts[m] and row not in vocabs[m].values()]
                if spare:
                    assert found == (spare[0], row)
                else:
                    members = mapper.means[found[1]]
                    assert found[0] == MEAN
                    assert sorted(members.row.tolist()) == sorted(set(vocabs[0].values()))
                continue
            having = [(m, vocab[token]) for m, vocab in enumerate(vocabs) if token in vocab]
            if token in vocabs[number]:
                assert found == (number, vocabs[number][token])
            elif not having:
                assert found[0] == ZERO
                assert token in mapper.nowhere
            elif len(having) == 1 or (has_base and having[0][0] == 0):
                assert found == having[0]
            else:
                assert found[0] == MEAN
                members = mapper.means[found[1]]
                assert list(zip(members.origin.tolist(), members.row.tolist())) == having


def test_identity_and_counts():
    entry = as_map([(1, 0), (1, 1), (1, 2)])
    assert entry.is_identity(1, 3)
    assert not entry.is_identity(1, 4)
    assert not entry.is_identity(0, 3)
    assert not as_map([(1, 0), (1, 2), (1, 1)]).is_identity(1, 3)
    assert entry.only(1).is_identity(0, 3)
    assert (as_map([(0, 0), (1, 1)]).only(1).origin == [ZERO, 0]).all()
    mixed = as_map([(0, 0), (1, 1), (1, 5), (ZERO, 0), (MEAN, 0)])
    assert count_origins(mixed, 0, "model {}".format) == {"model 1": 2, "zeros": 1, "means": 1}


@pytest.mark.parametrize("change", [
    lambda maps, means: (maps[::-1], means), lambda maps, means: (means, maps), lambda maps, means: (maps, ()),
    lambda maps, means: ((as_map([(0, 2), (0, 0)]), maps[1]), means),
    lambda maps, means: ((as_map([(1, 1), (0, 0)]), maps[1]), means),
])  # fmt: skip
def test_another_table_has_another_digest(change):
    maps, means = (as_map([(0, 1), (0, 0)]), as_map([(MEAN, 0), (ZERO, 0)])), (as_map([(0, 0), (1, 1)]),)
    assert RowTable(maps, means).digest() == RowTable(tuple(maps), tuple(means)).digest()
    assert RowTable(*change(maps, means)).digest() != RowTable(maps, means).digest()
