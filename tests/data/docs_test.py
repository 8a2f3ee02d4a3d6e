"""The documentation: its corpus, the sentences of docstrings, and the tasks made of them."""

import json

import pytest

from variator_jax.commands import serving
from variator_jax.data import docs_corpus, docs_tasks
from variator_jax.data.docs_corpus import sentences
from variator_jax.data.docs_tasks import docs_examples_of
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import LABEL_WORDS
from variator_jax.errors import DataError


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Builds the corpus of an installation with the given files in an empty cache."""
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "cache"))
    folders = (tmp_path / "stdlib", tmp_path / "site-packages")
    monkeypatch.setattr(docs_corpus, "source_folders", lambda: folders)

    def build(files):
        for name, text in files.items():
            path = folders[1] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        folder = docs_corpus.ensure_corpus()
        return folder, [docs_corpus.read_split(folder, split) for split in docs_corpus.SPLITS]

    return build


def test_records_name_a_docstrings_owner_and_nothing_is_imported(corpus):
    source = (
        '"""The module has its own text."""\nraise SystemExit("imported!")\n'
        'class Box:\n    """A box that holds many things."""\n'
        '    def open(self):\n        """Open the box and look inside."""\n'
    )
    left_out = ("pack/tests/no.py", "pack/test_no.py", "pack/no_test.py", "variator_jax/no.py")
    broken = '"""This is a broken file."""\ndef ('
    files = {"pack/part/__init__.py": source, "pack/broken.py": broken}
    folder, (records, _) = corpus(files | dict.fromkeys(left_out, '"""This text has words."""'))
    assert [(r["package"], r["module"], r["name"], r["kind"]) for r in records] == [
        ("pack", "pack.part", "", "module"),
        ("pack", "pack.part", "Box", "class"),
        ("pack", "pack.part", "Box.open", "function"),
    ]
    assert records[2]["text"] == "Open the box and look inside."
    assert json.loads((folder / "manifest.json").read_text())["files"] == 2


def test_a_text_of_both_splits_stays_once(corpus):
    one, two = (f'"""This is the text number {n}."""\n' for n in ("one", "two"))
    _, splits = corpus({f"p/{n}.py": text for n, text in enumerate([one] * 20 + [two] * 20)})
    texts = [record["text"] for split in splits for record in split]
    assert sorted(texts) == ["This is the text number one.", "This is the text number two."]


def test_splits_are_by_file_and_building_is_repeatable(tmp_path, monkeypatch, capsys):
    contents = []
    for name in ("one", "two"):
        monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / name))
        folder = docs_corpus.ensure_corpus()
        contents.append([(folder / f"{split}.jsonl").read_bytes() for split in docs_corpus.SPLITS])
    assert contents[0] == contents[1] and "first use" in capsys.readouterr().err
    train, validation = ([json.loads(x) for x in part.splitlines()] for part in contents[0])
    modules = [{(r["package"], r["module"]) for r in part} for part in (train, validation)]
    assert not modules[0] & modules[1]
    assert 0.02 < len(validation) / len(train + validation) < 0.12
    # Nothing is built again, not even when a package came or went.
    monkeypatch.setattr(docs_corpus, "source_folders", lambda: (tmp_path,))
    assert docs_corpus.ensure_corpus() == folder and capsys.readouterr().err == ""


def test_a_failed_build_leaves_nothing_and_a_bad_cache_is_named(corpus, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no docstring found below"):
        corpus({"a/b.py": "x = 1"})
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="VARIATOR_CACHE"):
        docs_corpus.ensure_corpus()


def test_no_package_takes_more_than_its_share(monkeypatch):
    monkeypatch.setattr(docs_corpus, "_SOURCE_BYTES", 1000)
    names = [("giant", n) for n in range(500)] + [("small", n) for n in range(20)]
    sources = [docs_corpus.Source(str(n), f"{p}/{n}.py", p, None, 10) for p, n in names]
    chosen = docs_corpus.select_sources(sources)
    assert sum(source.size for source, _ in chosen if source.package == "giant") == 800
    assert sum(source.size for source, _ in chosen) == 1000
    assert {split for _, split in chosen} == {"train", "validation"}


SECTIONS = """Compute the mean of values.

Parameters
----------
a : array_like
    The numbers that we want to use here.

Notes
-----
The mean is taken over all axes.

>>> mean([1, 2, 3, 4, 5]) and then the rest of it
2.0
```
This is code within a fence here.
```
====== ======
name   value of it
====== ======

