"""What cannot work is refused in one line, before T5X starts."""

import dataclasses

import jax
import pytest
import seqio
import t5x_files
import tiny
from hf_files import save_hf

from variator_jax import cli
from variator_jax.commands import engines
from variator_jax.data import tasks
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig
from variator_jax.store import arrays, save_backbone, save_plugin

QUERY = "encoder/layers_1/attention/query/kernel"


@pytest.fixture
def refused(work, monkeypatch, capsys):
    """Runs a command here; gives the one line with which it is refused, exit code 2."""

    def run(*arguments, command="train"):
        def start(program):
            pytest.fail(f"T5X was started: {program}")

        monkeypatch.setattr(engines, "run_program", start)
        monkeypatch.chdir(work)
        options = ("--gin_file=tiny.gin", *arguments, "--gin.MODEL_DIR=never")
        assert cli.main([command, *options]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("variator: error: ") and "Traceback" not in "".join(error)
        assert sum("error:" in line for line in error) == 1
        assert not (work / "never").exists()
        return error[-1]

    return run


@pytest.fixture
def checkpoint(backbone, tmp_path):
    """Writes a checkpoint whose leaves were changed by a function, and gives the option for it."""

    def write(change=lambda tree: None, form="t5"):
        tree = t5x_files.t5x_tree(backbone.config, backbone.params, form)
        change(tree)
        t5x_files.write_legacy(tmp_path / "checkpoint_3", tree)
        return f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path}"

    return write


class TestCheckpoints:
    def test_missing_leaf(self, refused, checkpoint):
        message = refused(checkpoint(lambda tree: tree.pop(QUERY)))
        assert f"lacks {QUERY}" in message and "checkpoint_3" in message

    def test_another_shape(self, refused, checkpoint):
        message = refused(checkpoint(lambda tree: tree.update({QUERY: tree[QUERY][:, :16]})))
        assert f"{QUERY} of shape (32, 16), this run's is (32, 32)" in message

    def test_scanned_layers_name_the_conversion(self, refused, checkpoint):
        message = refused(checkpoint(form="scanned"))
        assert "scanned layers" in message and "variator convert --from t5x --to t5x" in message

    @pytest.mark.parametrize("kind", ["variator", "hf"])
    def test_other_formats_name_the_conversion(self, kind, refused, backbone, tmp_path):
        if kind == "variator":
            save_backbone(tmp_path / kind, backbone.config, backbone.params)
        else:
            save_hf(tmp_path / kind, backbone)
        message = refused(f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / kind}")
        assert f"variator convert --from {kind} --to t5x {tmp_path / kind}" in message

    def test_nothing_there(self, refused):
        assert "There is no folder" in refused("--gin.INITIAL_CHECKPOINT_PATH=nowhere")

    def test_a_backbone_alone_has_no_plugin_to_infer_with(self, refused):
        files = ("--gin_file=runs/infer.gin", "--gin.INFER_OUTPUT_DIR=never")
        checkpoint = "--gin.CHECKPOINT_PATH=backbone/checkpoint_1000"
        message = refused(*files, checkpoint, command="infer")
        assert "has no plugin" in message and "PLUGIN_PATH" in message


class TestPlugins:
    def folder(self, tmp_path, backbone, ratio=4, bottleneck=8):
        settings = PluginConfig(ratio, bottleneck=bottleneck)
        variables = tiny.random_plugin(settings, backbone.config)
        save_plugin(tmp_path / "plugin", settings, variables, backbone)
        return tmp_path / "plugin"

    def test_another_ratio(self, refused, backbone, tmp_path):
        folder = self.folder(tmp_path, backbone, ratio=2)
        message = refused(f"--gin.INITIAL_PLUGIN_PATH={folder}")
        assert "ratio" in message and "2" in message and "4" in message

    def test_another_bottleneck(self, refused, backbone, tmp_path):
        folder = self.folder(tmp_path, backbone, bottleneck=4)
        assert "bottleneck" in refused(f"--gin.INITIAL_PLUGIN_PATH={folder}")

    def test_another_backbone_where_nothing_is_trained(self, work, backbone, tmp_path):
        """Told by T5X's program, for it reads every weight; adaptation may start from one."""
        from variator_jax.t5x_engine import model, restore_config

        changed = jax.tree.map(lambda leaf: -leaf, backbone.params)
        other = dataclasses.replace(
            backbone, params=changed, fingerprint=arrays.fingerprint(changed)
        )
        folder = self.folder(tmp_path, other)
        made = model(
            backbone=backbone.config,
            plugin=PluginConfig(4, bottleneck=8),
            vocabulary=seqio.ByteVocabulary(),
            plugin_path=str(folder),
        )
        arguments = (str(work / "backbone"), made, str(folder))
        with pytest.raises(CheckpointError, match=other.fingerprint) as refusal:
            restore_config(*arguments)
        assert backbone.fingerprint in str(refusal.value)
        assert restore_config(*arguments, training=True).fallback_to_scratch


