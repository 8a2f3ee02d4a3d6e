import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import small_t5
import torch_files
from hf_files import VOCABULARY, state_dict, write

from variator_jax.errors import CheckpointError
from variator_jax.store import hf, hf_folder
from variator_jax.store.hf_folder import load_hf, save_hf


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a T5 1.1, written by hand."""
    return write(tmp_path / "hf", state_dict(small_t5.backbone(small_t5.GATED)))


class TestLoad:
    def test_a_folder_becomes_our_tree(self, folder):
        loaded, expected = load_hf(folder), small_t5.backbone(small_t5.GATED)
        small_t5.assert_same(loaded.params, expected.params)
        assert loaded.config == small_t5.GATED and loaded.fingerprint == expected.fingerprint
        assert loaded.vocabulary_file.read_bytes() == VOCABULARY
        assert len(loaded.vocabulary_fingerprint) == 64

    def test_the_weights_are_cast_on_demand(self, folder):
        half = load_hf(folder, "bf16")
        assert {x.dtype for x in small_t5.flat(half.params).values()} == {jnp.dtype(jnp.bfloat16)}
        assert half.config.dtype == half.config.param_dtype == "bfloat16"
        assert half.fingerprint == load_hf(folder, np.float32).fingerprint

    def test_pickled_weights_shards_and_aliases(self, folder):
        state, expected = state_dict(small_t5.backbone(small_t5.GATED)), load_hf(folder)
        (folder / "model.safetensors").unlink()
        # The table under three names, and a bias that the released files hold and nobody uses.
        state |= {name: state["shared.weight"] for name in hf.ALIASES}
        state[hf.UNUSED] = np.zeros((32, 3), np.float32)
        torch_files.save_zip(folder / "pytorch_model.bin", state)
        small_t5.assert_same(load_hf(folder).params, expected.params)

        (folder / "pytorch_model.bin").unlink()
        names, files = sorted(state), ("pytorch_model-1.bin", "pytorch_model-2.bin")
        for i, file in enumerate(files):
            torch_files.save_zip(folder / file, {name: state[name] for name in names[i::2]})
        index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        small_t5.assert_same(load_hf(folder).params, expected.params)

    def test_a_table_under_its_alias_alone(self, folder):
        state = state_dict(small_t5.backbone(small_t5.GATED))
        state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
        small_t5.assert_same(load_hf(write(folder, state)).params, load_hf(folder).params)

    def test_ties_are_read_as_transformers_reads_them(self, folder):
        plain = state_dict(small_t5.backbone(small_t5.PLAIN))
        relu = dict(feed_forward_proj="relu", tie_word_embeddings=True)
        assert load_hf(write(folder, plain, **relu)).config.logits_via_embedding
        same = {**plain, "lm_head.weight": plain["shared.weight"]}
        assert load_hf(write(folder, same, **relu)).config.logits_via_embedding
        # Tied but not scaled, as transformers 5 saves a T5 1.1 that was never trained.
        unscaled = load_hf(write(folder, plain, **relu, scale_decoder_outputs=False))
        assert not unscaled.config.logits_via_embedding
        head = unscaled.params["decoder"]["logits_dense"]["kernel"]
        assert np.array_equal(head.T, plain["shared.weight"])
        other = {**plain, "lm_head.weight": plain["shared.weight"] + 1}
        with pytest.raises(CheckpointError, match="another lm_head.weight"):
            load_hf(write(folder, other, **relu))

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ("relu", ("relu",)),
            ("gated-gelu", ("gelu", "linear")),
            ("gated-silu", ("silu", "linear")),
            ("gelu_new", ("gelu",)),
        ],
    )
    def test_feed_forward_layers(self, folder, said, expected):
        gated = "gated" in said
        source = small_t5.backbone(small_t5.GATED if gated else small_t5.PLAIN)
        state = state_dict(source)
        changes = dict(feed_forward_proj=said, tie_word_embeddings=not gated)
        assert load_hf(write(folder, state, **changes)).config.mlp_activations == expected

    def test_token_ids_may_be_left_out(self, folder):
        state = state_dict(small_t5.backbone(small_t5.GATED))
        ids = dict(pad_token_id=None, eos_token_id=1, decoder_start_token_id=0)
        assert load_hf(write(folder, state, **ids)).config == small_t5.GATED


class TestRoundTrip:
    @pytest.mark.parametrize("family", small_t5.CONFIGS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_ours_and_theirs_are_the_same_bits(self, family, dtype, tmp_path):
        backbone = small_t5.backbone(small_t5.CONFIGS[family], dtype)
        save_hf(tmp_path / "one", backbone)
        loaded = load_hf(tmp_path / "one")
        small_t5.assert_same(loaded.params, backbone.params)
        assert loaded.config == backbone.config and loaded.fingerprint == backbone.fingerprint
        save_hf(tmp_path / "two", loaded)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_shards(self, folder, tmp_path):
        backbone = load_hf(folder)
        save_hf(tmp_path / "shards", backbone, shard_size=8000)
        files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
        assert len(files) > 3 and files[0].name.endswith(f"-of-{len(files):05d}.safetensors")
        small_t5.assert_same(load_hf(tmp_path / "shards").params, backbone.params)
        assert (tmp_path / "shards" / "spiece.model").read_bytes() == VOCABULARY
        sizes = sum(x.nbytes for x in small_t5.flat(backbone.params).values())
        index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sizes

    def test_what_stands_there_already_is_kept(self, folder, tmp_path, monkeypatch):
        backbone = load_hf(folder)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("x")
        with pytest.raises(CheckpointError, match="mine"):
            save_hf(tmp_path / "mine", backbone)
        save_hf(tmp_path / "out", backbone)
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        backbone.params["encoder"]["encoder_norm"]["scale"] = np.full(16, np.nan, np.float32)
        with pytest.raises(CheckpointError, match="NaN"):
            save_hf(tmp_path / "out", backbone)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert sorted(x.name for x in tmp_path.iterdir()) == ["hf", "mine", "out"]

    def test_a_folder_with_more_than_is_written_is_kept(self, folder, tmp_path):
        backbone = load_hf(folder)
        save_hf(tmp_path / "out", backbone, shard_size=8000)
        save_hf(tmp_path / "out", backbone)
        assert not list((tmp_path / "out").glob("model-*"))
        (tmp_path / "out" / "tokenizer.json").write_text("{}")
        with pytest.raises(CheckpointError, match="holds tokenizer.json too"):
            save_hf(tmp_path / "out", backbone)
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

    def test_the_written_config_has_the_dropout_of_transformers(self, tmp_path):
        save_hf(tmp_path / "out", small_t5.backbone(small_t5.GATED))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dropout_rate"] == 0.1
        assert load_hf(tmp_path / "out").config.dropout_rate == 0.0


def test_names_go_both_ways():
    for config in small_t5.CONFIGS.values():
        for path in small_t5.flat(small_t5.backbone(config).params):
            assert hf.leaf_of(hf.name_of(path)) == (path, hf.is_transposed(path))


def test_released_shapes_get_their_names():
    from variator_jax.backbones.t5 import CONFIGS
    from variator_jax.store import hf_config

    for name, config in CONFIGS.items():
        content = json.loads(json.dumps(hf_config.render(config)))
        parsed = hf_config.parse("config.json", content, config.vocab_size).config
        assert parsed.name == name and hf_config.render(parsed) == content


def test_the_module_needs_no_torch():
    source = pathlib.Path(hf_folder.__file__).read_text()
    assert "import torch\n" not in source and "import transformers" not in source
