"""The quickstart's plan: every stage is a command whose gin files resolve, and none runs twice."""

import pathlib

import pytest

from variator_jax import cli, gin_utils
from variator_jax.commands import quickstart, registry

FOLDER = pathlib.Path("somewhere")


@pytest.mark.parametrize("stage", quickstart.stages(FOLDER), ids=lambda stage: stage.name)
def test_every_stage_is_a_command_that_resolves(stage, capsys):
    verb, *arguments = stage.command
    assert verb in registry.COMMANDS
    assert cli.main(["inspect", *arguments]) == 0, capsys.readouterr().err
    assert str(gin_utils.macro("MODEL_DIR")).startswith("somewhere")


def test_stages_follow_the_paper():
    plan = {stage.name: " ".join(stage.command) for stage in quickstart.stages(FOLDER)}
    for ratio in quickstart.RATIOS:
        pretraining = plan[f"plugin pre-training, ratio {ratio}"]
        adaptation = plan[f"plugin adaptation, ratio {ratio}"]
        assert "INITIAL_CHECKPOINT_PATH=somewhere/pretrained" in pretraining
        assert "INITIAL_CHECKPOINT_PATH=somewhere/finetuned" in adaptation
        assert f"INITIAL_PLUGIN_PATH=somewhere/plugin_{ratio}" in adaptation
        assert f"adapted_{ratio}" in plan["evaluation"]


def test_finished_stages_are_skipped_and_a_failure_stops(tmp_path, monkeypatch, capsys):
    plan, ran = quickstart.stages(tmp_path), []
    plan[0].result.parent.mkdir(parents=True)
    plan[0].result.touch()

    def fake(command):
        ran.append(command)
        return 2 if len(ran) == 3 else 0

    monkeypatch.setattr(registry, "run", fake)
    assert quickstart.run(tmp_path) == 2
    assert ran == [stage.command for stage in plan[1:4]]
    assert "[2/9] backbone fine-tuning" in capsys.readouterr().out
