"""T5 shapes by name. What a layer computes is in `layers.py`, `attention.py`, `network.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from variator_jax.errors import ConfigError, did_you_mean

_ACTIVATIONS = ("relu", "gelu", "silu", "linear")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5 backbone. `num_decoder_layers=0` is an encoder without a decoder.

    `mlp_activations` follows T5X: one name is a plain feed-forward layer (T5 1.0), two are a gated
    one (T5 1.1). `dtype` is that of activations and matrix products, `param_dtype` that of fresh
    parameters; norms, softmax and logits always run in float32. `relpos_stddev` is that
    of a fresh relative position bias. T5X's heads start out seeing all distances nearly alike; with
    a wide one a small backbone learns word order in hundreds of steps instead of thousands.
    `remat` is what a layer keeps for the backward pass: False everything, True nothing but its
    input, 'dots' the results of its products with weights. `encoder_mlp_dim` is the width of the
    encoder's feed-forward layers where it is not that of the decoder's, as in a narrower student.
    """

    name: str
    vocab_size: int
    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: Sequence[str] = ("gelu", "linear")
    logits_via_embedding: bool = False
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool | str = False
    layer_norm_epsilon: float = 1e-6
    relpos_stddev: float = 0.2
    encoder_mlp_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for field in ("vocab_size", "embed_dim", "num_heads", "head_dim", "mlp_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"T5Config.{field} is {getattr(self, field)}; it must be positive."
                )
        if self.encoder_mlp < 1:
            raise ConfigError(
                f"T5Config.encoder_mlp_dim is {self.encoder_mlp_dim}; it must be positive, or None "
                "for mlp_dim."
            )
        if self.num_encoder_layers < 1 or self.num_decoder_layers < 0:
            raise ConfigError(
                f"T5Config needs an encoder layer or more and no negative decoder layers; "
                f"found {self.num_encoder_layers} and {self.num_decoder_layers}."
            )
        if self.remat not in (False, True, "dots"):
            raise ConfigError(f"T5Config.remat is {self.remat!r}; it is False, True or 'dots'.")
        for activation in self.mlp_activations:
            if activation not in _ACTIVATIONS:
                raise ConfigError(
                    f"T5Config.mlp_activations holds {activation!r}; known are {_ACTIVATIONS}."
                    f"{did_you_mean(activation, _ACTIVATIONS)}"
                )
        for dtype in (self.dtype, self.param_dtype):
            if dtype not in _DTYPES:
                raise ConfigError(f"T5Config has dtype {dtype!r}; known are {_DTYPES}.")

    @property
    def gated(self) -> bool:
        """True for the gated feed-forward layers of T5 1.1, mT5, ByT5 and Flan-T5."""
        return len(self.mlp_activations) > 1

    @property
    def encoder_mlp(self) -> int:
        """Width of the encoder's feed-forward layers; the decoder's is `mlp_dim`."""
        return self.mlp_dim if self.encoder_mlp_dim is None else self.encoder_mlp_dim

    @property
    def has_decoder(self) -> bool:
        """False for an encoder-only backbone."""
        return self.num_decoder_layers > 0


def _t5(embed: int, heads: int, head_dim: int, mlp: int, layers: int | tuple[int, int]) -> dict:
    encoder, decoder = layers if isinstance(layers, tuple) else (layers, layers)
    return dict(
        embed_dim=embed,
        num_heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
    )


_T5_1_0 = {
    "small": _t5(512, 8, 64, 2048, 6),
    "base": _t5(768, 12, 64, 3072, 12),
    "large": _t5(1024, 16, 64, 4096, 24),
    "3b": _t5(1024, 32, 128, 16384, 24),
    "11b": _t5(1024, 128, 128, 65536, 24),
}
_T5_1_1 = {
    "small": _t5(512, 6, 64, 1024, 8),
    "base": _t5(768, 12, 64, 2048, 12),
    "large": _t5(1024, 16, 64, 2816, 24),
    "xl": _t5(2048, 32, 64, 5120, 24),
    "xxl": _t5(4096, 64, 64, 10240, 24),
}
_BYT5 = {
    "small": _t5(1472, 6, 64, 3584, (12, 4)),
    "base": _t5(1536, 12, 64, 3968, (18, 6)),
    "large": _t5(1536, 16, 64, 3840, (36, 12)),
    "xl": _t5(2560, 32, 64, 6720, (36, 12)),
    "xxl": _t5(4672, 64, 64, 12352, (36, 12)),
}
# Our own sizes for machines without an accelerator; 4,224 rows hold the documentation vocabulary.
_OURS = {
    "nano": _t5(128, 4, 32, 320, (3, 1)),
    "micro": _t5(192, 6, 32, 512, (6, 2)),
    "mini": _t5(256, 4, 64, 704, (8, 4)),
}


def _registry() -> dict[str, T5Config]:
    plain = dict(mlp_activations=("relu",), logits_via_embedding=True)
    families: list[tuple[str, dict[str, dict], int, dict[str, Any]]] = [
        ("t5_1_0_", _T5_1_0, 32128, plain),
        ("t5_1_1_", _T5_1_1, 32128, {}),
        ("flan_t5_", _T5_1_1, 32128, {}),
        ("mt5_", _T5_1_1, 250112, {}),
        ("byt5_", _BYT5, 384, {}),
        ("", _OURS, 4224, {"relpos_stddev": 1.5}),
    ]
    return {
        prefix + size: T5Config(name=prefix + size, vocab_size=vocab, **shape, **extra)
        for prefix, sizes, vocab, extra in families
        for size, shape in sizes.items()
    }


CONFIGS = _registry()


def get_config(name: str, **overrides: Any) -> T5Config:
    """Returns the named shape, with fields replaced by `overrides`.

    Raises:
      ConfigError: for an unknown name or field, with the nearest known ones.
    """
    if name not in CONFIGS:
        raise ConfigError(
            f"No backbone is named {name!r}.{did_you_mean(name, CONFIGS)} "
            f"Known: {', '.join(CONFIGS)}."
        )
    fields = [field.name for field in dataclasses.fields(T5Config)]
    for field in overrides:
        if field not in fields:
            raise ConfigError(f"T5Config has no field {field!r}.{did_you_mean(field, fields)}")
    return dataclasses.replace(CONFIGS[name], **overrides)
