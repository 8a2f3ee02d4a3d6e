"""The optimizer of a T5X run that trains a plugin: state for the plugin alone, the rest frozen."""

from __future__ import annotations

from typing import Any

import jax
import optax
from t5x import optimizers

from variator_jax.t5x_engine.network import OUTPUT_SCALE, PLUGIN

TRAINED, FROZEN = "plugin", "frozen"


def is_trained(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at this path of a T5X tree is trained: the plugin's, but for its scales."""
    names = [key.key for key in path]
    return names[0] == PLUGIN and names[-1] != OUTPUT_SCALE


def labels(params: Any) -> Any:
    """'plugin' or 'frozen' for each leaf, in the very containers of `params`, as optax asks for."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: TRAINED if is_trained(path) else FROZEN, params
    )


class PluginOptimizer(optimizers.OptaxWrapper):
    """T5X's wrapper of an optax optimizer, applied to the plugin's parameters and to no others.

    Modifications to the host: `apply_gradient` hands frozen leaves through. Adding a zero would
    leave their values alone, but not the sign of a zero, and would write every weight anew.
    """

    def __init__(self, optimizer: optax.GradientTransformation) -> None:
        super().__init__(
            optax.multi_transform({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, labels)
        )

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: Any, grads: Any
    ) -> tuple[Any, Any]:
        """The new parameters and state; frozen leaves are those of `params` themselves."""
        updated, state = super().apply_gradient(hyper_params, params, state, grads)
        kept = jax.tree_util.tree_map_with_path(
            lambda path, old, new: new if is_trained(path) else old, params, updated
        )
        return kept, state
