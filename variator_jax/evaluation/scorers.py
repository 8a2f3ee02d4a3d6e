"""Compiled functions that score a batch, one for each plugin setting and input shape.

A scorer takes backbone parameters, plugin variables and a batch as arguments and closes over
nothing but the module and its settings, so one compiled function serves every plugin of its ratio.
What the scores mean for a task lives in `evaluator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from variator_jax.errors import ConfigError, DataError
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.splice import splice

Batch = Mapping[str, np.ndarray]
# (backbone parameters, plugin variables or None, batch) -> scores
Scorer = Callable[[Any, Any, Batch], Any]
# token mask [batch, length] -> the context in which the backbone runs
Instead = Callable[[jax.Array], AbstractContextManager[None]]


def label_scorer(
    module: nn.Module,
    label_ids: Sequence[int],
    plugin: PluginConfig | None = None,
    *,
    instead: Instead | None = None,
    position: int = 0,
) -> Scorer:
    """Returns a scorer of verbalizers: logits of `label_ids` at one target position.

    Args:
      module: the backbone, with T5X's call signature.
      label_ids: first token id of each verbalizer, in label order.
      plugin: settings of the plugin to splice, None for the backbone itself.
      instead: what to surround the backbone with in place of a plugin, a control or a baseline,
        such as `lambda mask: skip_encoder_ffn()`; excludes `plugin`.
      position: where in the target the verbalizer begins; the target's tokens before it, a
        prefix, are given to the decoder.

    Returns:
      A function of (backbone parameters, plugin variables, batch) to `[batch, labels]` float32.
    """
    columns = np.asarray(label_ids, np.int32)

    def score(params: Any, variables: Any, arrays: Mapping[str, jax.Array]) -> jax.Array:
        decoder = [name for name in arrays if name.startswith("decoder")]
        begun = {name: arrays[name][:, : position + 1] for name in decoder}
        # [batch, position + 1, vocab]
        logits = _logits(module, params, variables, {**arrays, **begun}, plugin, instead)
        return logits[:, position, columns].astype(jnp.float32)

    return _compiled(score, plugin, instead)


def target_scorer(
    module: nn.Module, plugin: PluginConfig | None = None, *, instead: Instead | None = None
) -> Scorer:
    """Returns a scorer of target tokens under teacher forcing; arguments as for `label_scorer`.

    Returns:
      A function of (backbone parameters, plugin variables, batch) to two arrays
      `[batch, target length]`: negative log-likelihood in nats, and whether the token scores best.
    """

    def score(
        params: Any, variables: Any, arrays: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        targets = arrays["decoder_target_tokens"]
        # [batch, target length, vocab]
        logits = _logits(module, params, variables, arrays, plugin, instead).astype(jnp.float32)
        likelihood = jax.nn.log_softmax(logits)
        of_target = jnp.take_along_axis(likelihood, targets[..., None], axis=-1)[..., 0]
        return -of_target, jnp.argmax(logits, axis=-1) == targets

    return _compiled(score, plugin, instead)


def spliced(
    plugin: PluginConfig | None, variables: Any, tokens: jax.Array, instead: Instead | None = None
) -> AbstractContextManager[None]:
    """The context in which the backbone runs: as it is, with a plugin, or with what is instead."""
    if instead is not None:
        return instead(tokens > 0)
    return nullcontext() if plugin is None else splice(plugin, variables, tokens > 0)


def _logits(
    module: nn.Module,
    params: Any,
    variables: Any,
    arrays: Mapping[str, jax.Array],
    plugin: PluginConfig | None,
    instead: Instead | None,
) -> jax.Array:
    tokens = arrays["encoder_input_tokens"]
    with spliced(plugin, variables, tokens, instead):
        decoder = arrays["decoder_input_tokens"], arrays["decoder_target_tokens"]
        return module.apply({"params": params}, tokens, *decoder)


def _compiled(
    function: Callable[..., Any], plugin: PluginConfig | None, instead: Instead | None
) -> Scorer:
    if instead is not None and plugin is not None:
        raise ConfigError("A control or baseline in place of a plugin takes no plugin; found both.")
    compiled = jax.jit(function)

    def score(params: Any, variables: Any, batch: Batch) -> Any:
        return compiled(params, variables, model_inputs(batch))

    return score


def model_inputs(batch: Batch) -> dict[str, np.ndarray]:
    """The arrays that the model reads; DataError for a missing one or a packed batch."""
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    missing = [name for name in names if name not in batch]
    if missing:
        raise DataError(f"A batch to evaluate lacks {missing}; found {sorted(batch)}.")
    if "encoder_segment_ids" in batch:
        raise DataError("A packed batch cannot be evaluated: one example a row was expected.")
    return {name: batch[name] for name in names}
