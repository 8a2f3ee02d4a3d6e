"""Hugging Face folders without transformers: read, written, refused."""

import json

import numpy as np
import pytest
import small_t5
import torch_files
from hf_files import VOCABULARY, save_hf, state_dict, write
from small_t5 import refused

from variator_jax.backbones.t5 import CONFIGS
from variator_jax.errors import CheckpointError
from variator_jax.store import hugging_face, load_backbone

STATE = state_dict(small_t5.backbone(small_t5.GATED))
QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a T5 1.1, written by hand."""
    return write(tmp_path / "hf", STATE)


class TestLoad:
    def test_a_folder_becomes_our_tree(self, folder):
        loaded, expected = load_backbone(folder), small_t5.backbone(small_t5.GATED)
        small_t5.assert_same(loaded.params, expected.params)
        assert loaded.config == small_t5.GATED and loaded.fingerprint == expected.fingerprint
        assert loaded.vocabulary_file.read_bytes() == VOCABULARY
        assert len(loaded.vocabulary_fingerprint) == 64

    def test_the_weights_are_cast_on_demand(self, folder):
        expected = small_t5.backbone(small_t5.GATED, "bfloat16")
        half = load_backbone(folder, "bf16")
        small_t5.assert_same(half.params, expected.params)
        assert half.config == expected.config and half.fingerprint == expected.fingerprint

    def test_shards_of_pickled_weights_and_aliases(self, folder):
        expected = load_backbone(folder)
        (folder / "model.safetensors").unlink()
        # The table under three names, and a bias that the released files hold and nobody uses.
        state = STATE | {name: STATE["shared.weight"] for name in hugging_face.ALIASES}
        state[hugging_face.UNUSED] = np.zeros((32, 3), np.float32)
        names, files = sorted(state), ("pytorch_model-1.bin", "pytorch_model-2.bin")
        for i, file in enumerate(files):
            torch_files.save_zip(folder / file, {name: state[name] for name in names[i::2]})
        index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        small_t5.assert_same(load_backbone(folder).params, expected.params)

    def test_a_config_may_leave_out_what_transformers_has_as_default(self):
        few = dict(architectures=["MT5ForConditionalGeneration"], model_type="mt5")
        assert hugging_face.parse_config("", few, 250112) == CONFIGS["mt5_small"]


class TestWrite:
    @pytest.mark.parametrize("family", small_t5.CONFIGS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_ours_and_theirs_are_the_same_bits(self, family, dtype, tmp_path):
        backbone = small_t5.backbone(small_t5.CONFIGS[family], dtype)
        save_hf(tmp_path / "one", backbone)
        loaded = load_backbone(tmp_path / "one")
        small_t5.assert_same(loaded.params, backbone.params)
        assert loaded.config == backbone.config and loaded.fingerprint == backbone.fingerprint
        save_hf(tmp_path / "two", loaded)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_shards_have_their_size_and_an_index(self, folder, tmp_path):
        backbone, shards = load_backbone(folder), tmp_path / "shards"
        save_hf(shards, backbone, shard_size=8000)
        files = sorted(shards.glob("model-*.safetensors"))
        assert len(files) > 3 and all(file.stat().st_size < 10_000 for file in files)
        small_t5.assert_same(load_backbone(shards).params, backbone.params)
        assert (shards / "spiece.model").read_bytes() == VOCABULARY
        index = json.loads((shards / "model.safetensors.index.json").read_text())
        sizes = sum(x.nbytes for x in small_t5.flat(backbone.params).values())
        assert index["metadata"]["total_size"] == sizes

    def test_only_a_folder_of_its_own_is_replaced_and_only_on_success(self, folder, tmp_path):
        backbone, out = load_backbone(folder), tmp_path / "out"
        save_hf(out, backbone, shard_size=8000)
        save_hf(out, backbone)
        assert not list(out.glob("model-*"))
        before = (out / "model.safetensors").read_bytes()
        backbone.params["encoder"]["encoder_norm"]["scale"] = np.full(16, np.nan, np.float32)
        with pytest.raises(CheckpointError, match="NaN"):
            save_hf(out, backbone)
        assert (out / "model.safetensors").read_bytes() == before
        (out / "thesis.tex").write_text("x")
        with pytest.raises(CheckpointError, match="holds thesis.tex"):
            save_hf(out, load_backbone(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_go_both_ways(name):
    content = json.loads(json.dumps(hugging_face.render_config(CONFIGS[name])))
    parsed = hugging_face.parse_config("config.json", content, CONFIGS[name].vocab_size)
    assert parsed.name == name and hugging_face.render_config(parsed) == content


class TestRefusals:
    @pytest.mark.parametrize(("changes", "words"), [
        (dict(model_type="umt5"), "'umt5' model; expected 't5' or 'mt5'"),
        (dict(architectures=["T5ForSequenceClassification"]), "T5ForSequenceClassification"),
        (dict(feed_forward_proj="gelu"), "feed_forward_proj 'gelu'"),
        (dict(relative_attention_num_buckets=64), "relative_attention_num_buckets"),
        (dict(d_model="16"), "'d_model' is a str"),
        (dict(num_layers=2_000_000), "weights for 2000002 layers"),
        (dict(num_decoder_layers=3), "is missing decoder/layers_2"),
        (dict(eos_token_id=[1, 2]), r"eos_token_id \[1, 2\]; expected 1"),
        (dict(d_kv=8), r"shape \(16, 12\).*expected \(16, 24\)"),
        (dict(architectures=["T5EncoderModel"]), "has unexpected decoder.block.0"),
    ])  # fmt: skip
    def test_configs(self, folder, changes, words):
        refused(write(folder, STATE, **changes), words)

    @pytest.mark.parametrize(("name", "array", "words"), [
        (QUERY, None, "is missing encoder/layers_1/attention/query/kernel"),
        ("lm_head.weight", None, "is missing decoder/logits_dense/kernel"),
        ("qa_outputs.weight", np.zeros(3), "unexpected qa_outputs.weight"),
        (QUERY, np.zeros((3, 3), np.float32), r"shape \(3, 3\)"),
        (QUERY, np.zeros((12, 16), np.int8), "I8.*Quantised"),
        (QUERY, np.full((12, 16), np.inf, np.float32), "infinite"),
        (QUERY.replace("q.w", "relative_attention_bias.w"), np.zeros((32, 3)), "unexpected"),
        ("decoder.embed_tokens.weight", STATE["shared.weight"] + 1, "differs"),
    ])  # fmt: skip
    def test_weights(self, folder, name, array, words):
        state = {key: x for key, x in {**STATE, name: array}.items() if x is not None}
        refused(write(folder, state), words)

    @pytest.mark.parametrize(("name", "data", "words"), [
        ("model.safetensors", b"", "model.safetensors cannot be read"),
        ("model.safetensors", None, "no model.safetensors"),
        ("config.json", b"[1]", "config.json is a list"),
        ("config.json", b"\xff\xfe", "config.json is not readable JSON"),
    ])  # fmt: skip
    def test_missing_and_torn_files(self, folder, name, data, words):
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
        refused(folder, words)

    @pytest.mark.parametrize(("file", "words"), [
        ("../x.safetensors", "outside"), (3, "is a int"), ("model-9.safetensors", "cannot be"),
    ])  # fmt: skip
    def test_shards_that_differ_from_their_index(self, folder, file, words):
        save_hf(folder, load_backbone(folder), shard_size=8000)
        index = folder / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"] | {QUERY: file}
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, words)
