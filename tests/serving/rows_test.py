"""Windows of a file of texts, rows that cannot be encoded, and the shapes of batches."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from variator_jax.errors import VariatorError
from variator_jax.serving.engine import EngineLimits
from variator_jax.serving.rows import (
    RowError,
    Texts,
    make_batches,
    read_windows,
    row_ids,
    suffix_of,
)
from variator_jax.serving.tasks import Cut, TaskConfig, token_ids
from variator_jax.texts import ByteTokenizer

BYTES = ByteTokenizer(384)


def ids_of(line, suffix=".jsonl", **texts):
    return row_ids(line, suffix, BYTES, Texts(**texts))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_windows_have_numbered_lines_and_end_where_the_file_does(tmp_path, name):
    content = b'\xef\xbb\xbf"a"\n"b"\n  \n"c"\r\n"d"'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    first, second = read_windows(tmp_path / name, 3)
    assert first.lines == [(1, b'"a"'), (2, b'"b"'), (4, b'"c"')]
    assert second.lines == [(5, b'"d"')]
    assert second.bytes_read == (tmp_path / name).stat().st_size
    (other,) = read_windows(tmp_path / name, 9)
    assert len({first.digest, second.digest, other.digest}) == 3


def test_files_of_other_formats_and_broken_ones_are_refused(tmp_path):
    (tmp_path / "a.csv").touch()
    for name, reason in {"a.csv": "expected .jsonl or .txt", "b.txt": "no file"}.items():
        with pytest.raises(VariatorError, match=reason):
            suffix_of(tmp_path / name)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text\n" * 99)[:-9])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    for name in ("a.txt.gz", "b.txt.gz"):
        with pytest.raises(VariatorError, match="cannot be read"):
            list(read_windows(tmp_path / name, 9))


def test_the_text_of_a_row_is_a_field_a_string_or_the_line():
    expected = BYTES.encode("to: fox"), False
    for line, suffix in {b'{"t": "fox"}': ".jsonl", b'"fox"': ".jsonl", b"fox": ".txt"}.items():
        assert ids_of(line, suffix, field="t", prompt="to: {text}") == expected


@pytest.mark.parametrize(("line", "reason"), [
    (b"{", "cannot be read"),
    (b'"\xff"', "cannot be read"),
    (b'{"txt": "a"}', "no field 'text'. Did you mean 'txt'"),
    (b"[1]", "expected a text"),
    (b"NaN", "expected a text"),
    (b'"  "', "empty"),
    (b'"\\ud800"', "surrogate"),
    (b'"<extra_id_999>"', "sentinels go from"),
    (b'"' + b"a" * 600 + b'"', "601 tokens; the longest has 512"),
])  # fmt: skip
def test_rows_without_a_text_are_refused_with_the_reason(line, reason):
    with pytest.raises(RowError, match=reason):
        ids_of(line)


def test_longer_texts_lose_their_end_where_that_is_asked_for_but_the_prompt_stays():
    row = json.dumps("abcdef" * 9).encode()
    task = TaskConfig("embed", "embed", "q: {text} a:")
    expected = token_ids(task, "abcdef" * 9, BYTES, Cut(20, allowed=True))  # as the server does
    assert ids_of(row, max_length=20, truncate=True, prompt=task.prompt) == (expected, True)
    assert ids_of(b'"abc"', max_length=4, truncate=True) == (BYTES.encode("abc"), False)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 200))
def test_batches_hold_each_row_once_in_one_shape_for_each_length(lengths, budget):
    rows = [[2 + i] * n for i, n in enumerate(lengths)]
    seen, shapes = [], set()
    limits = EngineLimits((8, 16, 40), budget, budget)
    for chosen, tokens in make_batches(rows, limits):
        shapes.add(tokens.shape)
        assert tokens.size <= budget or len(tokens) == 1
        assert tokens.shape[1] in (8, 16, 40)
        for row, ids in zip(chosen, tokens, strict=False):
            assert list(np.trim_zeros(ids)) == rows[row]
        assert not tokens[len(chosen) :].any()
        seen += [*chosen]
    assert sorted(seen) == list(range(len(rows)))
    assert len({length for _, length in shapes}) == len(shapes)
