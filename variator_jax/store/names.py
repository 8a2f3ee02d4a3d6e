"""The name of a backbone by its shape: what its files do not say, and people want to read."""

from __future__ import annotations

import dataclasses

from variator_jax.backbones.t5 import CONFIGS, T5Config

_COMPARED = ("embed_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "gated")
_FAMILIES = ("flan_t5", "mt5", "byt5", "t5_1_0", "t5_1_1")  # a hint is looked through in this order


def with_name(config: T5Config, hint: str = "") -> T5Config:
    """The config under the name of the released backbone that has its shape.

    A shape that nobody released is called `<family>_custom`; encoders alone end in `_encoder`.

    Args:
      config: any shape; its own name is of no account.
      hint: text that may speak of a family, such as 'google/flan-t5-base'.
    """
    family = _family(config, hint.lower().replace("-", "_"))
    same = [name for name, known in CONFIGS.items() if _same_shape(config, known)]
    # T5 1.1, Flan-T5 and mT5 share their shapes: the vocabulary decides, then what was said.
    ranked = sorted(
        same,
        key=lambda name: (
            abs(CONFIGS[name].vocab_size - config.vocab_size),
            not name.startswith(family),
        ),
    )
    name = ranked[0] if ranked else f"{family}_custom"
    return dataclasses.replace(config, name=name if config.has_decoder else f"{name}_encoder")


def _same_shape(config: T5Config, known: T5Config) -> bool:
    if config.has_decoder:
        if config.num_decoder_layers != known.num_decoder_layers:
            return False
        if config.logits_via_embedding != known.logits_via_embedding:
            return False
    return all(getattr(config, field) == getattr(known, field) for field in _COMPARED)


def _family(config: T5Config, hint: str) -> str:
    for family in _FAMILIES:
        if family in hint:
            return family
    if not config.gated:
        return "t5_1_0"
    if config.vocab_size > 200_000:
        return "mt5"
    return "byt5" if config.vocab_size in (256, 259, 384) else "t5_1_1"
