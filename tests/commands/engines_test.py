"""Which engine a command takes, what it says about it, and what it refuses, without T5X."""

import os
import subprocess
import sys

import pytest

from variator_jax import cli, gin_utils
from variator_jax.backbones.t5 import cost, get_config
from variator_jax.commands import engines
from variator_jax.errors import ConfigError


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """Makes a folder t5x with these files importable, and nothing else of that name."""

    def make(*files):
        package = tmp_path / "t5x"
        package.mkdir()
        for name in files:
            (package / name).write_text("raise ImportError('this T5X is broken', name='clu')\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *_without_t5x()])
        return tmp_path

    return make


def _without_t5x():
    return [path for path in sys.path if not os.path.isfile(os.path.join(path, "t5x/train.py"))]


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(engines, "_t5x_root", lambda: None)


class TestChoice:
    def test_the_builtin_engine_where_there_is_no_t5x(self, absent):
        engine = engines.choose(None)
        assert engine.name == "builtin" and "docs/t5x.md" in engine.reason
        with pytest.raises(ConfigError, match="--engine=t5x, but t5x cannot be imported"):
            engines.choose("t5x")

    def test_t5x_where_it_is_unless_the_other_is_forced(self, importable):
        root = importable("__init__.py", "train.py")
        engine = engines.choose(None)
        assert engine.name == "t5x" and str(root) in engine.reason
        assert engines.choose("builtin").name == "builtin"

    def test_a_folder_that_is_only_called_so_does_not_count(self, importable):
        importable("notes.txt")
        assert engines.choose(None).name == "builtin"

    def test_unknown_engines_name_the_nearest(self):
        with pytest.raises(ConfigError, match="Did you mean 'builtin'"):
            engines.choose("buildin")

    def test_a_broken_t5x_is_told_and_not_passed_over(self, importable, capsys):
        importable("__init__.py", "train.py")
        assert cli.main(["train", "--gin_file=nano_docs.gin", "--dry_run"]) == 2
        message = capsys.readouterr().err
        assert message.startswith("engine: t5x") and "'clu'" in message
        assert "--engine=builtin" in message


class TestBuiltin:
    @pytest.mark.parametrize("command", ["export", "precompile"])
    def test_what_is_t5x_s_is_refused_by_name_with_the_way_to_get_it(self, absent, command, capsys):
        assert cli.main([command, "--gin_file=nano_docs.gin"], program="t5x") == 2
        engine, message = capsys.readouterr().err.splitlines()
        assert engine.startswith("engine: builtin (")
        assert message.startswith("t5x: error: the built-in engine") and "docs/t5x.md" in message

    def test_t5x_s_own_flags_are_refused(self, absent, capsys):
        command = ["train", "--gin_file=nano_docs.gin", "--", "--multiprocess_gpu"]
        assert cli.main(command) == 2
        assert "--multiprocess_gpu" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["t5_1_1_xl", "t5_1_1_xxl"])
    def test_a_dry_run_tells_the_budget_without_weights_and_names_what_is_open(self, name, capsys):
        file = f"--gin_file=variator_{name.rpartition('_')[2]}.gin"
        assert cli.main(["train", "--engine=builtin", file, "--dry_run"]) == 0
        out = capsys.readouterr().out
        rows = [line for line in out.splitlines() if "iB" in line]
        numbers = {row.split()[0]: row[18:].split()[0] for row in rows}
        assert numbers["backbone"] == f"{cost.backbone_parameters(get_config(name)):,}"
        assert "SEED = 0" in out and "still to be set: INITIAL_CHECKPOINT_PATH, MODEL_DIR" in out
        # Two moments a weight: the optimizer's state is the plugin's alone.
        plugin, state = (int(numbers[x].replace(",", "")) for x in ("gradients", "optimizer"))
        assert plugin < int(numbers["backbone"].replace(",", "")) / 100 and state < 2.01 * plugin


class TestT5XCommand:
    def test_it_finds_the_files_from_any_folder_and_keeps_the_users_first(self, tmp_path):
        (tmp_path / "variator_xl.gin").write_text("A = 1\n")
        line = engines.command_line(
            "infer", ["variator_xl.gin"], [("MODEL_DIR", "'x y'")], [str(tmp_path)], ["--flag"]
        )
        assert line[1:3] == ["-m", "t5x.infer"] and line[-1] == "--flag"
        assert f"--gin_file={tmp_path / 'variator_xl.gin'}" in line
        assert "--gin.MODEL_DIR='x y'" in line
        paths = next(x for x in line if x.startswith("--gin_search_paths=")).split("=")[1]
        assert paths.split(",") == [os.getcwd(), str(tmp_path), str(gin_utils.configs_dir())]

    def test_each_program_has_its_own_part_of_the_configuration(self):
        for command in engines.PROGRAMS:
            folder = gin_utils.configs_dir() / "engines" / "t5x" / command
            assert (folder / "engine.gin").is_file()


def test_both_commands_are_installed_and_are_the_same(absent):
    code = "import sys; from variator_jax import cli; sys.argv = ['t5x', '--help']; cli.t5x()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: t5x COMMAND" in done.stdout and "precompile" in done.stdout
