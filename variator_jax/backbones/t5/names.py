"""The name of a backbone by its shape: its files do not hold it, and people want to read it."""

from __future__ import annotations

import dataclasses

from variator_jax.backbones.t5.config import CONFIGS, T5Config

_COMPARED = ("embed_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "gated")
_FAMILIES = ("flan_t5", "mt5", "byt5", "t5_1_0", "t5_1_1")  # a hint is searched in this order


def with_name(config: T5Config, hint: str = "") -> T5Config:
    """The config under the name of the released backbone that has its shape.

    A shape that was never released is called `<family>_custom`; encoders alone end in `_encoder`.

    Args:
      config: any config; its `name` is ignored.
      hint: text that may name a family, such as 'google/flan-t5-base'.
    """
    family = _family(config, hint.lower().replace("-", "_"))
    compared = [*_COMPARED]
    if config.has_decoder:
        compared += ["num_decoder_layers", "logits_via_embedding"]
    same = [
        name
        for name, known in CONFIGS.items()
        if all(getattr(config, field) == getattr(known, field) for field in compared)
    ]
    # T5 1.1, Flan-T5 and mT5 share their shapes: the vocabulary decides, then the hint.
    same.sort(
        key=lambda name: (
            abs(CONFIGS[name].vocab_size - config.vocab_size),
            not name.startswith(family),
        )
    )
    name = same[0] if same else f"{family}_custom"
    return dataclasses.replace(config, name=name if config.has_decoder else f"{name}_encoder")


def _family(config: T5Config, hint: str) -> str:
    for family in _FAMILIES:
        if family in hint:
            return family
    if not config.gated:
        return "t5_1_0"
    if config.vocab_size > 200_000:
        return "mt5"
    return "byt5" if config.vocab_size in (256, 259, 384) else "t5_1_1"
