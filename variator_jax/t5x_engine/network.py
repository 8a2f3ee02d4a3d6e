"""T5X's own network under our splice, with the plugin's parameters in the same tree.

The network is unmodified, and its parameter paths stay what they are (`encoder/layers_0/...`), so
that any checkpoint of it restores. The plugin's parameters are added under `plugin/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from t5x.examples.t5 import network as t5x_network

from variator_jax.backbones.base import Mask, Stack
from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, splice
from variator_jax.t5x_engine.plugin_branch import PLUGIN, Parameters, from_tree, parameter_tree

_SAME_NAMES = (
    "vocab_size", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim", "mlp_dim",
    "mlp_activations", "dropout_rate", "logits_via_embedding",
)  # fmt: skip


def network_of(config: T5Config) -> nn.Module:
    """T5X's network of a backbone's shape.

    Raises:
      ConfigError: for what T5X's network cannot be: an encoder alone, one with feed-forward layers
        of its own width, or another norm's epsilon.
    """
    if (
        not config.has_decoder
        or config.encoder_mlp != config.mlp_dim
        or config.layer_norm_epsilon != 1e-6
    ):
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
        enable_dropout: bool = True,
        compressed: bool = True,
    ) -> jax.Array:
        """The encoder's output `[batch, length, embed]`, as long as its input."""
        options = dict(encoder_segment_ids=encoder_segment_ids, enable_dropout=enable_dropout)
        with self._spliced(encoder_input_tokens, encoder_segment_ids, compressed):
            return self.network.encode(encoder_input_tokens, **options)

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
