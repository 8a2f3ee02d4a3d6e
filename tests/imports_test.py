"""What imports what: no circle, a light start, a core without TensorFlow, and pip's wheel."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
import zipfile

from launching import ROOT, run

PACKAGE = ROOT / "variator_jax"

BLOCK = """
import importlib, pkgutil, sys

for name in ("airio", "clu", "seqio", "t5", "t5x", "tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None  # An import of it raises ModuleNotFoundError.
"""
LIGHT = """
import variator_jax
from variator_jax.commands import quickstart

assert "train" in quickstart.registry.COMMANDS  # run as a program, without `cli`
from variator_jax import cli

assert cli.main(["--help"]) == 0
print("heavy:", sorted(sys.modules.keys() & {"jax", "flax", "numpy", "optax"}))
assert all(getattr(variator_jax, name) is not None for name in variator_jax.__all__)
"""
CORE = """
from variator_jax import backbones, bench, evaluation, model, plugin, serving, store, train

for package in (backbones, bench, evaluation, plugin, serving, store, train):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert not sys.modules.keys() & {"matplotlib", "torch", "transformers"}
"""
TRAIN = """
import jax, optax, tempfile, tiny_model
from variator_jax.backbones.t5 import T5
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.run_folder import RunLog
from variator_jax.train.step import init_state, make_train_step

plugin = tiny_model.make_plugin(2)
batch = {"encoder_input_tokens": tiny_model.TOKENS, "decoder_input_tokens": tiny_model.DECODER,
         "decoder_target_tokens": tiny_model.DECODER, "decoder_loss_weights": tiny_model.DECODER}
optimizer = optax.adamw(1e-3)
objective = Distillation(T5(tiny_model.SHAPE), plugin.config, LossConfig())
step, state = make_train_step(objective, optimizer), init_state(plugin.variables.params, optimizer)
state, metrics = jax.jit(step)(state, (tiny_model.PARAMS, plugin.variables.output_scales), batch)
assert int(state.step) == 1 and float(metrics["loss"]) > 0
with tempfile.TemporaryDirectory() as folder:  # TensorBoard's events, too
    log = RunLog(folder, 4)
    log.write("train", 3, {"loss": 0.5})
    log.close()
print("trained")
"""


def test_the_core_imports_and_trains_without_tensorflow_seqio_and_t5x():
    program = [sys.executable, "-c", BLOCK + LIGHT + CORE + TRAIN]
    result = run(program, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
    lines = result.stdout.splitlines()
    assert lines and lines[-1] == "trained", result.stderr
    assert "heavy: []" in lines  # The command line starts at once.


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(module):
    """The modules of the package that a module imports, at its top or in its functions."""
    waiting = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in submodules]
        yield from (name for name in names if name in MODULES)


GRAPH = {module: set(imports(module)) - {module} for module in MODULES}


def folder(module):
    return ".".join(module.split(".")[1:2]) or "__init__"


def test_modules_import_each_other_in_no_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_the_library_needs_no_gin():
    reached, waiting = set(), {"variator_jax.model", "variator_jax.store", "variator_jax.plugin"}
    while waiting:
        reached |= waiting
        waiting = set().union(*(GRAPH[module] for module in waiting)) - reached
    assert "variator_jax.gin_utils" not in reached and "variator_jax.plugin.splice" in reached


def test_folders_import_each_other_in_no_circle():
    graph = {folder(module): set() for module in MODULES}
    for module, targets in GRAPH.items():
        graph[folder(module)] |= set(map(folder, targets)) - {folder(module)}
    graphlib.TopologicalSorter(graph).prepare()


# The package as pip builds it, away from the repository.

SOURCES = ("variator_jax", "gin_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")

# Runs the command line of the package in the folder that is the first argument.
RUN = """
import runpy, sys, variator_jax
assert variator_jax.__file__.startswith(sys.argv.pop(1)), variator_jax.__file__
runpy.run_module("variator_jax", run_name="__main__")
"""


def test_a_wheel_runs_from_another_folder(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    subprocess.run([*pip, *options], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("variator_jax-*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    arguments = ["train", "--engine=builtin", "--gin_file=nano_docs.gin", "--dry_run"]
    program = [sys.executable, "-c", RUN, target, *arguments]
    result = run(program, {"PYTHONPATH": str(target)}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "without activations" in result.stdout
    [entry_points] = target.glob("*.dist-info/entry_points.txt")
    assert "variator = variator_jax.cli:main" in entry_points.read_text()
