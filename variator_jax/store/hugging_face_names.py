"""The names of a T5's weights in transformers, and our paths for them."""

from __future__ import annotations

import re

from variator_jax.errors import CheckpointError

_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_SUBLAYERS = {
    "encoder": {
        "0.SelfAttention": "attention",
        "0.layer_norm": "pre_attention_layer_norm",
        "1.DenseReluDense": "mlp",
        "1.layer_norm": "pre_mlp_layer_norm",
    },
    "decoder": {
        "0.SelfAttention": "self_attention",
        "0.layer_norm": "pre_self_attention_layer_norm",
        "1.EncDecAttention": "encoder_decoder_attention",
        "1.layer_norm": "pre_cross_attention_layer_norm",
        "2.DenseReluDense": "mlp",
        "2.layer_norm": "pre_mlp_layer_norm",
    },
}
EMBEDDING, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"
_TOP = {
    "shared.weight": EMBEDDING,
    "lm_head.weight": HEAD,
    "encoder.final_layer_norm.weight": "encoder/encoder_norm/scale",
    "decoder.final_layer_norm.weight": "decoder/decoder_norm/scale",
}
_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d+\.\w+?)\.(?:(\w+)\.)?weight")
_LEAF = re.compile(r"(encoder|decoder)/layers_(\d+)/(\w+)/(?:(\w+)/)?(?:kernel|scale)")
_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# The embedding under other names, written by some versions of transformers.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The released T5 1.0 files hold a bias of the cross-attention that no version ever used.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def path_of(name: str) -> str | None:
    """Our path for a Hugging Face name, None for an alias.

    Raises:
      CheckpointError: for a name that no T5 has.
    """
    if name in ALIASES or name == UNUSED:
        return None
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[3] not in _SUBLAYERS[match[1]]:
        raise CheckpointError(f"{name!r} is not the name of a T5 weight in transformers.")
    stack, layer, sublayer, weight = match.groups()
    prefix = f"{stack}/layers_{layer}/{_SUBLAYERS[stack][sublayer]}"
    if weight is None:
        return f"{prefix}/scale"
    if weight == "relative_attention_bias":
        if name != _BIAS.format(stack):
            raise CheckpointError(f"{name!r} is a layer's own position bias, as only UMT5 has it.")
        return f"{stack}/relpos_bias/rel_embedding"
    return f"{prefix}/{_ATTENTION.get(weight, weight)}/kernel"


def name_of(path: str) -> str:
    """The Hugging Face name of one of our paths: the inverse of `path_of`."""
    for name, known in _TOP.items():
        if path == known:
            return name
    if path.endswith("/relpos_bias/rel_embedding"):
        return _BIAS.format(path.partition("/")[0])
    match = _LEAF.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is not a path of a T5")
    stack, layer, module, weight = match.groups()
    sublayer = next(theirs for theirs, ours in _SUBLAYERS[stack].items() if ours == module)
    letter = next((theirs for theirs, ours in _ATTENTION.items() if ours == weight), weight)
    inner = "" if weight is None else f"{letter}."
    return f"{stack}.block.{layer}.layer.{sublayer}.{inner}weight"


def is_transposed(path: str) -> bool:
    """True for our paths whose matrix transformers keeps transposed."""
    return path.endswith(("/kernel", "/rel_embedding"))
