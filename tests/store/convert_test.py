"""`variator convert` between backbones' formats: every bit kept, and options that go together."""

import dataclasses
import weakref

import numpy as np
import pytest
import small_t5
import t5x_files
from hf_files import save_hf

from variator_jax import cli
from variator_jax.errors import CheckpointError
from variator_jax.store import hugging_face, load_backbone, save_backbone
from variator_jax.store.backbone import Stream
from variator_jax.store.formats import convert

FORMATS = ("hf", "t5x", "variator")


@pytest.fixture
def backbone(tmp_path):
    (tmp_path / "some.model").write_bytes(b"any SentencePiece model")
    return small_t5.backbone(small_t5.GATED, vocabulary_file=tmp_path / "some.model")


@pytest.fixture
def sources(backbone, tmp_path):
    """The same backbone in every format, T5X's with scanned layers."""
    save_hf(tmp_path / "hf", backbone)
    save_backbone(tmp_path / "variator", backbone.config, backbone.params, backbone.vocabulary_file)
    tree = t5x_files.t5x_tree(backbone.config, backbone.params, "scanned")
    t5x_files.write_legacy(tmp_path / "t5x" / "checkpoint_5", tree)
    return tmp_path


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_pair_of_formats_keeps_every_bit(source, target, sources, backbone):
    text = convert(source, target, sources / source, sources / "out")
    loaded = load_backbone(sources / "out")
    small_t5.assert_same(loaded.params, backbone.params)
    assert loaded.fingerprint == backbone.fingerprint and backbone.fingerprint in text
    kept = "t5x" not in (source, target)  # T5X keeps no vocabulary
    assert (loaded.vocabulary_file is not None) == kept


@pytest.mark.parametrize("target", FORMATS)
def test_casting_on_the_way(target, sources, backbone):
    convert("hf", target, sources / "hf", sources / "out", dtype="bf16")
    loaded = load_backbone(sources / "out")
    assert {x.dtype.name for x in small_t5.flat(loaded.params).values()} == {"bfloat16"}
    assert loaded.config.param_dtype == "bfloat16" and loaded.fingerprint == backbone.fingerprint


def test_the_backbone_of_a_run_folder_is_converted(tmp_path, backbone):
    save_backbone(tmp_path / "run" / "backbone", backbone.config, backbone.params)
    convert("variator", "t5x", tmp_path / "run", tmp_path / "out")
    small_t5.assert_same(load_backbone(tmp_path / "out").params, backbone.params)


NARROW = dataclasses.replace(small_t5.GATED, encoder_mlp_dim=8)


@pytest.mark.parametrize(("config", "target", "dtype", "words"), [
    (NARROW, "hf", None, "has one d_ff"),
    (NARROW, "t5x", None, "has mlp_dim 24"),
    (small_t5.GATED, "variator", "f16", "encoder/encoder_norm/scale as float16"),
])  # fmt: skip
def test_what_a_format_or_a_dtype_cannot_hold_is_refused(config, target, dtype, words, tmp_path):
    params = small_t5.backbone(config).params
    params["encoder"]["encoder_norm"]["scale"] = np.full(16, 1e6, np.float32)
    save_backbone(tmp_path / "source", config, params)
    with pytest.raises(CheckpointError, match=words):
        convert("variator", target, tmp_path / "source", tmp_path / "out", dtype)
    assert not any((tmp_path / "out").rglob("*"))


def test_no_more_than_one_leaf_and_one_shard_are_held(sources):
    source = hugging_face.open_hf(sources / "hf")
    arrays, held = [], []

    def tracked(leaf):
        def read():
            array = leaf.read()
            arrays.append(weakref.ref(array))
            held.append(sum(one() is not None for one in arrays))
            return array

        return leaf._replace(read=read)

    leaves = {path: tracked(leaf) for path, leaf in source.leaves.items()}
    stream = Stream(dataclasses.replace(source, leaves=leaves))
    hugging_face.write(sources / "out", stream, shard_size=4000)
    assert len(list((sources / "out").glob("*.safetensors"))) > 8 and max(held) < len(leaves) / 2


def test_the_summary_says_what_was_made(capsys, sources, backbone):
    target = sources / "checkpoint_3"
    command = f"convert --from hf --to t5x {sources / 'hf'} {target} --dtype bf16"
    assert cli.main(command.split()) == 0
    out, err = capsys.readouterr()
    count = len(small_t5.flat(backbone.params))
    assert all(fact in out for fact in (str(target), "bfloat16", backbone.fingerprint))
    assert f"{count} of {count} leaves" in err


@pytest.mark.parametrize(("arguments", "words"), [
    ("--from hff --to t5x hf out", "Did you mean 'hf'"),
    ("--from hf --to hf hf out --dtype f64", "no dtype 'f64'"),
    ("--from hf --to hf hf out --backbone b", "--from official"),
    ("--from official --to hf p.pkl out", "--to variator"),
    ("--from official --to variator p.pkl out", "--backbone PATH"),
    ("--from official p.pkl out", "--to is missing"),
    ("--from t5x --to hf hf out", "not a T5X checkpoint"),
    ("--from hf --to hf gs://b/x out", "only T5X"),
    ("--from hf --to hf hf variator", "exists already"),
    ("--from t5x-run --to t5x t5x out", "with --to variator"),
    ("--from t5x-run t5x out --dtype bf16", "without --dtype"),
])  # fmt: skip
def test_options_that_cannot_be(arguments, words, capsys, sources, monkeypatch):
    monkeypatch.chdir(sources)
    assert cli.main(["convert", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out
    assert not any((sources / "out").rglob("*"))
