import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
from task_batches import parsed_task, take, texts

from variator_jax.data.file_task import file_task, span_corruption_task_from_text
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import byte_vocabulary, docs_vocabulary
from variator_jax.errors import DataError

TEMPLATE = "Sentence: {text} Is this positive?"
LABELS = ("no", "yes")
DAMAGED = gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20  # a header, then no deflate stream


def _write(path, rows):
    lines = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return str(path)


def _rows(count=60):
    return [{"text": f"the array number {i}", "label": i % 2} for i in range(count)]


def test_a_tenth_of_the_rows_is_held_out_and_rows_of_one_input_stay_together(tmp_path):
    rows = [{"text": f"array {i % 30}", "label": i % 2} for i in range(300)]
    name = file_task(_write(tmp_path / "mine.jsonl", rows), TEMPLATE, labels=LABELS)
    assert get_spec(name).kind == "classification" and get_spec(name).labels == LABELS
    train, validation = texts(name), texts(name, "validation")
    expected = {(f"Sentence: array {i} Is this positive?", LABELS[i % 2]) for i in range(30)}
    assert set(train) | set(validation) == expected
    assert not set(train) & set(validation) and len(train + validation) == 300
    texts_of = [{"text": f"array {i % 30}", "out": f"answer {i}"} for i in range(300)]
    several = file_task(_write(tmp_path / "many.jsonl", texts_of), "{text}", target="{out}")
    ours, theirs = (dict(texts(several, split)).keys() for split in ("train", "validation"))
    assert len(ours | theirs) == 30 and theirs and not ours & theirs
    assert 1 <= len(set(validation)) <= 8
    # The same rows under another prompt, from a file with a name that no task may have.
    path = shutil.copy(tmp_path / "mine.jsonl", tmp_path / "my own (1).jsonl")
    other = texts(file_task(path, "{text}, {text}", labels=LABELS), "validation")
    assert [text.split(", ")[0] for text, _ in other] == [text[10:-18] for text, _ in validation]


def test_a_copy_of_the_file_has_the_same_name_in_another_process(tmp_path):
    (tmp_path / "two").mkdir()
    path = _write(tmp_path / "same.jsonl", _rows())
    copied = shutil.copy(path, tmp_path / "two")
    os.utime(copied, (1, 1))
    code = (
        "from variator_jax.data import file_task as f, vocabulary\n"
        "for v in (vocabulary.byte_vocabulary(), vocabulary.docs_vocabulary()):\n"
        f"    print(f.file_task(path, {TEMPLATE!r}, labels={LABELS}, vocabulary=v))\n"
        "    print(f.span_corruption_task_from_text(path, vocabulary=v))"
    )
    printed = []
    exec(code, {"path": path, "print": printed.append})
    command = [sys.executable, "-c", f"path = {copied!r}\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.split() == printed, result.stderr


def test_what_makes_another_task_gives_another_name(tmp_path):
    path = _write(tmp_path / "other.jsonl", _rows())
    changes = [{}, {"labels": list(LABELS)}, {"labels": LABELS[::-1]}, {"template": "Say: {text}"}]
    changes += [{"vocabulary": byte_vocabulary(n)} for n in (0, 125)]  # the first two are the same
    given = {"template": "{text}", "labels": LABELS}
    names = {file_task(path, **{**given, **changed}) for changed in changes}
    _write(tmp_path / "other.jsonl", [*_rows()[:-1], {"text": "the array number 5!", "label": 1}])
    assert len(names | {file_task(path, **given)}) == 6


TSV = ["text\tlabel", 'a "quoted, text\t1', "other text\t0", "third one\t0", "x y\t1"]
NLI = [{"text": f"text {gold}", "gold": gold} for gold in ("entailment", "neutral", "other")]
GOLD = {"entailment": "yes", "neutral": "no", "other": "no"}
NAMED = ["text\t2\tthe end", "some array\ttwo\tnear", "an axis\t2nd\tfar"]


@pytest.mark.parametrize("rows, arguments, targets", [
    (TSV, {"labels": LABELS}, ["yes", "no", "no", "yes"]),
    (NLI, {"labels": GOLD, "label_field": "gold"}, ["yes", "no", "no"]),
    (NAMED, {"target": "2"}, ["two", "2nd"]),
    (NAMED, {"target": "the end"}, ["near", "far"]),
    (NAMED, {"target": "the {text}"}, ["the some array", "the an axis"]),
])  # fmt: skip
def test_labels_and_targets_come_from_any_field(tmp_path, rows, arguments, targets):
    suffix = "jsonl" if isinstance(rows[0], dict) else "tsv"
    path = _write(tmp_path / f"rows.{suffix}", rows)
    name = file_task(path, "{text}", validation_path=path, **arguments)
    table = rows if suffix == "jsonl" else [{"text": row.split("\t")[0]} for row in rows[1:]]
    expected = [(row["text"], target) for row, target in zip(table, targets, strict=True)]
    assert texts(name) == texts(name, "validation") == expected
    assert get_spec(name).kind == ("classification" if "labels" in arguments else "generation")
    assert get_spec(name).labels in ((), LABELS, LABELS[::-1])


BAD_ROWS = [
    (b'{"text": "caf\xe9", "label": 0}', "'utf-8' codec can't decode byte 0xe9 in position 13"),
    (b'{"text": "x", "label": 0', "cannot be read: Expecting"),
    (b'["text"]', "expected a JSON object, found"),
    (b'{"txt": "x", "label": 0}', "no field 'text'. Did you mean 'txt'"),
    (b'{"text": "  ", "label": 0}', "field 'text' is empty"),
    (b'{"text": null, "label": 0}', "field 'text' is null"),
    (b'{"text": "x"}', "no field 'label'"),
    (b'{"text": "x", "label": 2}', "unknown label '2'"),
    (b'{"text": "x", "label": "yess"}', "unknown label 'yess'. Did you mean 'yes'"),
    (b'{"text": "\\ud800", "label": 0}', "half a surrogate"),
    (b'{"text": ' + b"9" * 5000 + b', "label": 0}', "cannot be read: Exceeds the limit"),
]


def test_bad_rows_are_named_by_file_and_line_and_ten_of_them_listed(tmp_path, caplog):
    rows = _rows(20)
    path = _write(tmp_path / "bad.jsonl", [*rows[:6], "", *(row for row, _ in BAD_ROWS), *rows[6:]])
    with pytest.raises(DataError) as caught:
        file_task(path, TEMPLATE, labels=LABELS, tolerate_bad_rows=len(BAD_ROWS) - 1)
    message = str(caught.value)
    assert "11 of 31 rows are bad; 10 are tolerated" in message and "and 1 more" in message
    lines = message.splitlines()[1:]
    for number, (line, (_, reason)) in enumerate(zip(lines, BAD_ROWS[:10], strict=False), start=8):
        assert line.startswith(f"  {path}:{number}: ") and reason in line
    with caplog.at_level("WARNING", logger="absl"):
        name = file_task(path, TEMPLATE, labels=LABELS, tolerate_bad_rows=len(BAD_ROWS))
    assert f"{path}:8: cannot be read" in caplog.text
    assert len(texts(name) + texts(name, "validation")) == 20
    _write(tmp_path / "bad.jsonl", [*rows, BAD_ROWS[-1][0]])
    good = _write(tmp_path / "good.jsonl", _rows(4))
    with pytest.raises(DataError, match=f"{path}:21: {BAD_ROWS[-1][1]}"):
        file_task(good, TEMPLATE, labels=LABELS, validation_path=path)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _rows(20))
    broken = ("{text", "no field", "{}", "{text.x}", "{text} {12}", "{text:02d}", "{text:{label}}")
    words = (("yes",), ("yes", "yes"), "yes", (1, 2))
    for arguments, message in (
        *(({"template": template}, "plain fields in braces") for template in broken),
        *(({"labels": labels}, "a list or dict of two different words") for labels in words),
        ({"template": "{txt}"}, "no field 'txt'. Did you mean 'text'"),
        ({"labels": None, "target": "{text!r}"}, "plain fields in braces"),
        ({"labels": None}, "either labels .* or target"),
        ({"target": "text"}, "either labels .* or target"),
        ({"label_field": "lable"}, "no field 'lable'. Did you mean 'label'"),
        ({"labels": ("no", "never"), "vocabulary": byte_vocabulary()}, "both begin with token"),
        ({"vocabulary": "/nowhere/spiece.model"}, "no vocabulary file"),
    ):
        with pytest.raises(DataError, match=message):
            file_task(path, **{"template": TEMPLATE, "labels": LABELS, **arguments})


