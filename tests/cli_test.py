import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import variator_jax.evaluation
import variator_jax.train
from variator_jax import cli, gin_utils
from variator_jax.commands import engines
from variator_jax.commands.registry import COMMANDS
from variator_jax.errors import DataError

GIN = """from __gin__ import dynamic_registration
import {module} as lib
MODEL_DIR = %gin.REQUIRED
STEPS = 10
lib.{function}:
  model_dir = %MODEL_DIR
  steps = %STEPS
"""
ERRORS = {
    "bad_rows": DataError("rows.jsonl:3: the field 'text' is missing.\nAll 2 rows are bad."),
    "interrupt": KeyboardInterrupt(),
    "bug": ZeroDivisionError("a bug"),
}


@pytest.fixture(autouse=True)
def without_t5x(monkeypatch):
    """These are tests of the built-in engine; `t5x_engine/` has those of T5X."""
    monkeypatch.setattr(engines, "_t5x_root", lambda: None)


@pytest.fixture
def calls(monkeypatch, fresh_gin, tmp_path):
    """What the engine was called with; stands in for the modules that train and evaluate."""
    calls = []
    monkeypatch.chdir(tmp_path)

    def stand_in(function, package):
        def run(*, model_dir, steps):
            calls.append((function, model_dir, steps))
            if model_dir in ERRORS:
                raise ERRORS[model_dir]
            return types.SimpleNamespace(interrupted=model_dir == "preempted")

        module = types.ModuleType(f"{package.__name__}.{function}")
        run.__name__ = run.__qualname__ = function
        run.__module__ = module.__name__
        setattr(module, function, run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, function, module, raising=False)
        text = GIN.format(module=module.__name__, function=function)
        (tmp_path / f"{function}.gin").write_text(text)

    stand_in("train", variator_jax.train)
    stand_in("evaluate", variator_jax.evaluation)
    return calls


