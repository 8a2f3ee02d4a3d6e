import copy
import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

from variator_jax import gin_utils
from variator_jax.data.batches import batches
from variator_jax.data.file_task import file_task, span_corruption_task_from_text
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import DocsVocabulary, byte_vocabulary, docs_vocabulary
from variator_jax.errors import DataError

TEMPLATE = "Sentence: {text} Is this positive?"
LABELS = ("no", "yes")
DAMAGED = gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20  # a header, then no deflate stream
LENGTHS = {"inputs": 64, "targets": 16}


def _write(path, rows):
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return str(path)


def _rows(count=60):
    return [{"text": f"the array number {i}", "label": i % 2} for i in range(count)]


def _texts(name, split):
    vocabulary = docs_vocabulary()
    found = []
    for batch in batches(name, split, 1, LENGTHS, repeat=False, shuffle=False):
        found.append(
            tuple(
                vocabulary.decode([int(t) for t in batch[key][0] if t > 1])
                for key in ("encoder_input_tokens", "decoder_target_tokens")
            )
        )
    return found


def test_a_classification_task_from_json_lines(tmp_path):
    name = file_task(_write(tmp_path / "mine.jsonl", _rows()), TEMPLATE, labels=LABELS)
    assert get_spec(name).kind == "classification" and get_spec(name).labels == LABELS
    train, validation = _texts(name, "train"), _texts(name, "validation")
    expected = {
        (f"Sentence: the array number {i} Is this positive?", LABELS[i % 2]) for i in range(60)
    }
    assert set(train) | set(validation) == expected
    assert not set(train) & set(validation) and 1 <= len(validation) <= 15


def test_the_same_call_again_is_fine_and_another_under_its_name_is_not(tmp_path):
    path = _write(tmp_path / "again.jsonl", _rows())
    arguments = {"labels": LABELS, "name": "file_again"}
    assert file_task(path, TEMPLATE, **arguments) == "file_again"
    assert file_task(path, TEMPLATE, **arguments) == "file_again"
    with pytest.raises(DataError, match="already registered"):
        file_task(path, "Other: {text}", **arguments)
    _write(tmp_path / "again.jsonl", _rows(70))
    with pytest.raises(DataError, match="already registered"):
        file_task(path, TEMPLATE, **arguments)


