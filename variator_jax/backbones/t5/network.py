"""The T5 encoder-decoder, with T5X's parameter paths.

Compression plugins are spliced around `encoder/layers_<i>/mlp` from outside.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from variator_jax.backbones.base import Outputs
from variator_jax.backbones.t5.attention import (
    MultiHeadAttention,
    RelativePositionBias,
    causal_mask,
    padding_mask,
)
from variator_jax.backbones.t5.config import T5Config
from variator_jax.backbones.t5.layers import (
    MLP_INIT,
    Dense,
    Embed,
    MlpBlock,
    RMSNorm,
    constrain,
    dropout,
    remat,
)
from variator_jax.errors import ConfigError


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward layer, each with a norm and a residual connection."""

    config: T5Config

    @nn.compact
    def __call__(
        self, h: jax.Array, mask: jax.Array, bias: jax.Array, valid: jax.Array, deterministic: bool
    ) -> jax.Array:
        """`[batch, length, embed]` to the same; `valid` `[batch, length]` is False on padding."""
        config = self.config
        # [batch, length, embed]
        x = RMSNorm(config, name="pre_attention_layer_norm")(h)
        x = MultiHeadAttention(config, name="attention")(x, x, mask, bias, deterministic)
        # Padded rows get nothing, as in ModelCenter; T5X and transformers leave something arbitrary
        # there, which no valid position ever reads.
        x = x * valid[..., None].astype(x.dtype)
        h = h + dropout(config, x, deterministic)

        # [batch, length, embed]
        x = RMSNorm(config, name="pre_mlp_layer_norm")(h)
        x = MlpBlock(config, config.encoder_mlp, name="mlp")(x, deterministic)
        return constrain(h + dropout(config, x, deterministic))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder and a feed-forward layer."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        encoded: jax.Array,
        self_mask: jax.Array,
        cross_mask: jax.Array,
        bias: jax.Array,
        deterministic: bool,
        decode: bool,
    ) -> jax.Array:
        """`[batch, target length, embed]` to the same; one position a call if `decode`."""
        config = self.config
        # [batch, target length, embed]
        x = RMSNorm(config, name="pre_self_attention_layer_norm")(h)
        attention = MultiHeadAttention(config, name="self_attention")
        x = attention(x, x, self_mask, bias, deterministic, decode)
        h = h + dropout(config, x, deterministic)

        x = RMSNorm(config, name="pre_cross_attention_layer_norm")(h)
        attention = MultiHeadAttention(config, name="encoder_decoder_attention")
        x = attention(x, encoded, cross_mask, None, deterministic)
        h = h + dropout(config, x, deterministic)

        x = RMSNorm(config, name="pre_mlp_layer_norm")(h)
        x = MlpBlock(config, config.mlp_dim, name="mlp")(x, deterministic)
        return constrain(h + dropout(config, x, deterministic))


class Encoder(nn.Module):
    """The encoder stack over embedded tokens."""

    config: T5Config

    @nn.compact
    def __call__(
        self, h: jax.Array, mask: jax.Array, valid: jax.Array, deterministic: bool
    ) -> jax.Array:
        """`[batch, length, embed]` to the same, after the final norm."""
        config = self.config
        length = h.shape[1]
        # [1, heads, length, length]
        bias = RelativePositionBias(config, bidirectional=True, name="relpos_bias")(length, length)
        h = constrain(dropout(config, h, deterministic))
        # Arguments count from self: 5 is `deterministic`, which the layer branches on.
        layer = remat(EncoderLayer, config, (5,)) if config.remat else EncoderLayer
        for i in range(config.num_encoder_layers):
            h = layer(config, name=f"layers_{i}")(h, mask, bias, valid, deterministic)
        h = RMSNorm(config, name="encoder_norm")(h)
        return dropout(config, h, deterministic)


class Decoder(nn.Module):
    """The decoder stack over embedded target tokens, up to the hidden states before the logits."""

    config: T5Config

    def setup(self) -> None:
        """The output projection belongs to the decoder, as in T5X, and is a step of its own."""
        config = self.config
        if not config.logits_via_embedding:
            self.logits_dense = Dense(
                config.vocab_size, config, ("embed", "vocab"), MLP_INIT, dtype="float32"
            )

    def logits(self, decoded: jax.Array) -> jax.Array:
        """`[..., embed] -> [..., vocab]` in float32, where logits are not tied to the embedding."""
        return self.logits_dense(decoded)

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        encoded: jax.Array,
        self_mask: jax.Array,
        cross_mask: jax.Array,
        deterministic: bool,
        decode: bool,
        max_decode_length: int | None,
    ) -> jax.Array:
        """`[batch, target length, embed]` to the same, after the final norm."""
        config = self.config
        length = max_decode_length if decode and max_decode_length else h.shape[1]
        # [1, heads, length, length]
        bias = RelativePositionBias(config, bidirectional=False, name="relpos_bias")(length, length)
        h = constrain(dropout(config, h, deterministic))
        again = config.remat and not decode
        layer = remat(DecoderLayer, config, (6, 7)) if again else DecoderLayer
        for i in range(config.num_decoder_layers):
            h = layer(config, name=f"layers_{i}")(
                h, encoded, self_mask, cross_mask, bias, deterministic, decode
            )
        h = RMSNorm(config, name="decoder_norm")(h)
        return dropout(config, h, deterministic)