class TestSettings:
    def test_no_such_task(self, refused):
        message = refused("--gin.MIXTURE_OR_TASK_NAME=docs_topik")
        assert "'docs_topik'" in message and "Did you mean 'docs_topic'" in message

    def test_an_encoder_alone(self, refused, tmp_path):
        (tmp_path / "encoder.gin").write_text(
            "from __gin__ import dynamic_registration\n"
            "from variator_jax.backbones.t5 import config\n"
            "config.get_config.num_decoder_layers = 0\n"
        )
        message = refused(f"--gin_file={tmp_path / 'encoder.gin'}")
        assert "no decoder" in message and "--engine=builtin" in message

    @pytest.mark.parametrize("trained", ["backbone", "lora", "student"])
    def test_training_anything_but_a_plugin(self, refused, trained):
        message = refused(f"--gin.TRAINED={trained}")
        assert "finetune.gin" in message and "--engine=builtin" in message

    @pytest.mark.parametrize("command", ["train", "eval", "infer"])
    def test_merging_a_lora(self, refused, command):
        message = refused("--gin.INITIAL_LORA_PATH=runs/lora", command=command)
        assert "INITIAL_LORA_PATH is 'runs/lora': T5X merges no LoRA" in message
        assert "variator convert" in message and "--engine=builtin" in message

    def test_a_file_of_rows_that_is_not_there(self, refused):
        assert "nowhere.tsv" in refused("--gin.TASK_FILE=nowhere.tsv")


class TestWhatT5XWouldTakeWithoutAWord:
    def test_a_leaf_of_an_own_network_that_the_checkpoint_lacks(self, refused):
        deeper = ("--gin.config.get_config.num_decoder_layers=3", "--gin.PLUGIN_PATH=None")
        assert "lacks decoder/layers_" in refused(*deeper)

    def test_a_vocabulary_beyond_the_embeddings(self, backbone):
        from variator_jax.t5x_engine import model, preflight

        vocabulary, name = seqio.ByteVocabulary(extra_ids=500), "refusals_test_large_vocabulary"
        if name not in seqio.TaskRegistry.names():
            rows = [{"inputs": "a", "targets": "b"}]
            tasks.text_to_text_task(name, lambda split: rows, ("train",), vocabulary)
        made = model(
            backbone=backbone.config, plugin=PluginConfig(4), vocabulary=seqio.ByteVocabulary()
        )
        with pytest.raises(ConfigError, match="embeddings"):
            preflight.preflight(model=made, task=name)

    def test_nothing_to_train(self, refused):
        assert "ratio of 2 or more" in refused("--gin.RATIO=1")

    def test_a_cast_that_would_reach_the_plugin(self, refused, trained):
        run = (f"--gin.CHECKPOINT_PATH={trained}", "--gin.BACKBONE_DTYPE=bfloat16")
        assert "would cast the checkpoint's plugin" in refused(*run, command="infer")

    def test_a_mesh_with_fsdp(self, refused):
        assert "no fsdp" in refused("--gin.MESH_SHAPE=(1, 2, 2)")

    def test_macros_of_the_other_engine(self, refused):
        assert "is for the engine builtin" in refused("--gin.REMAT=True")

    @pytest.mark.parametrize("change", ["SEED=7", "BATCH_SIZE=4", "RATIO=2"])
    def test_a_run_that_is_resumed_as_another(self, trained, work, change, monkeypatch, capsys):
        monkeypatch.chdir(work)
        options = ("--gin_file=tiny.gin", f"--gin.MODEL_DIR={trained}", f"--gin.{change}")
        assert cli.main(["train", *options]) == 2
        assert "MODEL_DIR" in capsys.readouterr().err
