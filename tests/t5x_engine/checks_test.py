"""What cannot work is refused in one line, before T5X starts; and what a dry run counts."""

import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
import seqio
import t5x_files
import tiny
from hf_files import save_hf

from variator_jax import cli, gin_utils
from variator_jax.commands import engines
from variator_jax.data import tasks
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig
from variator_jax.store import arrays, save_backbone, save_plugin

QUERY = "encoder/layers_1/attention/query/kernel"
SETTINGS = PluginConfig(4, bottleneck=8)
FAMILY = sorted(path.name for path in gin_utils.configs_dir().glob("variator_*.gin"))
NO_DECODER = """from __gin__ import dynamic_registration
from variator_jax.backbones.t5 import config
config.get_config.num_decoder_layers = 0
"""


@pytest.fixture
def refused(work, monkeypatch, capsys):
    """Runs a command here; gives the one line with which it is refused, exit code 2."""

    def run(*arguments, command="train"):
        def start(program):
            pytest.fail(f"T5X was started: {program}")

        monkeypatch.setattr(engines, "run_program", start)
        monkeypatch.chdir(work)
        options = ("--gin_file=tiny.gin", "--gin.MODEL_DIR=never", *arguments)
        assert cli.main([command, *options]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("variator: error: ") and "Traceback" not in "".join(error)
        assert sum("error:" in line for line in error) == 1
        assert not (work / "never").exists()
        return error[-1]

    return run


@pytest.mark.parametrize("kind", ["missing", "shape", "scanned"])
def test_a_checkpoint_of_another_network(kind, refused, backbone, tmp_path):
    form = "scanned" if kind == "scanned" else "t5"
    tree = t5x_files.t5x_tree(backbone.config, backbone.params, form)
    if kind != "scanned":
        query = tree.pop(QUERY)
        tree |= {QUERY: query[:, :16]} if kind == "shape" else {}
    t5x_files.write_legacy(tmp_path / "checkpoint_3", tree)
    message = refused(f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path}")
    shape = f"{QUERY} of shape (32, 16), this run's is (32, 32)"
    convert = "variator convert --from t5x --to t5x"
    expected = {"missing": f"lacks {QUERY}", "shape": shape, "scanned": convert}
    assert expected[kind] in message and "checkpoint_3" in message


def test_other_formats_name_the_conversion(refused, backbone, tmp_path):
    save_hf(tmp_path / "hf", backbone)
    save_backbone(tmp_path / "variator", backbone.config, backbone.params)
    for kind in ("variator", "hf"):
        message = refused(f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / kind}")
        assert f"variator convert --from {kind} --to t5x {tmp_path / kind}" in message


REFUSED = {
    "train --gin.INITIAL_CHECKPOINT_PATH=nowhere": "There is no folder",
    "infer --gin.CHECKPOINT_PATH=backbone/checkpoint_1000": "has no plugin",
    "train --gin.MIXTURE_OR_TASK_NAME=docs_topik": "Did you mean 'docs_topic'",
    "train --gin_file=no_decoder.gin": "--engine=builtin",
    "train --gin.TRAINED=backbone": "finetune.gin",
    "train --gin.TRAINED=lora": "--engine=builtin",
    "infer --gin.INITIAL_LORA_PATH=runs/lora": "T5X merges no LoRA",
    "train --gin.TASK_FILE=nowhere.tsv": "nowhere.tsv",
    "train --gin.config.get_config.num_decoder_layers=3": "lacks decoder/layers_",
    "train --gin.RATIO=1": "ratio of 2 or more",
    "train --gin.MESH_SHAPE=(1,2,2)": "no fsdp",
    "train --gin.REMAT=True": "is for the engine builtin",
    "train --gin.NUM_MICROBATCHES=3": "must divide BATCH_SIZE",
    "train --gin.CHECKPOINT_PERIOD=6": "multiples of one another; found 10 and 6",
    "train --gin.NUM_PARTITIONS=3": "4 heads do not divide among 3",
    "train --gin.PACK=True": "PACK_MULTIPLE",
    "infer --gin.CHECKPOINT_PATH=trained --gin.BACKBONE_DTYPE=bfloat16": "cast the checkpoint's",
    "infer --gin.CHECKPOINT_PATH=trained --gin.PLUGIN_LAYERS=(0,)": "was trained with 'ffn all x4",
    "train --gin.MODEL_DIR=trained --gin.SEED=7": "holds another run, with seed 0",
    "train --gin.MODEL_DIR=trained --gin.RATIO=2": "MODEL_DIR",
}


@pytest.mark.parametrize("command", REFUSED)
def test_settings_that_cannot_work(command, refused, work, trained):
    (work / "no_decoder.gin").write_text(NO_DECODER)
    name, *options = command.split()
    assert REFUSED[command] in refused(*options, command=name)


def plugin_folder(tmp_path, backbone, settings=SETTINGS):
    variables = tiny.random_plugin(settings, backbone.config)
    save_plugin(tmp_path / "plugin", settings, variables, backbone)
    return tmp_path / "plugin"


def test_another_plugin(refused, backbone, tmp_path):
    folder = plugin_folder(tmp_path, backbone, PluginConfig(4, bottleneck=4))
    assert "bottleneck" in refused(f"--gin.INITIAL_PLUGIN_PATH={folder}")


def test_a_run_is_not_continued_from_another_plugin(refused, trained, backbone, tmp_path):
    folder = plugin_folder(tmp_path, backbone)
    message = refused("--gin.MODEL_DIR=trained", f"--gin.INITIAL_PLUGIN_PATH={folder}")
    assert f"INITIAL_PLUGIN_PATH None and not '{folder}'" in message


@pytest.fixture
def engine_model(backbone, t5x_engine):
    fixed = {"backbone": backbone.config, "plugin": SETTINGS, "vocabulary": seqio.ByteVocabulary()}
    return functools.partial(t5x_engine.model, **fixed)


def test_a_plugin_of_another_backbone_where_nothing_is_trained(
    work, backbone, engine_model, t5x_engine, tmp_path
):
    """Raised in T5X's program, which reads every weight; adaptation may start from one."""
    params = jax.tree.map(lambda leaf: -leaf, backbone.params)
    other = dataclasses.replace(backbone, params=params, fingerprint=arrays.fingerprint(params))
    folder = str(plugin_folder(tmp_path, other))
    arguments = (str(work / "backbone"), engine_model(plugin_path=folder), folder)
    with pytest.raises(CheckpointError, match=other.fingerprint) as refusal:
        t5x_engine.restore_config(*arguments)
    assert backbone.fingerprint in str(refusal.value)
    assert t5x_engine.restore_config(*arguments, training=True).fallback_to_scratch


def test_a_vocabulary_beyond_the_embeddings_and_an_export_without_version(engine_model, t5x_engine):
    vocabulary, name = seqio.ByteVocabulary(extra_ids=500), "checks_test_large_vocabulary"
    if name not in seqio.TaskRegistry.names():
        rows = [{"inputs": "a", "targets": "b"}]
        tasks.text_to_text_task(name, lambda split: rows, ("train",), vocabulary)
    with pytest.raises(ConfigError, match="embeddings"):
        t5x_engine.preflight(model=engine_model(), task=name)
    with pytest.raises(ConfigError, match="must end in a version number"):
        t5x_engine.preflight(model=engine_model(), output_dir="exported")


def test_what_a_stopped_run_of_other_settings_left_is_refused(engine_model, t5x_engine, tmp_path):
    infer = functools.partial(t5x_engine.preflight, model=engine_model(), results_dir=str(tmp_path))
    infer(results_of={"batch_size": 4, "decode_fn": t5x_engine.preflight})
    (tmp_path / "tmp-task-00000-of-00001").mkdir()
    (tmp_path / "tmp-task-00000-of-00001" / "task-chunk00000.COMPLETED").touch()
    infer(results_of={"batch_size": 4, "decode_fn": t5x_engine.preflight})
    with pytest.raises(ConfigError, match="holds results of another run"):
        infer(results_of={"batch_size": 8})


def test_results_of_a_checkpoint_that_was_written_again_are_refused(
    engine_model, t5x_engine, backbone, tmp_path
):
    folder, results = tmp_path / "checkpoint_3", {"checkpoint": str(tmp_path)}
    infer = functools.partial(
        t5x_engine.preflight, model=engine_model(), results_dir=str(tmp_path / "scores")
    )
    t5x_files.save_t5x(folder, backbone)
    infer(results_of=results)
    (tmp_path / "scores" / "task-score.jsonl.COMPLETED").touch()
    infer(results_of=results)
    shutil.rmtree(folder)
    t5x_files.save_t5x(folder, backbone)  # at the same path, as by a run that was made again
    with pytest.raises(ConfigError, match="holds results of another run"):
        infer(results_of=results)


def t5x_count(size):
    """Counts the parameters of T5X's network as T5X's own gin file configures it."""
    import gin
    from t5x.examples.t5 import network

    root = str(engines._t5x_root())
    gin_utils.parse([f"t5x/examples/t5/t5_1_1/{size}.gin"], ["DROPOUT_RATE=0.0"], [root])
    config = gin.get_configurable(network.T5Config)()
    tokens = jnp.ones((1, 4), jnp.int32)
    init = network.Transformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(("size", "billions"), [("xl", 2.850), ("xxl", 11.135)])
def test_a_dry_run_counts_what_t5x_counts(size, billions, fresh_gin, capsys):
    expected = t5x_count(size)
    assert round(expected / 1e9, 3) == billions
    for engine in ("t5x", "builtin"):
        options = ("train", f"--engine={engine}", f"--gin_file=variator_{size}.gin", "--dry_run")
        assert cli.main(options) == 0
        out = capsys.readouterr().out
        assert re.search(rf"^backbone +{expected:,} ", out, re.MULTILINE)
        assert "still to be set: INITIAL_CHECKPOINT_PATH, MODEL_DIR" in out
        assert ("-m t5x.train" in out) == (engine == "t5x")


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_parses_under_t5x(name, fresh_gin):
    with engines.as_main("t5x.train"):
        gin_utils.parse([name], [], engines.choose("t5x").search_paths("train"), require=False)
    assert set(gin_utils.unset_required()) <= {"INITIAL_CHECKPOINT_PATH", "MODEL_DIR"}
