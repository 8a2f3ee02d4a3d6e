"""T5X's own network under our splice, and the plugin's branch of a T5X tree.

The network is unmodified, and its parameter paths stay what they are (`encoder/layers_0/...`), so
that any checkpoint of it restores. The branch `plugin/` follows the module paths of the plugin's
keys: its parameters, what they start as, and their optimizer. Each key's output scale is one more
leaf, which is not trained.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from flax.linen.partitioning import param_with_axes
from t5x import optimizers
from t5x.examples.t5 import network as t5x_network

from variator_jax.backbones.base import Mask, Stack
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.backbones.t5.backbone import T5Stack
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin, plugin_specs, splice
from variator_jax.plugin.sites.base import ArraySpec
from variator_jax.store import load_plugin
from variator_jax.store.formats import run_part
from variator_jax.train.jobs import initial_plugin

_SAME_NAMES = (
    "vocab_size", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim", "mlp_dim",
    "mlp_activations", "dropout_rate", "logits_via_embedding",
)  # fmt: skip
PLUGIN = "plugin"  # the plugin's branch of the tree
OUTPUT_SCALE = "output_scale"  # one leaf of each key's branch


def to_tree(plugin: PluginVariables) -> dict[str, Any]:
    """A plugin's arrays as T5X's tree has them: by module path, with the output scales."""
    return traverse_util.unflatten_dict(
        {
            f"{key}/{name}": array
            for key, params in plugin.params.items()
            for name, array in {**params, OUTPUT_SCALE: plugin.output_scales[key]}.items()
        },
        sep="/",
    )


def from_tree(tree: Mapping[str, Any]) -> PluginVariables:
    """The inverse of `to_tree`."""
    branches = {"": flax.core.unfreeze(dict(tree))}
    params, scales = {}, {}
    while branches:
        key, branch = branches.popitem()
        if OUTPUT_SCALE in branch:
            scales[key] = branch.pop(OUTPUT_SCALE)
            params[key] = branch
        else:
            branches |= {f"{key}/{name}".lstrip("/"): node for name, node in branch.items()}
    return PluginVariables(params, scales)


def parameter_tree(config: PluginConfig, stack: Stack) -> dict[str, Any]:
    """The specs of a plugin's arrays, as `to_tree` arranges the arrays."""
    scale = ArraySpec((), (), nn.initializers.ones)
    flat = {
        f"{key}/{name}": spec
        for key, specs in plugin_specs(config, stack).items()
        for name, spec in {OUTPUT_SCALE: scale, **specs}.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


class Parameters(nn.Module):
    """A tree of float32 parameters with logical axes.

    Attributes:
      specs: their `ArraySpec`s, in nested dicts.
    """

    specs: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """The arrays, in dicts as `specs`."""
        return {
            name: param_with_axes(name, spec.init, spec.shape, jnp.float32, axes=spec.axes)
            if isinstance(spec, ArraySpec)
            else Parameters(spec, name=name)()
            for name, spec in self.specs.items()
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """Where a plugin's arrays come from before the first step.

    Attributes:
      plugin: its settings.
      backbone: shape of its backbone.
      path: a plugin folder, or one for each of several ratios; None or () for a fresh plugin.
      seed: of a fresh one.
    """

    plugin: PluginConfig
    backbone: T5Config
    path: str | Sequence[str] | None = None
    seed: int = 0

    @functools.cached_property
    def loaded(self) -> PluginVariables | None:
        """The arrays of the folder; None for a fresh plugin, which must be calibrated.

        Raises:
          CheckpointError: if a folder is damaged or has another plugin.
          ConfigError: if none of several folders has the wanted ratio.
        """
        if not self.path or self.plugin.ratio == 1:
            return None
        path = str(chosen_path(self.path, self.plugin))
        return jax.tree.map(np.asarray, initial_plugin(path, self.plugin, self.backbone).variables)

    def values(self) -> PluginVariables:
        """The arrays. Fresh ones are those of the built-in engine."""
        stack = T5(self.backbone).stack()
        return self.loaded or init_plugin(self.plugin, stack, jax.random.key(self.seed))


def chosen_path(path: str | Sequence[str], plugin: PluginConfig) -> pathlib.Path:
    """The plugin folder that `path` names, of several the one with these sites or this ratio.

    Raises:
      CheckpointError: if a folder is damaged.
      ConfigError: if none or more than one of several fits.
    """
    if isinstance(path, str):
        return run_part(path, "plugin")
    configs = {
        folder: load_plugin(folder).config for folder in (run_part(p, "plugin") for p in path)
    }
    fitting = [f for f, config in configs.items() if config == plugin]
    fitting = fitting or [f for f, config in configs.items() if config.ratio == plugin.ratio]
    if len(fitting) != 1:
        found = [config.description for config in configs.values()]
        raise ConfigError(f"Expected one plugin '{plugin.description}' in {path}; found {found}.")
    return fitting[0]


def is_trained(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at this path of a T5X tree is trained: the plugin's, but for its scales."""
    names = [key.key for key in path]
    return names[0] == PLUGIN and names[-1] != OUTPUT_SCALE


class PluginOptimizer(optimizers.OptaxWrapper):
    """T5X's wrapper of an optax optimizer, applied to the plugin's parameters and to no others.

    Modifications to the host: `apply_gradient` hands frozen leaves through. Adding a zero would
    leave their values alone, but not the sign of a zero, and would write every weight anew.
    """

    def __init__(self, optimizer: optax.GradientTransformation) -> None:
        of_leaf = lambda path, _: "plugin" if is_trained(path) else "frozen"  # noqa: E731
        labels = functools.partial(jax.tree_util.tree_map_with_path, of_leaf)
        transforms = {"plugin": optimizer, "frozen": optax.set_to_zero()}
        super().__init__(optax.multi_transform(transforms, labels))

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: Any, grads: Any
    ) -> tuple[Any, Any]:
        """The new parameters and state; frozen leaves are those of `params` themselves."""
        updated, state = super().apply_gradient(hyper_params, params, state, grads)
        kept = jax.tree_util.tree_map_with_path(
            lambda path, old, new: new if is_trained(path) else old, params, updated
        )
        return kept, state


@dataclasses.dataclass(frozen=True)
class T5XStack(T5Stack):
    """The encoder of T5X's network, whose layers ask for their own position bias."""

    def arguments(self, role: str) -> dict[str, str]:
        """The signatures of T5X's `EncoderLayer` and `MultiHeadDotProductAttention`."""
        if role == "layer":
            return {"inputs": "stream", "encoder_mask": "mask"}
        return {"inputs_q": "queries", "inputs_kv": "keys", "mask": "mask", "bias": "bias"}


def stack_of(config: T5Config) -> T5XStack:
    """The encoder of a backbone as T5X's network runs it."""
    layers = config.num_encoder_layers
    return T5XStack(layers, config.embed_dim, prefix="encoder", config=config)


def network_of(config: T5Config) -> nn.Module:
    """T5X's network of a backbone's shape.

    Raises:
      ConfigError: for what T5X's network cannot be: an encoder alone, one with feed-forward layers
        of its own width, or another norm's epsilon.
    """
    shared = config.encoder_mlp == config.mlp_dim and config.layer_norm_epsilon == 1e-6
    if not (config.has_decoder and shared):
        raise ConfigError(
            f"T5X's network has a decoder, one mlp_dim and layer_norm_epsilon 1e-6; found {config}."
            " Use --engine=builtin."
        )
    fields = {name: getattr(config, name) for name in _SAME_NAMES}
    # As in our own network, the softmax runs in float32 for any dtype.
    fields |= {"emb_dim": config.embed_dim, "float32_attention_logits": True}
    fields["dtype"] = jnp.dtype(config.dtype)
    return t5x_network.Transformer(t5x_network.T5Config(**fields))


def refuse_scanned(network: nn.Module) -> None:
    """Refuses a network whose layers are one scanned module.

    Raises:
      ConfigError: with the conversion that leads to the plain network.
    """
    config = getattr(network, "config", None)
    if getattr(network, "scan_layers", False) or getattr(config, "scan_layers", False):
        raise ConfigError(
            "The network scans its layers, and a plugin needs one module for each. Convert the "
            "checkpoint (variator convert --from t5x --to t5x SRC DST), and use t5x.examples.t5's."
        )


class SplicedTransformer(nn.Module):
    """A T5X network with a compression plugin spliced in; its interface is the network's own.

    Attributes:
      network: T5X's `Transformer`, or another Linen network with its interface.
      plugin_config: the plugin; at ratio 1 there is none, and the tree is the network's alone.
      stack: the network's encoder.
    """

    network: nn.Module
    plugin_config: PluginConfig
    stack: Stack

    def setup(self) -> None:
        """Puts the network's parameters at the top of the tree and the plugin's in a branch."""
        nn.share_scope(self, self.network)
        if self.plugin_config.ratio > 1:
            specs = parameter_tree(self.plugin_config, self.stack)
            self.plugin = Parameters(specs, name=PLUGIN)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        compressed: bool = True,
        **options: Any,
    ) -> jax.Array:
        """The network's logits `[batch, target length, vocab]`; the teacher's, not `compressed`."""
        tokens = (encoder_input_tokens, decoder_input_tokens, decoder_target_tokens)
        with self._spliced(encoder_input_tokens, encoder_segment_ids, compressed):
            return self.network(*tokens, encoder_segment_ids=encoder_segment_ids, **options)

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """The compressed encoder's output `[batch, length, embed]`, as long as its input."""
        with self._spliced(encoder_input_tokens, encoder_segment_ids, compressed=True):
            return self.network.encode(encoder_input_tokens, encoder_segment_ids, **options)

    def decode(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The network's own decoder, which no plugin touches."""
        return self.network.decode(*args, **kwargs)

    @contextlib.contextmanager
    def _spliced(
        self, tokens: jax.Array, segment_ids: jax.Array | None, compressed: bool
    ) -> Iterator[None]:
        # Always made, so that the tree is the same for both.
        plugin = from_tree(self.plugin()) if self.plugin_config.ratio > 1 else None
        config = self.plugin_config if compressed else PluginConfig(1)
        with splice(config, plugin, Mask(tokens > 0, segment_ids), stack=self.stack):
            yield