class Transformer(nn.Module):
    """A T5 encoder-decoder, or an encoder alone. Token 0 is padding and starts the decoder."""

    config: T5Config

    def setup(self) -> None:
        """Creates the parts in T5X's names, the decoder only where the config has one."""
        config = self.config
        self.token_embedder = Embed(config)
        self.encoder = Encoder(config)
        if config.has_decoder:
            self.decoder = Decoder(config)

    def __call__(
        self, encoder_input_tokens: jax.Array, decoder_input_tokens: jax.Array | None = None
    ) -> jax.Array:
        """Logits `[batch, target length, vocab]`, float32; an encoder alone returns its output."""
        outputs = self.forward(encoder_input_tokens, decoder_input_tokens)
        return outputs.hidden["encoder"] if outputs.logits is None else outputs.logits

    def forward(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        enable_dropout: bool = False,
    ) -> Outputs:
        """Runs `[batch, length]` and `[batch, target length]` int tokens through both stacks.

        Without a decoder, `decoder_input_tokens` is ignored and there are no logits.
        """
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        if not self.config.has_decoder:
            return Outputs({"encoder": encoded}, None)
        decoded = self.decode_hidden(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            enable_dropout=enable_dropout,
        )
        return Outputs({"encoder": encoded, "decoder": decoded}, self.logits(decoded))

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        enable_dropout: bool = False,
    ) -> jax.Array:
        """Encodes `[batch, length]` int tokens: `[batch, length, embed]`."""
        valid = encoder_input_tokens > 0
        # [batch, 1, length, length]
        mask = padding_mask(valid, valid, encoder_segment_ids, encoder_segment_ids)
        # [batch, length, embed]
        h = self.token_embedder(encoder_input_tokens)
        return self.encoder(h, mask, valid, not enable_dropout)

    def decode_hidden(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array | None,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> jax.Array:
        """The decoder's last hidden states, `[batch, target length, embed]`.

        Raises:
          ConfigError: for a backbone without a decoder, or without decoder tokens.
        """
        if not self.config.has_decoder:
            raise ConfigError(f"Backbone {self.config.name!r} is an encoder without a decoder.")
        if decoder_input_tokens is None:
            raise ConfigError(
                f"Backbone {self.config.name!r} has a decoder; give its input tokens."
            )
        everywhere = jnp.ones(decoder_input_tokens.shape, bool)
        # [batch or 1, 1, length, length]
        self_mask = causal_mask(decoder_input_tokens.shape[1])
        if decoder_segment_ids is not None:
            self_mask = self_mask & padding_mask(
                everywhere, everywhere, decoder_segment_ids, decoder_segment_ids
            )
        # [batch, 1, target length, length]
        cross_mask = padding_mask(
            everywhere, encoder_input_tokens > 0, decoder_segment_ids, encoder_segment_ids
        )
        # [batch, target length, embed]
        h = self.token_embedder(decoder_input_tokens)
        return self.decoder(
            h, encoded, self_mask, cross_mask, not enable_dropout, decode, max_decode_length
        )

    def decode(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        **cache: Any,
    ) -> jax.Array:
        """Logits for `[batch, target length]` decoder tokens, given the encoder's output."""
        hidden = self.decode_hidden(encoded, encoder_input_tokens, decoder_input_tokens, **cache)
        return self.logits(hidden)

    def logits(self, decoded: jax.Array) -> jax.Array:
        """`[..., embed] -> [..., vocab]` in float32, by the embedding where it is tied."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(decoded)
        return self.decoder.logits(decoded)


def init_params(config: T5Config, rng: jax.Array) -> dict:
    """Fresh parameters of a backbone, a plain nested dict."""
    tokens = jnp.ones((1, 2), jnp.int32)
    return jax.jit(Transformer(config).init)(rng, tokens, tokens)["params"]


def shape_params(config: T5Config) -> dict:
    """The tree of `init_params` as shapes and dtypes, without allocating anything."""
    tokens = jnp.ones((1, 2), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)["params"]
