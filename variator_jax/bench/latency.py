"""The time of encoder passes at each compression ratio, against what the saved FLOPs allow.

All calls are timed in turns, and each round begins with another one, so that a slow spell of the
machine affects all of them. Weights do not change the time: `random_params` fills a named shape
within seconds.

The baselines are Hugging Face's T5 encoder in torch, eager and through `torch.compile`: the same
shape, tokens, dtype and threads as ours, random weights, no gradients. What cannot run is returned
with the reason. torch and transformers are imported only when they are asked for.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.t5 import T5, T5Config, shape_params
from variator_jax.bench.arguments import BenchSettings, Shape
from variator_jax.bench.output import log, usable_cores
from variator_jax.bench.results import ENCODER, Measurement, Timing
from variator_jax.errors import ConfigError
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginConfig, flops_allowed_speedup, init_plugin, stack_flops

Params = Any
Call = Callable[[], object]
Plugins = Mapping[Any, PluginConfig]  # by ratio or name
PEAK = "matrix peak"
EAGER = "transformers, eager"
COMPILED = "transformers, torch.compile"
#: A baseline's call, or the reason why it has none.
Baseline = Call | str
# Fields of a checkpoint's config that do not describe its shape.
_NO_SHAPE = ("architectures", "model_type", "_name_or_path", "dtype", "torch_dtype")


@dataclasses.dataclass(frozen=True)
class Latency:
    """Measured time of one encoder pass.

    Attributes:
      config: name of the backbone's shape.
      batch: rows.
      length: tokens of a row.
      milliseconds: median over the rounds.
      speedup: median of the backbone over this median.
      flops_allowed_speedup: the speed-up if time were proportional to FLOPs.
      spread: distance between the quartiles, in milliseconds.
    """

    config: str
    batch: int
    length: int
    milliseconds: float
    speedup: float
    flops_allowed_speedup: float
    spread: float = 0.0

    @property
    def shape(self) -> str:
        """Backbone, rows and tokens in words."""
        return f"{self.config}, batch {self.batch}, length {self.length}"


def measure_encoder_latency(
    config: T5Config, plugins: Plugins, shape: Shape, rounds: int = 7
) -> dict[Any, Latency]:
    """Times `encode` of full rows (no padding) of the backbone and each plugin, untrained.

    Args:
      config: shape of the backbone.
      plugins: ratio or name -> settings. Ratio 1, the backbone, is always measured.
      shape: rows and tokens.
      rounds: how often each ratio is measured, after one call that compiles and one that warms up.

    Returns:
      Ratio or name -> time, the backbone first.

    Raises:
      ConfigError: for no round.
    """
    if rounds < 1:
        raise ConfigError(f"A latency needs at least one round; found {rounds}.")
    plugins = {1: PluginConfig(ratio=1)} | dict(plugins)
    tokens, stack = random_tokens(config, shape.batch, shape.length), T5(config).stack()
    calls = _encoder_calls(config, random_params(config), plugins, tokens)
    seconds = interleaved_seconds(calls, rounds)
    rows, backbone = {}, 1e3 * float(np.median(seconds[1]))
    size = (config.name, shape.batch, shape.length)
    for ratio, samples in seconds.items():
        low, median, high = map(float, np.percentile(1e3 * np.array(samples), (25, 50, 75)))
        allowed = flops_allowed_speedup(stack, shape.length, plugins[ratio])
        rows[ratio] = Latency(*size, median, backbone / median, allowed, high - low)
    return rows


def bench_encoder(
    config: T5Config, params: Params, shape: Shape, settings: BenchSettings
) -> Measurement:
    """Times `encode` of full rows with fresh plugins, and baselines in the same rounds.

    Args:
      config: shape and dtype of the backbone.
      params: its weights, at least those of embeddings and encoder.
      shape: rows and tokens.
      settings: ratios, rounds, and whether baselines are timed.
    """
    log(f"encoder of {config.name}, {shape} tokens")
    stack = T5(config).stack()
    plugins: dict[Any, PluginConfig] = {ratio: PluginConfig(ratio) for ratio in settings.ratios}
    plugins |= {plugin.description: plugin for plugin in settings.plugins}
    tokens = random_tokens(config, shape.batch, shape.length)
    calls: dict[Any, Call] = {**_encoder_calls(config, params, plugins, tokens)}
    baselines: dict[str, Baseline] = {}
    if settings.peer:
        baselines = start_baselines(config, tokens)
        calls |= {name: call for name, call in baselines.items() if not isinstance(call, str)}
    peak, seconds = timed_with_peak(calls, config.dtype, settings.rounds)
    rows = []
    for key, plugin in plugins.items():
        ratio, name = (None, key) if isinstance(key, str) else (key, f"k={key}")
        flops = shape.batch * stack_flops(stack, shape.length, plugin)
        allowed = flops_allowed_speedup(stack, shape.length, plugin)
        name = "k=1, the backbone" if ratio == 1 else name
        rows.append(Timing(name, seconds[key], flops, ratio, allowed))
    for name, call in baselines.items():
        error = call if isinstance(call, str) else ""
        rows.append(Timing(name, seconds.get(name, ()), error=error))
    return Measurement(ENCODER, shape.batch, shape.length, peak, rows)


def _encoder_calls(
    config: T5Config, params: Params, plugins: Plugins, tokens: np.ndarray
) -> dict[Any, Call]:
    """The encoder at each ratio with a fresh plugin: weights do not change the time."""
    stack = T5(config).stack()
    fresh = {r: init_plugin(p, stack, jax.random.key(0)) for r, p in plugins.items() if p.ratio > 1}
    return {
        ratio: bound(encoder_call(config, plugin), params, fresh.get(ratio), tokens)
        for ratio, plugin in plugins.items()
    }


def encoder_call(config: T5Config, plugin: PluginConfig | None) -> Callable[..., jax.Array]:
    """Jitted encoder: (backbone params, plugin variables, tokens) -> `[batch, length, embed]`.

    Weights are arguments, never constants of the compiled function. Ratio 1 runs the backbone.
    """
    model = SplicedModel(T5(config), plugin)

    def encode(params: Params, variables: Any, tokens: jax.Array) -> jax.Array:
        return model.encode(params, variables, {"encoder_input_tokens": tokens})

    return jax.jit(encode)


def interleaved_seconds(calls: Mapping[Any, Call], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each call in each round; every round begins with the next call of the circle."""
    for call in calls.values():
        for _ in range(2):  # the first compiles, the second warms caches and allocators up
            jax.block_until_ready(call())
    order = list(calls)
    seconds: dict[Any, list[float]] = {key: [] for key in order}
    for first in range(rounds):
        turn = first % len(order)
        for key in order[turn:] + order[:turn]:
            start = time.perf_counter()
            jax.block_until_ready(calls[key]())
            seconds[key].append(time.perf_counter() - start)
    return seconds


