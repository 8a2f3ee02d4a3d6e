"""T5 shapes by name, and names by shape; what layers compute is in the files beside this one."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from variator_jax.errors import check_known, check_number, check_whole

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
        sizes = ("vocab_size", "embed_dim", "num_heads", "head_dim", "mlp_dim", "encoder_mlp")
        least = dict.fromkeys((*sizes, "num_encoder_layers"), 1) | {"num_decoder_layers": 0}
        for field, smallest in least.items():
            check_whole(f"T5Config.{field}", getattr(self, field), smallest)
        check_number("DROPOUT_RATE", self.dropout_rate, 1)
        check_known("T5Config.remat is", self.remat, (False, True, "dots"))
        for name in self.mlp_activations:
            check_known("T5Config.mlp_activations has", name, _ACTIVATIONS)
        for field in ("dtype", "param_dtype"):
            check_known(f"T5Config.{field} is", getattr(self, field), _DTYPES)

    @property
    def gated(self) -> bool:
        """True for the gated feed-forward layers of T5 1.1, mT5, ByT5 and Flan-T5."""
        return len(self.mlp_activations) > 1

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """Names of the matrices into a feed-forward layer's hidden units, one per activation."""
        return tuple(f"wi_{i}" for i in range(len(self.mlp_activations))) if self.gated else ("wi",)

    @property
    def encoder_mlp(self) -> int:
        """Width of the encoder's feed-forward layers; the decoder's is `mlp_dim`."""
        return self.mlp_dim if self.encoder_mlp_dim is None else self.encoder_mlp_dim

    @property
    def has_decoder(self) -> bool:
        """False for an encoder-only backbone."""
        return self.num_decoder_layers > 0


# embed_dim, num_heads, head_dim, mlp_dim, num_encoder_layers, num_decoder_layers
_Shapes = dict[str, tuple[int, int, int, int, int, int]]
_T5_1_0: _Shapes = {
    "small": (512, 8, 64, 2048, 6, 6),
    "base": (768, 12, 64, 3072, 12, 12),
    "large": (1024, 16, 64, 4096, 24, 24),
    "3b": (1024, 32, 128, 16384, 24, 24),
    "11b": (1024, 128, 128, 65536, 24, 24),
}
_T5_1_1: _Shapes = {
    "small": (512, 6, 64, 1024, 8, 8),
    "base": (768, 12, 64, 2048, 12, 12),
    "large": (1024, 16, 64, 2816, 24, 24),
    "xl": (2048, 32, 64, 5120, 24, 24),
    "xxl": (4096, 64, 64, 10240, 24, 24),
}
_BYT5: _Shapes = {
    "small": (1472, 6, 64, 3584, 12, 4),
    "base": (1536, 12, 64, 3968, 18, 6),
    "large": (1536, 16, 64, 3840, 36, 12),
    "xl": (2560, 32, 64, 6720, 36, 12),
    "xxl": (4672, 64, 64, 12352, 36, 12),
}
# Our own sizes for machines without an accelerator; 4,224 rows hold the documentation vocabulary.
_OURS: _Shapes = {
    "nano": (128, 4, 32, 320, 3, 1),
    "micro": (192, 6, 32, 512, 6, 2),
    "mini": (256, 4, 64, 704, 8, 4),
}
_PLAIN = {"mlp_activations": ("relu",), "logits_via_embedding": True}
_FAMILIES: dict[str, tuple[_Shapes, int, dict[str, Any]]] = {
    "t5_1_0_": (_T5_1_0, 32128, _PLAIN),
    "t5_1_1_": (_T5_1_1, 32128, {}),
    "flan_t5_": (_T5_1_1, 32128, {}),
    "mt5_": (_T5_1_1, 250112, {}),
    "byt5_": (_BYT5, 384, {}),
    "": (_OURS, 4224, {"relpos_stddev": 1.5}),
}
CONFIGS = {
    family + size: T5Config(family + size, vocab_size, *shape, **settings)
    for family, (shapes, vocab_size, settings) in _FAMILIES.items()
    for size, shape in shapes.items()
}


def get_config(name: str, **overrides: Any) -> T5Config:
    """Returns the named shape, with fields replaced by `overrides`.

    Raises:
      ConfigError: for an unknown name or field, with the nearest known ones.
    """
    check_known("No backbone is named", name, CONFIGS)
    fields = [field.name for field in dataclasses.fields(T5Config)]
    for field in overrides:
        check_known("T5Config has no field", field, fields)
    return dataclasses.replace(CONFIGS[name], **overrides)


_COMPARED = ("embed_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "gated")
_HINTS = ("flan_t5", "mt5", "byt5", "t5_1_0", "t5_1_1")  # a hint is searched in this order


def with_name(config: T5Config, hint: str = "") -> T5Config:
    """The config under the name of the released backbone that has its shape.

    A shape that was never released is called `<family>_custom`; encoders alone end in `_encoder`.

    Args:
      config: any config; its `name` is ignored.
      hint: text that may name a family, such as 'google/flan-t5-base'.
    """
    family = _family(config, hint.lower().replace("-", "_"))
    decoder = ["num_decoder_layers", "logits_via_embedding"] if config.has_decoder else []
    shape_of = operator.attrgetter(*_COMPARED, *decoder)
    same = [name for name, known in CONFIGS.items() if shape_of(known) == shape_of(config)]
    # T5 1.1, Flan-T5 and mT5 share their shapes: the vocabulary decides, then the hint.
    same.sort(key=lambda name: not name.startswith(family))
    same.sort(key=lambda name: abs(CONFIGS[name].vocab_size - config.vocab_size))
    name = next(iter(same), f"{family}_custom")
    return dataclasses.replace(config, name=name if config.has_decoder else f"{name}_encoder")


def _family(config: T5Config, hint: str) -> str:
    if hinted := [family for family in _HINTS if family in hint]:
        return hinted[0]
    if not config.gated:
        return "t5_1_0"
    if config.vocab_size > 200_000:
        return "mt5"
    return "byt5" if config.vocab_size in (256, 259, 384) else "t5_1_1"
