"""Folders of sentence-transformers: vectors equal to that library's, through the service."""

import dataclasses
import json

import hf_files
import jax
import numpy as np
import pytest
import safetensors.numpy
import served
import small_t5

from variator_jax import cli
from variator_jax.data.vocabulary import train_sentencepiece
from variator_jax.errors import CheckpointError
from variator_jax.serving.engine import Engine, EngineLimits
from variator_jax.serving.sentences import load_encoder
from variator_jax.serving.tasks import TaskConfig
from variator_jax.store import load_backbone

TEXTS = ["the quick fox", "a lazy dog jumps over the fox"]
PACKAGE = "sentence_transformers.models."


def write(folder, activation="Identity", pooling="mean_tokens", bias=False):
    """An encoder with pooling, a dense layer and normalisation, as ST5 has them."""
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": PACKAGE + kind}
        for i, kind in enumerate(("Transformer", "Pooling", "Dense", "Normalize"))
    ]
    config = dataclasses.replace(small_t5.CONFIGS["encoder"], vocab_size=256)
    hf_files.save_hf(folder, small_t5.backbone(config))
    (folder / "spiece.model").write_bytes(train_sentencepiece(TEXTS * 30, 120))
    (folder / "modules.json").write_text(json.dumps(listed))
    for module in listed[1:]:
        (folder / module["path"]).mkdir()
    settings = {"word_embedding_dimension": 16, f"pooling_mode_{pooling}": True}
    settings |= {"pooling_mode_cls_token": False} if pooling == "mean_tokens" else {}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    name = f"torch.nn.modules.linear.{activation}"
    settings = {"in_features": 16, "out_features": 8, "bias": bias, "activation_function": name}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    arrays = {"linear.weight": rng.normal(size=(8, 16)).astype("f4")}
    arrays |= {"linear.bias": rng.normal(size=8).astype("f4")} if bias else {}
    safetensors.numpy.save_file(arrays, folder / "2_Dense" / "model.safetensors")
    return arrays


def expected_vectors(folder, arrays):
    """What the dense layer makes of the means of the texts' states."""
    means = served.means(served.VariatorModel(load_backbone(folder)), TEXTS)
    return np.tanh(means @ arrays["linear.weight"].T + arrays["linear.bias"])


async def vectors(folder, **options):
    """The vectors of the texts, from a service of this folder."""
    backbone, dense, _ = load_encoder(folder)
    task = TaskConfig("embed", "embed")
    engine = Engine(backbone, (), [task], EngineLimits((32,), 64, 2), dense)
    async with served.started(slo_ms=10_000, engine=engine) as service:
        return np.array((await service.submit("embed", TEXTS, **options)).values)


@served.run
async def test_vectors_go_through_the_dense_layer(tmp_path):
    arrays = write(tmp_path, "Tanh", bias=True)
    found = await vectors(tmp_path, normalize=False)
    np.testing.assert_allclose(found, expected_vectors(tmp_path, arrays), atol=1e-5)


def test_bulk_encoding_and_export_go_through_it_too_and_take_its_longest_text(tmp_path, capsys):
    folder, out = tmp_path / "st", tmp_path / "out"
    expected = expected_vectors(folder, write(folder, "Tanh", bias=True))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    assert load_encoder(folder)[2] == 32
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "the quick fox " * 9]))
    given = ["--backbone", str(folder), "--output"]
    texts = str(tmp_path / "texts.txt")
    assert cli.main(["encode", *given, str(out), "--input", texts]) == 0
    assert "2 rows" in (printed := capsys.readouterr().out) and "1 bad rows" in printed
    found = safetensors.numpy.load_file(out / "encoded-000000.safetensors")
    np.testing.assert_allclose(found["embeddings"], expected, atol=1e-5)

    command = ["export", "--format=jax", "--batches=2", *given, str(tmp_path / "exported")]
    assert cli.main(command) == 0
    (file,) = (tmp_path / "exported").glob("*.jaxexport")
    assert file.name == "none_2x32.jaxexport"
    weights = safetensors.numpy.load_file(tmp_path / "exported" / "weights.safetensors")
    tokens = served.VariatorModel(load_backbone(folder)).tokenize(TEXTS)
    tokens = np.pad(tokens, ((0, 0), (0, 32 - tokens.shape[1])))
    vectors = jax.export.deserialize(file.read_bytes()).call(weights, tokens)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@served.run
async def test_vectors_are_those_of_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    write(tmp_path)
    expected = library.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(await vectors(tmp_path), expected, atol=2e-5)


@pytest.mark.parametrize("file, setting", [
    ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
    ("sentence_bert_config.json", {"do_lower_case": True}),
])  # fmt: skip
def test_settings_that_change_each_text_are_refused(tmp_path, file, setting):
    write(tmp_path)
    (tmp_path / file).write_text(json.dumps(dict.fromkeys(setting)))
    load_encoder(tmp_path)
    (tmp_path / file).write_text(json.dumps(setting))
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        load_encoder(tmp_path)


@pytest.mark.parametrize("options, words", [
    ({"activation": "GELU"}, "GELU"), ({"pooling": "cls_token"}, "cls_token"),
])  # fmt: skip
def test_what_is_not_known_is_refused_by_name(tmp_path, options, words):
    write(tmp_path, **options)
    with pytest.raises(CheckpointError, match=words):
        load_encoder(tmp_path)
