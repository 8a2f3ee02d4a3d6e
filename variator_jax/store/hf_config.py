"""A Hugging Face `config.json` and a `T5Config`: which of theirs is which of ours, both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from variator_jax.backbones.t5 import T5Config
from variator_jax.backbones.t5.attention import MAX_DISTANCE, NUM_BUCKETS
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.store.names import with_name

_LARGEST = 1 << 24  # no dimension of a T5 comes near it; a damaged number does
_REFUSED = {
    "umt5": "UMT5 has a position bias in every layer, this network one a stack, as T5 and mT5",
    "longt5": "LongT5 attends locally, which this network does not",
    "switch_transformers": "Switch Transformers have experts, which this network does not",
    "t5gemma": "T5Gemma is a Gemma inside",
    "t5gemma2": "T5Gemma 2 is a Gemma inside",
    "pix2struct_text_model": "Pix2Struct reads images",
    "udop": "UDOP reads images",
}
_ENCODERS = ("T5EncoderModel", "MT5EncoderModel")
_ARCHITECTURES = (
    *_ENCODERS,
    "T5ForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "T5WithLMHeadModel",
    "T5Model",
    "MT5Model",
)
# T5X's 'gelu' is the tanh approximation, which transformers calls 'gelu_new'; but for T5's own
# 'gated-gelu', which it reads as that, its 'gelu' is the exact one.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "silu": "silu",
    "swish": "silu",
}
# Data and decoding have these built in.
_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
# transformers' own; a `T5Config` that was loaded has none, for training brings its own.
_DROPOUT_RATE = 0.1
_THEIRS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu"}


@dataclasses.dataclass(frozen=True)
class Description:
    """What a `config.json` says: the shape, and how logits come about."""

    config: T5Config
    scaled_logits: bool  # by 1 / sqrt(embed), as T5 1.0 does
    tied: bool  # whether a missing output matrix is the embedding


def parse(where: str, content: Mapping[str, Any], vocab_size: int) -> Description:
    """Reads a config, as transformers does.

    Args:
      where: the file, for messages.
      content: the parsed JSON.
      vocab_size: rows of the embedding; configs of resized models may say something else.

    Raises:
      CheckpointError: for another model than a T5, or settings that this network does not have.
    """
    kind = content.get("model_type", "t5")
    if kind in _REFUSED:
        raise CheckpointError(f"{where} describes a {kind!r} model: {_REFUSED[kind]}.")
    if kind not in ("t5", "mt5"):
        raise CheckpointError(f"{where} describes a {kind!r} model; expected 't5' or 'mt5'.")
    get = _Getter(where, content)
    if get.number("relative_attention_num_buckets", NUM_BUCKETS) != NUM_BUCKETS:
        raise CheckpointError(f"{where} has not {NUM_BUCKETS} relative_attention_num_buckets.")
    if get.number("relative_attention_max_distance", MAX_DISTANCE) != MAX_DISTANCE:
        raise CheckpointError(f"{where} has a relative_attention_max_distance not {MAX_DISTANCE}.")
    for key, expected in _TOKENS.items():
        if content.get(key) not in (None, expected):
            raise CheckpointError(f"{where} has {key} {content[key]!r}; expected {expected}.")
    layers = get.number("num_layers")
    decoder_layers = layers
    if content.get("num_decoder_layers") is not None:
        decoder_layers = get.number("num_decoder_layers")
    said_tied = content.get("tie_word_embeddings") is not False
    # transformers 5 calls every config tied and keeps the scaling apart; it never scales an mT5.
    scaled = kind == "t5" and content.get("scale_decoder_outputs", said_tied) is not False
    try:
        config = T5Config(
            name="t5",
            vocab_size=vocab_size,
            embed_dim=get.number("d_model"),
            num_heads=get.number("num_heads"),
            head_dim=get.number("d_kv"),
            mlp_dim=get.number("d_ff"),
            num_encoder_layers=layers,
            num_decoder_layers=0 if _is_encoder(where, content) else decoder_layers,
            mlp_activations=_activations(where, content, kind),
            logits_via_embedding=scaled,
            layer_norm_epsilon=get.fraction("layer_norm_epsilon", 1e-6),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where} has no usable config: {error}") from error
    hint = f"{kind if kind == 'mt5' else ''} {content.get('_name_or_path', '')}"
    return Description(with_name(config, hint), scaled, said_tied)


def render(config: T5Config) -> dict[str, Any]:
    """The `config.json` of a backbone.

    Raises:
      CheckpointError: for activations that transformers' T5 does not have, or an encoder whose
        feed-forward layers are not as wide as the decoder's.
    """
    gated = config.gated
    first, *rest = config.mlp_activations
    if first not in _THEIRS or (gated and rest != ["linear"]):
        raise CheckpointError(
            f"transformers' T5 has no feed-forward layer {tuple(config.mlp_activations)}."
        )
    act = _THEIRS[first]
    if config.has_decoder and config.encoder_mlp != config.mlp_dim:
        raise CheckpointError(
            f"Backbone {config.name!r} has feed-forward layers of {config.encoder_mlp} units in "
            f"the encoder and {config.mlp_dim} in the decoder; transformers' T5 knows one d_ff."
        )
    family = "MT5" if config.name.startswith("mt5") and not config.logits_via_embedding else "T5"
    head = "ForConditionalGeneration" if config.has_decoder else "EncoderModel"
    scaled = config.logits_via_embedding
    return {
        "architectures": [family + head],
        "model_type": family.lower(),
        "_name_or_path": config.name,
        "d_model": config.embed_dim,
        "d_kv": config.head_dim,
        "d_ff": config.encoder_mlp,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers or config.num_encoder_layers,
        "vocab_size": config.vocab_size,
        "feed_forward_proj": f"gated-{'gelu' if first == 'gelu' else act}" if gated else act,
        "dense_act_fn": act,
        "is_gated_act": gated,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": config.dropout_rate or _DROPOUT_RATE,
        "relative_attention_num_buckets": NUM_BUCKETS,
        "relative_attention_max_distance": MAX_DISTANCE,
        "tie_word_embeddings": scaled,
        "scale_decoder_outputs": scaled,
        "is_encoder_decoder": config.has_decoder,
        "use_cache": config.has_decoder,
        "initializer_factor": 1.0,
        **_TOKENS,
        "dtype": config.param_dtype,
        "torch_dtype": config.param_dtype,
    }


def _is_encoder(where: str, content: Mapping[str, Any]) -> bool:
    """Whether the folder holds an encoder alone."""
    named = content.get("architectures") or ["T5ForConditionalGeneration"]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise CheckpointError(f"{where} has no proper architectures: {named!r}.")
    if named[0] not in _ARCHITECTURES:
        raise CheckpointError(
            f"{where} describes a {named[0]}; expected a T5ForConditionalGeneration or a "
            "T5EncoderModel."
        )
    return named[0] in _ENCODERS


def _activations(where: str, content: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    default = "gated-gelu" if kind == "mt5" else "relu"
    said = content.get("feed_forward_proj") or default
    match = re.fullmatch(r"(gated-)?(\w+)", said) if isinstance(said, str) else None
    if match is None:
        raise CheckpointError(f"{where} has feed_forward_proj {said!r}, which is not known.")
    act = "gelu_new" if said == "gated-gelu" else match.group(2)
    if act not in _ACTIVATIONS or content.get("dense_act_fn") not in (None, act):
        raise CheckpointError(
            f"{where} has feed_forward_proj {said!r} with activation "
            f"{content.get('dense_act_fn', act)!r}; known are relu, gelu_new, silu, and the gated "
            "ones gated-gelu, gated-silu, gated-relu."
        )
    return (_ACTIVATIONS[act], "linear") if match.group(1) else (_ACTIVATIONS[act],)


class _Getter:
    """Numbers of a config, checked."""

    def __init__(self, where: str, content: Mapping[str, Any]) -> None:
        self._where, self._content = where, content

    def number(self, key: str, default: int | None = None) -> int:
        found = self._content.get(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= _LARGEST:
            raise CheckpointError(f"{self._where} has no usable {key}: found {found!r}.")
        return found

    def fraction(self, key: str, default: float) -> float:
        found = self._content.get(key, default)
        if not isinstance(found, float) or not 0 < found < 1:
            raise CheckpointError(f"{self._where} has no usable {key}: found {found!r}.")
        return found
