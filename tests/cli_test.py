"""The command line on the built-in engine; `t5x_engine/` has the tests of T5X."""

import re
import shlex
import sys
import types
from pathlib import Path

import jax
import pytest

import variator_jax.evaluation
import variator_jax.train
from variator_jax import cli, gin_utils
from variator_jax.backbones.t5 import T5, get_config
from variator_jax.commands import engines
from variator_jax.commands.registry import COMMANDS
from variator_jax.errors import DataError
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.store import Backbone, save_plugin

GIN = """from __gin__ import dynamic_registration
import {module} as lib
MODEL_DIR = %gin.REQUIRED
STEPS = 10
lib.{function}:
  model_dir = %MODEL_DIR
  steps = %STEPS
"""
BAD = DataError("rows.jsonl:3: the field 'text' is missing.\nAll 2 rows are bad.")
ERRORS = {"bad_rows": BAD, "interrupt": KeyboardInterrupt(), "bug": ZeroDivisionError("a bug")}


@pytest.fixture(autouse=True)
def without_t5x(monkeypatch):
    monkeypatch.setattr(engines, "_t5x_root", lambda: None)


@pytest.fixture
def calls(monkeypatch, fresh_gin, tmp_path):
    """The calls of stand-ins for the modules that train and evaluate, with their gin files."""
    calls = []
    monkeypatch.chdir(tmp_path)

    for package, function in {"train": "train", "evaluation": "evaluate"}.items():

        def run(*, model_dir, steps, function=function):
            calls.append((function, model_dir, steps))
            if model_dir in ERRORS:
                raise ERRORS[model_dir]
            return types.SimpleNamespace(interrupted=model_dir == "preempted")

        module = types.ModuleType(f"variator_jax.{package}.{function}")
        run.__name__ = run.__qualname__ = function
        run.__module__ = module.__name__
        setattr(module, function, run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(f"variator_jax.{package}.{function}", module, raising=False)
        text = GIN.format(module=module.__name__, function=function)
        (tmp_path / f"{function}.gin").write_text(text)
    return calls


@pytest.fixture
def variator(capsys):
    """Runs a command, given as a list or as a line; gives exit code, stdout and stderr."""

    def run(command):
        code = cli.main(shlex.split(command) if isinstance(command, str) else command)
        return code, *capsys.readouterr()

    return run


def refusal(result):
    """The one line on stderr of a refused command, after the one that names the engine."""
    code, out, err = result
    err = re.sub(r"^engine: .*\n", "", err)
    assert code == 2 and out == ""
    assert err.startswith("variator: error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(("command", "call"), [
    ("train --gin_file=train.gin --gin.STEPS=3", ("train", "runs/x", 3)),
    ("eval --gin_file evaluate.gin", ("evaluate", "runs/x", 10)),
    ("train --gin_file=train.gin --gin_file=long.gin --gin_search_paths=.,lib",
     ("train", "runs/x", 99)),
])  # fmt: skip
def test_the_configured_function_is_called(variator, calls, command, call):
    Path("lib").mkdir()
    Path("lib/long.gin").write_text("STEPS = 99\n")
    assert variator(f"{command} --gin.MODEL_DIR=runs/x")[0] == 0
    assert calls == [call]


TRAIN = "train --gin_file=train.gin"
REFUSED = {
    "train": "no gin file",
    TRAIN: "--gin.MODEL_DIR=VALUE",
    "train --gin_fil=train.gin": "'--gin_file'",
    "train --gin_file=evaluate.gin --gin.MODEL_DIR=x": "one that does, such as nano_docs",
    "train --TRAIN_STEPS=5": "--gin.TRAIN_STEPS=5",
    "train a.gin": "--gin_file=a.gin",
    "train --gin.RATIO 8": "Did you mean '--gin.RATIO=8'?",
    "train --ratio=8": "Did you mean '--gin.RATIO=8'?",
    "train --multiprocess_gpu": "own program go behind --",
    "trian": "Did you mean 'train'?",
    "--gin_file=train.gin train": "the command comes first",
    "inspect": "one of the two",
    "report x --gin.A=1": "takes no gin overrides",
    "report nowhere": "report.md",
}


@pytest.mark.parametrize("command", REFUSED)
def test_errors_are_found_before_anything_runs(variator, calls, command):
    assert REFUSED[command] in refusal(variator(command))
    assert calls == []


def test_a_check_asks_for_no_devices_and_runs_nothing(variator, fresh_gin, monkeypatch):
    monkeypatch.setattr("jax.devices", lambda *_: pytest.fail("asked for devices"))
    mesh = "--gin.MESH_SHAPE='(64, 1, 1)'"
    assert variator(f"train --check --gin_file=nano_docs.gin {mesh}")[:2] == (0, "")


