"""Which engine a command takes and what it refuses, without T5X; and the quickstart's plan."""

import argparse
import os
import sys
from pathlib import Path

import pytest

from variator_jax import cli, gin_utils
from variator_jax.commands import engines, quickstart, registry
from variator_jax.errors import ConfigError


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """Makes a folder t5x with these files importable, and nothing else of that name."""

    def make(*files):
        package = tmp_path / "t5x"
        package.mkdir()
        for name in files:
            (package / name).write_text("raise ImportError('this T5X is broken', name='clu')\n")
        others = [p for p in sys.path if not os.path.isfile(os.path.join(p, "t5x/train.py"))]
        monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
        return tmp_path

    return make


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(engines, "_t5x_root", lambda: None)


def test_the_builtin_engine_where_there_is_no_t5x(importable):
    importable("notes.txt")  # A folder of that name alone does not count.
    engine = engines.choose(None)
    assert engine.name == "builtin" and "docs/t5x.md" in engine.reason
    with pytest.raises(ConfigError, match="--engine=t5x, but t5x cannot be imported"):
        engines.choose("t5x")
    with pytest.raises(ConfigError, match="Did you mean 'builtin'"):
        engines.choose("buildin")


def test_t5x_where_it_is_unless_the_other_is_forced(importable, monkeypatch, capsys):
    root = importable("__init__.py", "train.py")
    engine = engines.choose(None)
    assert engine.name == "t5x" and str(root) in engine.reason
    assert cli.main(["train", "--gin_file=nano_docs.gin", "--dry_run"]) == 2
    message = capsys.readouterr().err  # A broken T5X is reported and not passed over.
    assert message.startswith("engine: t5x") and "'clu'" in message
    assert "--engine=builtin" in message
    assert engines.choose("builtin").name == "builtin"
    monkeypatch.setenv("VARIATOR_ENGINE", "builtin")
    assert engines.choose(None).name == "builtin"


REFUSED = {
    "export": "the built-in engine has no export; docs/t5x.md",
    "precompile": "the built-in engine has no precompile",
    "train -- --multiprocess_gpu": "has no --multiprocess_gpu",
    "train --gin.NUM_PARTITIONS=2": "for the engine t5x; on builtin: give MESH_SHAPE",
    "train --gin.PLUGIN_PATH=x": "train takes INITIAL_PLUGIN_PATH",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_the_builtin_engine_refuses_what_is_t5x_s(absent, arguments, capsys):
    name, *others = arguments.split()
    assert cli.main([name, "--gin_file=nano_docs.gin", *others], program="t5x") == 2
    engine, message = capsys.readouterr().err.splitlines()
    assert engine.startswith("engine: builtin (")
    assert message.startswith("t5x: error: ") and REFUSED[arguments] in message


def test_the_command_of_t5x_has_absolute_files_and_the_users_folders_first(absent, tmp_path):
    (tmp_path / "variator_xl.gin").write_text("A = 1\n")
    args = argparse.Namespace(command="infer", gin_file=["variator_xl.gin"], t5x_flags=["--flag"])
    vars(args).update(gin_search_paths=[str(tmp_path)], tfds_data_dir="data", process_index=0)
    engine = engines.Engine(engines.T5X, "a test")
    line = engines.command_line(args, engine, [("MODEL_DIR", "'x y'")])
    assert line[1:4] == ["-m", "t5x.infer", f"--gin_file={tmp_path / 'variator_xl.gin'}"]
    folders = line[4].removeprefix("--gin_search_paths=").split(",")
    assert folders[:2] == [os.getcwd(), str(tmp_path)]
    assert folders[-1] == str(gin_utils.configs_dir())
    flags = ["--tfds_data_dir=data", "--process_index=0", "--multiprocess_gpu", "--flag"]
    assert line[5:] == ["--gin.MODEL_DIR='x y'", *flags]
    parts = Path(gin_utils.engine_dir("t5x"))
    assert all((parts / command / "engine.gin").is_file() for command in engines.PROGRAMS)


# Every stage of the quickstart is a command whose gin files resolve, and none runs twice.


def test_the_stages_follow_the_paper_and_resolve(capsys):
    plan = {stage.name: stage.command for stage in quickstart.stages(Path("somewhere"))}
    for verb, *arguments in plan.values():
        assert verb in registry.COMMANDS
        assert cli.main(["inspect", *arguments]) == 0, capsys.readouterr().err
        assert str(gin_utils.macro("MODEL_DIR")).startswith("somewhere")
    for k in quickstart.PLUGINS:
        adaptation = plan[f"plugin adaptation, {k}"]
        pretrained = "--gin.INITIAL_CHECKPOINT_PATH=somewhere/pretrained"
        assert pretrained in plan[f"plugin pre-training, {k}"]
        assert "--gin.INITIAL_CHECKPOINT_PATH=somewhere/finetuned" in adaptation
        assert f"--gin.INITIAL_PLUGIN_PATH=somewhere/plugin_{k}" in adaptation
        assert f"adapted_{k}" in plan["evaluation"][-1]


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
