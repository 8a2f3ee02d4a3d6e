"""The core works where only JAX, Flax, Optax and Orbax are installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

BLOCK = """
import sys

BLOCKED = {"airio", "clu", "seqio", "t5", "t5x", "tensorflow", "tensorflow_datasets",
           "tensorflow_text"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""

IMPORT_CORE = """
import importlib, pkgutil
import variator_jax, variator_jax.cli, variator_jax.gin_utils
from variator_jax import backbones, bench, evaluation, plugin, store, train

for package in (backbones, bench, evaluation, plugin, store, train):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert not sys.modules.keys() & {"matplotlib", "torch", "transformers"}
"""

RUN_CORE = """
import jax, jax.numpy as jnp, optax
from variator_jax.backbones.t5 import T5, T5Config, init_params
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.step import init_state, make_train_step
from variator_jax.plugin import PluginConfig, flops_saved, init_plugin, splice

config = T5Config("tiny", vocab_size=32, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
                  num_encoder_layers=1, num_decoder_layers=1)
backbone, params = T5(config), init_params(config, jax.random.key(0))
settings = PluginConfig(ratio=2, bottleneck=4)
plugin = init_plugin(settings, backbone.stack(), jax.random.key(1))
tokens = jnp.arange(2, 12, dtype=jnp.int32).reshape(2, 5)
batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens,
         "decoder_target_tokens": tokens, "decoder_loss_weights": jnp.ones_like(tokens)}

with splice(settings, plugin, tokens > 0):
    logits = backbone.apply(params, batch).logits
assert logits.shape == (2, 5, 32) and bool(jnp.isfinite(logits).all())

optimizer = optax.adamw(1e-3)
step = jax.jit(make_train_step(Distillation(backbone, settings, LossConfig()), optimizer))
state, metrics = step(init_state(plugin.params, optimizer), (params, plugin.output_scales), batch)
assert int(state.step) == 1 and float(metrics["loss"]) > 0
wide = T5(T5Config("wide", 32, 512, 8, 64, 2048, 2, 2)).stack()
assert 0 < flops_saved(wide, 256, PluginConfig(4)) < 1
print("done")
"""


def run_blocked(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", BLOCK + script], capture_output=True, text=True, env=environment
    )


def test_the_block_blocks():
    """A control: without it the tests below could pass for nothing."""
    assert "No module named 'tensorflow'" in run_blocked("import tensorflow").stderr


def test_core_imports_and_trains_without_tensorflow_seqio_and_t5x():
    result = run_blocked(IMPORT_CORE + RUN_CORE)
    assert result.stdout.endswith("done\n"), result.stderr


def test_the_command_line_imports_nothing_heavy():
    script = "import variator_jax.cli as c; c.main(['--help'])\nprint(sys.modules.keys() & HEAVY)"
    result = run_blocked(f"HEAVY = {{'jax', 'flax', 'gin', 'numpy', 'optax'}}\n{script}")
    assert result.stdout.endswith("set()\n"), result.stdout + result.stderr
