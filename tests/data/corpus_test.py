import dataclasses
import json

import pytest

from variator_jax.data import corpus, docstrings
from variator_jax.data.docstrings import Installation
from variator_jax.errors import DataError


def _texts(folder, split):
    return [record["text"] for record in corpus.read_split(folder, split)]


def _installation(root, files):
    for name, text in files.items():
        path = root / "site-packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "stdlib").mkdir(exist_ok=True)
    return Installation(root / "stdlib", (root / "site-packages",), (("p", "1"),), "3.0")


def test_records_say_where_a_docstring_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "cache"))
    source = (
        '"""The module has its own text."""\n'
        'class Box:\n    """A box that holds many things."""\n'
        '    def open(self):\n        """Open the box and look inside."""\n'
    )
    folder = corpus.ensure_corpus(_installation(tmp_path, {"pack/part/__init__.py": source}))
    records = corpus.read_split(folder, "train")
    assert [(r["package"], r["module"], r["name"], r["kind"]) for r in records] == [
        ("pack", "pack.part", "", "module"),
        ("pack", "pack.part", "Box", "class"),
        ("pack", "pack.part", "Box.open", "function"),
    ]
    assert records[2]["text"] == "Open the box and look inside."


def test_nothing_is_imported_and_broken_files_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "cache"))
    good = '"""This text is found in the file."""\nraise SystemExit("imported!")\n'
    folder = corpus.ensure_corpus(
        _installation(
            tmp_path, {"a/good.py": good, "a/broken.py": '"""This is a broken file."""\ndef ('}
        )
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {"read": 2, "broken": 1}
    assert manifest["package_versions"] == {"p": "1"}
    assert sum(manifest["records"].values()) == 1


def test_tests_and_this_package_itself_are_left_out(tmp_path):
    text = '"""This is a text with words."""\n'
    installation = _installation(
        tmp_path,
        {
            "a/keep.py": text,
            "a/tests/no.py": text,
            "a/test_no.py": text,
            "variator_jax/no.py": text,
        },
    )
    assert [s.relative for s in docstrings.find_sources(installation)] == ["site/a/keep.py"]


def test_no_file_and_no_text_is_in_both_splits(tiny_installation):
    folder = corpus.ensure_corpus(tiny_installation)
    records = {split: corpus.read_split(folder, split) for split in corpus.SPLITS}
    modules = {split: {(r["package"], r["module"]) for r in rs} for split, rs in records.items()}
    assert not modules["train"] & modules["validation"]
    assert not set(_texts(folder, "train")) & set(_texts(folder, "validation"))
    share = len(records["validation"]) / (len(records["train"]) + len(records["validation"]))
    assert 0.02 < share < 0.12


def test_a_text_of_both_splits_stays_in_train_only():
    def record(split, text):
        return {"split": split, "text": text}

    kept = docstrings.deduplicate(
        [
            record("validation", "one"),
            record("validation", "two"),
            record("validation", "two"),
            record("train", "one"),
            record("train", "one"),
        ]
    )
    assert [r["text"] for r in kept["train"]] == ["one"]
    assert [r["text"] for r in kept["validation"]] == ["two"]


def test_building_twice_gives_the_same_bytes(tiny_installation, tmp_path, monkeypatch):
    contents = []
    for name in ("one", "two"):
        monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / name))
        folder = corpus.ensure_corpus(tiny_installation)
        contents.append([(folder / f"{split}.jsonl").read_bytes() for split in corpus.SPLITS])
    assert contents[0] == contents[1] and all(contents[0])


def test_the_second_call_builds_nothing_even_when_a_package_changed(
    tiny_installation, monkeypatch, capsys
):
    first = corpus.ensure_corpus(tiny_installation)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "extract", None)
        assert corpus.ensure_corpus(tiny_installation) == first
    newer = dataclasses.replace(tiny_installation, packages=(("numpy", "2"), ("scipy", "2")))
    assert corpus.ensure_corpus(newer) == first
    assert capsys.readouterr().err == ""


def test_a_build_that_fails_leaves_no_folder(tiny_installation, tmp_path, monkeypatch):
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(docstrings, "deduplicate", lambda records: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpus.ensure_corpus(tiny_installation)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_package_takes_more_than_its_share(monkeypatch):
    monkeypatch.setattr(docstrings, "_SOURCE_BYTES", 1000)
    sources = [
        docstrings.Source(package, f"{package}/{n}.py", None, 10)
        for package, count in (("giant", 500), ("small", 20))
        for n in range(count)
    ]
    chosen = list(docstrings.select_sources(sources))
    sizes = {p: sum(s.size for s in chosen if s.package == p) for p in ("giant", "small")}
    assert sizes == {"giant": 800, "small": 200}
    assert {s.split for s in chosen} == {"train", "validation"}


def test_a_cache_folder_that_cannot_be_made_and_an_unknown_split(
    tiny_installation, tmp_path, monkeypatch
):
    with pytest.raises(DataError, match="no split 'test'"):
        corpus.read_split(tmp_path, "test")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="VARIATOR_CACHE"):
        corpus.ensure_corpus(tiny_installation)
