"""Hugging Face T5 state dicts and our trees: names and transposes. Arrays only, no files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from variator_jax.backbone.config import T5Config
from variator_jax.errors import CheckpointError

_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_ENCODER_SUBLAYERS = {
    "0.SelfAttention": "attention",
    "0.layer_norm": "pre_attention_layer_norm",
    "1.DenseReluDense": "mlp",
    "1.layer_norm": "pre_mlp_layer_norm",
}
_DECODER_SUBLAYERS = {
    "0.SelfAttention": "self_attention",
    "0.layer_norm": "pre_self_attention_layer_norm",
    "1.EncDecAttention": "encoder_decoder_attention",
    "1.layer_norm": "pre_cross_attention_layer_norm",
    "2.DenseReluDense": "mlp",
    "2.layer_norm": "pre_mlp_layer_norm",
}
_SUBLAYERS = {"encoder": _ENCODER_SUBLAYERS, "decoder": _DECODER_SUBLAYERS}
_TOP = {
    "shared.weight": ("token_embedder/embedding", False),
    "lm_head.weight": ("logits_dense/kernel", True),
    "encoder.final_layer_norm.weight": ("encoder/encoder_norm/scale", False),
    "decoder.final_layer_norm.weight": ("decoder/decoder_norm/scale", False),
}
_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d+\.\w+?)\.(?:(\w+)\.)?weight")
# The same table under other names, written by some versions of transformers.
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def leaf_of(name: str) -> tuple[str, bool] | None:
    """Our path for a Hugging Face name and whether the matrix is transposed; None for an alias.

    Raises:
      CheckpointError: for a name that no T5 has.
    """
    if name in _ALIASES:
        return None
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match.group(3) not in _SUBLAYERS[match.group(1)]:
        raise CheckpointError(f"{name!r} is not the name of a T5 weight in transformers.")
    stack, layer, sublayer, weight = match.groups()
    prefix = f"{stack}/layers_{layer}/{_SUBLAYERS[stack][sublayer]}"
    if weight is None:
        return f"{prefix}/scale", False
    if weight == "relative_attention_bias":
        return f"{stack}/relpos_bias/rel_embedding", True
    return f"{prefix}/{_ATTENTION.get(weight, weight)}/kernel", True


def params_from_state_dict(state: Mapping[str, np.ndarray], config: T5Config) -> dict:
    """Turns a `T5ForConditionalGeneration` or `T5EncoderModel` state dict into our nested tree.

    Raises:
      CheckpointError: for a name that no T5 has.
    """
    tree: dict = {}
    for name, array in state.items():
        leaf = leaf_of(name)
        if leaf is None or (leaf[0] == "logits_dense/kernel" and config.logits_via_embedding):
            continue
        path, transpose = leaf
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.ascontiguousarray(array.T) if transpose else np.asarray(array)
    return tree