def test_a_copy_of_the_file_has_the_same_name_in_another_process(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    path = _write(tmp_path / "one" / "same.jsonl", _rows())
    copied = shutil.copy(path, tmp_path / "two")  # a new folder, a new time
    names = []
    for vocabulary in (byte_vocabulary(), docs_vocabulary()):
        names.append(file_task(path, TEMPLATE, labels=LABELS, vocabulary=vocabulary))
        names.append(span_corruption_task_from_text(path, vocabulary=vocabulary))
    code = (
        "from variator_jax.data import file_task, vocabulary\n"
        "for v in (vocabulary.byte_vocabulary(), vocabulary.docs_vocabulary()):\n"
        f"    print(file_task.file_task({copied!r}, {TEMPLATE!r}, labels={LABELS}, vocabulary=v))\n"
        f"    print(file_task.span_corruption_task_from_text({copied!r}, vocabulary=v))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == names, result.stderr


def test_what_makes_another_task_gives_another_name(tmp_path):
    path = _write(tmp_path / "other.jsonl", _rows())
    names = {
        file_task(path, "{text}", labels=LABELS),
        file_task(path, "{text}", labels=LABELS[::-1]),
        file_task(path, "{text}", labels=LABELS, vocabulary=byte_vocabulary()),
        file_task(path, "{text}", labels=LABELS, vocabulary=DocsVocabulary(extra_ids=10)),
        file_task(path, "Say: {text}", labels=LABELS),
    }
    _write(tmp_path / "other.jsonl", [*_rows()[:-1], {"text": "the array number 5!", "label": 1}])
    names.add(file_task(path, "{text}", labels=LABELS))
    assert len(names) == 6


def test_touching_the_file_changes_nothing(tmp_path):
    path = _write(tmp_path / "touched.jsonl", _rows())
    name = file_task(path, TEMPLATE, labels=LABELS)
    os.utime(path, (1, 1))
    assert file_task(path, TEMPLATE, labels=LABELS) == name


def test_a_tsv_splits_on_tabs_alone_and_labels_may_be_words_or_numbers(tmp_path):
    rows = ["text\tlabel", 'a "quoted, text\tyes', "other text\t0", "third one\tno", "x y\t1"]
    path = _write(tmp_path / "a.tsv", rows)
    name = file_task(path, "{text}", labels=LABELS, validation_path=path, name="file_tsv")
    assert _texts(name, "train") == [
        ('a "quoted, text', "yes"),
        ("other text", "no"),
        ("third one", "no"),
        ("x y", "yes"),
    ]
    assert _texts(name, "validation") == _texts(name, "train")


def test_a_dict_of_labels_maps_what_stands_in_the_file(tmp_path):
    rows = [
        {"text": "one text", "gold": "entailment"},
        {"text": "two text", "gold": "neutral"},
        {"text": "three text", "gold": "contradiction"},
    ]
    path = _write(tmp_path / "nli.jsonl", rows)
    labels = {"entailment": "yes", "neutral": "no", "contradiction": "no"}
    name = file_task(path, "{text}", labels=labels, label_field="gold", validation_path=path)
    assert [label for _, label in _texts(name, "train")] == ["yes", "no", "no"]
    assert get_spec(name).labels == ("yes", "no")


def test_jsons_truth_values_are_labels(tmp_path):
    path = _write(
        tmp_path / "t.jsonl", [{"text": "one", "label": True}, {"text": "two", "label": False}]
    )
    name = file_task(path, "{text}", labels=LABELS, validation_path=path)
    assert [label for _, label in _texts(name, "train")] == ["yes", "no"]


@pytest.mark.parametrize("target", ["summary", "{summary}"])
def test_without_labels_it_is_generation(tmp_path, target):
    rows = [{"text": f"some array {i}", "summary": f"array {i}"} for i in range(20)]
    name = file_task(_write(tmp_path / "g.jsonl", rows), "{text}", target=target)
    assert get_spec(name).kind == "generation"
    assert all(inputs == f"some {goal}" for inputs, goal in _texts(name, "train"))


def test_a_target_field_may_have_any_name(tmp_path):
    rows = ["text\t2\tthe end", "some array\ttwo\tnear", "an axis\t2nd\tfar"]
    path = _write(tmp_path / "names.tsv", rows)
    for target, answers in (("2", ["two", "2nd"]), ("the end", ["near", "far"])):
        name = file_task(path, "{text}", target=target, validation_path=path)
        assert [answer for _, answer in _texts(name, "train")] == answers


def test_equal_rows_are_never_in_both_splits(tmp_path):
    rows = [{"text": f"array {i % 30}", "label": i % 2} for i in range(300)]
    name = file_task(_write(tmp_path / "dup.jsonl", rows), "{text}", labels=LABELS)
    assert not set(_texts(name, "train")) & set(_texts(name, "validation"))
    assert len(_texts(name, "train") + _texts(name, "validation")) == 300


BAD_ROWS = [
    (b'{"text": "caf\xe9", "label": 0}', "broken UTF-8 at byte 14"),
    (b'{"text": "x", "label": 0', "broken JSON"),
    (b'["text"]', "expected a JSON object, found a list"),
    (b'{"txt": "x", "label": 0}', "no field 'text'. Did you mean 'txt'"),
    (b'{"text": "  ", "label": 0}', "field 'text' is empty"),
    (b'{"text": null, "label": 0}', "field 'text' is null"),
    (b'{"text": "x"}', "no field 'label'"),
    (b'{"text": "x", "label": 2}', "unknown label '2'"),
    (b'{"text": "x", "label": "yess"}', "unknown label 'yess'. Did you mean 'yes'"),
    (b'{"text": "\\ud800", "label": 0}', "half a surrogate"),
    (b'{"text": ' + b"9" * 5000 + b', "label": 0}', "an integer has too many digits"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    rows = _rows(20)
    path = _write(tmp_path / "bad.jsonl", [*rows[:6], row, "", *rows[6:]])
    with pytest.raises(DataError) as caught:
        file_task(path, TEMPLATE, labels=LABELS)
    assert f"{path}:7: " in str(caught.value) and message in str(caught.value)
    assert "1 of 21 rows are bad" in str(caught.value)


def test_tolerated_bad_rows_are_skipped_with_a_warning_and_not_one_more(tmp_path, caplog):
    path = _write(tmp_path / "bad.jsonl", [*_rows(20), *(row for row, _ in BAD_ROWS)])
    with pytest.raises(DataError, match="11 of 31 rows are bad, and 10 are tolerated"):
        file_task(path, TEMPLATE, labels=LABELS, tolerate_bad_rows=len(BAD_ROWS) - 1)
    with caplog.at_level("WARNING", logger="absl"):
        name = file_task(path, TEMPLATE, labels=LABELS, tolerate_bad_rows=len(BAD_ROWS))
    assert f"{path}:21: broken UTF-8" in caplog.text and f"{path}:30: " in caplog.text
    assert len(_texts(name, "train") + _texts(name, "validation")) == 20


def test_ten_bad_rows_are_listed_and_the_rest_counted(tmp_path):
    path = _write(tmp_path / "bad.jsonl", [*_rows(4), *["{"] * 25])
    with pytest.raises(DataError) as caught:
        file_task(path, TEMPLATE, labels=LABELS)
    assert str(caught.value).count(f"{path}:") == 11  # ten rows, and the file in front
    assert "and 15 more" in str(caught.value)


def test_columns_that_do_not_fit_the_header_are_bad_rows(tmp_path):
    path = _write(tmp_path / "bad.tsv", ["text\tlabel", "one\t1", "two\t1\tmore", "three"])
    with pytest.raises(DataError) as caught:
        file_task(path, "{text}", labels=LABELS)
    assert f"{path}:3: 3 columns, expected 2" in str(caught.value)
    assert f"{path}:4: 1 columns" in str(caught.value)


def test_bad_validation_rows_count_too(tmp_path):
    good = _write(tmp_path / "good.jsonl", _rows(4))
    bad = _write(tmp_path / "bad.jsonl", [*_rows(2), {"text": "x", "label": "?"}])
    with pytest.raises(DataError, match="bad.jsonl:3: unknown label"):
        file_task(good, TEMPLATE, labels=LABELS, validation_path=bad)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"template": "{txt}"}, "no row of .* has a field 'txt'. Did you mean 'text'"),
        ({"template": "{text"}, "is broken"),
        ({"template": "no field"}, "needs fields in braces"),
        ({"template": "{}"}, "needs fields in braces"),
        ({"template": "{text.x}"}, "needs fields in braces"),
        ({"template": "{0}"}, "needs fields in braces"),
        ({"template": "{text} {12}"}, "needs fields in braces"),
        ({"template": "{text:02d}"}, "has ':02d' after the field 'text'"),
        ({"template": "{text:{label}}"}, "after the field 'text'"),
        ({"template": "{text!q}"}, "has '!q' after the field 'text'"),
        ({"labels": None, "target": "{text!r}"}, "has '!r' after the field 'text'"),
        ({"labels": ("yes",)}, "two different verbalizers"),
        ({"labels": ("yes", "yes")}, "two different verbalizers"),
        ({"labels": "yes"}, "list or dict of words"),
        ({"labels": None}, "either labels .* or target"),
        ({"target": "text"}, "either labels .* or target"),
        ({"label_field": "lable"}, "no row of .* has a field 'lable'. Did you mean 'label'"),
        ({"labels": ("no", "never"), "vocabulary": byte_vocabulary()}, "both begin with token"),
        ({"vocabulary": "/nowhere/spiece.model"}, "no vocabulary file"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, message):
    path = _write(tmp_path / "rows.jsonl", _rows(20))
    with pytest.raises(DataError, match=message):
        file_task(path, **{"template": TEMPLATE, "labels": LABELS, **arguments})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mine.jsonn", b"", "no data file .*Did you mean 'mine.jsonl'"),
        ("mine.jsonl", b"\n \n", "is empty"),
        ("mine.tsv", b"text\tlabel\n", "has a header and no rows"),
        ("mine.tsv", b"text\ttext\nx\ty\n", "twice"),
        ("mine.csv", b"text,label\n", r"ends with '.csv'; expected .jsonl, .tsv"),
        ("mine.jsonl.gz", b"not gzip", "mine.jsonl.gz cannot be read"),
        ("mine.jsonl.gz", DAMAGED, "mine.jsonl.gz cannot be read"),
        ("mine.jsonl.gz", gzip.compress(b"text")[:-3], "mine.jsonl.gz cannot be read"),
        ("mine.jsonl", b'{"text": "x", "label": 0}\n', "one distinct row"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if name.endswith("jsonn"):
        (tmp_path / "mine.jsonl").write_text("{}")
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        file_task(str(path), "{text}", labels=LABELS)


@pytest.mark.parametrize("name", ["wiki.txt", "wiki.txt.gz", "wiki.jsonl"])
def test_span_corruption_of_the_users_text(tmp_path, name):
    lines = [f"the array number {i} has a shape and an axis" for i in range(200)]
    content = "\n".join(json.dumps({"text": x}) if "json" in name else x for x in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    task = span_corruption_task_from_text(str(tmp_path / name))
    assert get_spec(task).kind == "span_corruption"
    assert span_corruption_task_from_text(str(tmp_path / name)) == task
    lengths = {"inputs": 24, "targets": 16}
    batch = next(batches(task, "train", 8, lengths))
    assert (batch["encoder_input_tokens"] > 0).mean() > 0.9
    assert (batch["decoder_target_tokens"][:, 0] == docs_vocabulary().vocab_size - 1).all()
    assert next(batches(task, "validation", 1, lengths, repeat=False), None) is not None


def test_broken_lines_of_a_text_file_are_reported(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_bytes(b"good line\n\xff\xfe\nanother line\n")
    with pytest.raises(DataError, match="wiki.txt:2: broken UTF-8 at byte 1"):
        span_corruption_task_from_text(str(path))


def test_a_file_task_can_be_written_in_gin(tmp_path, fresh_gin):
    path = _write(tmp_path / "gin.jsonl", _rows())
    gin_utils.parse(
        ["vocabularies/docs.gin", "tasks/file.gin"],
        [
            f"TASK_FILE={os.fspath(path)}",
            f"TASK_TEMPLATE={TEMPLATE}",
            "TASK_LABELS=['no', 'yes']",
        ],
    )
    # Copying a reference is how gin evaluates one that is called.
    name = copy.deepcopy(gin_utils.macro("MIXTURE_OR_TASK_NAME"))
    assert get_spec(name).labels == ("no", "yes")
