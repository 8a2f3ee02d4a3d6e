"""Hugging Face T5 state dicts and our trees: names and transposes. Arrays only, no files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from variator_jax.backbones.t5.config import T5Config
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
    "lm_head.weight": ("decoder/logits_dense/kernel", True),
    "encoder.final_layer_norm.weight": ("encoder/encoder_norm/scale", False),
    "decoder.final_layer_norm.weight": ("decoder/decoder_norm/scale", False),
}
_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d+\.\w+?)\.(?:(\w+)\.)?weight")
_LEAF = re.compile(r"(encoder|decoder)/layers_(\d+)/(\w+)/(?:(\w+)/)?(?:kernel|scale)")
_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# The same table under other names, written by some versions of transformers.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The released T5 1.0 files hold a bias of the cross-attention that no version ever used.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def leaf_of(name: str) -> tuple[str, bool] | None:
    """Our path for a Hugging Face name and whether the matrix is transposed; None for an alias.

    Raises:
      CheckpointError: for a name that no T5 has.
    """
    if name in ALIASES or name == UNUSED:
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
        if name != _BIAS.format(stack):
            raise CheckpointError(
                f"{name!r} is a position bias of a layer's own, as in UMT5; this network shares "
                "that of the first layer, as T5 and mT5 do."
            )
        return f"{stack}/relpos_bias/rel_embedding", True
    return f"{prefix}/{_ATTENTION.get(weight, weight)}/kernel", True


def name_of(path: str) -> str:
    """The Hugging Face name of one of our paths: `leaf_of` backwards."""
    for name, (known, _) in _TOP.items():
        if path == known:
            return name
    if path.endswith("/relpos_bias/rel_embedding"):
        return _BIAS.format(path.partition("/")[0])
    match = _LEAF.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is no path of a T5")
    stack, layer, module, weight = match.groups()
    sublayer = next(hf for hf, ours in _SUBLAYERS[stack].items() if ours == module)
    prefix = f"{stack}.block.{layer}.layer.{sublayer}"
    if weight is None:
        return f"{prefix}.weight"
    letter = next((hf for hf, ours in _ATTENTION.items() if ours == weight), weight)
    return f"{prefix}.{letter}.weight"


def is_transposed(path: str) -> bool:
    """True for our paths whose matrix transformers keeps the other way round."""
    return path.endswith(("/kernel", "/rel_embedding"))


def params_from_state_dict(state: Mapping[str, np.ndarray], config: T5Config) -> dict:
    """Turns a `T5ForConditionalGeneration` or `T5EncoderModel` state dict into our nested tree.

    Raises:
      CheckpointError: for a name that no T5 has.
    """
    tree: dict = {}
    for name, array in state.items():
        leaf = leaf_of(name)
        if leaf is None or (name == "lm_head.weight" and config.logits_via_embedding):
            continue
        path, transpose = leaf
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.ascontiguousarray(array.T) if transpose else np.asarray(array)
    return tree
