"""The compiled distillation step of the built-in engine, on several devices and without weights.

As a script it compiles the steps that it is asked for and prints what their modules tell, as JSON.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, T5Config, shape_params
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train import optimizers
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.step import init_state, jit_train_step, make_train_step

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# `%name = f32[8,4]{1,0} all-reduce(%a), ...`, the result perhaps a tuple of such.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def collectives(text):
    """`[kind, [[shape, bytes], ...]]` of each collective of an optimised module, by its results."""
    found = []
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            arrays = [
                (json.loads(f"[{shape}]"), _BYTES[kind]) for kind, shape in _ARRAY.findall(match[1])
            ]
            found.append(
                [match[2], [[shape, size * int(np.prod(shape))] for shape, size in arrays]]
            )
    return found


def compile_step(config, plugin, mesh_shape, batch, length, targets):
    """Compiles one step from shapes alone; also gives the shapes of the plugin's weights."""
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = meshes.make_mesh(config, batch, mesh_shape, devices)
    everywhere = meshes.replicated(mesh)

    def lie(tree, sharding):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    optimizer = optimizers.optimizer("adamw", 1e-3, "constant")
    fresh = jax.eval_shape(
        lambda: init_plugin(plugin, T5(config).stack(), jax.random.key(0))
    )
    state = jax.eval_shape(lambda params: init_state(params, optimizer), fresh.params)
    state, fresh = lie(state, everywhere), lie(fresh, everywhere)
    shardings = meshes.parameter_shardings(config, mesh)
    backbone = jax.tree.map(lie, shape_params(config), shardings)
    names = ("input_tokens", "target_tokens", "loss_weights")
    lengths = {"encoder_input_tokens": length} | {f"decoder_{name}": targets for name in names}
    rows = {
        name: jax.ShapeDtypeStruct((batch, columns), jnp.int32) for name, columns in lengths.items()
    }
    rows = lie(rows, meshes.batch_sharding(mesh))
    objective = Distillation(T5(config), plugin, LossConfig())
    step = jit_train_step(make_train_step(objective, optimizer), state, mesh)
    with meshes.activations(mesh):
        compiled = step.lower(state, (backbone, fresh.output_scales), rows).compile()
    return compiled, fresh.params


def measure(config, mesh_shape, batch=8, length=24, targets=6):
    """What the compiled module of one step tells."""
    compiled, plugin = compile_step(
        T5Config(**config), PluginConfig(4, bottleneck=8), mesh_shape, batch, length, targets
    )
    memory = compiled.memory_analysis()
    return {
        "collectives": collectives(compiled.as_text()),
        "flops": compiled.cost_analysis()["flops"],
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "plugin": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plugin)),
    }


if __name__ == "__main__":
    print(json.dumps([measure(**case) for case in json.loads(sys.argv[1])]))
