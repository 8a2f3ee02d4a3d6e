"""LoRA folders, what they are merged into, and what they are refused beside."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_t5 import ENCODER, GATED, PLAIN, assert_same, backbone, flat
from tiny import random_plugin

from variator_jax import (
    LoraConfig,
    VariatorModel,
    load_backbone,
    load_lora,
    load_plugin,
    save_backbone,
    save_lora,
    save_plugin,
    with_lora,
)
from variator_jax.backbones.lora import init_lora, lora_weights, merge_lora
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import inspect
from variator_jax.store.formats import open_backbone
from variator_jax.store.arrays import fingerprint
from variator_jax.store.hugging_face import save_hf
from variator_jax.store.lora import collect_with_lora, new_lora
from variator_jax.store.source import memory_source
from variator_jax.store.t5x import save_t5x

CONFIG = LoraConfig(rank=3, alpha=4.5)
TRAINING = {"task": "a_task", "steps": 30}


def arrays(owner, seed=0, config=CONFIG):
    shapes = jax.eval_shape(lambda: init_lora(config, owner.params, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(rng.normal(0, 0.5, x.shape), "f4"), shapes)


@pytest.fixture(scope="module")
def owner():
    return backbone(GATED)


@pytest.fixture(scope="module")
def other():
    """Of the same name and shape, with other weights."""
    changed = backbone(GATED)
    params = jax.tree.map(lambda x: x * 2, changed.params)
    return dataclasses.replace(changed, params=params, fingerprint=fingerprint(params))


@pytest.fixture
def folder(owner, tmp_path):
    save_lora(tmp_path / "lora", CONFIG, arrays(owner), owner, TRAINING)
    return tmp_path / "lora"


@pytest.fixture
def merged(owner, folder):
    return with_lora(owner, folder)


def test_a_folder_gives_back_what_was_put_in(owner, folder):
    found = load_lora(folder, owner)
    assert found.config == CONFIG and found.task == "a_task"
    assert_same(found.params, arrays(owner))
    assert found.description["training"] == TRAINING
    assert sorted(p.name for p in folder.iterdir()) == ["lora.json", "lora.safetensors"]
    assert load_lora(folder.parent).fingerprint == found.fingerprint  # as a run leaves it


def test_only_what_is_named_is_changed_and_by_the_formula(owner, folder, merged):
    before, after = flat(owner.params), flat(merged.params)
    expected = flat(merge_lora(owner.params, arrays(owner), CONFIG))
    named = lora_weights(CONFIG, owner.params)
    for path in before:
        if path in named:
            np.testing.assert_allclose(after[path], expected[path], rtol=1e-6, atol=1e-6)
            assert np.abs(after[path] - before[path]).max() > 1e-2
    kept = zip(jax.tree.leaves(owner.params), jax.tree.leaves(merged.params), strict=True)
    assert sum(one is two for one, two in kept) == len(before) - len(named)
    assert merged.fingerprint == fingerprint(merged.params) != owner.fingerprint
    assert merged.lora == {"fingerprint": load_lora(folder).fingerprint, "task": "a_task"}


def test_the_networks_answers_change_and_are_those_of_the_merged_weights(owner, merged):
    tokens, targets = np.arange(1, 9).reshape(2, 4), np.array([[0, 5], [0, 7]])
    bare = VariatorModel(owner).logits(tokens, targets)
    found = VariatorModel(merged).logits(tokens, targets)
    same = dataclasses.replace(owner, params=merge_lora(owner.params, arrays(owner), CONFIG))
    np.testing.assert_allclose(found, VariatorModel(same).logits(tokens, targets), atol=1e-3)
    assert np.abs(found - bare).max() > 1e-2


def _save(kind, path, owner):
    if kind == "ours":
        save_backbone(path, owner.config, owner.params)
    elif kind == "run":
        save_backbone(path / "backbone", owner.config, owner.params)
    else:
        {"hf": save_hf, "t5x": save_t5x}[kind](path, owner)


@pytest.mark.parametrize("kind", ["ours", "run", "hf", "t5x"])
def test_it_is_merged_while_a_backbone_is_loaded_whatever_its_format(
    owner, folder, merged, tmp_path, kind
):
    _save(kind, tmp_path / "backbone", owner)
    loaded = load_backbone(tmp_path / "backbone", lora=folder)
    assert loaded.fingerprint == merged.fingerprint and loaded.lora == merged.lora
    assert_same(loaded.params, merged.params)
    given = load_backbone(tmp_path / "backbone", lora=load_lora(folder))
    assert given.fingerprint == merged.fingerprint
    streamed = collect_with_lora(open_backbone(tmp_path / "backbone"), load_lora(folder), "bf16")
    assert streamed.fingerprint == merged.fingerprint and streamed.config.dtype == "bfloat16"
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), merged.params)
    assert_same(streamed.params, rounded)


def test_a_cast_comes_after_the_merge(owner, folder, merged, tmp_path):
    save_hf(tmp_path / "hf", owner)
    half = load_backbone(tmp_path / "hf", "bfloat16", lora=folder)
    assert half.fingerprint == merged.fingerprint
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}


def test_a_merged_backbone_can_be_written_and_is_one_like_any_other(merged, tmp_path):
    save_backbone(tmp_path / "merged", merged.config, merged.params)
    again = load_backbone(tmp_path / "merged")
    assert again.fingerprint == merged.fingerprint
    assert_same(again.params, merged.params)


def test_a_lora_of_another_backbone_is_refused_by_name(owner, other, folder, tmp_path):
    reason = f"'t5_1_1_custom' with fingerprint {owner.fingerprint}; this backbone is"
    with pytest.raises(CheckpointError, match=f"The LoRA in .*{reason}.*{other.fingerprint}"):
        load_lora(folder, other)
    with pytest.raises(CheckpointError, match=reason):
        with_lora(other, folder)
    save_hf(tmp_path / "hf", other)
    for source in (open_backbone(tmp_path / "hf"), memory_source("memory", other)):
        with pytest.raises(CheckpointError, match=reason):
            collect_with_lora(source, load_lora(folder))
    with pytest.raises(CheckpointError, match=reason):
        load_backbone(tmp_path / "hf", lora=folder)


def test_another_shape_is_refused_before_a_weight_is_read(owner, folder):
    read = []
    deep = dataclasses.replace(GATED, embed_dim=20, name="wide")
    source = memory_source("memory", backbone(deep))
    leaves = tuple(dataclasses.replace(x, read=lambda: read.append(1)) for x in source.leaves)
    with pytest.raises(CheckpointError, match=r"belongs to backbone 't5_1_1_custom'.*\(20, 12\)"):
        collect_with_lora(dataclasses.replace(source, leaves=leaves), load_lora(folder))
    assert not read


def test_a_lora_is_not_merged_twice(merged, folder):
    with pytest.raises(CheckpointError, match=r"with a LoRA merged in \(task 'a_task'"):
        with_lora(merged, folder)


def test_a_lora_of_another_vocabulary_is_refused(owner, tmp_path):
    spoken = dataclasses.replace(owner, vocabulary_fingerprint="a" * 64)
    save_lora(tmp_path / "lora", CONFIG, arrays(owner), spoken)
    with pytest.raises(CheckpointError, match="vocabulary"):
        with_lora(dataclasses.replace(owner, vocabulary_fingerprint="b" * 64), tmp_path / "lora")


def test_a_plugin_beside_a_merged_backbone_says_so_and_is_refused_beside_the_bare_one(
    owner, merged, folder, tmp_path
):
    settings = PluginConfig(2, bottleneck=4)
    variables = random_plugin(settings, GATED)
    save_plugin(tmp_path / "plugin", settings, variables, merged)
    save_plugin(tmp_path / "bare", settings, variables, owner)
    plugin = load_plugin(tmp_path / "plugin", merged)
    assert plugin.description["backbone"]["lora"] == merged.lora
    assert "lora" not in load_plugin(tmp_path / "bare", owner).description["backbone"]
    with pytest.raises(
        CheckpointError,
        match=r"backbone 't5_1_1_custom' with a LoRA merged in \(task 'a_task', [0-9a-f]{12}\) "
        rf"with fingerprint {merged.fingerprint}; this backbone is 't5_1_1_custom' with finger",
    ):
        load_plugin(tmp_path / "plugin", owner)
    with pytest.raises(CheckpointError, match="this backbone is 't5_1_1_custom' with a LoRA"):
        VariatorModel(merged, load_plugin(tmp_path / "bare"))
    assert VariatorModel(with_lora(owner, folder), plugin).ratios == (1, 2)
    text = inspect.describe(tmp_path / "plugin")
    assert (
        f"LoRA of task a_task merged in whose fingerprint is {merged.lora['fingerprint']}" in text
    )


def test_a_folder_is_described(owner, folder, tmp_path):
    text = inspect.describe(folder)
    count = sum(x.size for x in jax.tree.leaves(arrays(owner)))
    for said in ("LoRA in", "rank:        3, alpha 4.5", f"{count:,} for 10 weights",
                 f"{4 * count / 1000:.3g} kB", "self_attention", owner.fingerprint,
                 load_lora(folder).fingerprint, "task a_task, steps 30"):  # fmt: skip
        assert said in text, said
    (tmp_path / "run.json").write_text("{}")
    assert "LoRA in" in inspect.describe(tmp_path)  # in a run folder


def test_a_folder_without_its_description_is_told(folder):
    (folder / "lora.json").unlink()
    with pytest.raises(CheckpointError, match="lora.json"):
        inspect.describe(folder)


@pytest.mark.parametrize("run", [True, False])
def test_a_lora_is_no_backbone(folder, run):
    with pytest.raises(CheckpointError, match="holds a LoRA and no backbone"):
        load_backbone(folder.parent if run else folder)


def test_arrays_of_another_rank_or_backbone_are_not_written(owner, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected \(16, 3\)"):
        save_lora(tmp_path / "x", CONFIG, arrays(owner, config=LoraConfig(rank=2)), owner)
    bad = arrays(owner)
    bad["encoder"]["layers_0"]["attention"]["query"]["kernel"]["a"][0, 0] = np.nan
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        save_lora(tmp_path / "x", CONFIG, bad, owner)
    with pytest.raises(CheckpointError, match="matches no weight"):
        new_lora(LoraConfig(sites="nothing"), bad, owner)
    assert not (tmp_path / "x").exists()


def test_a_description_that_names_other_weights_is_refused(folder):
    content = json.loads((folder / "lora.json").read_text())
    content["weights"]["encoder/layers_0/mlp/wi_0/kernel"] = [16, 24]
    (folder / "lora.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        load_lora(folder)


@pytest.mark.parametrize("config", [PLAIN, ENCODER], ids=["1.0", "encoder"])
def test_other_families_have_loras_too(config, tmp_path):
    owner = backbone(config)
    save_lora(tmp_path / "lora", CONFIG, arrays(owner), owner)
    assert with_lora(owner, tmp_path / "lora").fingerprint != owner.fingerprint
