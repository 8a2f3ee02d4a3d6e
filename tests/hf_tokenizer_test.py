"""Folders of transformers' tokenizers: ids as AutoTokenizer's, or a refusal by name."""

import dataclasses
import json
import pickle
import sys

import pytest
from hf_files import save_hf
from pieces import pieces
from tiny_model import BACKBONE

from variator_jax import VariatorError, VariatorModel
from variator_jax.backbones.t5 import get_config
from variator_jax.data._tf import tf
from variator_jax.data.span_corruption import corrupt_spans
from variator_jax.data.vocabulary import fingerprint, load_vocabulary, train_sentencepiece
from variator_jax.hf_tokenizer import find_vocabulary
from variator_jax.store import load_backbone, save_backbone
from variator_jax.store.backbone import open_folder
from variator_jax.texts import load_tokenizer
from variator_jax.train.checks import check_vocabulary

transformers = pytest.importorskip("transformers")

TEXTS = (
    "the quick <hl> brown <hl>fox<sep> jumps.",
    "two\nlines   and\ttab \n",
    "fox<extra_id_0>dog <extra_id_1>. <extra_id_99>",
    "héllo ﬁne ½ Ａ 日本語 👩‍👩‍👧 a​b İ",
    *("", "   ", "</s> <pad>  <unk> x", "the lazy </s>"),
    *(" <HL> <b> x<b>y <word> a<word>", "The Dog <sep> "),
)
ADDED = {
    "<hl>": {},
    "<sep>": {"lstrip": True, "rstrip": True, "special": True},
    "<b>": {"lstrip": True, "normalized": False},
}


