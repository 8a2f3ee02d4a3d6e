"""Distillation losses: pure functions of arrays that return a sum and the weight to divide it by.

Padding never counts, neither in the sum nor in the weight. Sums and weights add up over
microbatches and devices, which is why they are not divided here. The objectives, which call these,
stop the teacher's gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp

from variator_jax.errors import ConfigError, check_number

WeightedSum = tuple[jax.Array, jax.Array]
_SMALLEST = 1e-6  # mean square by which an error is divided


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How much each loss counts. The paper's recipe is 1 + 1 on the hidden states, nothing else.

    Attributes:
      encoder_hidden: MSE between the encoder's last hidden states.
      decoder_hidden: MSE between the decoder's last hidden states; ignored without a decoder.
      logits: KL divergence from the teacher's to the student's distribution.
      task: the task's own cross-entropy; it and `logits` are refused without a decoder.
      residual: MSE of the residual stream behind each site, over the teacher's mean square.
      neurons: MSE of the input of the FFN's last matrix for merged vectors against the teacher's
        merge-weighted mean, over that mean's mean square.
      pooled: one minus the cosine of the encoder's mean-pooled states, a text each: embeddings.
      temperature: softens both distributions of `logits`.
    """

    encoder_hidden: float = 1.0
    decoder_hidden: float = 1.0
    logits: float = 0.0
    task: float = 0.0
    residual: float = 0.0
    neurons: float = 0.0
    pooled: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = {k: v for k, v in dataclasses.asdict(self).items() if k != "temperature"}
        for name, value in dataclasses.asdict(self).items():
            check_number(f"The weight {name}" if name in weights else f"The {name}", value)
        if not any(weights.values()):
            raise ConfigError("All loss weights are 0: there is nothing to train on.")
        if self.temperature <= 0:
            raise ConfigError(f"The temperature must be positive; found {self.temperature}.")


def hidden_mse(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> WeightedSum:
    """Squared error of hidden states over all valid elements (paper: distil=hidden).

    Args:
      student: `[batch, length, embed]`.
      teacher: the same shape.
      mask: `[batch, length]`, 1 on tokens and 0 on padding.

    Returns:
      The sum of squares and the number of valid elements, float32 scalars.
    """
    mask = mask.astype(jnp.float32)
    # [batch, length, embed]
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    difference = difference * jnp.sqrt(mask)[..., None]  # so that its square has the weight once
    return jnp.sum(jnp.square(difference)), jnp.sum(mask) * student.shape[-1]


def relative_mse(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> WeightedSum:
    """Squared error of each position over the teacher's mean square there.

    Args:
      student: `[batch, length, embed]`.
      teacher: the same shape.
      mask: `[batch, length]`, 1 on positions that count.

    Returns:
      The sum over valid positions, and their number.
    """
    mask, teacher = mask.astype(jnp.float32), teacher.astype(jnp.float32)
    difference = student.astype(jnp.float32) - teacher
    # [batch, length]
    error = jnp.mean(jnp.square(difference), axis=-1)
    scale = jnp.mean(jnp.square(teacher), axis=-1)
    return jnp.sum(mask * error / jnp.maximum(scale, _SMALLEST)), jnp.sum(mask)


def pooled_cosine(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, segments: jax.Array | None = None
) -> WeightedSum:
    """One minus the cosine of the means over the tokens of each text, as embeddings are compared.

    Args:
      student: `[batch, length, embed]`.
      teacher: the same shape.
      mask: `[batch, length]`, 1 on tokens and 0 on padding.
      segments: `[batch, length]` int, from 1 on, of rows that hold several texts.

    Returns:
      The sum over texts, and their number.
    """
    texts = members_of_texts(mask, segments)
    # [batch, texts, embed]; a sum has the direction of the mean
    ours, theirs = (
        jnp.einsum("blt,ble->bte", texts, x.astype(jnp.float32)) for x in (student, teacher)
    )
    present = jnp.any(texts > 0, axis=1).astype(jnp.float32)
    # [batch, texts]
    norms = jnp.sum(jnp.square(ours), -1) * jnp.sum(jnp.square(theirs), -1)
    cosine = jnp.sum(ours * theirs, -1) / jnp.sqrt(jnp.maximum(norms, _SMALLEST**2))
    return jnp.sum(present * (1 - cosine)), jnp.sum(present)


def members_of_texts(mask: jax.Array, segments: jax.Array | None) -> jax.Array:
    """`[batch, length, texts]` float32, 1 where a token is a text's; a row holds at most `length`.

    Args:
      mask: `[batch, length]`, 1 on tokens and 0 on padding.
      segments: `[batch, length]` int, from 1 on, of rows that hold several texts; None for one.
    """
    texts = mask[..., None].astype(jnp.float32)
    return texts if segments is None else texts * jax.nn.one_hot(segments - 1, mask.shape[1])


def logits_kl(
    student: jax.Array, teacher: jax.Array, mask: jax.Array, temperature: float = 1.0
) -> WeightedSum:
    """KL(teacher || student) of the next-token distributions, times temperature squared.

    Args:
      student: logits `[batch, length, vocab]`.
      teacher: the same shape.
      mask: `[batch, length]`.
      temperature: divides both; the square keeps the gradient's size (Hinton et al., 2015).

    Returns:
      The sum in nats over valid positions, and their number.
    """
    mask = mask.astype(jnp.float32)
    # [batch, length, vocab]
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_teacher = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    # [batch, length]
    divergence = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return temperature**2 * jnp.sum(divergence * mask), jnp.sum(mask)


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> WeightedSum:
    """Cross-entropy of the target tokens.

    Args:
      logits: `[batch, length, vocab]`.
      targets: `[batch, length]` int.
      mask: `[batch, length]`.

    Returns:
      The sum in nats over valid positions, and their number.
    """
    mask = mask.astype(jnp.float32)
    # [batch, length, vocab]
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * mask), jnp.sum(mask)


def accuracy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> WeightedSum:
    """Valid positions whose largest logit is the target's, and the number of valid positions."""
    mask = mask.astype(jnp.float32)
    # [batch, length]
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return jnp.sum(right * mask), jnp.sum(mask)
