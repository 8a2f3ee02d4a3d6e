import os
import sys
from pathlib import Path

import pytest

from variator_jax import gin_utils
from variator_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_gin")

HEADER = "from __gin__ import dynamic_registration\nimport variator_toy.model as model\n"
TOY = """
def Net(width, depth=2):
    return (width, depth)

def train(*, model_dir, net=None, steps=10, task="topic"):
    return {"model_dir": model_dir, "net": net, "steps": steps, "task": task}
"""


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """An importable package `variator_toy`."""
    folder = tmp_path_factory.mktemp("toy")
    package = folder / "variator_toy"
    package.mkdir()
    for name, text in {"__init__": "", "model": TOY, "broken": "1 / 0\n"}.items():
        (package / f"{name}.py").write_text(text)
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


# Finding files.


def test_current_folder_goes_before_search_paths_before_packaged(run_gin, tmp_path, monkeypatch):
    monkeypatch.setattr(gin_utils, "configs_dir", lambda: tmp_path / "packaged")
    (tmp_path / "mine").mkdir()
    for folder in ("packaged", "mine", "."):
        run_gin("", f"{folder}/runs/x.gin")
        path = gin_utils.find_config("runs/x.gin", [str(tmp_path / "mine")])
        assert path == tmp_path / folder / "runs/x.gin"
    assert gin_utils.find_config(str(path)) == path  # An absolute name is taken as it is.


@pytest.mark.parametrize("name", ["runs/adapts.gin", "adapt.gin"])
def test_a_missing_file_is_named_with_the_nearest(run_gin, name):
    message = refusal([name])
    assert repr(name) in message and "Did you mean 'runs/adapt.gin'" in message


# What is accepted.


def test_later_files_and_then_overrides_win(run_gin):
    first = run_gin("STEPS = 1\nmodel.train.steps = %STEPS\nmodel.train.model_dir = 'a'")
    second = run_gin("STEPS = 2\nmodel.train.model_dir = 'b'", "second.gin")
    gin_utils.parse([first, second])
    assert toy_train()["steps"] == 2 and toy_train()["model_dir"] == "b"
    gin_utils.parse([first, second], ["STEPS=3", "train.model_dir=runs/c"])
    assert toy_train()["steps"] == 3 and toy_train()["model_dir"] == "runs/c"
    gin_utils.parse([run_gin("OTHER = 1", "other.gin")])
    assert "STEPS" not in gin_utils.resolved_config()  # Each parse starts from nothing.


def test_includes_resolve_along_the_search_path_and_each_file_is_read_once(run_gin, monkeypatch):
    run_gin("WIDTH = 5", "lib/sizes/five.gin")
    run_gin("include 'sizes/five.gin'", "lib/middle.gin")
    name, opened, real = run_gin("include 'middle.gin'\nSTEPS = %WIDTH"), [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, **k: opened.append(path.name) or real(path, **k))
    gin_utils.parse([name], ["STEPS=4"], search_paths=["lib"])
    assert opened == ["run.gin", "middle.gin", "five.gin"] and gin_utils.macro("WIDTH") == 5


HOME = os.path.expanduser("~")
LITERALS = {"7": 7, "-1e-3": -1e-3, "None": None, "'runs/x'": "runs/x", "(2, 4)": (2, 4)}
WORDS = "runs/x docs_topic gs://bucket/x-1 /tmp/a.b 2026-11-22 2024-run/x 1st/~x 3/4-steps".split()
SENTENCES = ("Sentence: {text} Positive?", "{text}", '{a-1} "{b}" is it?', "1. {text}", "{a} it's")
IN_HOME = {"~/x": f"{HOME}/x", "('~/x', 'a~/b')": (f"{HOME}/x", "a~/b")}
VALUES = LITERALS | IN_HOME | {word: word for word in (*WORDS, *SENTENCES)}


@pytest.mark.parametrize("value", VALUES)
def test_literals_are_literals_and_bare_words_are_strings(run_gin, value):
    gin_utils.parse([run_gin("NAME = %gin.REQUIRED")], [f"NAME={value}"])
    assert gin_utils.macro("NAME") == VALUES[value]


def test_paths_in_files_begin_with_the_home_folder_too_and_are_handed_on(run_gin):
    text = "NAME = '~/x'\nmodel.train:\n  task = ('~/y', %NAME)\n  model_dir = 'a~/b'"
    overrides = gin_utils.parse([run_gin(text)], ["train.steps=7"])
    paths = [("NAME", f"'{HOME}/x'"), ("train.task", f"('{HOME}/y', %NAME)")]
    assert overrides[0] == ("train.steps", "7") and sorted(overrides[1:]) == paths
    assert gin_utils.macro("NAME") == f"{HOME}/x"


