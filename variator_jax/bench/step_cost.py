"""FLOPs of a distillation step, by formula, counted as in `cost`: a multiply-add is 2.

A step is the teacher's forward pass, the student's, and a backward pass through activations only.
The backbone is frozen, so a product with its weights costs as much backwards as forwards, where
training it would cost twice. Products of two activations (scores, values) and those with plugin
weights cost twice. Nothing below the lowest compressed feed-forward layer is passed backwards, and
in the decoder nothing that does not depend on the encoder. The hidden-state losses need no logits.
"""

from __future__ import annotations

import dataclasses

from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.backbones.t5.cost import ffn_flops
from variator_jax.errors import ConfigError
from variator_jax.plugin import Ffn, PluginConfig, stack_flops


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over a whole batch; what rematerialisation runs twice counts once."""

    teacher: int
    student: int
    backward: int

    @property
    def total(self) -> int:
        """All three."""
        return self.teacher + self.student + self.backward


def distillation_flops(
    config: T5Config, plugin: PluginConfig, batch: int, length: int, targets: int
) -> StepFlops:
    """FLOPs of a step with the paper's losses on the hidden states.

    Args:
      config: shape of the backbone, with or without a decoder.
      plugin: the compression plugin that is trained.
      batch: rows.
      length: tokens of an encoder row, padding included.
      targets: tokens of a decoder row.

    Raises:
      ConfigError: for a size below 1 or a plugin of ratio 1, which trains nothing.
    """
    if not _compressed(config, plugin):
        raise ConfigError("A plugin that compresses no layer has no distillation step.")
    if targets < 1:
        raise ConfigError(f"A cost needs a positive number of targets; found {targets}.")
    decoder = decoder_flops(config, length, targets)
    return StepFlops(
        teacher=batch * (stack_flops(T5(config).stack(), length) + decoder),
        student=batch * (stack_flops(T5(config).stack(), length, plugin) + decoder),
        backward=batch
        * (_encoder_backward(config, plugin, length) + _decoder_backward(config, length, targets)),
    )


def _compressed(config: T5Config, plugin: PluginConfig) -> list[int]:
    """The encoder layers with FFN sites."""
    stack, sites = T5(config).stack(), plugin.parts
    return sorted({i for site in sites if isinstance(site, Ffn) for i in site.selected(stack)})


def decoder_flops(config: T5Config, length: int, targets: int) -> int:
    """One decoder pass over `targets` tokens of one row, up to the hidden states; 0 without one."""
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    own = targets * (8 * embed * joined + 4 * targets * joined)
    # Queries and outputs on the short side, keys and values of all encoder tokens.
    cross = (targets + length) * 4 * embed * joined + 4 * targets * length * joined
    return config.num_decoder_layers * (own + cross + _decoder_ffn(config, targets))


def _encoder_backward(config: T5Config, plugin: PluginConfig, length: int) -> int:
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    attention = length * (8 * embed * joined + 2 * 4 * length * joined)
    groups = -(-length // plugin.ratio)
    compressed = _compressed(config, plugin)
    flops = 0
    for layer in range(min(compressed), config.num_encoder_layers):
        flops += ffn_flops(config, groups if layer in compressed else length)
        flops += attention if layer > min(compressed) else 0
    # What the student's pass costs beyond its frozen products is the plugin's.
    layers = config.num_encoder_layers - len(compressed)
    frozen = config.num_encoder_layers * length * (8 * embed * joined + 4 * length * joined)
    frozen += layers * ffn_flops(config, length) + len(compressed) * ffn_flops(config, groups)
    return flops + 2 * (stack_flops(T5(config).stack(), length, plugin) - frozen)


def _decoder_backward(config: T5Config, length: int, targets: int) -> int:
    if not config.has_decoder:
        return 0
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    product = 2 * targets * length * joined  # scores, or values
    projection = 2 * embed * joined
    # Values to both sides, scores to the keys; output of the attention; keys and values.
    lowest = 3 * product + targets * projection + 2 * length * projection
    own = targets * (4 * projection + 2 * 4 * targets * joined)
    above = lowest + product + targets * projection + own  # and to the queries
    layers = config.num_decoder_layers
    return lowest + (layers - 1) * above + layers * _decoder_ffn(config, targets)


def _decoder_ffn(config: T5Config, rows: int) -> int:
    return rows * 2 * (len(config.mlp_activations) + 1) * config.embed_dim * config.mlp_dim
