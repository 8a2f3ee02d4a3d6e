"""Greedy and beam decoding with a key/value cache, from the encoder's output."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from variator_jax.backbones.t5.network import Transformer

START_TOKEN, EOS_TOKEN = 0, 1
_NEVER = -1e9

# (tokens [rows] int32, cache) -> (logits [rows, vocab] float32, cache)
Step = Callable[[jax.Array, dict], tuple[jax.Array, dict]]


def greedy_decode(
    module: Transformer, params: dict, encoded: jax.Array, inputs: jax.Array, max_length: int
) -> jax.Array:
    """The most likely next token at every step, until EOS or `max_length` tokens.

    Args:
      module: a backbone with a decoder.
      params: its parameters.
      encoded: `[batch, length, embed]`, the encoder's output.
      inputs: `[batch, length]` int, the encoder's tokens, for the cross-attention's mask.
      max_length: tokens to generate at the most, EOS included.

    Returns:
      `[batch, max_length]` int32: the tokens after the start token, EOS included, 0 behind it.
    """
    batch = encoded.shape[0]
    step, cache = _decoder(module, params, encoded, inputs, max_length)

    def body(state: tuple) -> tuple:
        i, last, tokens, done, cache = state
        # [batch, vocab]
        logits, cache = step(last, cache)
        chosen = jnp.where(done, 0, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        tokens, done = tokens.at[:, i].set(chosen), done | (chosen == EOS_TOKEN)
        return i + 1, chosen, tokens, done, cache

    state = (
        jnp.int32(0),
        jnp.full((batch,), START_TOKEN, jnp.int32),
        jnp.zeros((batch, max_length), jnp.int32),
        jnp.all(inputs == 0, axis=1),  # what fills a batch up is not waited for
        cache,
    )
    state = jax.lax.while_loop(lambda s: (s[0] < max_length) & ~jnp.all(s[3]), body, state)
    return state[2]


def beam_decode(
    module: Transformer,
    params: dict,
    encoded: jax.Array,
    inputs: jax.Array,
    max_length: int,
    num_beams: int = 4,
    length_penalty: float = 0.6,
) -> jax.Array:
    """Beam search; returns the best finished beam, or the best unfinished one if none finished.

    Scores are log-probabilities over ((5 + length) / 6) ^ `length_penalty` (Wu et al., 2016), as in
    T5X. Arguments as in `greedy_decode`.
    """
    batch, empty = encoded.shape[0], jnp.all(inputs == 0, axis=1)
    # [batch * beams, ...]
    encoded = jnp.repeat(encoded, num_beams, axis=0)
    inputs = jnp.repeat(inputs, num_beams, axis=0)
    step, cache = _decoder(module, params, encoded, inputs, max_length)

    def normalise(scores: jax.Array, length: jax.Array | int) -> jax.Array:
        return scores / ((5.0 + length) / 6.0) ** length_penalty

    def body(state: _Beams) -> _Beams:
        # [batch, beams]
        last = jnp.where(state.i == 0, START_TOKEN, state.tokens[:, :, state.i - 1])
        logits, cache = step(last.reshape(-1), state.cache)
        # [batch, beams, vocab]
        gained = jax.nn.log_softmax(logits).reshape(batch, num_beams, -1)
        vocab = gained.shape[-1]
        # [batch, 2 * beams], so that even if half of them end here, as many can continue.
        sums = (state.scores[:, :, None] + gained).reshape(batch, -1)
        scores, flat = jax.lax.top_k(sums, 2 * num_beams)
        parent, token = flat // vocab, (flat % vocab).astype(jnp.int32)
        # [batch, 2 * beams, max_length]
        tokens = _pick(state.tokens, parent).at[:, :, state.i].set(token)
        ended = token == EOS_TOKEN

        # [batch, 3 * beams]
        ending = jnp.where(ended, normalise(scores, state.i + 1), _NEVER)
        pool = jnp.concatenate([state.finished, ending], axis=1)
        finished, best = jax.lax.top_k(pool, num_beams)
        finished_tokens = _pick(jnp.concatenate([state.finished_tokens, tokens], axis=1), best)

        scores, alive = jax.lax.top_k(jnp.where(ended, _NEVER, scores), num_beams)
        rows = (_pick(parent, alive) + num_beams * jnp.arange(batch)[:, None]).reshape(-1)
        cache = jax.tree.map(lambda x: x if x.ndim == 0 else x[rows], cache)
        return _Beams(state.i + 1, _pick(tokens, alive), scores, finished_tokens, finished, cache)

    def unfinished(state: _Beams) -> jax.Array:
        # Log-probabilities only fall, so a beam can at best keep its sum and be as long as allowed.
        reachable = normalise(jnp.max(state.scores, axis=1), max_length)
        better = (reachable > jnp.min(state.finished, axis=1)) & ~empty
        return (state.i < max_length) & jnp.any(better)

    state = jax.lax.while_loop(unfinished, body, _no_beams(batch, num_beams, max_length, cache))
    has_finished = state.finished[:, :1] > _NEVER
    best = jnp.where(has_finished, state.finished_tokens[:, 0], state.tokens[:, 0])
    # An empty row is not waited for: its tokens would depend on the other rows.
    return jnp.where(empty[:, None], 0, best)


class _Beams(NamedTuple):
    i: jax.Array  # tokens generated so far
    tokens: jax.Array  # [batch, beams, max_length] of the unfinished beams
    scores: jax.Array  # [batch, beams] their log-probabilities
    finished_tokens: jax.Array  # [batch, beams, max_length] of the best that ended
    finished: jax.Array  # [batch, beams] their normalised scores
    cache: dict


def _no_beams(batch: int, num_beams: int, max_length: int, cache: dict) -> _Beams:
    """The start of a search: one beam that counts, for equal ones would stay equal."""
    tokens = jnp.zeros((batch, num_beams, max_length), jnp.int32)
    never = jnp.full((batch, num_beams), _NEVER)
    return _Beams(jnp.int32(0), tokens, never.at[:, 0].set(0.0), tokens, never, cache)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `x` `[batch, beams, ...]` chosen by `index` `[batch, n]`: `[batch, n, ...]`."""
    return jax.vmap(lambda rows, chosen: rows[chosen])(x, index)


def _decoder(
    module: Transformer, params: dict, encoded: jax.Array, inputs: jax.Array, max_length: int
) -> tuple[Step, dict]:
    """One step of the decoder, and an empty cache."""

    def call(tokens: jax.Array, **cache: dict) -> tuple[jax.Array, dict]:
        settings = {"decode": True, "max_decode_length": max_length, "mutable": ["cache"]}
        variables, arguments = {"params": params, **cache}, (encoded, inputs, tokens)
        logits, updated = module.apply(variables, *arguments, **settings, method="decode")
        return logits[:, 0], updated["cache"]

    def step(tokens: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        # [batch, 1]
        return call(tokens[:, None], cache=cache)

    # The cache's shapes come from a call at full length, which is traced but never run.
    tokens = jax.ShapeDtypeStruct((encoded.shape[0], max_length), jnp.int32)
    _, shapes = jax.eval_shape(call, tokens)
    return step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
