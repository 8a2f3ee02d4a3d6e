"""Times encoder passes: every ratio, the peers and a large matrix product in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.bench import memory
from variator_jax.bench.latency import (
    Clock,
    bound,
    encoder_call,
    encoder_shapes,
    interleaved_seconds,
    random_params,
    random_tokens,
)
from variator_jax.bench.results import EncoderResult, MatrixPeak, PeerRow, RatioRow
from variator_jax.bench.settings import Shape
from variator_jax.plugin import (
    PluginConfig,
    PluginVariables,
    flops_allowed_speedup,
    init_plugin,
    stack_flops,
)

# What a peer is: (backbone's shape, tokens) -> (name, its call, or why there is none) of each.
Peer = tuple[str, Callable[[], object] | None, str]
StartPeers = Callable[[T5Config, Any], Sequence[Peer]]
_PEAK = "matrix peak"


def bench_encoder(
    config: T5Config,
    params: Any,
    plugins: Mapping[int, tuple[PluginConfig, PluginVariables | None]],
    shape: Shape,
    rounds: int,
    start_peers: StartPeers | None = None,
    clock: Clock = time.perf_counter,
) -> EncoderResult:
    """Times `encode` of full rows.

    Args:
      config: shape and dtype of the backbone.
      params: its weights, see `random_encoder`.
      plugins: ratio -> settings and arrays, with ratio 1; see `fresh_plugins`.
      shape: rows and tokens.
      rounds: how often each call is timed, after it was compiled and warmed up.
      start_peers: what starts other libraries' encoders on the same tokens.
      clock: seconds, rising.

    Raises:
      ConfigError: where the memory does not suffice.
    """
    tokens = random_tokens(config, shape.batch, shape.length)
    calls: dict[str, Callable[[], object]] = {_PEAK: matrix_call(config.dtype)}
    for ratio, (plugin, variables) in plugins.items():
        what = f"The encoder of {config.name!r} at {shape} and ratio {ratio}"
        calls[f"ratio {ratio}"] = compiled_call(
            what, encoder_call(config, plugin), params, variables, tokens
        )
    peers = start_peers(config, tokens) if start_peers else ()
    calls |= {name: call for name, call, _ in peers if call is not None}
    seconds = interleaved_seconds(calls, rounds, clock)
    rows = tuple(
        RatioRow(
            ratio,
            stack_flops(T5(config).stack(), shape.length, plugin, shape.batch),
            flops_allowed_speedup(T5(config).stack(), shape.length, plugin),
            tuple(seconds[f"ratio {ratio}"]),
        )
        for ratio, (plugin, _) in plugins.items()
    )
    found = tuple(PeerRow(name, tuple(seconds.get(name, ())), why) for name, _, why in peers)
    peak = MatrixPeak(matrix_size(), tuple(seconds[_PEAK]))
    return EncoderResult(shape.batch, shape.length, peak, rows, found)


def random_encoder(config: T5Config) -> Any:
    """Embeddings and encoder, on the device.

    Raises:
      ConfigError: where the memory does not suffice.
    """
    return random_backbone(config, encoder_shapes(config), "encoder")


def random_backbone(config: T5Config, shapes: Any, part: str) -> Any:
    """Random weights of these shapes, on the device, if it has room."""
    needed = memory.tree_bytes(shapes)
    what = f"Backbone {config.name!r} in {config.param_dtype}: its {part}"
    memory.check_room(what, needed, jax.devices()[0])
    with memory.told(what, needed):
        return random_params(config, shapes=shapes)


def fresh_plugins(
    config: T5Config, ratios: Sequence[int]
) -> dict[int, tuple[PluginConfig, PluginVariables | None]]:
    """Untrained plugins of the default settings; None for the backbone itself."""
    stack = T5(config).stack()
    return {
        ratio: (
            PluginConfig(ratio),
            init_plugin(PluginConfig(ratio), stack, jax.random.key(0))
            if ratio > 1
            else None,
        )
        for ratio in ratios
    }


def compiled_call(what: str, function: Any, *arguments: Any) -> Callable[[], object]:
    """A jitted function compiled for its arguments, which lie on the device; run once.

    Raises:
      ConfigError: where the memory does not suffice, with what `what` needs.
    """
    compiled = function.lower(*arguments).compile()
    memory.check_room(what, memory.compiled_bytes(compiled, resident=False), jax.devices()[0])
    with memory.told(what, memory.compiled_bytes(compiled)):
        call = bound(compiled, *arguments)
        jax.block_until_ready(call())
    return call


def matrix_call(dtype: str) -> Callable[[], object]:
    """One large product in `dtype`: what the device can reach at best, as the encoder asks it."""
    size = matrix_size()
    # Not all alike: processors slow down where bits toggle, and zeros would not.
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    return bound(jax.jit(jnp.dot), a, a)


def matrix_size() -> int:
    """Rows of the square matrices: a few milliseconds on an accelerator, a tenth second here."""
    return 2048 if jax.devices()[0].platform == "cpu" else 8192