@pytest.fixture
def variator(capsys):
    """Runs the command; gives exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return run


def refusal(result):
    """The one line on stderr of a refused command, after the one that names the engine."""
    code, out, err = result
    assert code == 2 and out == ""
    if err.startswith("engine: "):
        err = err.partition("\n")[2]
    assert err.startswith("variator: error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


class TestRuns:
    @pytest.mark.parametrize(
        ("arguments", "call"),
        [
            (("train", "--gin_file=train.gin", "--gin.STEPS=3"), ("train", "runs/x", 3)),
            (("eval", "--gin_file", "evaluate.gin"), ("evaluate", "runs/x", 10)),
        ],
    )
    def test_the_configured_function_is_called(self, variator, calls, arguments, call):
        assert variator(*arguments, "--gin.MODEL_DIR=runs/x")[0] == 0
        assert calls == [call]

    def test_files_stack_and_search_paths_are_searched(self, variator, calls, tmp_path):
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "long.gin").write_text("STEPS = 99\n")
        command = ("train", "--gin_file=train.gin", "--gin_file=long.gin", "--gin.MODEL_DIR=x")
        assert "long.gin" in refusal(variator(*command))
        assert variator(*command, f"--gin_search_paths={tmp_path},lib")[0] == 0
        assert calls == [("train", "x", 99)]

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("", "no gin file"),
            ("--gin_file=trian.gin", "'train.gin'"),
            ("--gin_file=train.gin", "--gin.MODEL_DIR=VALUE"),
            ("--gin_file=train.gin --gin.MODEL_DIR=x --gin.STPS=1", "'STEPS'"),
            ("--gin_file=train.gin --gin.MODEL_DIR=x --gin.train.stps=1", "'steps'"),
            ("--gin_file=train.gin --gin.MODEL_DIR", "--gin.MODEL_DIR=VALUE"),
            ("--gin_fil=train.gin", "'--gin_file'"),
            ("--gin_file=evaluate.gin --gin.MODEL_DIR=x", "variator_jax.train.train"),
            ("--TRAIN_STEPS=5", "--gin.TRAIN_STEPS"),
            ("a.gin", "--gin_file=a.gin"),
            ("--multiprocess_gpu", "own program go behind --"),
        ],
    )
    def test_errors_are_found_before_anything_runs(self, variator, calls, arguments, expected):
        assert expected in refusal(variator("train", *arguments.split()))
        assert calls == []

    def test_a_check_needs_all_that_is_required_and_runs_nothing(self, variator, calls):
        command = ("train", "--gin_file=train.gin", "--check", "--multiprocess")
        assert "--gin.MODEL_DIR=VALUE" in refusal(variator(*command))
        code, out, _ = variator(*command, "--gin.MODEL_DIR=x")
        assert (code, out, calls) == (0, "", [])

    def test_a_check_asks_for_no_devices(self, variator, fresh_gin, monkeypatch):
        import jax

        monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("asked for devices"))
        code, out, _ = variator(
            "train", "--gin_file=nano_docs.gin", "--check", "--gin.MESH_SHAPE=(64, 1, 1)"
        )
        assert (code, out) == (0, "")


class TestErrors:
    def test_an_error_of_the_run_is_one_line_without_gins_trace(self, variator, calls, monkeypatch):
        command = ("train", "--gin_file=train.gin", "--gin.MODEL_DIR=bad_rows")
        line = "variator: error: rows.jsonl:3: the field 'text' is missing. All 2 rows are bad.\n"
        assert refusal(variator(*command)) == line
        monkeypatch.setenv("VARIATOR_DEBUG", "1")
        code, _, err = variator(*command)
        assert code == 2 and "Traceback" in err and err.endswith(line)

    def test_a_run_that_a_signal_ended_exits_as_if_the_signal_had(self, variator, calls):
        with pytest.raises(SystemExit) as done:
            variator("train", "--gin_file=train.gin", "--gin.MODEL_DIR=preempted")
        assert done.value.code == 143

    def test_bugs_are_not_hidden(self, variator, calls):
        with pytest.raises(ZeroDivisionError):
            variator("train", "--gin_file=train.gin", "--gin.MODEL_DIR=bug")

    def test_an_interrupt_gives_130(self, variator, calls):
        code, _, err = variator("train", "--gin_file=train.gin", "--gin.MODEL_DIR=interrupt")
        assert code == 130 and "Traceback" not in err

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("trian", "Did you mean 'train'?"),
            ("--gin_file=train.gin train", "the command comes first"),
            ("inspect", "one of the two"),
            ("inspect x --gin_file=train.gin", "one of the two"),
            ("report", "required: path"),
            ("report x --gin.A=1", "takes no gin overrides"),
            ("report nowhere", "report.md"),
        ],
    )
    def test_other_commands(self, variator, arguments, expected):
        assert expected in refusal(variator(*arguments.split()))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_examples(variator, name):
    code, out, _ = variator(name, "--help")
    assert code == 0 and re.search(rf"examples:\n  (variator|t5x) {name} ", out)


def test_the_help_of_the_program(variator):
    code, out, _ = variator()
    assert code == 2 and "usage: variator [-h]" in out and all(name in out for name in COMMANDS)
    assert variator("--help") == (0, out, "")
    assert variator("--version")[1] == f"variator {variator_jax.__version__}\n"


def test_inspect_prints_the_resolved_configuration(variator, calls):
    code, out, _ = variator("inspect", "--gin_file=train.gin", "--gin.MODEL_DIR=runs/x")
    assert code == 0 and "MODEL_DIR = 'runs/x'" in out and "STEPS = 10" in out
    assert calls == []


def test_inspect_describes_a_folder(variator, monkeypatch):
    from variator_jax.commands import describe

    monkeypatch.setattr(describe, "describe", lambda path, verify: f"{path} {verify}")
    assert variator("inspect", "runs/x") == (0, "runs/x False\n", "")
    assert variator("inspect", "runs/x", "--verify") == (0, "runs/x True\n", "")


@pytest.mark.parametrize("table", ["report.md", "results.md"])
def test_report_prints_the_table_and_names_the_plots(variator, tmp_path, table):
    (tmp_path / table).write_text("| k | score |\n")
    plots = [tmp_path / "ratios_nano.png", tmp_path / "arms_nano_k4.png"]
    for plot in plots:
        plot.touch()
    code, out, _ = variator("report", str(tmp_path))
    assert code == 0 and "| k | score |" in out and all(str(plot) in out for plot in plots)


RUNS = [example for name in ("train", "eval", "infer") for example in COMMANDS[name].examples]
DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("example", RUNS)
def test_the_examples_of_the_help_resolve(example, variator):
    code, out, err = variator(*shlex.split(example)[1:], "--dry_run")
    assert code == 0 and "without activations" in out, err
    if "variator_xl" in example:  # The documentation shows what is printed.
        budget = out[out.index("backbone t5_1_1_xl, plugin of ratio 4") :]
        assert budget in (DOCS / "t5x.md").read_text()


FAMILY = sorted(path.stem for path in gin_utils.configs_dir().glob("variator_*.gin"))


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_names_what_it_requires(name, variator):
    required = {"INITIAL_CHECKPOINT_PATH": "backbone", "MODEL_DIR": "runs/x"}
    message = refusal(variator("inspect", f"--gin_file={name}.gin"))
    header = (gin_utils.configs_dir() / f"{name}.gin").read_text().partition("include")[0]
    assert all(macro in message and macro in header for macro in required)
    overrides = [f"--gin.{macro}={value}" for macro, value in required.items()]
    code, out, _ = variator("inspect", f"--gin_file={name}.gin", *overrides)
    size, _, family = name.removeprefix("variator_").partition("_")
    assert code == 0 and f"'{family or 't5_1_1'}_{size}'" in out


@pytest.mark.parametrize("task", ["mnli", "squad", "text", "file"])
def test_adaptation_is_stacked_on_the_family(task, variator):
    files = [f"--gin_file={f}.gin" for f in ("variator_xl", f"tasks/{task}", "runs/adapt")]
    assert "required, but not set" in (message := refusal(variator("inspect", *files)))
    assert "INITIAL_PLUGIN_PATH" in message