def test_macros_are_read_and_resolved_through_one_another(run_gin):
    gin_utils.parse([run_gin("model.train.steps = %STEPS")], ["STEPS=4"])
    assert gin_utils.macro("STEPS") == 4
    name = run_gin("A = 1\nB = %A\nC = {'x': [%B, 2]}\nmodel.train.task = %C")
    gin_utils.parse([name], ["train.steps=%MINE", "MINE=%C"])
    assert gin_utils.macro("MINE") == gin_utils.macro("C") == {"x": [1, 2]}
    with pytest.raises(ConfigError, match="no macro 'STEPS' is defined"):
        gin_utils.macro("STEPS")


def test_a_resolved_configuration_can_be_parsed_again(run_gin):
    text = "STEPS = 4\nmodel.train:\n  steps = %STEPS\n  model_dir = 'x'\n  net = @model.Net()\n"
    gin_utils.parse([run_gin(text + "model.Net.width = 3\nmodel.Net.depth = 9")])
    before = toy_train()
    gin_utils.parse([run_gin(gin_utils.resolved_config(), "again.gin", header="")])
    assert toy_train() == before


# What is refused: line 4 of a file, and overrides.

LINES = {
    "STEPS = ": "syntax error",
    "STEPS = runs": "'runs' is not a Python literal (strings need quotes)",
    "STEPS 5": "in: STEPS 5",
    "modle.train.steps = 1": "not provided by an import statement. Did you mean 'model'?",
    "model.trian.steps = 1": "has no attribute trian. Did you mean 'train'",
    "model.train.stps = 1": "'stps'. Did you mean 'steps'?",
    "NET = @model.Nett()": "Nett. Did you mean 'Net'?",
    "import variator_toy.modle": "'variator_toy.modle'. Did you mean 'model'",
    "import variator_toy.broken": "variator_toy.broken failed with ZeroDivisionError",
    "model.train.steps = %STPS": "%STPS is not defined; set it in a gin file or with --gin.STPS",
    "include 'inner.gim'": "gin file 'inner.gim' does not exist",
    "include 'run.gin'": "circular include of",
}


@pytest.mark.parametrize("line", LINES)
def test_errors_name_file_and_line_and_the_nearest_name(run_gin, line):
    name = run_gin(f"STEPS = 3\n{line}\n")
    for outer in (name, run_gin(f"include '{name}'", "outer.gin")):
        message = refusal([outer])
        assert "run.gin:4" in message and LINES[line] in message


OVERRIDES = {
    "STEPS=1O0": "--gin.STEPS=1O0: expected a value such as 100.",
    "STPS=5": "no gin file of this run defines or reads a macro 'STPS'. Did you mean 'STEPS'",
    "train.stps=5": "doesn't have a parameter named 'stps'. Did you mean 'steps'?",
    "trian.steps=5": "'trian'. Did you mean 'train'?",
    "TRAIN-STEPS=5": "--gin.TRAIN-STEPS: no gin file of this run defines or reads a macro 'TRAIN",
    "NAME=": "--gin.NAME has no value: write --gin.NAME=VALUE",
}
BAD_VALUES = ("true", "none", "2,4", "2/3,4", "[a, b]", "'open", "it's", "'{text}", "{a: b}")
OVERRIDES |= {f"NAME={value}": "quote a string twice" for value in BAD_VALUES}


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides_are_checked(run_gin, override):
    name = run_gin("STEPS = 100\nNAME = 'x'\nmodel.train.steps = %STEPS")
    assert OVERRIDES[override] in refusal([name], [override])


def test_files_without_dynamic_registration_and_binary_files(run_gin, tmp_path):
    assert "'nosuch'" in refusal([run_gin("nosuch.steps = 1", header="")])
    (tmp_path / "binary.gin").write_bytes(b"A = '\xff\xfe'")
    assert "binary.gin: 'utf-8' codec can't decode" in refusal(["binary.gin"])


def test_every_missing_macro_and_parameter_is_named_with_how_to_set_it(run_gin):
    name = run_gin("MODEL_DIR = %gin.REQUIRED\nmodel.train.steps = %gin.REQUIRED\nTASK = 'a'")
    message = refusal([name])
    assert "--gin.MODEL_DIR=VALUE --gin.train.steps=VALUE" in message and "TASK" not in message
    assert "MODEL_DIR" not in refusal([name], ["MODEL_DIR=x"])
    gin_utils.parse([name], ["MODEL_DIR=x", "train.steps=1"])
    gin_utils.parse([name], require=False)
    assert gin_utils.leave_unset() == ["MODEL_DIR", "train.steps"]
    assert gin_utils.macro("MODEL_DIR") is None


def test_configured_checks_what_is_left_out_below_and_what_no_file_mentions(run_gin):
    gin_utils.parse([run_gin("NET = @model.Net()\nmodel.train.net = %NET")])
    with pytest.raises(ConfigError, match=r"Net\.width, train\.model_dir"):
        toy_train()
    gin_utils.parse([run_gin("model.train.net = @model.Net\nmodel.train.model_dir = 'x'")])
    assert toy_train()["net"](width=3) == (3, 2)  # The caller fills in what is left out.
    gin_utils.parse([run_gin("STEPS = 1")])
    with pytest.raises(ConfigError, match=r"variator_toy\.model\.train"):
        toy_train()
