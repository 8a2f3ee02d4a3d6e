"""Hugging Face folders that are not what they should be: each has an error of its own."""

import json
import os

import numpy as np
import pytest
import small_t5
import torch_files
from hf_files import state_dict, write

from variator_jax.errors import CheckpointError
from variator_jax.store.hf_folder import load_hf, save_hf


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a T5 1.1, written by hand."""
    return write(tmp_path / "hf", state_dict(small_t5.backbone(small_t5.GATED)))


def refused(folder, words):
    with pytest.raises(CheckpointError, match=words) as error:
        load_hf(folder)
    assert str(folder) in str(error.value)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (dict(model_type="umt5"), "umt5.*every layer"),
            (dict(model_type="longt5"), "locally"),
            (dict(model_type="bert"), "'bert'.*expected 't5' or 'mt5'"),
            (dict(architectures=["T5ForSequenceClassification"]), "T5ForSequenceClassification"),
            (dict(architectures="T5Model"), "architectures"),
            (dict(feed_forward_proj="gelu"), "feed_forward_proj 'gelu'"),
            (dict(feed_forward_proj=["gated-gelu"]), "feed_forward_proj"),
            (dict(relative_attention_num_buckets=64), "relative_attention_num_buckets"),
            (dict(relative_attention_max_distance=256), "relative_attention_max_distance"),
            (dict(d_model="16"), "d_model: found '16'"),
            (dict(d_ff=None), "d_ff"),
            (dict(num_heads=True), "num_heads"),
            (dict(num_layers=2_000_000_000), "num_layers"),
            (dict(num_layers=2_000_000), "3 encoder layers, the config says 2000000"),
            (dict(num_decoder_layers=3), "2 decoder layers, the config says 3"),
            (dict(layer_norm_epsilon="1e-6"), "layer_norm_epsilon"),
            (dict(pad_token_id=1), "pad_token_id 1; expected 0"),
            (dict(eos_token_id=[1, 2]), r"eos_token_id \[1, 2\]; expected 1"),
            (dict(decoder_start_token_id=2), "decoder_start_token_id 2; expected 0"),
            (dict(d_kv=8), r"shape \(16, 12\).*expected \(16, 24\)"),
            (dict(architectures=["T5EncoderModel"]), "encoder alone, but holds lm_head.weight"),
        ],
    )
    def test_configs(self, folder, changes, words):
        refused(write(folder, state_dict(small_t5.backbone(small_t5.GATED)), **changes), words)

    def test_weights(self, folder):
        state = state_dict(small_t5.backbone(small_t5.GATED))
        query = "encoder.block.1.layer.0.SelfAttention.q.weight"

        def change(**arrays):
            changed = {**state, **arrays}
            return write(folder, {k: v for k, v in changed.items() if v is not None})

        refused(change(**{query: None}), f"lacks {query}")
        refused(change(**{"lm_head.weight": None}), "lacks lm_head.weight")
        refused(change(**{"shared.weight": None}), "lacks shared.weight")
        refused(change(**{"qa_outputs.weight": np.zeros(3)}), "qa_outputs.weight")
        refused(change(**{query: np.zeros((3, 3), np.float32)}), r"shape \(3, 3\)")
        refused(change(**{query: np.zeros((12, 16), np.int8)}), "int8.*Quantised")
        refused(change(**{query: np.full((12, 16), np.inf, np.float32)}), "infinite")
        own = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
        refused(change(**{own: np.zeros((32, 3), np.float32)}), "as in UMT5")
        other = state["shared.weight"] + 1
        refused(change(**{"decoder.embed_tokens.weight": other}), "share one embedding")

    def test_missing_and_torn_files(self, folder, tmp_path):
        data = (folder / "model.safetensors").read_bytes()
        for cut in (0, 4, 300, len(data) - 1):
            (folder / "model.safetensors").write_bytes(data[:cut])
            refused(folder, "model.safetensors.*(cut short|damaged)")
        (folder / "model.safetensors").unlink()
        refused(folder, "no model.safetensors")
        (folder / "config.json").write_text("[1]")
        refused(folder, "config.json holds no dictionary")
        (folder / "config.json").write_bytes(b"\xff\xfe")
        refused(folder, "config.json is not readable JSON")
        (folder / "config.json").unlink()
        refused(folder, "no config.json")
        refused(tmp_path / "nothing", "There is no folder")

    def test_shards_that_disagree_with_their_index(self, folder, tmp_path):
        shards = tmp_path / "shards"
        save_hf(shards, load_hf(folder), shard_size=8000)
        index = shards / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        name = next(iter(content["weight_map"]))
        for file, words in (("../x.safetensors", "no file of its folder"), (3, "no file of its")):
            changed = {**content, "weight_map": {**content["weight_map"], name: file}}
            index.write_text(json.dumps(changed))
            refused(shards, words)
        changed = dict(content["weight_map"])
        changed.pop(name)
        index.write_text(json.dumps({"weight_map": changed}))
        refused(shards, f"disagree about {name}")
        index.write_text(json.dumps({"weight_map": {}}))
        refused(shards, "no weight_map")
        index.write_text(json.dumps(content))
        (shards / content["weight_map"][name]).unlink()
        refused(shards, "is missing")

    def test_a_pickle_that_would_run_a_command_runs_none(self, folder, tmp_path):
        (folder / "model.safetensors").unlink()
        canary = tmp_path / "canary"
        command = torch_files.Call(torch_files.Name("os", "system"), f"touch {canary}")
        (folder / "pytorch_model.bin").write_bytes(torch_files.dumps({"shared.weight": command}))
        refused(folder, "nothing was run")
        assert not canary.exists()
        os.system(f"touch {canary}")  # a control: that command does make the file
        assert canary.exists()

    def test_random_damage_to_the_header_is_told(self, folder):
        path, rng = folder / "model.safetensors", np.random.default_rng(1)
        data, expected = path.read_bytes(), load_hf(folder)
        length = int.from_bytes(data[:8], "little")
        told = 0
        for _ in range(60):
            changed = bytearray(data)
            changed[rng.integers(8 + length)] ^= 1 << rng.integers(8)
            path.write_bytes(changed)
            try:
                # A letter of the header's own comment, or a blank, may change without harm.
                small_t5.assert_same(load_hf(folder).params, expected.params)
            except CheckpointError as error:
                assert str(folder) in str(error)
                told += 1
        assert told > 50
