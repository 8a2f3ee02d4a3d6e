"""Compiled functions that score or answer a batch, one for each model and input shape.

Each takes backbone parameters, plugin variables and a batch as arguments, so one compiled function
serves every plugin with the same settings, and is kept for the next one. What scores mean for a
task is decided in `evaluator`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from variator_jax.backbones.base import Stack
from variator_jax.evaluation.data import Batch
from variator_jax.mesh import compile_on
from variator_jax.model import SplicedModel
from variator_jax.plugin import intercept_modules

# (backbone parameters, plugin variables or None, batch) -> scores
Scorer = Callable[[Any, Any, Batch], Any]
_ENCODER = ("encoder_input_tokens",)
_TEACHER_FORCED = (*_ENCODER, "decoder_input_tokens", "decoder_target_tokens")


def _keep(make: Callable[..., Scorer]) -> Callable[..., Scorer]:
    """`make`, whose scorers are kept for equal arguments; interventions are never equal."""
    kept = functools.lru_cache(maxsize=32)(make)

    @functools.wraps(make)
    def scorer(model: SplicedModel, *args: Any, **kwargs: Any) -> Scorer:
        return (make if model.intervention else kept)(model, *args, **kwargs)

    return scorer


@_keep
def label_scorer(
    model: SplicedModel, label_ids: tuple[int, ...], position: int = 0, mesh: Mesh | None = None
) -> Scorer:
    """Returns a scorer of verbalizers: logits of `label_ids` at one target position.

    Args:
      model: the backbone, spliced or not.
      label_ids: first token id of each verbalizer, in label order.
      position: in the target, where the verbalizer begins; the target's tokens before it, a
        prefix, are given to the decoder.
      mesh: where it runs; None for the first device.

    Returns:
      A function of (backbone parameters, plugin variables, batch) to `[batch, labels]` float32.
    """
    columns = np.asarray(label_ids, np.int32)

    def score(params: Any, variables: Any, arrays: Mapping[str, jax.Array]) -> jax.Array:
        decoder = [name for name in arrays if name.startswith("decoder")]
        begun = {name: arrays[name][:, : position + 1] for name in decoder}
        # [batch, position + 1, vocab]
        logits = model.logits(params, variables, {**arrays, **begun})
        return logits[:, position, columns].astype(jnp.float32)

    return _compiled(score, mesh, _TEACHER_FORCED)


@_keep
def target_scorer(model: SplicedModel, mesh: Mesh | None = None) -> Scorer:
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
        logits = model.logits(params, variables, arrays).astype(jnp.float32)
        likelihood = jax.nn.log_softmax(logits)
        of_target = jnp.take_along_axis(likelihood, targets[..., None], axis=-1)[..., 0]
        return -of_target, jnp.argmax(logits, axis=-1) == targets

    return _compiled(score, mesh, _TEACHER_FORCED)


@_keep
def generator(model: SplicedModel, max_length: int, mesh: Mesh | None = None) -> Scorer:
    """Returns greedy decoding: a function to token ids `[batch, max_length]` int32."""
    return _compiled(functools.partial(model.generate, max_length=max_length), mesh, _ENCODER)


@_keep
def encoder(model: SplicedModel, mesh: Mesh | None = None) -> Scorer:
    """Returns the encoder: a function to hidden states `[batch, length, embed]`."""
    return _compiled(model.encode, mesh, _ENCODER)


def skip_encoder_ffn(stack: Stack) -> AbstractContextManager[None]:
    """A control: while active, every FFN of the stack returns zeros like its input.

    A plugin can only lose what the FFNs contribute: a task whose score hardly falls without them
    cannot rank plugins.

    Enter it inside the function that is jitted: one that was compiled before runs as it was
    compiled.

    Raises:
      PluginError: on leaving, if no FFN was skipped.
    """
    paths = {stack.path("ffn", layer) for layer in range(stack.layers)}

    def skip(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> jax.Array:
        return jnp.zeros_like(stack.stream("ffn", args, kwargs))

    return intercept_modules(paths.__contains__, skip)


def _compiled(function: Callable[..., Any], mesh: Mesh | None, names: Sequence[str]) -> Scorer:
    """`function` compiled for the named arrays of a batch, which has one example a row."""
    compiled = compile_on(mesh, function)

    def score(params: Any, variables: Any, batch: Batch) -> Any:
        return compiled(params, variables, {name: batch[name] for name in names})

    return score
