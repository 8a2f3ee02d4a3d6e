"""Dense, embedding, norm and feed-forward layers with T5X's parameter names and logical axes.

Attention lives in `attention.py`, the stack of layers in `network.py`.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes, with_sharding_constraint

from variator_jax.backbones.t5.config import T5Config

Initializer = Callable[..., jax.Array]

# T5X draws attention kernels from a normal and feed-forward kernels from a truncated normal.
ATTENTION_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
MLP_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def weight(
    name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...], config: T5Config
) -> jax.Array:
    """A parameter of the module that calls this, in the config's `param_dtype`."""
    return param_with_axes(name, init, shape, jnp.dtype(config.param_dtype), axes=axes)


class Dense(nn.Module):
    """A matrix product without bias: `[..., in] -> [..., features]`, one 2-D kernel as in T5X."""

    features: int
    config: T5Config
    axes: tuple[str, str]
    kernel_init: Initializer = MLP_INIT
    dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies in `dtype`, which defaults to the config's."""
        dtype = jnp.dtype(self.dtype or self.config.dtype)
        shape = (x.shape[-1], self.features)
        kernel = weight("kernel", self.kernel_init, shape, self.axes, self.config)
        # Pinned by its own axes: where a mesh cuts weights along their width, each is gathered
        # here, when it is used. Left alone, XLA gathers the whole batch's activations instead.
        return jnp.dot(x.astype(dtype), constrain(kernel.astype(dtype), *self.axes))


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; statistics in float32, `[..., embed] -> [..., embed]`."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis and returns the config's dtype."""
        scale = weight("scale", nn.initializers.ones, x.shape[-1:], ("embed",), self.config)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + self.config.layer_norm_epsilon)
        scale = constrain(scale.astype(jnp.float32), "embed")
        return (x * scale).astype(jnp.dtype(self.config.dtype))


class Embed(nn.Module):
    """Token embeddings, shared by encoder and decoder."""

    config: T5Config

    def setup(self) -> None:
        """Creates the table `[vocab, embed]`."""
        config, init = self.config, nn.initializers.normal(stddev=1.0)
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = weight("embedding", init, shape, ("vocab", "embed"), config)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up `[batch, length]` int tokens: `[batch, length, embed]`."""
        # T5X's exporters trace with float tokens, so cast; a gather beats its one-hot product here.
        rows = jnp.take(self.embedding, tokens.astype(jnp.int32), axis=0)
        return rows.astype(jnp.dtype(self.config.dtype))

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits against the table, in float32: `[..., embed] -> [..., vocab]`."""
        logits = jnp.dot(x.astype(jnp.float32), self.embedding.astype(jnp.float32).T)
        # T5 1.0 rescales tied logits; without it they would start with a variance of `embed`.
        return logits / jnp.sqrt(jnp.float32(self.config.embed_dim))


class MlpBlock(nn.Module):
    """The feed-forward layer, plain (`wi`) or gated (`wi_0`, `wi_1`): `[..., embed]` to the same.

    In the encoder this is the site that a compression plugin surrounds; it does not know about it.
    `features` is the number of hidden units.
    """

    config: T5Config
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Applies the layer; `deterministic=False` drops hidden units out."""
        config = self.config
        # [..., mlp]
        branches = [
            _ACTIVATIONS[activation](Dense(self.features, config, ("embed", "mlp"), name=name)(x))
            for name, activation in zip(config.mlp_inputs, config.mlp_activations, strict=True)
        ]
        hidden = dropout(config, functools.reduce(operator.mul, branches), deterministic)
        if hidden.ndim == 3:
            hidden = constrain(hidden, "batch", "length", "mlp")
        # [..., embed]
        return Dense(config.embed_dim, config, ("mlp", "embed"), name="wo")(hidden)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Pins activations to the mesh by their logical axes, by default those of a hidden state.

    Outside of a mesh and of axis rules (`variator_jax.mesh`, or T5X's) it does nothing.
    """
    return with_sharding_constraint(x, names or ("batch", "length", "embed"))


def remat(layer: type[nn.Module], config: T5Config, static: tuple[int, ...]) -> type[nn.Module]:
    """The layer, run again in the backward pass from what `config.remat` lets it keep.

    Args:
      layer: a layer of a stack.
      config: the backbone's settings.
      static: indices, counted from self, of the arguments that are not arrays.
    """
    policy = None
    if config.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(layer, static_argnums=static, policy=policy)


def dropout(config: T5Config, x: jax.Array, deterministic: bool) -> jax.Array:
    """T5's dropout: the same units for every position of a sequence."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(x, deterministic=deterministic)
