"""LoRA: a weight W of a frozen backbone becomes W + alpha/rank * A @ B, and A and B are trained.

The settings, the arrays and the merge, as pure functions over T5X's parameter tree. How A and B are
trained is in `train/jobs.py`, folders of them are in `store/lora.py`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from variator_jax.errors import ConfigError, check_whole

SELF_ATTENTION = (
    r"(encoder/layers_\d+/attention|decoder/layers_\d+/self_attention)/(query|value)/kernel"
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Settings of a LoRA; the defaults are those of the official code (`--delta-tuning`).

    Attributes:
      rank: columns of A and rows of B.
      alpha: the change of a weight is `alpha / rank * A @ B`.
      sites: regular expressions for whole parameter paths, each of which must match some weight;
        by default the query and value of every self-attention, and of no cross-attention.
    """

    rank: int = 16
    alpha: float = 32.0
    sites: Sequence[str] = (SELF_ATTENTION,)

    def __post_init__(self) -> None:
        check_whole("A LoRA's rank", self.rank)
        alpha = self.alpha
        if type(alpha) not in (int, float) or not 0 < alpha <= 1e9:
            raise ConfigError(f"A LoRA's alpha is a positive number; found {str(alpha)[:40]}.")
        object.__setattr__(self, "alpha", float(alpha))
        sites = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)
        object.__setattr__(self, "sites", sites)
        if not sites:
            raise ConfigError("A LoRA needs a site; LoraConfig.sites is empty.")
        for site in sites:
            try:
                re.compile(site)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"A LoRA's site {site!r} is not a regular expression: {error}."
                ) from None

    @property
    def scale(self) -> float:
        """What `A @ B` is multiplied by."""
        return self.alpha / self.rank


def lora_weights(config: LoraConfig, params: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The weights that a LoRA changes: path -> (in, out), in the order of the paths.

    Args:
      config: its settings.
      params: the backbone's tree, of arrays or of shapes.

    Raises:
      ConfigError: for a site that matches no weight, or something else than a matrix.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    weights: dict[str, tuple[int, int]] = {}
    for site in config.sites:
        matched = {path: leaf.shape for path, leaf in flat.items() if re.fullmatch(site, path)}
        other = [f"{path} {shape}" for path, shape in matched.items() if len(shape) != 2]
        if other or not matched:
            found = other[0] if other else "no weight"
            matrices = (path for path, leaf in flat.items() if len(leaf.shape) == 2)
            # One path for all layers of a stack.
            known = sorted({re.sub(r"layers_\d+", r"layers_<i>", path) for path in matrices})
            raise ConfigError(
                f"The site {site!r} of a LoRA matches {found}; the matrices are {', '.join(known)}."
            )
        weights |= matched
    return dict(sorted(weights.items()))


def init_lora(config: LoraConfig, params: Mapping[str, Any], rng: jax.Array) -> dict:
    """Fresh A and B, float32, under the path of their weight as `a [in, rank]`, `b [rank, out]`.

    A is Kaiming-uniform with slope sqrt(5), which is uniform within 1 / sqrt(in); B is 0, so that a
    fresh LoRA changes nothing.

    Args:
      config: its settings.
      params: the backbone's tree, of arrays or of shapes.
      rng: of A.

    Raises:
      ConfigError: as `lora_weights`.
    """
    weights = lora_weights(config, params)
    leaves: dict[str, jax.Array] = {}
    keys = jax.random.split(rng, len(weights))
    for key, (path, (width, out)) in zip(keys, weights.items(), strict=True):
        shape, bound = (width, config.rank), 1 / math.sqrt(width)
        leaves[f"{path}/a"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        leaves[f"{path}/b"] = jnp.zeros((config.rank, out), jnp.float32)
    return traverse_util.unflatten_dict(leaves, sep="/")


def pairs(lora: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The path of each weight with its A `[in, rank]` and B `[rank, out]`, rising by path."""
    flat = traverse_util.flatten_dict(dict(lora), sep="/")
    for path in sorted({name.rpartition("/")[0] for name in flat}):
        yield path, (flat[f"{path}/a"], flat[f"{path}/b"])


def merge_lora(params: Mapping[str, Any], lora: Mapping[str, Any], config: LoraConfig) -> dict:
    """The backbone with every change added to its weight; differentiable, for use within a step.

    The sum is made in float32 and cast to the weight's own dtype. Other leaves are the very same
    arrays.
    """
    weights = traverse_util.flatten_dict(dict(params), sep="/")
    for path, (a, b) in pairs(lora):
        # [in, out]; accelerators would round the factors to bfloat16 or TF32.
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        weight = jnp.asarray(weights[path])
        merged = weight.astype(jnp.float32) + config.scale * change.astype(jnp.float32)
        weights[path] = merged.astype(weight.dtype)
    return traverse_util.unflatten_dict(weights, sep="/")


def merge_weight(
    weight: np.ndarray, a: np.ndarray, b: np.ndarray, config: LoraConfig
) -> np.ndarray:
    """One merged weight in the host's memory, the same on every machine.

    A merged backbone is known by the fingerprint of its weights. In float32 that would depend on
    the order in which a machine adds up, so the sum is made in float64 and rounded to float32, and
    then to the weight's dtype, as `merge_lora` does.

    Args:
      weight: `[in, out]`.
      a: `[in, rank]`.
      b: `[rank, out]`.
      config: the LoRA's settings.
    """
    merged = np.matmul(np.asarray(a, np.float64), np.asarray(b, np.float64))
    merged *= config.scale
    merged += weight.astype(np.float32)
    return merged.astype(np.float32).astype(weight.dtype)
