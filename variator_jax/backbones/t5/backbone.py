"""T5 behind the interface of a backbone: one pass, generation, masks and stacks."""

import dataclasses
from collections.abc import Collection

import jax

from variator_jax.backbones import base
from variator_jax.backbones.t5.config import T5Config
from variator_jax.backbones.t5.cost import attention_flops, ffn_flops
from variator_jax.backbones.t5.decoding import beam_decode, greedy_decode
from variator_jax.backbones.t5.network import Transformer
from variator_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class T5Stack(base.FfnStack):
    """The encoder or the decoder of a T5, with T5X's module paths."""

    config: T5Config | None = None

    def path(self, role: str, layer: int) -> str:
        """The path of a part; the stack has one position bias for all layers."""
        if role == "bias":
            return f"{self.prefix}/relpos_bias"
        if role == "neurons":
            return f"{super().path('ffn', layer)}/Dropout_0"
        if role == "ffn_input":
            return f"{super().path('layer', layer)}/pre_mlp_layer_norm"
        if role == "input":
            return super().path("layer", layer - 1) if layer else f"{self.prefix}/Dropout_0"
        return super().path(role, layer)

    def matrices(self, role: str, layer: int) -> dict[str, tuple[int, int]]:
        """The kernels of the attention or of the FFN."""
        config = self._encoder_config()
        embed, joined = config.embed_dim, config.num_heads * config.head_dim
        if role == "ffn":
            shapes = {name: (embed, config.encoder_mlp) for name in config.mlp_inputs}
            shapes["wo"] = (config.encoder_mlp, embed)
        else:
            shapes = {"key": (embed, joined), "value": (embed, joined)}
            if role == "attention":
                shapes |= {"query": (embed, joined), "out": (joined, embed)}
        part = self.path("ffn" if role == "ffn" else "attention", layer)
        return {f"{part}/{name}": shape for name, shape in shapes.items()}

    def arguments(self, role: str) -> dict[str, str]:
        """The signatures of `EncoderLayer` and `MultiHeadAttention`."""
        if role == "layer":
            return {"h": "stream", "mask": "mask", "bias": "bias", "valid": "valid"}
        return {"query_input": "queries", "key_input": "keys", "mask": "mask", "bias": "bias"}

    def flops(self, layer: int, queries: int, keys: int, ffn_rows: int) -> int:
        """Self-attention and FFN of a layer, for one row."""
        config = self._encoder_config()
        return attention_flops(config, queries, keys) + ffn_flops(config, ffn_rows)

    def _encoder_config(self) -> T5Config:
        if self.causal:  # it has cross-attention and FFNs of another width
            raise ConfigError("Matrices and FLOPs are those of the encoder's stack.")
        assert self.config is not None  # set by `T5.stack`
        return self.config


@dataclasses.dataclass(frozen=True)
class T5:
    """T5 1.0, T5 1.1 and their kin with one configuration; parameters are arguments."""

    config: T5Config

    @property
    def module(self) -> Transformer:
        """The network."""
        return Transformer(self.config)

    def apply(
        self,
        params: dict,
        batch: base.Batch,
        dropout_rng: jax.Array | None = None,
        capture: Collection[str] = (),
    ) -> base.Outputs:
        """One pass over a batch in T5X's names; with dropout where an rng is given."""
        dropout = dropout_rng is not None and self.config.dropout_rate > 0
        outputs, variables = self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch.get("decoder_input_tokens"),
            batch.get("encoder_segment_ids"),
            batch.get("decoder_segment_ids"),
            enable_dropout=dropout,
            method="forward",
            rngs={"dropout": dropout_rng} if dropout else None,
            mutable=[base.INTERMEDIATES],
            capture_intermediates=base.captures(capture),
        )
        return outputs._replace(hidden=outputs.hidden | base.captured(variables))

    def encode(
        self, params: dict, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Encodes `[batch, length]` int tokens: `[batch, length, embed]`."""
        return self.module.apply({"params": params}, tokens, segment_ids, method="encode")

    def generate(
        self,
        params: dict,
        encoded: jax.Array,
        tokens: jax.Array,
        max_length: int,
        num_beams: int = 1,
    ) -> jax.Array:
        """Greedy tokens, or the best of several beams: `[batch, max_length]` int32."""
        if num_beams == 1:
            return greedy_decode(self.module, params, encoded, tokens, max_length)
        return beam_decode(self.module, params, encoded, tokens, max_length, num_beams)

    def masks(self, batch: base.Batch) -> dict[str, base.Mask]:
        """The mask of each stack; token 0 is padding, and starts a decoder."""
        valid = batch["encoder_input_tokens"] > 0
        masks = {"encoder": base.Mask(valid, batch.get("encoder_segment_ids"))}
        if "decoder_loss_weights" in batch:
            segments = batch.get("decoder_segment_ids")
            masks["decoder"] = base.Mask(batch["decoder_loss_weights"], segments)
        return masks

    def stack(self, name: str = "encoder") -> T5Stack:
        """The encoder or the decoder.

        Raises:
          ConfigError: for another name, or the decoder of an encoder alone.
        """
        config = self.config
        layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
        if not layers.get(name):
            raise ConfigError(f"Backbone {config.name!r} has no stack {name!r}.")
        return T5Stack(layers[name], config.embed_dim, name == "decoder", name, config=config)
