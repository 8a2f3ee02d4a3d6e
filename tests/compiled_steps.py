"""The compiled distillation step of the built-in engine, on several devices and without weights.

As a script it compiles the steps that it is asked for and prints what their modules need, as JSON.
"""

import json
import math
import re
import sys

import jax

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.bench import budget
from variator_jax.plugin import PluginConfig, plugin_parameters
from variator_jax.train import optimizers

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
            arrays = [(json.loads(f"[{n}]"), _BYTES[kind]) for kind, n in _ARRAY.findall(match[1])]
            found.append([match[2], [[shape, size * math.prod(shape)] for shape, size in arrays]])
    return found


def measure(config, mesh_shape, batch=8, length=24, targets=6):
    """Collectives, FLOPs and memory of the compiled module of one step, from shapes alone."""
    config, plugin = T5Config(**config), PluginConfig(4, bottleneck=8)
    devices = jax.devices()[: math.prod(mesh_shape)]
    mesh = meshes.make_mesh(config, batch, mesh_shape, devices)
    optimizer = optimizers.optimizer("adamw", 1e-3, "constant")
    lengths = {"inputs": length, "targets": targets}
    compiled = budget.Step(config, plugin, optimizer, lengths, batch, mesh).compiled
    memory = compiled.memory_analysis()
    return {
        "collectives": collectives(compiled.as_text()),
        "flops": compiled.cost_analysis()["flops"],
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "plugin": 4 * plugin_parameters(plugin, T5(config).stack()),
    }


if __name__ == "__main__":
    print(json.dumps([measure(**case) for case in json.loads(sys.argv[1])]))