def test_errors_of_a_run(variator, calls, monkeypatch):
    command = f"{TRAIN} --gin.MODEL_DIR="
    line = "variator: error: rows.jsonl:3: the field 'text' is missing. All 2 rows are bad.\n"
    assert refusal(variator(f"{command}bad_rows")) == line
    monkeypatch.setenv("VARIATOR_DEBUG", "1")
    code, _, err = variator(f"{command}bad_rows")
    assert code == 2 and "Traceback" in err and err.endswith(line)
    code, _, err = variator(f"{command}interrupt")
    assert code == 130 and "Traceback" not in err
    with pytest.raises(ZeroDivisionError):  # Bugs are not hidden.
        variator(f"{command}bug")
    with pytest.raises(SystemExit) as done:  # as if the signal had ended the run
        variator(f"{command}preempted")
    assert done.value.code == 143


def test_the_help_has_examples_of_each_command(variator, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["t5x", "--help"])
    assert cli.t5x() == 0 and "usage: t5x [-h]" in capsys.readouterr().out
    code, out, _ = variator("")
    assert code == 2 and "usage: variator [-h]" in out and all(name in out for name in COMMANDS)
    assert variator("--help") == (0, out, "")
    assert variator("--version")[1] == f"variator {variator_jax.__version__}\n"
    for name in COMMANDS:
        code, out, _ = variator([name, "--help"])
        assert code == 0 and re.search(rf"examples:\n  (variator|t5x) {name} ", out)


def test_inspect_prints_a_configuration_or_describes_a_folder(variator, calls, monkeypatch):
    code, out, _ = variator("inspect --gin_file=train.gin --gin.MODEL_DIR=runs/x")
    assert code == 0 and "MODEL_DIR = 'runs/x'" in out and "STEPS = 10" in out and calls == []
    target = "variator_jax.commands.describe.describe"
    monkeypatch.setattr(target, lambda path, verify: f"{path} {verify}")
    assert variator("inspect runs/x") == (0, "runs/x False\n", "")
    assert variator("inspect runs/x --verify") == (0, "runs/x True\n", "")


@pytest.mark.parametrize("table", ["report.md", "results.md"])
def test_report_prints_the_table_and_names_the_plots(variator, tmp_path, table):
    (tmp_path / table).write_text("| k | score |\n")
    (tmp_path / "ratios_nano.png").touch()
    code, out, _ = variator(["report", str(tmp_path)])
    assert code == 0 and "| k | score |" in out and f"{tmp_path}/ratios_nano.png" in out


RUNS = [example for name in ("train", "eval", "infer") for example in COMMANDS[name].examples]
RUNS.append("variator train --gin_file=quickstart/adapt.gin")
DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("example", RUNS)
def test_the_examples_of_the_help_resolve(example, variator):
    code, out, err = variator([*shlex.split(example)[1:], "--dry_run"])
    assert code == 0 and "without activations" in out, err
    if "variator_xl" in example:  # The documentation shows what is printed.
        budget = out[out.index("backbone t5_1_1_xl, 1 device") :]
        assert budget in (DOCS / "t5x.md").read_text()


def test_the_dry_run_of_an_evaluation_names_the_plugins_of_the_folders(variator, tmp_path):
    nano = Backbone(get_config("nano"), {}, "")
    for sites in ("span all x4", "kv 1 x8"):
        plugin = PluginConfig(sites=sites)
        variables = init_plugin(plugin, T5(nano.config).stack(), jax.random.key(0))
        save_plugin(tmp_path / plugin.name, plugin, variables, nano)
    paths = tuple(str(tmp_path / name) for name in ("span_x4", "kv_x8"))
    files = "eval --gin_file=nano_docs.gin --gin_file=tasks/docs_topic.gin --gin_file=runs/eval.gin"
    code, out, err = variator([*files.split(), f"--gin.PLUGIN_PATHS={paths}", "--dry_run"])
    assert code == 0 and "ffn_x4" not in out, err
    assert "plugin span_x4 of sites span all x4: " in out and "plugin kv_x8 of sites kv 1" in out


FAMILY = sorted(path.stem for path in gin_utils.configs_dir().glob("variator_*.gin"))
REQUIRED = {"INITIAL_CHECKPOINT_PATH": "backbone", "MODEL_DIR": "runs/x"}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_names_what_it_requires(name, variator):
    message = refusal(variator(f"inspect --gin_file={name}.gin"))
    header = (gin_utils.configs_dir() / f"{name}.gin").read_text().partition("include")[0]
    assert all(macro in message and macro in header for macro in REQUIRED)
    overrides = [f"--gin.{macro}={value}" for macro, value in REQUIRED.items()]
    code, out, _ = variator(["inspect", f"--gin_file={name}.gin", *overrides])
    size, _, family = name.removeprefix("variator_").partition("_")
    assert code == 0 and f"'{family or 't5_1_1'}_{size}'" in out


@pytest.mark.parametrize("task", ["mnli", "squad", "text", "file"])
def test_adaptation_is_stacked_on_the_family(task, variator):
    files = [f"--gin_file={f}.gin" for f in ("variator_xl", f"tasks/{task}", "runs/adapt")]
    message = refusal(variator(["inspect", *files]))
    assert "required, but not set" in message and "INITIAL_PLUGIN_PATH" in message
