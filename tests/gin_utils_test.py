import os
import sys
from pathlib import Path

import gin
import pytest

from variator_jax import gin_utils
from variator_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_gin")

HEADER = "from __gin__ import dynamic_registration\nimport variator_toy.model as model\n"
TOY = """
import dataclasses

@dataclasses.dataclass
class Net:
    width: int
    depth: int = 2

def train(*, model_dir, net=None, steps=10, task="topic"):
    return {"model_dir": model_dir, "net": net, "steps": steps, "task": task}
"""


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """An importable package `variator_toy`."""
    folder = tmp_path_factory.mktemp("toy")
    package = folder / "variator_toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(TOY)
    (package / "broken.py").write_text("1 / 0\n")
    (package / "needy.py").write_text("import variator_toy_absent\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def run_gin(tmp_path, monkeypatch):
    """Writes the lines of a gin file below tmp_path, the current folder, and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="run.gin", header=HEADER):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + text)
        return name

    return write


def refusal(*args, **kwargs):
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        gin_utils.parse(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def toy_train():
    from variator_toy import model

    return gin_utils.configured(model.train)()


class TestFinding:
    def test_current_folder_goes_before_search_paths_before_packaged(
        self, run_gin, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(gin_utils, "configs_dir", lambda: tmp_path / "packaged")
        (tmp_path / "mine").mkdir()
        for folder in ("packaged", "mine", "."):
            run_gin("", f"{folder}/runs/x.gin")
            path = gin_utils.find_config("runs/x.gin", [str(tmp_path / "mine")])
            assert path == tmp_path / folder / "runs/x.gin"
        assert gin_utils.find_config(str(path)) == path  # An absolute name stands for itself.

    def test_packaged_configs_lie_in_the_repository_of_a_checkout(self):
        assert gin_utils.configs_dir() == Path(__file__).parents[1] / "gin_configs"

    @pytest.mark.parametrize("name", ["runs/adapts.gin", "adapt.gin"])
    def test_missing_file_is_named_with_the_nearest(self, run_gin, tmp_path, monkeypatch, name):
        run_gin("", "packaged/runs/adapt.gin")
        monkeypatch.setattr(gin_utils, "configs_dir", lambda: tmp_path / "packaged")
        message = refusal([name])
        assert repr(name) in message and "Did you mean 'runs/adapt.gin'?" in message

    def test_search_path_must_be_a_folder(self, run_gin):
        assert "nowhere" in refusal([run_gin("")], search_paths=["nowhere"])


class TestParsing:
    def test_later_files_and_then_overrides_win(self, run_gin):
        first = run_gin("STEPS = 1\nmodel.train.steps = %STEPS\nmodel.train.model_dir = 'a'")
        second = run_gin("STEPS = 2\nmodel.train.model_dir = 'b'", "second.gin")
        gin_utils.parse([first, second])
        assert toy_train()["steps"] == 2 and toy_train()["model_dir"] == "b"
        gin_utils.parse([first, second], ["STEPS=3", "train.model_dir='c'"])
        assert toy_train()["steps"] == 3 and toy_train()["model_dir"] == "c"

    def test_starts_from_nothing_each_time(self, run_gin):
        gin_utils.parse([run_gin("STEPS = 1\nmodel.train.steps = %STEPS")])
        gin_utils.parse([run_gin("", "empty.gin")])
        assert "STEPS" not in gin_utils.resolved_config()
        with pytest.raises(ConfigError, match="no macro 'STEPS'"):
            gin_utils.macro("STEPS")

    def test_includes_resolve_along_the_search_path(self, run_gin, tmp_path, capfd):
        run_gin("WIDTH = 5", "lib/sizes/five.gin")
        run_gin("include 'sizes/five.gin'", "lib/middle.gin")
        top = run_gin("include 'middle.gin'")
        gin_utils.parse([top], search_paths=["lib"])
        assert gin_utils.macro("WIDTH") == 5
        assert capfd.readouterr().err == ""
        assert "lib" not in str(gin.config._LOCATION_PREFIXES)

    def test_missing_include_names_the_line(self, run_gin):
        run_gin("", "sizes/five.gin")
        message = refusal([run_gin("\ninclude 'sizes/fife.gin'")])
        assert "run.gin:4" in message and "'sizes/five.gin'" in message

    def test_circular_include_is_refused(self, run_gin):
        run_gin("include 'run.gin'", "other.gin")
        message = refusal([run_gin("include 'other.gin'")])
        assert "other.gin:3: circular include of" in message

    def test_each_file_is_read_once(self, run_gin, monkeypatch):
        run_gin("WIDTH = 5", "inner.gin")
        name, opened, real = run_gin("include 'inner.gin'\nSTEPS = %WIDTH"), [], Path.open
        monkeypatch.setattr(
            Path, "open", lambda self, *args, **kw: opened.append(self) or real(self, *args, **kw)
        )
        gin_utils.parse([name], ["STEPS=4"])
        assert [path.name for path in opened] == ["run.gin", "inner.gin"]


HOME = os.path.expanduser("~")
LITERALS = {"7": 7, "-1e-3": -1e-3, "None": None, "'runs/x'": "runs/x", "(2, 4)": (2, 4)}
WORDS = [
    "runs/x", "docs_topic", "gs://bucket/x-1", "/tmp/a.b", "2026-11-22", "2024-run/x", "1st/~x",
    "3/4-steps", "Sentence: {text} Positive?",
]  # fmt: skip
IN_HOME = {"~/x": f"{HOME}/x", "('~/x', 'a~/b')": (f"{HOME}/x", "a~/b")}


class TestOverrides:
    @pytest.mark.parametrize(
        ("value", "expected"), [*LITERALS.items(), *((w, w) for w in WORDS), *IN_HOME.items()]
    )
    def test_literals_are_literals_and_bare_words_are_strings(self, run_gin, value, expected):
        name = run_gin("NAME = %gin.REQUIRED\nmodel.train.task = %NAME")
        gin_utils.parse([name], [f"NAME={value}"])
        assert gin_utils.macro("NAME") == expected

    @pytest.mark.parametrize("value", ["runs/x", "None", 7, "a b", ("x", 1), None])
    def test_as_override_is_the_inverse(self, run_gin, value):
        override = gin_utils.as_override("NAME", value).removeprefix("--gin.")
        gin_utils.parse([run_gin("NAME = %gin.REQUIRED")], [override])
        assert gin_utils.macro("NAME") == value

    def test_bare_words_serve_parameters_too(self, run_gin):
        name = run_gin("model.train.task = 'a'")
        gin_utils.parse([name], ["train.task=pairs", "train.model_dir=runs/x"])
        assert toy_train()["task"] == "pairs" and toy_train()["model_dir"] == "runs/x"

    def test_bare_word_where_the_files_have_a_number_is_refused(self, run_gin):
        message = refusal([run_gin("STEPS = 100")], ["STEPS=1O0"])
        assert message == "--gin.STEPS=1O0: expected a value such as 100."

    @pytest.mark.parametrize(
        "value", ["true", "none", "2,4", "2/3,4", "[a, b]", "'open", "it's", ""]
    )
    def test_what_is_neither_literal_nor_word_is_refused(self, run_gin, value):
        assert "--gin.NAME" in refusal([run_gin("NAME = 'x'")], [f"NAME={value}"])

    def test_unknown_macro_names_the_nearest(self, run_gin):
        message = refusal([run_gin("TRAIN_STEPS = 1")], ["TRIAN_STEPS=5"])
        assert "'TRIAN_STEPS'" in message and "Did you mean 'TRAIN_STEPS'?" in message

    def test_a_macro_that_is_only_read_may_be_set(self, run_gin):
        gin_utils.parse([run_gin("model.train.steps = %STEPS")], ["STEPS=4"])
        assert gin_utils.macro("STEPS") == 4
        gin_utils.parse([run_gin("model.train.steps = 3")], ["train.steps=%MINE", "MINE=5"])
        assert gin_utils.macro("MINE") == 5

    def test_misspelt_parameter_and_name(self, run_gin):
        name = run_gin("model.train.steps = 1")
        message = refusal([name], ["train.stps=5"])
        assert "--gin.train.stps=5" in message and "Did you mean 'steps'?" in message
        message = refusal([name], ["trian.steps=5"])
        assert "'trian'" in message and "Did you mean 'train'?" in message

    def test_malformed_name(self, run_gin):
        assert "--gin.TRAIN-STEPS" in refusal([run_gin("")], ["TRAIN-STEPS=5"])


class TestMistakesInFiles:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("STEPS = ", "syntax error"),
            ("STEPS = runs", "'runs' is not a Python literal (strings need quotes)"),
            ("STEPS = [1, 2", "syntax error"),
            ("STEPS 5", "in: STEPS 5"),
            ("modle.train.steps = 1", "'modle'. Did you mean 'model'?"),
            ("model.trian.steps = 1", "'trian'. Did you mean 'train'"),
            ("model.train.stps = 1", "'stps'. Did you mean 'steps'?"),
            ("NET = @model.Nett()", "'Nett'. Did you mean 'Net'?"),
            ("model.Net.widht = 1", "'widht'. Did you mean 'width'"),
            (
                "import variator_toy.modle",
                "'variator_toy.modle'. Did you mean 'variator_toy.model'",
            ),
            ("import variator_tyo.model", "'variator_tyo'. Did you mean 'variator_toy'"),
            ("import variator_toy.broken", "variator_toy.broken failed with ZeroDivisionError"),
            ("import variator_toy.needy", "'variator_toy_absent' (needed by variator_toy.needy)"),
            ("model.train.steps = %STPS", "%STPS is not defined"),
        ],
    )
    def test_are_shown_with_file_line_and_nearest_name(self, run_gin, line, expected):
        message = refusal([run_gin(f"STEPS = 3\n{line}\n")])
        assert "run.gin:4" in message or "[1, 2" in line  # An open bracket is missed at the end.
        assert expected in message
        assert "%" not in expected or "Did you mean 'STEPS'?" in message

    def test_the_included_file_is_the_one_named(self, run_gin):
        run_gin("model.train.stps = 1", "inner.gin")
        assert "inner.gin:3" in refusal([run_gin("include 'inner.gin'")])

    def test_files_without_dynamic_registration(self, run_gin):
        assert "'nosuch'" in refusal([run_gin("nosuch.steps = 1", header="")])

    def test_not_text(self, run_gin, tmp_path):
        (tmp_path / "binary.gin").write_bytes(b"A = '\xff\xfe'")
        assert "UTF-8" in refusal(["binary.gin"])


class TestRequired:
    def test_every_missing_macro_is_named_with_how_to_set_it(self, run_gin):
        name = run_gin("MODEL_DIR = %gin.REQUIRED\nSTEPS = %gin.REQUIRED\nTASK = 'a'")
        message = refusal([name])
        assert "--gin.MODEL_DIR=VALUE" in message and "--gin.STEPS=VALUE" in message
        assert "TASK" not in message
        assert "MODEL_DIR" not in refusal([name], ["MODEL_DIR=x"])
        gin_utils.parse([name], ["MODEL_DIR=x", "STEPS=1"])

    def test_required_parameters_count(self, run_gin):
        assert "--gin.train.steps=" in refusal([run_gin("model.train.steps = %gin.REQUIRED")])

    def test_configured_names_what_is_left_out_below(self, run_gin):
        gin_utils.parse([run_gin("NET = @model.Net()\nmodel.train.net = %NET")])
        with pytest.raises(ConfigError, match=r"Net\.width, train\.model_dir"):
            toy_train()

    def test_configured_passes_what_the_caller_fills_in(self, run_gin):
        gin_utils.parse([run_gin("model.train.net = @model.Net\nmodel.train.model_dir = 'x'")])
        assert toy_train()["net"](width=3).depth == 2

    def test_configured_refuses_what_no_file_mentions(self, run_gin):
        gin_utils.parse([run_gin("STEPS = 1")])
        with pytest.raises(ConfigError, match=r"variator_toy\.model\.train"):
            toy_train()


class TestReading:
    def test_macros_are_resolved_through_one_another(self, run_gin):
        gin_utils.parse([run_gin("A = 1\nB = %A\nC = {'x': [%B, 2]}\nmodel.train.steps = %C")])
        assert gin_utils.macro("B") == 1 and gin_utils.macro("C") == {"x": [1, 2]}

    def test_unknown_macro(self, run_gin):
        gin_utils.parse([run_gin("STEPS = 1")])
        with pytest.raises(ConfigError, match="Did you mean 'STEPS'"):
            gin_utils.macro("STPS")

    def test_operative_and_resolved_configurations_can_be_parsed_again(self, run_gin):
        text = (
            "STEPS = 4\nmodel.train:\n  steps = %STEPS\n  model_dir = 'x'\n  net = @model.Net()\n"
        )
        gin_utils.parse([run_gin(text + "model.Net.width = 3\nmodel.Net.depth = 9")])
        before = toy_train()
        assert "train.task = 'topic'" in gin.operative_config_str()  # A default that was used.
        for again in (gin.operative_config_str(), gin_utils.resolved_config()):
            gin_utils.parse([run_gin(again, "again.gin", header="")])
            assert toy_train() == before
