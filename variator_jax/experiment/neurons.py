"""Which share of the encoder's FFN neurons fire, per FFN input and layer (the paper's Figure 5).

A compressed FFN input stands for k tokens. If it makes more neurons fire than one token does, and
nearly as many as its k tokens together, the FFN still does the work of all of them.

A neuron is one entry of what goes into the FFN's output kernel `wo`: the activation, and in a
gated FFN the product of both branches. Where ReLU takes part it fires when it is not 0, exactly.
GELU and SiLU are never quite 0; there a neuron fires when its magnitude exceeds the RMS of all
neurons for that same input: when it carries more than an even share of what the input calls up.
Like ReLU's, this rule does not see a vector's length, and a merged vector, being an average, is
mostly shorter than its members.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from variator_jax.backbones.base import Stack
from variator_jax.backbones.t5 import T5
from variator_jax.model import SplicedModel
from variator_jax.plugin import Ffn, PluginConfig, PluginVariables, intercept_modules
from variator_jax.plugin.groups import make_groups, to_groups

_INPUTS = "encoder_input_tokens"


def activated_neurons(
    backbone: T5,
    params: Any,
    plugin: PluginConfig,
    variables: PluginVariables | None,
    batches: Iterable[Mapping[str, Any]],
) -> pd.DataFrame:
    """Shares of the encoder's FFN neurons that fire, with a plugin in place and without it.

    Args:
      backbone: the network; it runs without dropout and remat.
      params: its parameters.
      plugin: the plugin's settings; ratio 1 is the backbone itself.
      variables: the plugin's arrays; may be None at ratio 1.
      batches: with `encoder_input_tokens` `[batch, length]`, 0 on padding, one example a row. Few
        shapes are best: each is compiled once.

    Returns:
      A row for each encoder layer, the index, with shares in [0, 1] averaged over FFN inputs:
        share: of an FFN input of the spliced encoder, a merged group, or a token where the plugin
          leaves the layer alone. A group counts once, if it has a token at all.
        token: of one token in the uncompressed encoder.
        union: that fire for one or more members of a group in the uncompressed encoder: what the
          merged vector would have to make fire to lose nothing.

    Raises:
      PluginError: if no layer matches `plugin.sites`, or `variables` do not fit.
    """
    # Arrays that remat's layers compute cannot be carried out of them.
    count = _counter(T5(dataclasses.replace(backbone.config, remat=False)), plugin)
    # (layer, kind) -> sum of shares, number of inputs
    totals: dict[tuple[int, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for batch in batches:
        for key, counts in count(params, variables, batch[_INPUTS]).items():
            totals[key] += np.asarray(counts, np.float64)
    means = pd.Series({key: total / number for key, (total, number) in totals.items()})
    return means.unstack().rename_axis("layer").rename_axis(None, axis=1)


def _counter(backbone: T5, plugin: PluginConfig) -> Callable[..., dict]:
    """The jitted count of one batch: (layer, kind) -> (sum of shares, number of inputs)."""
    stack = backbone.stack()
    threshold = 0.0 if "relu" in backbone.config.mlp_activations else 1.0
    sites = [site for site in plugin.parts if isinstance(site, Ffn)]
    ratios = {layer: site.ratio for site in sites for layer in site.selected(stack)}

    def fires(hidden: jax.Array) -> jax.Array:
        # [batch, inputs, neurons]
        energy = jnp.square(hidden.astype(jnp.float32))
        return energy > threshold * jnp.mean(energy, axis=-1, keepdims=True)

    @jax.jit
    def count(params: Any, variables: Any, tokens: jax.Array) -> dict:
        mask = backbone.masks({_INPUTS: tokens})["encoder"]
        with _ffn_hidden(stack) as plain:
            backbone.encode(params, tokens)
        with _ffn_hidden(stack) as spliced:
            SplicedModel(backbone, plugin).encode(params, variables, tokens)
        counts = {}
        for layer in plain:
            # [batch, groups, k]; without regard to `pool_padding`: groups of padding are not inputs
            ratio = ratios.get(layer, 1)
            members = make_groups(mask, ratio).members
            groups = members.any(-1)
            token, merged = fires(plain[layer]), fires(spliced[layer])
            # [batch, groups, neurons]
            union = (to_groups(token, ratio) & members[..., None]).any(2)
            counts[layer, "share"] = _masked_sum(merged.mean(-1), groups)
            counts[layer, "token"] = _masked_sum(token.mean(-1), mask.valid)
            counts[layer, "union"] = _masked_sum(union.mean(-1), groups)
        return counts

    return count


@contextmanager
def _ffn_hidden(stack: Stack) -> Iterator[dict[int, jax.Array]]:
    """Collects what goes into each FFN's `wo`, `[batch, inputs, neurons]` by layer."""
    caught: dict[int, jax.Array] = {}
    layers = {f"{stack.path('ffn', layer)}/wo": layer for layer in range(stack.layers)}

    def catch(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        caught[layers[path]] = stack.stream("ffn", args, kwargs)
        return call(*args, **kwargs)

    with intercept_modules(layers.__contains__, catch):
        yield caught


def _masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`[2]`: the sum of `x [batch, inputs]` where the mask is True, and how many those are."""
    return jnp.stack([jnp.sum(jnp.where(mask, x, 0.0)), jnp.sum(mask)])
