"""`variator export --format jax`: compiled-ahead programs that run without this package.

The folder holds `weights.safetensors`, a serialised `jax.export` program for each plugin, batch and
length, the vocabulary, and `export.json`, which lists them. Weights are arguments of a program: a
dict of the names that `export.json` has for its plugin. JAX and safetensors alone load it:

    index = json.load(open("exported/export.json"))
    weights = safetensors.numpy.load_file("exported/weights.safetensors")
    entry = index["programs"][0]
    program = jax.export.deserialize(open(f"exported/{entry['file']}", "rb").read())
    used = {name: weights[name] for name in index["weights"][entry["plugin"]]}
    vectors = program.call(used, tokens)  # tokens: [batch, length] int32, 0 on padding
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from safetensors.numpy import save_file

from variator_jax.backbones.t5 import T5
from variator_jax.bench.output import log
from variator_jax.errors import ConfigError, check_known
from variator_jax.files import atomic_folder, write_json
from variator_jax.hf_tokenizer import FILES
from variator_jax.model import SplicedModel
from variator_jax.plugin.config import NONE
from variator_jax.serving.engine import check_rows_apart
from variator_jax.serving.sentences import Encoder, arrays_of
from variator_jax.serving.tasks import mean_pool, normalized, through_dense
from variator_jax.store import Plugin
from variator_jax.store.backbone import copy_vocabulary
from variator_jax.store.description import owner_content
from variator_jax.store.plugins import check_plugin

INDEX, WEIGHTS = "export.json", "weights.safetensors"
TASKS = ("encode", "embed")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """What is exported.

    Attributes:
      task: 'encode' for a vector a token, 'embed' for the normalised mean of a text's tokens.
      batches: rows of the programs.
      lengths: tokens of a row.
      platforms: what the programs run on, of `PLATFORMS`; empty for the platform of this process.
    """

    task: str = "embed"
    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (64, 256)
    platforms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_known("No program is for the task", self.task, TASKS)
        for platform in self.platforms:
            check_known("No program is for the platform", platform, PLATFORMS)
        sizes = (*self.batches, *self.lengths)
        if not self.batches or not self.lengths or min(sizes) < 1:
            raise ConfigError(f"Batches and lengths are 1 or more; found {sizes}.")


def export_programs(
    path: str | os.PathLike,
    encoder: Encoder,
    plugins: Iterable[Plugin] = (),
    settings: ExportSettings = ExportSettings(),
) -> list[str]:
    """Writes the folder atomically, and returns the names of its programs.

    Args:
      path: the folder; an earlier export is replaced.
      encoder: the backbone, which is exported as the plugin 'none', and layers behind pooling.
      plugins: its plugins.
      settings: task, shapes and platforms.

    Raises:
      VariatorError: for a plugin of another backbone, one that merges padding, or a folder that
        holds something else.
    """
    backbone, named = encoder.backbone, dict[str, Plugin | None]({NONE: None})
    for given in plugins:
        check_plugin(given, backbone)
        check_rows_apart(given)
        named[given.config.name] = given
    holds = "|".join([r".*\.jaxexport", WEIGHTS, *FILES])
    with atomic_folder(path, replaces=(INDEX,), holds=holds) as draft:
        weights: dict[str, np.ndarray] = {}
        index: dict[str, Any] = {
            "task": settings.task,
            "backbone": owner_content(backbone),
            "jax": jax.__version__,
            "platforms": list(settings.platforms or (export.default_export_platform(),)),
            "programs": [],
            "weights": {},
        }
        for name, plugin in named.items():
            programs, used = _write_programs(draft, name, encoder, plugin, settings)
            weights |= used
            index["programs"] += programs
            index["weights"][name] = sorted(used)
        save_file(weights, draft / WEIGHTS)
        copy_vocabulary(backbone.vocabulary_file, draft)
        write_json(draft / INDEX, index)
    return [program["file"] for program in index["programs"]]


def _write_programs(
    folder: Path, name: str, encoder: Encoder, plugin: Plugin | None, settings: ExportSettings
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Writes the programs of one plugin; returns their entries and the weights that they use."""
    tree = {
        "backbone": encoder.backbone.params,
        f"plugins/{name}": plugin.variables if plugin else None,
        "dense": [arrays_of(layer) for layer in encoder.dense],
    }
    weights = {_name(path): np.asarray(x) for path, x in tree_leaves_with_path(tree)}
    function = jax.jit(_program(name, encoder, plugin, settings, tree))
    shapes = [(batch, length) for batch in settings.batches for length in settings.lengths]
    # The first trace finds out which weights the task reads.
    traced = export.export(function)(weights, _tokens(*shapes[0]))
    names = sorted(weights)  # the order in which JAX flattens a dict
    weights = {names[i]: weights[names[i]] for i in traced.module_kept_var_idx if i < len(names)}
    entries = []
    exporter = export.export(function, platforms=settings.platforms or None)
    for batch, length in shapes:
        exported = exporter(weights, _tokens(batch, length))
        file = f"{name}_{batch}x{length}.jaxexport"
        (folder / file).write_bytes(exported.serialize())
        log(f"  {file}")
        ratio = plugin.config.ratio if plugin else 1
        entry = {"file": file, "plugin": name, "ratio": ratio, "batch": batch, "length": length}
        entries.append({**entry, "output": list(exported.out_avals[0].shape)})
    return entries, weights


def _program(
    name: str, encoder: Encoder, plugin: Plugin | None, settings: ExportSettings, tree: Any
) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """The task as a function of weights by name and tokens `[batch, length]`."""
    model = SplicedModel(T5(encoder.backbone.config), plugin.config if plugin else None)

    def run(weights: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
        # What is not among the weights is not read either.
        found = tree_map_with_path(lambda path, _: weights.get(_name(path)), tree)
        batch = {"encoder_input_tokens": tokens}
        # [batch, length, embed]
        states = model.encode(found["backbone"], found[f"plugins/{name}"], batch)
        if settings.task == "encode":
            return states
        given = zip(encoder.dense, found["dense"], strict=True)
        layers = [layer._replace(**arrays) for layer, arrays in given]
        # [batch, out]
        return normalized(through_dense(mean_pool(states, tokens), layers))

    return run


def _name(path: Any) -> str:
    return keystr(path, simple=True, separator="/")


def _tokens(batch: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)
