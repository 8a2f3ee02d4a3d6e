"""One training step: gradients of the trained arrays alone, averaged over microbatches.

The frozen arrays are an argument of the compiled step and no part of its result: neither gradients
nor optimizer state are ever made for them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.errors import ConfigError
from variator_jax.train.objectives import Batch, Objective

Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", Any, Batch], tuple["TrainState", Metrics]]


@struct.dataclass
class TrainState:
    """All that a step changes, and all that a training checkpoint holds."""

    step: jax.Array  # int32, updates done so far
    params: Any  # the trained arrays: a plugin's, or a whole backbone's
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def placed_state(state: TrainState, mesh: Mesh) -> TrainState:
    """The state on a mesh: moments are cut as their parameter is, all else is replicated."""
    shardings = moment_shardings((state.step, state.opt_state), state.params)

    def move(leaf: jax.Array, sharding: Any) -> jax.Array:
        return meshes.place(meshes.gather(leaf), sharding or meshes.replicated(mesh))

    step, opt_state = jax.tree.map(move, (state.step, state.opt_state), shardings)
    return TrainState(step, state.params, opt_state)


def moment_shardings(opt_state: Any, params: Any) -> Any:
    """For each leaf of an optimizer's state its parameter's sharding; False where it has none.

    Optimizers keep moments in trees of the parameters' form, so the path of a moment ends like that
    of its parameter, and its shape is the same; counters and factored moments have no parameter.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))

    def sharding(path: tuple[Any, ...], leaf: Any) -> Any:
        ends = (path[start:] for start in range(len(path)))
        parameter = next((by_path[end] for end in ends if end in by_path), None)
        if parameter is None or parameter.shape != leaf.shape:
            return False
        return parameter.sharding or False  # a tree must not have None as a leaf

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def jit_train_step(train_step: TrainStep, state: TrainState, mesh: Mesh) -> Any:
    """Compiles a step whose state keeps its place on the mesh; the old state's memory is reused."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = meshes.replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    num_microbatches: int = 1,
    seed: int = 0,
) -> TrainStep:
    """Builds `(state, frozen, batch) -> (state, metrics)`, to be jitted by the caller.

    Each term is its sum over the whole batch divided by the whole batch's weight, so a batch gives
    the same update however many microbatches it is cut into.

    Args:
      objective: what to minimise.
      optimizer: an optax transformation over the trained arrays.
      num_microbatches: how many passes the batch is cut into, to save memory.
      seed: of dropout; each step and microbatch folds its own number in.
    """

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = objective.weights(batch)
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params: Any, micro: Batch, index: jax.Array) -> tuple[jax.Array, Metrics]:
            sums = objective.terms(params, frozen, micro, jax.random.fold_in(rng, index))
            return combine(sums, weights, objective.coefficients)

        grads, metrics = _accumulate(loss_fn, state.params, batch, num_microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(objective: Objective) -> Callable[[Any, Any, Batch], tuple[Metrics, Metrics]]:
    """Builds `(trained, frozen, batch) -> (sums, weights)`, which add up over batches."""

    def eval_step(params: Any, frozen: Any, batch: Batch) -> tuple[Metrics, Metrics]:
        return objective.terms(params, frozen, batch, None), objective.weights(batch)

    return eval_step


def combine(
    sums: dict[str, jax.Array], weights: Mapping[str, jax.Array], coefficients: Mapping[str, float]
) -> tuple[jax.Array, Metrics]:
    """The loss, and as metrics it and each term's mean: its sum over its weight, or over 1.

    A microbatch's sums over the whole batch's weights are its shares, which add up to the means.
    """
    means = {name: total / jnp.maximum(weights[name], 1.0) for name, total in sums.items()}
    loss = sum(coefficient * means[name] for name, coefficient in coefficients.items())
    return jnp.asarray(loss), {"loss": jnp.asarray(loss), **means}


def _accumulate(
    loss_fn: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
    num_microbatches: int,
) -> tuple[Any, Metrics]:
    """Gradients and metrics of all microbatches, added up."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        return grad_fn(params, batch, jnp.int32(0))
    size = next(iter(batch.values())).shape[0]
    if size % num_microbatches:
        raise ConfigError(
            f"A batch of {size} does not divide into {num_microbatches} microbatches; choose a "
            f"divisor of {size}."
        )
    # [microbatches, batch / microbatches, ...]: strided rows, so each microbatch is spread over all
    # devices.
    micro = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1), dict(batch)
    )

    def body(total: tuple[Any, Metrics], now: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, *now)), None

    indices = jnp.arange(num_microbatches, dtype=jnp.int32)
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micro), indices[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, (micro, indices))[0]
