import shlex
import sys
import types
from pathlib import Path

import pytest

import variator_jax.train
from variator_jax import cli, gin_utils
from variator_jax.commands import engines
from variator_jax.errors import DataError

GIN = """from __gin__ import dynamic_registration
import variator_jax.train.{name} as {name}_lib
MODEL_DIR = %gin.REQUIRED
STEPS = 10
{name}_lib.{function}:
  model_dir = %MODEL_DIR
  steps = %STEPS
"""


@pytest.fixture(autouse=True)
def without_t5x(monkeypatch):
    """These are tests of the built-in engine; `t5x_engine/` has those of T5X."""
    monkeypatch.setattr(engines, "_t5x_root", lambda: None)


@pytest.fixture
def calls(monkeypatch, fresh_gin):
    """What the engine was called with; stands in for the modules that train and evaluate."""
    seen = []

    def engine(name, function):
        def stand_in(*, model_dir, steps):
            seen.append((function, model_dir, steps))
            if model_dir == "bad_rows":
                raise DataError("rows.jsonl:3: the field 'text' is missing.\nAll 2 rows are bad.")
            if model_dir == "interrupt":
                raise KeyboardInterrupt
            if model_dir == "bug":
                raise ZeroDivisionError("a bug")
            return types.SimpleNamespace(interrupted=model_dir == "preempted")

        module = types.ModuleType(f"variator_jax.train.{name}")
        stand_in.__name__ = stand_in.__qualname__ = function
        stand_in.__module__ = module.__name__
        setattr(module, function, stand_in)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(variator_jax.train, name, module, raising=False)

    engine("train", "train")
    engine("evaluate", "evaluate")
    return seen


@pytest.fixture
def gin_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.gin").write_text(GIN.format(name="train", function="train"))
    (tmp_path / "eval.gin").write_text(GIN.format(name="evaluate", function="evaluate"))
    return "run.gin"