def random_params(config: T5Config, shapes: Params | None = None) -> Params:
    """Weights of a sensible scale, drawn in seconds at any size.

    Leaves repeat one pool of a million normal numbers, divided by the square root of their fan-in:
    good for time and FLOPs, not for training.

    Args:
      config: shape of the backbone.
      shapes: the tree to fill; by default embeddings and encoder, which is what `encode` reads.
    """
    pool = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32)

    def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if len(shape.shape) < 2:
            return jnp.ones(shape.shape, shape.dtype)
        scaled = pool / np.float32(np.sqrt(shape.shape[0]))
        return jnp.asarray(np.resize(scaled, shape.shape), shape.dtype)

    return jax.tree.map(fill, encoder_shapes(config) if shapes is None else shapes)


def encoder_shapes(config: T5Config) -> Params:
    """Shapes and dtypes of the parameters that `encode` reads, without allocating anything."""
    return shape_params(dataclasses.replace(config, num_decoder_layers=0))


def bound(call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """`call` with its arguments on the device, so that no transfer is timed."""
    placed = jax.device_put(arguments)
    return lambda: call(*placed)


def random_tokens(config: T5Config, batch: int, length: int) -> np.ndarray:
    """Random tokens `[batch, length]` int32, none of them padding."""
    rng = np.random.default_rng(0)
    return rng.integers(2, config.vocab_size, (batch, length), dtype=np.int32)


def timed_with_peak(
    calls: Mapping[Any, Call], dtype: str, rounds: int
) -> tuple[Timing, dict[Any, list[float]]]:
    """Times calls in turns with one large matrix product, the best that the device can reach."""
    size = matrix_size()
    # Random numbers: processors slow down where bits toggle, and zeros would not.
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    calls = {PEAK: bound(jax.jit(jnp.dot), a, a), **calls}
    seconds = interleaved_seconds(calls, rounds)
    return Timing(f"{PEAK}, {size} x {size}", seconds.pop(PEAK), 2.0 * size**3), seconds


def matrix_size() -> int:
    """Rows of the square matrices: a few milliseconds on an accelerator, a tenth second on CPUs."""
    return 2048 if jax.devices()[0].platform == "cpu" else 8192


def start_baselines(config: T5Config, tokens: np.ndarray) -> dict[str, Baseline]:
    """Both baselines on `tokens` `[batch, length]`, each run once already."""
    try:
        model, inputs = _encoder(config, tokens)
    except Exception as error:  # Any failure of other libraries is reported, ours still timed.
        return dict.fromkeys((EAGER, COMPILED), _reason(error))
    return {name: _started(model, inputs, name == COMPILED) for name in (EAGER, COMPILED)}


def transformers_config(config: T5Config) -> Any:
    """Their `T5Config` of the same shape, without dropout."""
    import transformers

    from variator_jax.store.hugging_face import render_config

    theirs = {k: v for k, v in render_config(config).items() if k not in _NO_SHAPE}
    # An encoder has no cache.
    return transformers.T5Config(**{**theirs, "dropout_rate": 0.0, "use_cache": False})


def _encoder(config: T5Config, tokens: np.ndarray) -> tuple[Any, Any]:
    """The module and its input on the device that JAX runs on.

    Raises:
      RuntimeError: if torch cannot use that device.
    """
    import torch
    import transformers

    platform = jax.devices()[0].platform
    if platform == "cpu":
        device = "cpu"
        torch.set_num_threads(usable_cores())
    elif platform in ("gpu", "cuda", "rocm") and torch.cuda.is_available():
        device = "cuda"
        # JAX multiplies float32 matrices in TF32 on GPUs by default; so does torch here.
        torch.set_float32_matmul_precision("high")
    else:
        raise RuntimeError(f"JAX runs on {platform}, and this torch {torch.__version__} cannot")
    with torch.device(device):
        model = transformers.T5EncoderModel(transformers_config(config))
    inputs = torch.as_tensor(tokens, dtype=torch.long, device=device)
    return model.to(getattr(torch, config.dtype)).eval(), inputs


def _started(model: Any, inputs: Any, compiled: bool) -> Baseline:
    """The call, after a first one; or the reason why that failed."""
    import torch

    def call() -> None:
        with torch.no_grad():
            encode(input_ids=inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    try:
        encode = torch.compile(model, dynamic=False) if compiled else model
        call()
    except Exception as error:  # As above.
        return _reason(error)
    return call


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"
