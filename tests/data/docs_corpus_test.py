import json

import pytest

from variator_jax.data import docs_corpus
from variator_jax.data.docs_corpus import Installation
from variator_jax.errors import DataError


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """Makes an installation of the given files, with an empty cache."""
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "cache"))

    def write(files):
        for name, text in files.items():
            path = tmp_path / "site-packages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "stdlib").mkdir()
        return Installation(tmp_path / "stdlib", (tmp_path / "site-packages",))

    return write


def test_records_name_a_docstrings_owner_and_nothing_is_imported(installation):
    source = (
        '"""The module has its own text."""\nraise SystemExit("imported!")\n'
        'class Box:\n    """A box that holds many things."""\n'
        '    def open(self):\n        """Open the box and look inside."""\n'
    )
    broken = '"""This is a broken file."""\ndef ('
    files = {"pack/part/__init__.py": source, "pack/broken.py": broken}
    folder = docs_corpus.ensure_corpus(installation(files))
    records = docs_corpus.read_split(folder, "train")
    assert [(r["package"], r["module"], r["name"], r["kind"]) for r in records] == [
        ("pack", "pack.part", "", "module"),
        ("pack", "pack.part", "Box", "class"),
        ("pack", "pack.part", "Box.open", "function"),
    ]
    assert records[2]["text"] == "Open the box and look inside."
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {"read": 2, "broken": 1}
    assert sum(manifest["records"].values()) == 3


def test_tests_and_this_package_itself_are_left_out(installation):
    names = ("a/keep.py", "a/tests/no.py", "a/test_no.py", "a/no_test.py", "variator_jax/no.py")
    text = '"""This is a text with words."""\n'
    sources = docs_corpus.find_sources(installation(dict.fromkeys(names, text)))
    assert [source.relative for source in sources] == ["site/a/keep.py"]


def test_no_file_and_no_text_is_in_both_splits(tiny_installation):
    folder = docs_corpus.ensure_corpus(tiny_installation)
    train, validation = (docs_corpus.read_split(folder, split) for split in docs_corpus.SPLITS)
    modules = [{(r["package"], r["module"]) for r in part} for part in (train, validation)]
    assert not modules[0] & modules[1]
    assert not {r["text"] for r in train} & {r["text"] for r in validation}
    assert 0.02 < len(validation) / len(train + validation) < 0.12


def test_a_text_of_both_splits_stays_in_train_only(installation):
    one, two = (f'"""This is the text number {n}."""\n' for n in ("one", "two"))
    files = {f"p/{n}.py": text for n, text in enumerate([one] * 20 + [two] * 20)}
    folder = docs_corpus.ensure_corpus(installation(files))
    texts = [
        r["text"] for split in docs_corpus.SPLITS for r in docs_corpus.read_split(folder, split)
    ]
    assert sorted(texts) == ["This is the text number one.", "This is the text number two."]


def test_building_twice_gives_the_same_bytes_and_a_third_call_builds_nothing(
    tiny_installation, tmp_path, monkeypatch, capsys
):
    contents = []
    for name in ("one", "two"):
        monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / name))
        folder = docs_corpus.ensure_corpus(tiny_installation)
        contents.append([(folder / f"{split}.jsonl").read_bytes() for split in docs_corpus.SPLITS])
    assert contents[0] == contents[1] and all(contents[0])
    assert "first use" in capsys.readouterr().err
    # Nor does it when a package came or went.
    assert docs_corpus.ensure_corpus(tiny_installation._replace(site_folders=())) == folder
    assert capsys.readouterr().err == ""


def test_a_build_that_fails_leaves_no_folder(installation, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no docstring found below"):
        docs_corpus.ensure_corpus(installation({"a/b.py": "x = 1"}))
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="VARIATOR_CACHE"):
        docs_corpus.ensure_corpus()
    with pytest.raises(DataError, match="no split 'test'"):
        docs_corpus.read_split(tmp_path, "test")


def test_no_package_takes_more_than_its_share(monkeypatch):
    monkeypatch.setattr(docs_corpus, "_SOURCE_BYTES", 1000)
    sources = [
        docs_corpus.Source(str(n), f"{package}/{n}.py", package, None, 10)
        for package, count in (("giant", 500), ("small", 20))
        for n in range(count)
    ]
    chosen = docs_corpus.select_sources(sources)
    sizes = {p: sum(s.size for s, _ in chosen if s.package == p) for p in ("giant", "small")}
    assert sizes == {"giant": 800, "small": 200}
    assert {split for _, split in chosen} == {"train", "validation"}