Args:
  x: This text is about an argument.
"""


def test_prose_becomes_sentences_and_everything_else_is_dropped():
    first = "Return the first item, e.g. Some value of it."
    second = "It is never None in this case."
    assert sentences(f"{first} It is never\n    None in this case.\n") == [first, second]
    prose = ["Compute the mean of values.", "The mean is taken over all axes."]
    assert sentences(SECTIONS) == prose
    marked = "Use :func:`~pkg.thing` or ``other`` with the *nice* `link <https://x.org>`_ to it."
    assert sentences(marked) == ["Use pkg.thing or other with the nice link to it."]
    others = ("x = [1, 2, 3]; y = {4: 5} ** 6", "Les donn\u00e9es que nous avons lues ici.", "")
    assert not any(map(sentences, others))


def _record(text, package="numpy", name="f", kind="function"):
    return {"package": package, "module": "m", "name": name, "kind": kind, "text": text}


@pytest.mark.parametrize("task", ["docs_topic", "docs_pair", "docs_name", "docs_recall"])
def test_splits_share_no_input_inputs_are_unique_and_labels_are_the_specs(task):
    train, validation = (docs_examples_of(task, split) for split in ("train", "validation"))
    inputs = [{e["inputs"] for e in examples} for examples in (train, validation)]
    assert all(inputs) and not inputs[0] & inputs[1]
    assert [len(train), len(validation)] == [len(texts) for texts in inputs]
    labels = get_spec(task).labels
    assert not labels or {e["targets"] for e in train} == set(labels)
    assert set(labels) <= set(LABEL_WORDS)


def test_pairs_occur_in_both_orders_and_the_answer_is_yes_for_the_written_one():
    one, two = "This is the opening sentence.", "That is the second one."
    examples = docs_tasks.pair_examples([_record(f"{one}\n{two}\nA third one here.")])
    expected = {f"First: {one} Second: {two}": "yes", f"First: {two} Second: {one}": "no"}
    assert {e["inputs"]: e["targets"] for e in examples} == expected


def test_recall_asks_for_numbered_words_of_a_passage_without_articles():
    text = "Returns the greatest common divisor of a list."
    examples = docs_tasks.recall_examples([_record(text)])
    words = "1 Returns 2 greatest 3 common 4 divisor 5 of 6 list"
    assert len(examples) == 3
    for example in examples:
        number, _, passage = example["inputs"].partition("? ")
        assert passage == words
        assert words.split()[2 * int(number) - 1] == example["targets"]


def test_topics_lose_the_words_that_give_them_away_and_ambiguous_texts_are_dropped():
    text = "Convert the numpy.ndarray to a tf.Tensor with jnp.asarray and keras_core for later use."
    (example,) = docs_tasks.topic_examples([_record(text)])
    assert example["targets"] == "numpy"
    given_away = ("numpy", "tf.", "jnp", "keras", "ndarray")
    assert not any(word in example["inputs"].lower() for word in given_away)
    both = "This very same text stands in more than one library here."
    assert docs_tasks.topic_examples([_record(both), _record(both, "jax")]) == []


def test_names_become_words():
    assert docs_tasks.name_words("Box.open_lid") == ["open", "lid"]
    assert docs_tasks.name_words("_HTTPServerError") == ["http", "server", "error"]
    unsuitable = ("Box.__init__", "a_b", "one_two_three_four_five", "conv2d")
    assert not any(map(docs_tasks.name_words, unsuitable))


def test_held_out_drops_a_pair_of_which_one_sentence_is_known():
    known, new = "This one is known already.", "Here is something quite new."
    pairs = (known, "This is the other one."), (known, new), ("Here is a beginning.", new)
    train, partly, fresh = (docs_tasks.pair_examples([_record("\n".join(p))]) for p in pairs)
    assert docs_tasks.held_out(train, partly + fresh, 10) == fresh
    assert docs_tasks.held_out(train, fresh, 1) == fresh[:1]


def test_the_quickstarts_tasks_are_those_its_backbone_was_tuned_on():
    topic, pair, name, _ = serving.quickstart_tasks()
    assert (topic.prompt, topic.labels) == (docs_tasks.TOPIC_PROMPT, tuple(docs_tasks.TOPICS))
    assert (pair.prompt, pair.labels) == (docs_tasks.PAIR_PROMPT, ("no", "yes"))
    assert name.prompt == docs_tasks.NAME_PROMPT
