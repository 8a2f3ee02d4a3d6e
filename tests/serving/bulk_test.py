"""`variator encode`: equal to the library, resumed after a kill, and nothing twice or lost."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import served
from safetensors.numpy import load_file
from tiny import random_params
from tiny_model import SHAPE, make_plugin

from variator_jax import VariatorModel, cli, save_backbone, save_plugin
from variator_jax.errors import VariatorError
from variator_jax.serving import bulk
from variator_jax.serving.bulk import BulkSettings, encode_file
from variator_jax.serving.rows import Texts
from variator_jax.serving.sentences import Encoder
from variator_jax.store import load_backbone

TEXTS = [f"{'the lazy dog ' * (i % 5)}{i}" for i in range(23)]
BAD = {4: "{", 9: '{"text": ""}', 17: '{"text": 5}'}  # by the lines' numbers
SETTINGS = BulkSettings(window=8, batch_tokens=128)
# Ends the process before it gives a file its name for the n-th time.
KILLER = """
import os, signal, sys
from variator_jax import cli

left, rename = [int(sys.argv[1])], os.replace

def replace(draft, path):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(draft, path)

os.replace = replace
cli.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone of bytes, which needs no vocabulary, read from its folder."""
    folder, shape = tmp_path_factory.mktemp("b"), dataclasses.replace(SHAPE, name="byt5_tiny")
    save_backbone(folder / "backbone", shape, random_params(shape))
    loaded = load_backbone(folder / "backbone")
    plugin = make_plugin(4, loaded)
    save_plugin(folder / "plugin", plugin.config, plugin.variables, loaded)
    return folder, loaded, plugin


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    for line, content in sorted(BAD.items()):
        lines.insert(line - 1, content)
    file.write_text("\n".join(lines))
    return file


def good_lines():
    return [line for line in range(1, len(TEXTS) + len(BAD) + 1) if line not in BAD]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def arrays(folder, name):
    return np.concatenate([load_file(x)[name] for x in sorted(folder.glob("*.safetensors"))])


@pytest.fixture(scope="module")
def whole(backbone, texts, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    encode_file(texts, folder, Encoder(backbone[1]), backbone[2], SETTINGS)
    return folder


def test_vectors_are_the_normalised_means_of_what_the_library_encodes(backbone, whole):
    assert list(arrays(whole, "lines")) == good_lines()
    expected = served.pooled(VariatorModel(*backbone[1:]), TEXTS, ratio=4)
    np.testing.assert_allclose(arrays(whole, "embeddings"), expected, atol=1e-5)


def test_bad_rows_and_counts_are_listed(whole):
    listed = [json.loads(row) for row in (whole / "bad_rows.jsonl").open()]
    assert [row["line"] for row in listed] == list(BAD) and "is empty" in listed[1]["error"]
    index = json.loads((whole / "encode.json").read_text())
    assert index["finished"] and (index["rows"], index["bad"], index["files"]) == (23, 3, 4)
    assert index["tokens"] == sum(len(text) + 1 for text in TEXTS)


def test_without_pooling_each_token_has_a_vector_in_the_asked_dtype(backbone, texts, tmp_path):
    settings = dataclasses.replace(SETTINGS, pooling="none", dtype="bfloat16", window=64)
    encode_file(texts, tmp_path / "out", Encoder(backbone[1]), None, settings)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    found, model = load_file(file), VariatorModel(backbone[1])
    assert found["embeddings"].dtype == ml_dtypes.bfloat16
    for i, text in enumerate(TEXTS):
        vectors = found["embeddings"][found["offsets"][i] : found["offsets"][i + 1]]
        expected = np.asarray(model.encode(text))[0]
        np.testing.assert_allclose(vectors.astype("f4"), expected, rtol=1e-2, atol=1e-4)
    assert found["offsets"][-1] == len(found["embeddings"])


def test_a_killed_run_continues_to_the_same_bytes(backbone, texts, whole, tmp_path):
    folder, out = backbone[0], tmp_path / "out"
    command = [
        *("encode", "--backbone", f"{folder}/backbone", "--plugins", f"{folder}/plugin"),
        *("--input", str(texts), "--output", str(out), "--window=8", "--batch_tokens=128"),
    ]
    for place in (1, 2):  # files that get their names: the index, then two windows
        killed = subprocess.run([sys.executable, "-c", KILLER, str(place), *command])
        assert killed.returncode == -signal.SIGKILL
    assert len(list(out.glob("*.safetensors"))) == 2 and list(out.glob(".encoded-*"))
    first = (out / "encoded-000000.safetensors").stat().st_mtime_ns
    assert cli.main(command) == 0
    assert contents(out) == contents(whole)
    assert (out / "encoded-000000.safetensors").stat().st_mtime_ns == first


def test_other_settings_another_input_and_foreign_folders_are_refused(
    backbone, texts, whole, tmp_path
):
    before = contents(whole)

    def refused(
        reason, path=texts, folder=whole, owner=backbone[1], plugin=backbone[2], settings=SETTINGS
    ):
        with pytest.raises(VariatorError, match=reason):
            encode_file(path, folder, Encoder(owner), plugin, settings)

    refused("another run, with plugin", plugin=None)
    refused("another run, with dtype", settings=dataclasses.replace(SETTINGS, dtype="bfloat16"))
    half = dataclasses.replace(backbone[1].config, dtype="bfloat16")
    refused("another run, with compute", owner=dataclasses.replace(backbone[1], config=half))
    refused("another run, with format", path=shutil.copy(texts, tmp_path / "texts.txt"))
    longer = tmp_path / "texts.jsonl"
    longer.write_text(texts.read_text() + '\n"one more"')
    refused("lines 25 to 27 are not those", path=longer)
    longer.write_text("\n".join(texts.read_text().splitlines()[:8]))
    refused("The input has no lines for", path=longer)
    refused("texts.*, and no encode.json", folder=tmp_path)
    assert contents(whole) == before


def test_a_finished_run_takes_no_more_windows_and_a_lost_one_is_made_again(backbone, tmp_path):
    texts, out, settings = tmp_path / "a.txt", tmp_path / "out", bulk.BulkSettings(window=2)
    texts.write_text("a\nb\nc\nd\n")
    encode_file(texts, out, Encoder(backbone[1]), None, settings)
    before = contents(out)
    texts.write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(VariatorError, match="has more lines than"):
        encode_file(texts, out, Encoder(backbone[1]), None, settings)
    assert contents(out) == before
    texts.write_text("a\nb\nc\nd\n")
    (out / "encoded-000000.safetensors").unlink()
    encode_file(texts, out, Encoder(backbone[1]), None, settings)
    assert contents(out) == before


def test_vectors_that_are_not_finite_make_bad_rows(backbone, tmp_path):
    (tmp_path / "texts.txt").write_text("a\nb\n")
    params = backbone[1].params
    broken = np.array(params["token_embedder"]["embedding"])
    broken[ord("b") + 3] = np.nan
    params = {**params, "token_embedder": {"embedding": broken}}
    changed = dataclasses.replace(backbone[1], params=params)
    total = encode_file(tmp_path / "texts.txt", tmp_path / "out", Encoder(changed))
    assert (total.rows, total.bad) == (1, 1) and list(arrays(tmp_path / "out", "lines")) == [1]


def test_a_file_without_a_good_row_has_arrays_of_no_rows(backbone, tmp_path):
    (tmp_path / "texts.jsonl").write_text("{\n[]\n")
    encode_file(tmp_path / "texts.jsonl", tmp_path / "out", Encoder(backbone[1]))
    assert arrays(tmp_path / "out", "embeddings").shape == (0, SHAPE.embed_dim)
    assert len((tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()) == 2


def test_settings_that_no_run_has_are_refused():
    for wrong, reason in (
        ({"pooling": "max"}, "Known: mean, none"),
        ({"dtype": "int8"}, "Known: float32, bfloat16"),
        ({"window": 0}, "1 or more"),
        ({"texts": Texts(prompt="query")}, "found 0"),
        ({"texts": Texts(prompt="{query}")}, "no {text}"),
    ):
        with pytest.raises(VariatorError, match=reason):
            bulk.BulkSettings(**wrong)