def _folder(path, kind, added):
    """A folder that transformers saves, with tokens added to it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "mt5" if kind == "mt5" else "t5"}))
    settings = {"tokenizer_class": "ByT5Tokenizer" if kind == "byt5" else "T5Tokenizer"}
    if kind != "byt5":
        (path / "spiece.model").write_bytes(pieces(100 if kind == "mt5" else 0))
        settings["extra_ids"] = 0 if kind == "mt5" else 100
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    tokens = [transformers.AddedToken(name, **flags) for name, flags in ADDED.items()]
    tokenizer.add_tokens(tokens if added else [])
    tokenizer.save_pretrained(str(path))
    return path


def _edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _assert_equal_ids(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = load_tokenizer(find_vocabulary(folder))
    assert ours.size == len(theirs) or ours.size == 384
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
    return ours, theirs


@pytest.mark.parametrize("alone", [False, True], ids=["beside the others", "alone"])
@pytest.mark.parametrize("added", [False, True], ids=["plain", "added"])
@pytest.mark.parametrize("kind", ["t5", "mt5", "byt5"])
def test_ids_are_those_of_transformers(kind, added, alone, tmp_path):
    folder = _folder(tmp_path / "hf", kind, added)
    if alone:
        (folder / "spiece.model").unlink(missing_ok=True)
    if alone and kind == "t5":
        (folder / "tokenizer_config.json").unlink()
    ours, theirs = _assert_equal_ids(folder)
    assert list(ours.added) == (list(ADDED) if added else [])
    ids = ours.encode("the <hl> fox <extra_id_0> dog")
    assert ours.decode([*ids, 9, 0]) == theirs.decode(ids[:-1])


def test_pieces_alone_give_the_ids_of_transformers_or_refuse_the_text(tmp_path):
    (tmp_path / "spiece.model").write_bytes(pieces())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    ours = load_tokenizer(find_vocabulary(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    texts = [*TEXTS[:2], *TEXTS[3:6], "fox<extra_id_0> dog <extra_id_99>", "< /s> <s> </S> <pad"]
    for text in texts:
        assert ours.encode(text) == theirs(text).input_ids, text
    for text in ("a</s>b", "the lazy </s>", "</s> <pad>", "x <unk>", "<pad>"):
        with pytest.raises(VariatorError, match="letters to a spiece.model, id . to transformers"):
            ours.encode(text)


def _older(content):
    sequence = {"type": "Sequence", "normalizers": [content["normalizer"]]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content.update(normalizer=sequence, pre_tokenizer=metaspace, truncation=truncation)


def _of_class(name, **more):
    return lambda content: content.update(tokenizer_class=name, **more)


@pytest.mark.parametrize(("file", "change"), [
    ("tokenizer.json", _older),
    ("tokenizer_config.json", _of_class("T5TokenizerFast")),
    ("tokenizer_config.json", _of_class("PreTrainedTokenizerFast")),
    ("tokenizer_config.json", _of_class("T5Tokenizer", extra_special_tokens=["<word>"])),
    ("tokenizer_config.json", _of_class("T5Tokenizer", sep_token="<word>")),
    ("tokenizer_config.json", _of_class("T5Tokenizer", added_tokens_decoder={})),
])  # fmt: skip
def test_what_transformers_passes_over_or_adds_itself(file, change, tmp_path):
    folder = _folder(tmp_path / "hf", "t5", added=True)
    _edit(folder / file, change)
    _assert_equal_ids(folder)


BYT5 = {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}}


@pytest.mark.parametrize(("kind", "files", "words"), [
    ("t5", {"added_tokens.json": {"<word>": 220}}, "adds the token '<word>'.*save_pretrained"),
    ("t5", {"special_tokens_map.json": {"mask_token": "<word>"}}, "adds the token '<word>'"),
    ("t5", {"tokenizer_config.json": {"extra_special_tokens": ["<word>"]}}, "adds the token"),
    ("t5", {"tokenizer_config.json": {"added_tokens_decoder": {"7": 1}}}, "cannot be read"),
    ("t5", {"tokenizer.json": {"model": {"type": "BPE"}}}, "is not a tokenizer of a T5"),
    ("t5", {"tokenizer_config.json": []}, "is not a JSON object"),
    ("byt5", {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}, "are missing"),
    ("byt5", BYT5 | {"added_tokens.json": {"<word>": 384}}, "adds '<word>' to ByT5's tokens"),
])  # fmt: skip
def test_what_cannot_be_read_with_equal_ids_is_refused_by_name(kind, files, words, tmp_path):
    if kind == "t5":
        (tmp_path / "spiece.model").write_bytes(pieces())
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(VariatorError, match=words):
        load_tokenizer(find_vocabulary(tmp_path))


def test_ids_that_contradict_the_file_are_refused(tmp_path):
    folder = _folder(tmp_path / "hf", "t5", added=False)
    listed = {"900": {"content": "<word>"}}
    _edit(folder / "tokenizer_config.json", lambda x: x.update(added_tokens_decoder=listed))
    with pytest.raises(VariatorError, match="has '<word>' as id 2.*; expected 900"):
        load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["t5", "byt5"])
def test_folders_keep_the_vocabulary_and_its_ids(kind, tmp_path, monkeypatch):
    folder = _folder(tmp_path / "hf", kind, added=True)
    file = find_vocabulary(folder)
    save_backbone(tmp_path / "ours", BACKBONE.config, BACKBONE.params, file)
    save_hf(tmp_path / "theirs", dataclasses.replace(BACKBONE, vocabulary_file=file))
    expected = load_tokenizer(file, 400).encode(TEXTS[0])
    for name in ("ours", "theirs"):
        loaded = load_backbone(tmp_path / name)
        assert load_tokenizer(loaded.vocabulary_file).encode(TEXTS[0]) == expected
        names = {file.name for file in (tmp_path / name).iterdir()}
        assert {file.name for file in folder.iterdir()} <= names | {"config.json"}
    save_backbone(tmp_path / "ours", BACKBONE.config, BACKBONE.params, file)
    if kind == "t5":
        model = VariatorModel(load_backbone(tmp_path / "ours"))
        assert model.tokenize(TEXTS[0])[0].tolist() == expected
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(VariatorError, match="pip install tokenizers"):
            load_tokenizer(file)
        (tmp_path / "ours" / "tokenizer.json").write_text("{}")
        with pytest.raises(VariatorError, match="tokenizer.json"):
            open_folder(tmp_path / "ours", verify=False)


@pytest.mark.parametrize("kind", ["t5", "mt5", "byt5"])
def test_tasks_take_the_folder_as_their_vocabulary(kind, tmp_path):
    folder = _folder(tmp_path / "hf", kind, added=True)
    vocabulary, file = load_vocabulary(folder), find_vocabulary(folder)
    texts = tf.data.Dataset.from_tensor_slices(list(TEXTS)).map(vocabulary.encode_tf)
    for text, ids in zip(TEXTS, texts.as_numpy_iterator(), strict=True):
        assert [*ids, 1] == [*vocabulary.encode(text), 1] == load_tokenizer(file).encode(text)
    ids = vocabulary.encode("the <hl> dog")
    (decoded,) = vocabulary.decode_tf(tf.constant([ids])).numpy()
    assert vocabulary.decode([*ids, 1, 5]) == decoded.decode()
    assert vocabulary == pickle.loads(pickle.dumps(vocabulary))
    assert len(fingerprint(vocabulary)) == 64
    rows = tf.data.Dataset.from_tensors({"targets": tf.fill([1, 30], 9)})
    feature = type("Feature", (), {"vocabulary": vocabulary})
    if kind == "byt5":
        with pytest.raises(VariatorError, match="count up from <extra_id_0>"):
            corrupt_spans(rows, {"targets": feature})
        return
    corrupted = next(corrupt_spans(rows, {"targets": feature}).as_numpy_iterator())
    name = "▁<extra_id_0>" if kind == "mt5" else "<extra_id_0>"
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert max(corrupted["inputs"]) == theirs.convert_tokens_to_ids(name)


@pytest.mark.parametrize("added", [False, True], ids=["plain", "added"])
def test_a_task_of_other_ids_is_refused_before_it_trains(added, tmp_path):
    folder, config = _folder(tmp_path / "hf", "t5", added), get_config("nano", vocab_size=300)
    file, other = folder / "tokenizer.json", load_vocabulary(folder / "spiece.model")
    check_vocabulary("t", load_vocabulary(folder), config, file)
    if not added:
        check_vocabulary("t", other, config, file)
        (tmp_path / "other.model").write_bytes(train_sentencepiece(["one two"] * 9, 110))
        other = load_vocabulary(tmp_path / "other.model")
    with pytest.raises(VariatorError, match="another vocabulary.*Set VOCABULARY.*tokenizer.json"):
        check_vocabulary("t", other, config, file)
