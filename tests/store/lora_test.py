"""LoRA folders, what they are merged into, and what they are refused beside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_files import save_hf
from small_t5 import GATED, assert_same, backbone, flat
from t5x_files import save_t5x
from tiny import random_lora, random_plugin

from variator_jax import LoraConfig, VariatorModel, load_lora, save_lora, with_lora
from variator_jax.backbones.lora import lora_weights, merge_lora
from variator_jax.commands.describe import describe
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import load_backbone, load_plugin, save_backbone, save_plugin
from variator_jax.store.arrays import fingerprint
from variator_jax.store.backbone import memory_source
from variator_jax.store.formats import open_backbone
from variator_jax.store.lora import collect_with_lora

CONFIG = LoraConfig(rank=3, alpha=4.5)
TRAINING = {"task": "a_task", "steps": 30}


@pytest.fixture(scope="module")
def owner():
    return backbone(GATED)


@pytest.fixture(scope="module")
def folder(owner, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "lora"
    save_lora(path, CONFIG, random_lora(CONFIG, owner.params), owner, TRAINING)
    return path


@pytest.fixture(scope="module")
def merged(owner, folder):
    return with_lora(owner, folder)


def test_a_folder_gives_back_what_was_put_in(owner, folder):
    found = load_lora(folder, owner)
    assert found.config == CONFIG and found.task == "a_task"
    assert_same(found.params, random_lora(CONFIG, owner.params))
    assert found.description["training"] == TRAINING
    assert sorted(p.name for p in folder.iterdir()) == ["lora.json", "lora.safetensors"]
    assert load_lora(folder.parent).fingerprint == found.fingerprint  # as a run leaves it


def test_only_what_is_named_is_changed_and_by_the_formula(owner, folder, merged):
    before, after = flat(owner.params), flat(merged.params)
    expected = flat(merge_lora(owner.params, random_lora(CONFIG, owner.params), CONFIG))
    named = lora_weights(CONFIG, owner.params)
    for path in named:
        np.testing.assert_allclose(after[path], expected[path], rtol=1e-6, atol=1e-6)
        assert np.abs(after[path] - before[path]).max() > 1e-2
    kept = zip(jax.tree.leaves(owner.params), jax.tree.leaves(merged.params), strict=True)
    assert sum(one is two for one, two in kept) == len(before) - len(named)
    assert merged.fingerprint == fingerprint(merged.params) != owner.fingerprint
    assert merged.lora == {"fingerprint": load_lora(folder).fingerprint, "task": "a_task"}


@pytest.mark.parametrize("kind", ["ours", "run", "hf", "t5x"])
def test_it_is_merged_while_a_backbone_of_any_format_is_loaded(
    owner, folder, merged, tmp_path, kind
):
    path = tmp_path / "backbone"
    if kind in ("ours", "run"):
        save_backbone(path if kind == "ours" else path / "backbone", owner.config, owner.params)
    else:
        {"hf": save_hf, "t5x": save_t5x}[kind](path, owner)
    loaded = load_backbone(path, lora=folder)
    assert loaded.fingerprint == merged.fingerprint and loaded.lora == merged.lora
    assert_same(loaded.params, merged.params)
    # A cast comes after the merge.
    half = collect_with_lora(open_backbone(path), load_lora(folder), "bf16")
    assert half.fingerprint == merged.fingerprint and half.config.dtype == "bfloat16"
    assert_same(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), merged.params))


def test_another_backbone_or_vocabulary_is_refused(owner, folder, merged, tmp_path):
    params = jax.tree.map(lambda x: x * 2, owner.params)  # of the same name and shape
    other = dataclasses.replace(owner, params=params, fingerprint=fingerprint(params))
    reason = f"'t5_1_1_custom' with fingerprint {owner.fingerprint}; this backbone is"
    with pytest.raises(CheckpointError, match=f"The LoRA in .*{reason}.*{other.fingerprint}"):
        load_lora(folder, other)
    save_hf(tmp_path / "hf", other)
    strange = dataclasses.replace(owner, vocabulary_fingerprint="b" * 64)
    trained = dataclasses.replace(owner, vocabulary_fingerprint="a" * 64)
    save_lora(tmp_path / "lora", CONFIG, random_lora(CONFIG, owner.params), trained)
    with pytest.raises(CheckpointError, match="vocabulary"):
        with_lora(strange, tmp_path / "lora")
    for load in (
        lambda: with_lora(other, folder),
        lambda: collect_with_lora(memory_source("memory", other), load_lora(folder)),
        lambda: load_backbone(tmp_path / "hf", lora=folder),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load()
    with pytest.raises(CheckpointError, match=r"with a LoRA merged in \(task 'a_task'"):
        with_lora(merged, folder)


@pytest.mark.parametrize(("changes", "found"), [
    ({"embed_dim": 20}, r"has \(20, 12\)"), ({"num_encoder_layers": 1}, "has none"),
])  # fmt: skip
def test_another_shape_is_refused_before_a_weight_is_read(folder, changes, found):
    read = []
    source = memory_source("memory", backbone(dataclasses.replace(GATED, **changes, name="other")))
    leaves = {k: x._replace(read=lambda: read.append(1)) for k, x in source.leaves.items()}
    with pytest.raises(CheckpointError, match=f"belongs to backbone 't5_1_1_custom'.*{found}"):
        collect_with_lora(dataclasses.replace(source, leaves=leaves), load_lora(folder))
    assert not read


def test_a_plugin_beside_a_merged_backbone_is_refused_beside_the_bare_one(
    owner, merged, folder, tmp_path
):
    settings = PluginConfig(2, bottleneck=4)
    variables = random_plugin(settings, GATED)
    save_plugin(tmp_path / "plugin", settings, variables, merged)
    save_plugin(tmp_path / "bare", settings, variables, owner)
    plugin = load_plugin(tmp_path / "plugin", merged)
    assert plugin.description["backbone"]["lora"] == merged.lora
    assert "lora" not in load_plugin(tmp_path / "bare", owner).description["backbone"]
    reason = r"backbone 't5_1_1_custom' with a LoRA merged in \(task 'a_task'\) with fingerprint "
    reason += f"{merged.fingerprint}; this backbone is 't5_1_1_custom' with finger"
    with pytest.raises(CheckpointError, match=reason):
        load_plugin(tmp_path / "plugin", owner)
    reason = rf"plugin ffn_x2 belongs .* {owner.fingerprint}; .* with a LoRA .*{merged.fingerprint}"
    with pytest.raises(CheckpointError, match=reason):
        VariatorModel(merged, load_plugin(tmp_path / "bare"))
    assert VariatorModel(with_lora(owner, folder), plugin).ratios == (1, 2)
    save_hf(tmp_path / "hf", owner)
    rounded = with_lora(load_backbone(tmp_path / "hf", "bfloat16"), folder)
    with pytest.raises(CheckpointError, match=r"merged into other weights: load_backbone\(path"):
        load_plugin(tmp_path / "plugin", rounded)
    assert merged.lora["fingerprint"] in describe(tmp_path / "plugin")


@pytest.mark.parametrize("path", [".", "lora"])
def test_a_lora_is_not_a_backbone(folder, path):
    with pytest.raises(CheckpointError, match="holds a LoRA and no backbone"):
        load_backbone(folder.parent / path)


@pytest.mark.parametrize(("config", "scale", "words"), [
    (LoraConfig(rank=2), 1, r"expected \(16, 2\)"),
    (CONFIG, np.float32(np.nan), "NaN or infinite"),
    (LoraConfig(sites="nothing"), 1, "matches no weight"),
])  # fmt: skip
def test_arrays_of_another_rank_or_backbone_are_not_written(owner, tmp_path, config, scale, words):
    params = jax.tree.map(lambda x: x * scale, random_lora(CONFIG, owner.params))
    with pytest.raises(CheckpointError, match=words):
        save_lora(tmp_path / "x", config, params, owner)
    assert not (tmp_path / "x").exists()
