"""The tiny backbone, its rows and its gin file; and the runs that many tests look at.

These tests run T5X's own programs. Where T5X is not importable, all of them skip.
"""

import csv
from pathlib import Path

import jax
import numpy as np
import pytest
import t5x_files
import t5x_runs

from variator_jax.backbones.t5 import get_config, init_params
from variator_jax.commands import engines
from variator_jax.store import Backbone, arrays

HERE = Path(__file__).parent

SHAPE = dict(
    vocab_size=384, embed_dim=32, num_heads=4, head_dim=8, mlp_dim=64, num_encoder_layers=2,
    num_decoder_layers=1,
)  # fmt: skip
GIN = """from __gin__ import dynamic_registration
from variator_jax.backbones.t5 import config
include 'plugins/variator.gin'
include 'tasks/file.gin'
include 'vocabularies/bytes.gin'
include 'runs/pretrain.gin'
include 'engine.gin'
BACKBONE = @config.get_config()
config.get_config:
  name = 'nano'
{shape}
  dtype = %DTYPE
  dropout_rate = %DROPOUT_RATE
TASK_FILE = '{folder}/rows.tsv'
TASK_TEMPLATE = 'Text: {{text}}'
TASK_LABELS = ['no', 'yes']
TASK_FEATURE_LENGTHS = {{'inputs': 37, 'targets': 6}}
BATCH_SIZE = 8
TRAIN_STEPS = 20
WARMUP_STEPS = 2
LEARNING_RATE = 3e-3
RATIO = 4
BOTTLENECK = 8
LOG_PERIOD = 1
EVAL_PERIOD = 10
EVAL_BATCHES = 2
CHECKPOINT_PERIOD = 10
INITIAL_CHECKPOINT_PATH = '{folder}/backbone/checkpoint_1000'
"""
DECODED = """from __gin__ import dynamic_registration
from t5x import utils
INFER_EVAL_DATASET = @infer_eval/utils.DatasetConfig()
"""


def pytest_collection_modifyitems(items):
    """Marks the tests of this folder; without T5X they are skipped."""
    absent = engines.choose(None).name != engines.T5X
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.t5x)
            if absent:
                item.add_marker(pytest.mark.skip(reason=engines.choose(None).reason))


@pytest.fixture(scope="session")
def t5x_engine():
    """The engine's package, imported only where T5X is."""
    from variator_jax import t5x_engine

    return t5x_engine


@pytest.fixture(scope="session")
def shape():
    """The shape of the tiny backbone."""
    return get_config("nano", **SHAPE)


@pytest.fixture(scope="session")
def backbone(shape):
    """The tiny backbone: random weights, larger than at the start, so that its answers differ."""
    params = jax.tree.map(np.array, init_params(shape, jax.random.key(1)))
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 and x.shape[0] != 384 else x, params)
    # A zero with a sign, for bits that a step must not touch.
    params["encoder"]["encoder_norm"]["scale"][0] = -0.0
    return Backbone(shape, params, arrays.fingerprint(params), None, None)


@pytest.fixture(scope="session")
def work(tmp_path_factory, backbone):
    """A folder with tiny.gin, its rows, and the backbone as T5X writes it now and wrote it once."""
    folder = tmp_path_factory.mktemp("t5x_engine")
    lines = "\n".join(f"  {name} = {value}" for name, value in SHAPE.items())
    (folder / "tiny.gin").write_text(GIN.format(folder=folder, shape=lines))
    (folder / "decoded.gin").write_text(DECODED)
    rng = np.random.default_rng(0)
    with open(folder / "rows.tsv", "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(("text", "label"))
        for i in range(120):
            text = "".join(rng.choice(list("abc "), rng.integers(3, 40))).strip() or "a"
            rows.writerow((f"{text}{i}", text.count("a") % 2))
    t5x_files.save_t5x(folder / "backbone" / "checkpoint_1000", backbone)
    tree = t5x_files.t5x_tree(backbone.config, backbone.params)
    t5x_files.write_legacy(folder / "legacy" / "checkpoint_1000", tree)
    return folder


@pytest.fixture(scope="session")
def trained(work):
    """The folder of a T5X run of 20 steps, whose evaluation decodes, too."""
    run = work / "trained"
    files = ("--gin_file=tiny.gin", "--gin_file=decoded.gin")
    done = t5x_runs.call(t5x_runs.command("train", *files, f"--gin.MODEL_DIR={run}"), work)
    assert "engine: t5x (t5x is importable" in done.stderr
    return run


@pytest.fixture(scope="session")
def builtin(work):
    """The folder of the built-in engine's run of the same gin file."""
    run = work / "builtin"
    arguments = ("train", "--engine=builtin", "--gin_file=tiny.gin", f"--gin.MODEL_DIR={run}")
    t5x_runs.call(t5x_runs.command(*arguments), work)
    return run


@pytest.fixture(scope="session")
def plugin(work, trained):
    """The plugin folder that `variator convert` makes of the T5X run."""
    folder = work / "plugin"
    t5x_runs.call(t5x_runs.command("convert", "--from", "t5x-run", trained, folder), work)
    return folder


@pytest.fixture(scope="session")
def predicted(work, trained):
    """The folder with T5X's predictions from the run's checkpoint."""
    folder = work / "predicted"
    options = ("infer", "--gin_file=tiny.gin", "--gin_file=runs/infer.gin")
    paths = (f"--gin.CHECKPOINT_PATH={trained}", f"--gin.INFER_OUTPUT_DIR={folder}")
    t5x_runs.call(t5x_runs.command(*options, *paths), work)
    return folder