@pytest.fixture
def variator(capsys):
    """Runs the command; gives exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return run


def complaint(result):
    """The one line on stderr of a refused command, behind the one that names the engine."""
    code, out, err = result
    assert code == 2 and out == ""
    if err.startswith("engine: "):
        err = err.partition("\n")[2]
    assert err.startswith("variator: error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


class TestTrainAndEval:
    def test_train_calls_the_configured_engine(self, variator, gin_file, calls):
        arguments = (
            "train",
            f"--gin_file={gin_file}",
            "--gin.MODEL_DIR=runs/x",
            "--gin.STEPS",
            "3",
        )
        assert variator(*arguments)[0] == 0
        assert calls == [("train", "runs/x", 3)]

    def test_eval_calls_the_configured_evaluation(self, variator, gin_file, calls):
        assert variator("eval", "--gin_file", "eval.gin", "--gin.MODEL_DIR='r'")[0] == 0
        assert calls == [("evaluate", "r", 10)]

    def test_files_stack_and_search_paths_are_searched(self, variator, gin_file, calls, tmp_path):
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "long.gin").write_text("STEPS = 99\n")
        files = (f"--gin_file={gin_file}", "--gin_file=long.gin")
        assert "long.gin" in complaint(variator("train", *files, "--gin.MODEL_DIR=x"))
        search = f"--gin_search_paths={tmp_path},lib"
        assert variator("train", *files, search, "--gin.MODEL_DIR=x")[0] == 0
        assert calls == [("train", "x", 99)]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "no gin file"),
            (("--gin_file=rum.gin",), "'run.gin'"),
            (("--gin_file=run.gin",), "--gin.MODEL_DIR=VALUE"),
            (("--gin_file=run.gin", "--gin.MODEL_DIR=x", "--gin.STPS=1"), "'STEPS'"),
            (("--gin_file=run.gin", "--gin.MODEL_DIR=x", "--gin.train.stps=1"), "'steps'"),
            (("--gin_file=run.gin", "--gin.MODEL_DIR"), "--gin.MODEL_DIR=VALUE"),
            (("--gin_file=run.gin", "--gin.MODEL_DIR", "--gin.STEPS=1"), "--gin.MODEL_DIR=VALUE"),
            (("--gin_fil=run.gin",), "'--gin_file'"),
            (("--gin_file=eval.gin", "--gin.MODEL_DIR=x"), "variator_jax.train.train"),
        ],
    )
    def test_slips_are_told_before_anything_runs(self, variator, gin_file, calls, arguments, said):
        assert said in complaint(variator("train", *arguments))
        assert calls == []

    def test_a_check_wants_all_that_is_required_and_runs_nothing(self, variator, gin_file, calls):
        files = ("train", f"--gin_file={gin_file}", "--check", "--multiprocess")
        assert "--gin.MODEL_DIR=VALUE" in complaint(variator(*files))
        code, out, _ = variator(*files, "--gin.MODEL_DIR=x")
        assert (code, out, calls) == (0, "", [])

    def test_a_check_asks_for_no_devices(self, variator, fresh_gin, monkeypatch):
        import jax

        monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("asked for devices"))
        arguments = ("train", "--engine=builtin", "--gin_file=nano_docs.gin", "--check")
        code, out, _ = variator(*arguments, "--gin.MESH_SHAPE=(64, 1, 1)")
        assert (code, out) == (0, "")


class TestErrors:
    def test_an_error_of_the_run_is_one_line_without_gins_trace(self, variator, gin_file, calls):
        result = variator("train", f"--gin_file={gin_file}", "--gin.MODEL_DIR=bad_rows")
        line = "variator: error: rows.jsonl:3: the field 'text' is missing. All 2 rows are bad.\n"
        assert complaint(result) == line

    def test_debugging_shows_the_traceback(self, variator, gin_file, calls, monkeypatch):
        monkeypatch.setenv("VARIATOR_DEBUG", "1")
        code, _, err = variator("train", f"--gin_file={gin_file}", "--gin.MODEL_DIR=bad_rows")
        assert code == 2 and "Traceback" in err and "variator: error: rows.jsonl:3" in err

    @pytest.mark.parametrize(
        "slip,meant", [("--TRAIN_STEPS=5", "--gin.TRAIN_STEPS"), ("a.gin", "--gin_file=a.gin")]
    )
    def test_macros_and_files_without_their_option_are_told_it(self, variator, calls, slip, meant):
        assert meant in complaint(variator("train", slip))

    def test_a_run_that_a_signal_ended_exits_as_if_the_signal_had(self, variator, gin_file, calls):
        with pytest.raises(SystemExit) as done:
            variator("train", f"--gin_file={gin_file}", "--gin.MODEL_DIR=preempted")
        assert done.value.code == 143

    def test_an_interrupt_gives_130(self, variator, gin_file, calls):
        code, _, err = variator("train", f"--gin_file={gin_file}", "--gin.MODEL_DIR=interrupt")
        assert code == 130 and "Traceback" not in err

    def test_bugs_are_not_hidden(self, variator, gin_file, calls):
        with pytest.raises(ZeroDivisionError):
            variator("train", f"--gin_file={gin_file}", "--gin.MODEL_DIR=bug")

    def test_unknown_commands_name_the_nearest(self, variator):
        assert "Did you mean 'train'?" in complaint(variator("trian"))
        assert "the command comes first" in complaint(variator("--gin_file=run.gin", "train"))


class TestHelp:
    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_each_command_has_examples(self, variator, name):
        code, out, _ = variator(name, "--help")
        assert code == 0 and "examples:" in out and f"variator {name} " in out
        assert name in variator("--help")[1]

    def test_without_a_command(self, variator):
        code, out, _ = variator()
        assert code == 2 and "usage: variator COMMAND" in out

    def test_version(self, variator):
        from variator_jax import __version__

        assert variator("--version")[1] == f"variator {__version__}\n"


class TestInspectAndReport:
    def test_inspect_prints_the_resolved_configuration(self, variator, gin_file, calls):
        code, out, _ = variator("inspect", f"--gin_file={gin_file}", "--gin.MODEL_DIR=runs/x")
        assert code == 0 and "MODEL_DIR = 'runs/x'" in out and "STEPS = 10" in out
        assert calls == []

    def test_inspect_describes_a_folder(self, variator, monkeypatch):
        from variator_jax.commands import describe

        monkeypatch.setattr(describe, "describe", lambda path, verify: f"{path} {verify}")
        assert variator("inspect", "runs/x") == (0, "runs/x False\n", "")
        assert variator("inspect", "runs/x", "--verify") == (0, "runs/x True\n", "")

    def test_inspect_takes_one_of_the_two(self, variator, gin_file):
        assert "one of the two" in complaint(variator("inspect"))
        assert "one of the two" in complaint(variator("inspect", "x", f"--gin_file={gin_file}"))

    def test_report_prints_the_table(self, variator, tmp_path):
        assert "report.md" in complaint(variator("report", str(tmp_path)))
        (tmp_path / "report.md").write_text("| k | score |\n")
        (tmp_path / "report.png").write_bytes(b"")
        code, out, _ = variator("report", str(tmp_path))
        assert code == 0 and "| k | score |" in out and "report.png" in out

    def test_report_prints_an_experiments_tables_and_names_its_plots(self, variator, tmp_path):
        (tmp_path / "results.md").write_text("| arm | k |\n")
        for name in ("ratios_nano.png", "arms_nano_k4.png"):
            (tmp_path / name).write_bytes(b"")
        code, out, _ = variator("report", str(tmp_path))
        assert code == 0 and "| arm | k |" in out
        assert "ratios_nano.png" in out and "arms_nano_k4.png" in out

    def test_report_takes_a_folder_and_no_overrides(self, variator):
        assert "needs a folder" in complaint(variator("report"))
        assert "takes no gin overrides" in complaint(variator("report", "x", "--gin.A=1"))


@pytest.mark.parametrize(
    "example",
    [e for name in ("train", "eval", "infer") for e in cli.COMMANDS[name].examples],
)
def test_the_examples_of_the_help_resolve(example, capsys):
    _, *arguments = shlex.split(example)
    assert cli.main([*arguments, "--dry_run"]) == 0, capsys.readouterr().err
    assert "without activations" in capsys.readouterr().out


def test_the_documentation_of_t5x_shows_the_budget_that_is_printed(capsys):
    assert cli.main(["train", "--engine=builtin", "--gin_file=variator_xl.gin", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    budget = printed[printed.index("backbone t5_1_1_xl, plugin of ratio 4") :]
    assert budget in (Path(__file__).parents[1] / "docs" / "t5x.md").read_text()


FAMILY = sorted(path.stem for path in gin_utils.configs_dir().glob("variator_*.gin"))
REQUIRED = {"INITIAL_CHECKPOINT_PATH": "backbone", "MODEL_DIR": "runs/x"}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_names_what_it_requires(name, capsys):
    command = ["inspect", f"--gin_file={name}.gin"]
    assert cli.main(command) == 2
    message = capsys.readouterr().err
    header = (gin_utils.configs_dir() / f"{name}.gin").read_text().partition("include")[0]
    assert all(macro in message and macro in header for macro in REQUIRED)
    assert cli.main(command + [f"--gin.{k}={v}" for k, v in REQUIRED.items()]) == 0
    size, _, family = name.removeprefix("variator_").partition("_")
    assert f"'{family or 't5_1_1'}_{size}'" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["mnli", "squad", "text", "file"])
def test_adaptation_is_stacked_on_the_family(task, capsys):
    files = [f"--gin_file={f}.gin" for f in ("variator_xl", f"tasks/{task}", "runs/adapt")]
    assert cli.main(["train", *files, "--dry_run"]) == 0, capsys.readouterr().err
    assert "INITIAL_PLUGIN_PATH" in capsys.readouterr().out.rpartition("still to be set")[2]