def test_files_that_cannot_be_used_are_refused(tmp_path):
    for name, content, message in (
        ("mine.jsonl", b"\n \n", "has no rows"),
        ("mine.jsonl", b'{"text": "x", "label": 0}\n', "one distinct input"),
        ("mine.tsv", b"text\ttext\nx\ty\n", "twice"),
        ("mine.tsv", b"text\tlabel\none\t1\tmore\n", "mine.tsv:2: 3 columns, expected 2"),
        ("mine.csv", b"text,label\n", r"mine.csv: expected .jsonl, .tsv"),
        ("mine.jsonl.gz", DAMAGED, "mine.jsonl.gz cannot be read"),
        ("mine.jsonl.gz", gzip.compress(b"text")[:-3], "mine.jsonl.gz cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            file_task(str(tmp_path / name), "{text}", labels=LABELS)
    with pytest.raises(DataError, match="no data file .*Did you mean 'mine.csv'"):
        file_task(str(tmp_path / "mne.csv"), "{text}", labels=LABELS)


@pytest.mark.parametrize("name", ["wiki.txt.gz", "wiki.jsonl"])
def test_span_corruption_of_the_users_text(tmp_path, name, fresh_gin):
    lines = [f"the array number {i} has a shape and an axis" for i in range(200)]
    content = "\n".join(json.dumps({"text": x}) if "json" in name else x for x in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    task = span_corruption_task_from_text(str(tmp_path / name))
    files = ["vocabularies/docs.gin", "tasks/text.gin"]
    assert parsed_task(files, f"TEXT_FILE={tmp_path / name}") == task
    (batch,) = take(1, task, lengths={"inputs": 24, "targets": 16})
    assert (batch["encoder_input_tokens"] > 0).mean() > 0.9
    assert (batch["decoder_target_tokens"][:, 0] == docs_vocabulary().vocab_size - 1).all()


def test_file_tasks_can_be_written_in_gin(tmp_path, fresh_gin):
    path = _write(tmp_path / "gin.jsonl", _rows())
    bindings = [f"TASK_FILE={path}", f"TASK_TEMPLATE={TEMPLATE}", "TASK_LABELS=['no', 'yes']"]
    task = parsed_task(["vocabularies/docs.gin", "tasks/file.gin"], *bindings)
    assert get_spec(task).labels == ("no", "yes")
