"""What imports what: no circle, nothing heavy at the start, a core without TensorFlow."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "variator_jax"

BLOCK = """
import sys

BLOCKED = {"airio", "clu", "seqio", "t5", "t5x", "tensorflow", "tensorflow_datasets",
           "tensorflow_text"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
try:
    import tensorflow
except ModuleNotFoundError:
    print("blocked")
"""

LIGHT = """
from variator_jax import cli
assert cli.main(["--help"]) == 0
print("heavy:", sorted(sys.modules.keys() & {"jax", "flax", "numpy", "optax"}))
"""

CORE = """
import importlib, pkgutil
from variator_jax import backbones, bench, evaluation, model, plugin, store, train

for package in (backbones, bench, evaluation, plugin, store, train):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert not sys.modules.keys() & {"matplotlib", "torch", "transformers"}
"""

TRAIN = """
import jax, optax, tiny_model
from variator_jax.backbones.t5 import T5
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.step import init_state, make_train_step

plugin = tiny_model.make_plugin(2)
batch = {"encoder_input_tokens": tiny_model.TOKENS, "decoder_input_tokens": tiny_model.DECODER,
         "decoder_target_tokens": tiny_model.DECODER, "decoder_loss_weights": tiny_model.DECODER}
network, optimizer = T5(tiny_model.SHAPE), optax.adamw(1e-3)
objective = Distillation(network, plugin.config, LossConfig())
step, state = make_train_step(objective, optimizer), init_state(plugin.variables.params, optimizer)
state, metrics = jax.jit(step)(state, (tiny_model.PARAMS, plugin.variables.output_scales), batch)
assert int(state.step) == 1 and float(metrics["loss"]) > 0
print("trained")
"""


def test_the_core_imports_and_trains_without_tensorflow_seqio_and_t5x():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    program = [sys.executable, "-c", BLOCK + LIGHT + CORE + TRAIN]
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    lines = result.stdout.splitlines()
    assert lines[0] == "blocked" and lines[-1] == "trained", result.stderr
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


def circles(graph):
    """The strongly connected parts of more than one node: what reaches itself through others."""
    reached = {node: set(targets) for node, targets in graph.items()}
    for middle in graph:
        for node in graph:
            if middle in reached[node]:
                reached[node] |= reached[middle]
    return {frozenset(m for m in reached[n] if n in reached[m]) for n in graph if n in reached[n]}


GRAPH = {module: set(imports(module)) - {module} for module in MODULES}


def folder(module):
    return ".".join(module.split(".")[1:2]) or "__init__"


def test_modules_import_each_other_in_no_circle():
    assert circles(GRAPH) == set()


# Imports against the direction of the folders, still to be turned around.
UPWARD = {("evaluation", "bench")}


def test_folders_import_each_other_in_no_circle():
    graph = {folder(module): set() for module in MODULES}
    for module, targets in GRAPH.items():
        graph[folder(module)] |= {folder(target) for target in targets} - {folder(module)}
    for source, target in UPWARD:
        graph[source].discard(target)
    assert circles(graph) == set()
