"""The three forms of T5X's parameter tree and ours: scanned layers, 3-D kernels, shared biases.

`t5x/examples/t5` keeps 2-D kernels in `layers_i` and one position bias a stack: ours is the same.
`t5x/examples/scalable_t5` keeps heads apart (3-D kernels) and a position bias in every layer; with
scanned layers, all of a stack's layers are one array, stacked along axis 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from variator_jax.backbones.t5 import T5Config
from variator_jax.backbones.t5.config import with_name
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.store.source import Leaf, Source

_BIAS = "relpos_bias/rel_embedding"
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
_HEAD = "decoder/logits_dense/kernel"
_AXIS = 1  # of the layers, T5Config.param_scan_axis in T5X


class Sliced(NamedTuple):
    """An array in a checkpoint, read by parts: `read(index)` with numpy's basic indices."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], np.ndarray]


def to_leaves(origin: str, target: Mapping[str, Sliced]) -> list[Leaf]:
    """Our leaves of a tree in any of the forms.

    Raises:
      CheckpointError: if position biases differ between layers, or the arrays have odd shapes.
    """
    leaves: list[Leaf] = []
    biases: dict[str, list[Leaf]] = {}
    for name, array in target.items():
        for path, index in _paths(origin, name, array):
            leaf = _leaf(name, path, array, index)
            if _LAYER.fullmatch(path) and path.endswith(f"/{_BIAS}"):
                biases.setdefault(path.partition("/")[0], []).append(leaf)
            else:
                leaves.append(leaf)
    return leaves + [_shared_bias(origin, stack, tables) for stack, tables in biases.items()]


def _paths(origin: str, name: str, array: Sliced) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Our paths for an array, with the index of each in it: several where layers are scanned."""
    match = _SCANNED.fullmatch(name)
    if match is None:
        yield name, ()
        return
    if len(array.shape) < 2:
        raise CheckpointError(f"{origin}: {name} has shape {array.shape} and no axis of layers.")
    for i in range(array.shape[_AXIS]):
        yield f"{match[1]}/layers_{i}/{match[2]}", (slice(None), i)


def _leaf(name: str, path: str, array: Sliced, index: tuple[Any, ...]) -> Leaf:
    shape = array.shape if not index else array.shape[:_AXIS] + array.shape[_AXIS + 1 :]
    if len(shape) == 3 and path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        shape = (shape[0], shape[1] * shape[2])  # [embed, heads, kv]
    elif len(shape) == 3 and path.endswith("out/kernel"):
        shape = (shape[0] * shape[1], shape[2])  # [heads, kv, embed]

    def read() -> np.ndarray:
        return np.asarray(array.read(index), order="C").reshape(shape)

    return Leaf(path, name, shape, array.dtype, read)


def _shared_bias(origin: str, stack: str, leaves: list[Leaf]) -> Leaf:
    first, *others = leaves
    table = first.read()
    for other in others:
        if other.shape != first.shape or not np.array_equal(other.read(), table):
            raise CheckpointError(
                f"{origin}: the position bias {other.path} differs from {first.path}; this network "
                "shares one among all layers, as T5 does."
            )
    return Leaf(f"{stack}/{_BIAS}", first.name, table.shape, table.dtype, lambda: table)


def deduce_config(origin: str, leaves: Iterable[Leaf]) -> T5Config:
    """The shape of a backbone by its leaves, whose files hold no settings.

    One feed-forward input is T5 1.0's relu, two are T5 1.1's gated gelu.

    Raises:
      CheckpointError: if a leaf that the shape depends on is missing or odd.
    """
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    gated = "encoder/layers_0/mlp/wi_0/kernel" in shapes
    sizes = []
    for path in (
        "token_embedder/embedding",  # [vocab, embed]
        f"encoder/{_BIAS}",  # [heads, buckets]
        "encoder/layers_0/attention/query/kernel",  # [embed, heads * kv]
        f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel",  # [embed, mlp]
    ):
        shape = shapes.get(path)
        if shape is None or len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{origin} is not a T5: {path} is missing or has shape {shape}.")
        sizes.append(shape)
    (vocab, embed), (heads, _), (_, joined), (_, mlp) = sizes
    if joined % heads:
        raise CheckpointError(f"{origin}: {joined} query columns do not divide by {heads} heads.")
    depth = {stack: _depth(origin, stack, shapes) for stack in ("encoder", "decoder")}
    try:
        config = T5Config(
            name="t5",
            vocab_size=vocab,
            embed_dim=embed,
            num_heads=heads,
            head_dim=joined // heads,
            mlp_dim=mlp,
            num_encoder_layers=depth["encoder"],
            num_decoder_layers=depth["decoder"],
            mlp_activations=("gelu", "linear") if gated else ("relu",),
            logits_via_embedding=_HEAD not in shapes if depth["decoder"] else not gated,
        )
    except ConfigError as error:
        raise CheckpointError(f"{origin} has no usable shape: {error}") from error
    return with_name(config, origin)


def _depth(origin: str, stack: str, paths: Iterable[str]) -> int:
    matches = (_LAYER.fullmatch(path) for path in paths)
    layers = {int(match[2]) for match in matches if match and match[1] == stack}
    gaps = set(range(len(layers))) - layers
    if gaps:
        raise CheckpointError(f"{origin} is missing {stack}/layers_{min(gaps)}.")
    return len(layers)


def check_deducible(source: Source) -> None:
    """Refuses a backbone whose settings `deduce_config` would not deduce from its leaves.

    Raises:
      CheckpointError: naming the setting.
    """
    config = source.config
    deduced = deduce_config(f"backbone {config.name}", source.leaves)
    settings = ["mlp_activations", "layer_norm_epsilon", "mlp_dim"]
    for name in settings + ["logits_via_embedding"] * config.has_decoder:
        ours, theirs = getattr(config, name), getattr(deduced, name)
        if ours != theirs:
            raise CheckpointError(
                f"Backbone {config.name!r} has {name} {ours}. A T5X checkpoint holds no settings, "
                f"and this one would be read as having {theirs}. Write another format."
            )
