"""T5X's own network under our splice: the plugin's parameters lie beside its own, in one tree.

The network is held unmodified, and its parameter paths stay what they are (`encoder/layers_0/...`),
so that any checkpoint of it restores. What is added lies under `plugin/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen.partitioning import param_with_axes
from t5x.examples.t5 import network as t5x_network

from variator_jax.backbones.base import Mask, Stack
from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, PluginVariables, plugin_specs, splice
from variator_jax.plugin.sites.base import ArraySpec

PLUGIN = "plugin"  # the plugin's branch of the tree
OUTPUT_SCALE = "output_scale"  # beside each layer's trained parameters


def network_of(config: T5Config) -> nn.Module:
    """T5X's network of a backbone's shape.

    Raises:
      ConfigError: for what T5X's network cannot be: an encoder alone, one with feed-forward layers
        of its own width, or another norm's epsilon.
    """
    if not config.has_decoder:
        raise ConfigError(
            f"Backbone {config.name!r} has no decoder, which T5X's network always has; "
            "use --engine=builtin."
        )
    if config.encoder_mlp != config.mlp_dim:
        raise ConfigError(
            f"Backbone {config.name!r} has encoder_mlp_dim {config.encoder_mlp} and mlp_dim "
            f"{config.mlp_dim}; T5X's network knows one for both. Use --engine=builtin."
        )
    if config.layer_norm_epsilon != 1e-6:
        raise ConfigError(
            f"Backbone {config.name!r} has layer_norm_epsilon {config.layer_norm_epsilon}; T5X's "
            "network knows 1e-6 only. Use --engine=builtin."
        )
    return t5x_network.Transformer(
        t5x_network.T5Config(
            vocab_size=config.vocab_size,
            dtype=jnp.dtype(config.dtype),
            emb_dim=config.embed_dim,
            num_heads=config.num_heads,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            head_dim=config.head_dim,
            mlp_dim=config.mlp_dim,
            mlp_activations=tuple(config.mlp_activations),
            dropout_rate=config.dropout_rate,
            logits_via_embedding=config.logits_via_embedding,
            # As in our own network: the softmax runs in float32 whatever the dtype.
            float32_attention_logits=True,
        )
    )


def refuse_scanned(network: nn.Module) -> None:
    """Refuses a network whose layers are one scanned module.

    Raises:
      ConfigError: with the conversion that leads to the plain network.
    """
    config = getattr(network, "config", None)
    if getattr(network, "scan_layers", False) or getattr(config, "scan_layers", False):
        raise ConfigError(
            "The network scans its layers, so all of them are one module, and a plugin cannot be "
            "spliced into each. Convert the checkpoint (variator convert --from t5x --to t5x "
            "SRC DST writes the plain form) and use t5x.examples.t5's network."
        )


def to_tree(plugin: PluginVariables) -> dict[str, Any]:
    """A plugin's arrays as T5X's tree has them: by module path, output scales beside them."""
    flat = {
        (*key.split("/"), *path): array
        for key, params in plugin.params.items()
        for path, array in traverse_util.flatten_dict(params).items()
    }
    flat |= {(*key.split("/"), OUTPUT_SCALE): a for key, a in plugin.output_scales.items()}
    return traverse_util.unflatten_dict(flat)


def from_tree(tree: Mapping[str, Any]) -> PluginVariables:
    """The inverse of `to_tree`."""
    flat = traverse_util.flatten_dict(flax.core.unfreeze(dict(tree)), sep="/")
    scales = {
        path.removesuffix(f"/{OUTPUT_SCALE}"): array
        for path, array in flat.items()
        if path.endswith(f"/{OUTPUT_SCALE}")
    }
    params = {
        key: traverse_util.unflatten_dict(
            {
                path.removeprefix(f"{key}/"): array
                for path, array in flat.items()
                if path.startswith(f"{key}/") and not path.endswith(OUTPUT_SCALE)
            },
            sep="/",
        )
        for key in scales
    }
    return PluginVariables(params, scales)


class PluginParameters(nn.Module):
    """A plugin's parameters in a T5X tree, each with axes; what they start as is `model.py`'s."""

    config: PluginConfig
    stack: Stack

    @nn.compact
    def __call__(self) -> PluginVariables:
        """The plugin's arrays, in the two trees that `splice` takes."""
        branches: dict[str, dict[str, ArraySpec]] = {}
        scale = ArraySpec((), (), nn.initializers.ones)
        for key, specs in plugin_specs(self.config, self.stack).items():
            branch, _, rest = key.partition("/")
            named = {f"{rest}/{name}": spec for name, spec in specs.items()}
            branches.setdefault(branch, {}).update({f"{rest}/{OUTPUT_SCALE}": scale, **named})
        return from_tree({name: _Branch(specs, name=name)() for name, specs in branches.items()})


class _Branch(nn.Module):
    """A subtree of parameters, by paths relative to it."""

    specs: Mapping[str, ArraySpec]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        children: dict[str, dict[str, ArraySpec]] = {}
        tree = {}
        for path, spec in self.specs.items():
            name, _, rest = path.partition("/")
            if rest:
                children.setdefault(name, {})[rest] = spec
            else:
                tree[name] = param_with_axes(
                    name, spec.init, spec.shape, jnp.float32, axes=spec.axes
                )
        return tree | {name: _Branch(specs, name=name)() for name, specs in children.items()}


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
        """Puts the network's parameters at the top of the tree and the plugin's beside them."""
        nn.share_scope(self, self.network)
        if self.plugin_config.ratio > 1:
            self.plugin = PluginParameters(self.plugin_config, self.stack, name=PLUGIN)

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        compressed: bool = True,
    ) -> jax.Array:
        """The network's logits `[batch, target length, vocab]`; the teacher's, not `compressed`."""
        with self._spliced(encoder_input_tokens, encoder_segment_ids, compressed):
            return self.network(
                encoder_input_tokens,
                decoder_input_tokens,
                decoder_target_tokens,
                encoder_segment_ids,
                decoder_segment_ids,
                encoder_positions,
                decoder_positions,
                enable_dropout=enable_dropout,
                decode=decode,
            )

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        enable_dropout: bool = True,
        compressed: bool = True,
    ) -> jax.Array:
        """The encoder's output `[batch, length, embed]`, as long as its input."""
        with self._spliced(encoder_input_tokens, encoder_segment_ids, compressed):
            return self.network.encode(
                encoder_input_tokens,
                encoder_segment_ids=encoder_segment_ids,
                enable_dropout=enable_dropout,
            )

    def decode(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The network's own decoder, which no plugin touches."""
        return self.network.decode(*args, **kwargs)

    @contextlib.contextmanager
    def _spliced(
        self, tokens: jax.Array, segment_ids: jax.Array | None, compressed: bool
    ) -> Iterator[None]:
        if self.plugin_config.ratio == 1:
            yield
            return
        plugin = self.plugin()  # always, so that the tree is the same for both
        if not compressed:
            yield
            return
        with splice(self.plugin_config, plugin, Mask(tokens > 0, segment_ids), stack=self.stack):
            yield
