"""What an encoder and its compression plugin cost: parameters and FLOPs, by formula.

A multiply-add counts as 2 FLOPs, and only matrix products and the weighted sum of a merge group are
counted. Left out, as in the paper: softmax, norms, activations, residual additions, biases, masks,
position buckets and the embedding look-up. They are what separates these figures from XLA's own
count, a few per cent at small widths and below one per cent at T5-base. Measuring time is the
business of `latency`.
"""

from __future__ import annotations

from variator_jax.backbones.t5.attention import NUM_BUCKETS
from variator_jax.backbones.t5.config import T5Config
from variator_jax.errors import ConfigError
from variator_jax.plugin.config import PluginConfig


def encoder_flops(
    config: T5Config, length: int, ratio: int, plugin: PluginConfig | None = None, batch: int = 1
) -> int:
    """FLOPs of one encoder pass as this library computes it.

    Hidden decompression multiplies the FFN's output on the short side, before it is repeated
    (DESIGN.md section 3), and is cheaper than the paper's form, which `paper_flops` counts.

    Args:
      config: shape of the backbone.
      length: tokens per row, padding included.
      ratio: compression ratio k; 1 is the backbone itself. A length that does not divide is
        filled up to ceil(length / k) groups, as the plugin does.
      plugin: method settings, the defaults of that ratio if None.
      batch: rows.

    Raises:
      ConfigError: for a size below 1 or a `plugin` of another ratio.
      PluginError: for a plugin of layers that the backbone lacks.
    """
    plugin = _settings(length, ratio, plugin, batch)
    whole = attention_flops(config, length) + ffn_flops(config, length)
    groups = -(-length // ratio)
    spliced = attention_flops(config, length) + ffn_flops(config, groups)
    spliced += groups * _plugin_flops(config.embed_dim, plugin)
    layers = len(plugin.compressed_layers(config.num_encoder_layers))  # none for ratio 1
    return batch * ((config.num_encoder_layers - layers) * whole + layers * spliced)


def paper_flops(
    config: T5Config, length: int, ratio: int, bottleneck: int = 64, batch: int = 1
) -> int:
    """FLOPs of one encoder pass as the official code computes it, a plugin in every layer.

    Its decompression multiplies the repeated output and the FFN's input, concatenated, on the long
    side: 2D(k+1) + 6Db per token for the plugin. `length` must divide by `ratio`, as it must there.
    """
    _settings(length, ratio, None, batch)
    if length % ratio:
        raise ConfigError(f"The paper's form needs a length that divides by {ratio}, not {length}.")
    embed = config.embed_dim
    layer = attention_flops(config, length) + ffn_flops(config, length // ratio)
    if ratio > 1:
        layer += length * (2 * embed * (ratio + 1) + 6 * embed * bottleneck)
    return batch * config.num_encoder_layers * layer


def flops_saved(
    config: T5Config, length: int, ratio: int, plugin: PluginConfig | None = None
) -> float:
    """Share of the encoder's FLOPs that ratio k saves, below 1; negative where it costs more."""
    return 1.0 - encoder_flops(config, length, ratio, plugin) / encoder_flops(config, length, 1)


def flops_allowed_speedup(
    config: T5Config, length: int, ratio: int, plugin: PluginConfig | None = None
) -> float:
    """The speed-up that a machine would reach if its time were proportional to FLOPs."""
    return encoder_flops(config, length, 1) / encoder_flops(config, length, ratio, plugin)


def backbone_parameters(config: T5Config) -> int:
    """Number of weights of the whole backbone: embeddings, encoder, decoder, output projection."""
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    attention = 4 * embed * joined
    kernels = (len(config.mlp_activations) + 1) * embed
    position_bias = config.num_heads * NUM_BUCKETS
    # Per layer one norm for each sublayer; per stack one position bias and one final norm.
    layer = attention + kernels * config.encoder_mlp + 2 * embed
    encoder = config.num_encoder_layers * layer + position_bias + embed
    total = config.vocab_size * embed + encoder
    if config.has_decoder:
        layer = 2 * attention + kernels * config.mlp_dim + 3 * embed
        total += config.num_decoder_layers * layer + position_bias + embed
        total += 0 if config.logits_via_embedding else embed * config.vocab_size
    return total


def attention_flops(config: T5Config, length: int) -> int:
    """Projections, scores and weighted values of one encoder layer and one row."""
    joined = config.num_heads * config.head_dim
    return length * (8 * config.embed_dim * joined + 4 * length * joined)


def ffn_flops(config: T5Config, rows: int) -> int:
    """One frozen FFN of the encoder on `rows` hidden vectors: 4DF each, 6DF if gated."""
    return rows * 2 * (len(config.mlp_activations) + 1) * config.embed_dim * config.encoder_mlp


def plugin_parameters(config: T5Config, plugin: PluginConfig) -> int:
    """Number of trained weights of a plugin: D(k^2 + 3b + 1) + k + b per layer, 0 for k = 1.

    The ablations have fewer: `mean` has no compression weights, `repeat` no decompression weights.
    The output scale `a`, a calibrated constant, is not counted.
    """
    if plugin.ratio == 1:
        return 0
    embed, ratio, bottleneck = config.embed_dim, plugin.ratio, plugin.bottleneck
    compression = ratio * embed * ratio + ratio
    decompression = 3 * embed * bottleneck + bottleneck + embed
    layer = (plugin.compression == "learned") * compression
    layer += (plugin.decompression == "bottleneck") * decompression
    return len(plugin.compressed_layers(config.num_encoder_layers)) * layer


def _plugin_flops(embed: int, plugin: PluginConfig) -> int:
    """Hidden compression and decompression of one merge group of k hidden vectors."""
    ratio, bottleneck = plugin.ratio, plugin.bottleneck
    flops = 2 * ratio * embed  # the weighted sum
    if plugin.compression == "learned":
        flops += 2 * (ratio * embed) * ratio  # u W
    if plugin.decompression == "bottleneck":
        flops += 2 * embed * bottleneck  # y W_r, on the short side
        flops += ratio * 2 * embed * bottleneck  # x W_x
        flops += ratio * 2 * bottleneck * embed  # (...) W_2
    return flops


def _settings(length: int, ratio: int, plugin: PluginConfig | None, batch: int) -> PluginConfig:
    for name, value in (("length", length), ("ratio", ratio), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"A cost needs a positive {name}; found {value}.")
    if plugin is None:
        return PluginConfig(ratio=ratio)
    if plugin.ratio != ratio:
        raise ConfigError(
            f"The plugin has ratio {plugin.ratio}, but the cost of {ratio} was asked."
        )
    return plugin
