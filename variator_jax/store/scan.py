"""The three forms of T5X's parameter tree and ours: scanned layers, 3-D kernels, shared biases.

`t5x/examples/t5` keeps 2-D kernels in `layers_i` and one position bias a stack: ours is the same.
`t5x/examples/scalable_t5` keeps heads apart (3-D kernels) and a position bias in every layer; with
scanned layers, all of a stack's layers are one array, stacked along axis 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.store.names import with_name
from variator_jax.store.stores import StoredArray
from variator_jax.store.stream import Leaf

_BIAS = "relpos_bias/rel_embedding"
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
_HEAD = "decoder/logits_dense/kernel"
_AXIS = 1  # of the layers, T5Config.param_scan_axis in T5X


class Place(NamedTuple):
    """Where a scanned tree keeps one of our leaves."""

    path: str
    layer: tuple[Any, ...] | None  # its index; None for an array of its own
    shape: tuple[int, ...]  # of the layer


def to_leaves(where: str, target: Mapping[str, StoredArray]) -> list[Leaf]:
    """Our leaves of a tree in any of the forms.

    Raises:
      CheckpointError: if position biases differ between layers, or the arrays have odd shapes.
    """
    leaves: list[Leaf] = []
    biases: dict[str, dict[int, tuple[str, np.ndarray]]] = {}
    for path, array in target.items():
        for i, rest, index in _layers(where, path, array):
            if i is not None and rest.endswith(f"/{_BIAS}"):
                stack = rest.partition("/")[0]
                biases.setdefault(stack, {})[i] = (path, array.read(index))
            else:
                ours = rest if i is None else re.sub("/", f"/layers_{i}/", rest, count=1)
                leaves.append(_leaf(path, ours, array, index))
    return leaves + [_shared_bias(where, stack, found) for stack, found in biases.items()]


def _layers(
    where: str, path: str, array: StoredArray
) -> Iterator[tuple[int | None, str, tuple[Any, ...]]]:
    """(layer or None, path without the layer, index of that layer in the array)."""
    if match := _SCANNED.fullmatch(path):
        if len(array.shape) < 2:
            raise CheckpointError(f"{where}: {path} has shape {array.shape} and no axis of layers.")
        for i in range(array.shape[_AXIS]):
            yield i, f"{match[1]}/{match[2]}", (slice(None), i)
    elif match := _LAYER.fullmatch(path):
        yield int(match[2]), f"{match[1]}/{match[3]}", ()
    else:
        yield None, path, ()


def _leaf(origin: str, path: str, array: StoredArray, index: tuple[Any, ...]) -> Leaf:
    shape = array.shape if not index else array.shape[:_AXIS] + array.shape[_AXIS + 1 :]
    if len(shape) == 3 and path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        shape = (shape[0], shape[1] * shape[2])  # [embed, heads, kv]
    elif len(shape) == 3 and path.endswith("out/kernel"):
        shape = (shape[0] * shape[1], shape[2])  # [heads, kv, embed]
    final = shape

    def read() -> np.ndarray:
        return np.ascontiguousarray(array.read(index)).reshape(final)

    return Leaf(path, final, array.dtype, read, origin)


def _shared_bias(where: str, stack: str, found: dict[int, tuple[str, np.ndarray]]) -> Leaf:
    first, (origin, table) = min(found.items())
    for i, (path, other) in sorted(found.items()):
        if other.shape != table.shape or not np.array_equal(other, table):
            raise CheckpointError(
                f"{where}: the position bias of {stack} layer {i} ({path}) differs from that of "
                f"layer {first}; this network shares one among all layers, as T5 does."
            )
    table = np.ascontiguousarray(table)
    return Leaf(f"{stack}/{_BIAS}", table.shape, table.dtype, lambda: table, origin)


def deduce_config(where: str, leaves: list[Leaf]) -> T5Config:
    """The shape of a backbone by its leaves, whose files hold no settings.

    One feed-forward input is T5 1.0's relu, two are T5 1.1's gated gelu.

    Raises:
      CheckpointError: if a leaf that tells the shape is missing or odd.
    """
    shapes = {leaf.path: leaf.shape for leaf in leaves}

    def shape(path: str) -> tuple[int, int]:
        found = shapes.get(path)
        if found is None or len(found) != 2 or 0 in found:
            raise CheckpointError(
                f"{where} is no T5: it has {'no' if found is None else f'a {found}'} {path}."
            )
        return found

    vocab, embed = shape("token_embedder/embedding")
    heads, _ = shape(f"encoder/{_BIAS}")
    _, joined = shape("encoder/layers_0/attention/query/kernel")
    if joined % heads:
        raise CheckpointError(f"{where}: {joined} query columns do not divide by {heads} heads.")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in shapes
    _, mlp = shape(f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")
    numbers: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for path in shapes:
        if match := _LAYER.fullmatch(path):
            numbers[match[1]].append(int(match[2]))
    depth = {stack: len(set(found)) for stack, found in numbers.items()}
    for stack, found in numbers.items():
        if set(found) != set(range(depth[stack])):
            lacks = next(i for i in range(len(found) + 1) if i not in found)
            raise CheckpointError(f"{where} lacks {stack}/layers_{lacks}.")
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
        raise CheckpointError(f"{where} has no usable shape: {error}") from error
    return with_name(config, where)


def place(config: T5Config, path: str, shape: tuple[int, ...], scan: bool) -> Place:
    """Where T5X keeps one of our leaves, in `t5`'s form or the scanned one of `scalable_t5`."""
    if scan and path != _HEAD:
        return _scanned_place(config, path, shape)
    return Place(path, None, shape)


def _scanned_place(config: T5Config, path: str, shape: tuple[int, ...]) -> Place:
    if path.endswith(f"/{_BIAS}"):
        stack = path.partition("/")[0]
        # One for every layer, all the same: [heads, 1, buckets] fills them.
        return Place(f"{stack}/{stack}/{_BIAS}", (slice(None), slice(None)), shape)
    match = _LAYER.fullmatch(path)
    if match is None:
        return Place(path, None, shape)
    stack, layer, rest = match.groups()
    heads, kv = config.num_heads, config.head_dim
    if rest.endswith(("query/kernel", "key/kernel", "value/kernel")):
        shape = (shape[0], heads, kv)
    elif rest.endswith("out/kernel"):
        shape = (heads, kv, shape[1])
    return Place(f"{stack}/{stack}/{rest}", (slice(None), int(layer)), shape)
