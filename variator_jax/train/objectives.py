"""What a step minimises: weighted losses, as functions of the trained and the frozen arrays.

All objectives share one interface, so one step and one loop train plugins and backbones alike.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Backbone, Batch, Mask, Outputs
from variator_jax.backbones.lora import LoraConfig, merge_lora
from variator_jax.errors import ConfigError
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.train import losses
from variator_jax.train.losses import LossConfig, WeightedSum
from variator_jax.train.site_losses import SiteLosses


class Objective(Protocol):
    """A training objective; `coefficients` is how much each of its terms counts."""

    coefficients: Mapping[str, float]

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """What each term's sum is divided by, from the batch's masks alone."""

    def terms(
        self, trained: Any, frozen: Any, batch: Batch, rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Each term's sum over a batch or a microbatch; terms without a coefficient only inform."""


class Comparison:
    """How a student's outputs are compared with its teacher's, whichever network made them."""

    def __init__(
        self, config: LossConfig, backbone: Backbone, sites: SiteLosses | None = None
    ) -> None:
        """Leaves out terms that count nothing, and an encoder alone its decoder's hidden states.

        Args:
          config: the weights of the losses.
          backbone: of the teacher, whose masks the student shares.
          sites: the losses of a plugin's sites, which a narrow student does not have.
        """
        names = ["encoder_hidden", "pooled"]
        if backbone.config.has_decoder:
            names += ["decoder_hidden", "logits", "task"]
        weights = {name: getattr(config, name) for name in names}
        weights |= sites.coefficients if sites else {}
        for name in ("logits", "task", "residual", "neurons"):
            if getattr(config, name) and name not in weights:
                raise ConfigError(
                    f"{name.upper()}_LOSS is {getattr(config, name)}, but there is nothing that it "
                    f"compares: {'no plugin' if name in ('residual', 'neurons') else 'no decoder'}."
                )
        self.coefficients: Mapping[str, float] = {k: v for k, v in weights.items() if v}
        if not self.coefficients:
            raise ConfigError(
                f"No loss with a weight applies to this plugin and backbone: {config}."
            )
        self._embed_dim, self._temperature = backbone.config.embed_dim, config.temperature
        self._sites, self._masks = sites, backbone.masks
        # Paths of the modules whose results must be among the hidden states of both.
        self.capture: Collection[str] = sites.capture if sites else ()

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Valid elements of the hidden states, texts, valid positions of the targets."""
        masks = self._masks(batch)
        counts = self._sites.weights(masks["encoder"]) if self._sites else {}
        if "pooled" in self.coefficients:
            counts["pooled"] = _texts(masks["encoder"])
        return {
            name: _count(_mask(name, masks)) * (self._embed_dim if name.endswith("_hidden") else 1)
            for name in self.coefficients
            if name not in counts
        } | counts

    def compare(
        self, student: Outputs, teacher: Outputs, batch: Batch, arrays: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Each term's sum over the batch. The caller has stopped the teacher's gradient.

        Args:
          student: its outputs, with those at `capture`.
          teacher: the same.
          batch: in T5X's names.
          arrays: the plugin's parameters, by key.
        """
        mask = self._masks(batch)["encoder"]
        terms = self._sites.terms(student, teacher, mask, arrays) if self._sites else {}
        return {
            name: self._term(name, student, teacher, batch)[0]
            for name in self.coefficients
            if name not in terms
        } | terms

    def _term(self, name: str, student: Outputs, teacher: Outputs, batch: Batch) -> WeightedSum:
        if name == "pooled":
            inputs = self._masks(batch)["encoder"]
            # [batch, length, embed]
            states = student.hidden["encoder"], teacher.hidden["encoder"]
            return losses.pooled_cosine(*states, inputs.valid, inputs.segments)
        # [batch, length]
        mask = _mask(name, self._masks(batch))
        if name.endswith("_hidden"):
            stack = name.removesuffix("_hidden")
            # [batch, length, embed]
            return losses.hidden_mse(student.hidden[stack], teacher.hidden[stack], mask)
        # [batch, target length, vocab]
        if name == "logits":
            return losses.logits_kl(student.logits, teacher.logits, mask, self._temperature)
        return losses.cross_entropy(student.logits, batch["decoder_target_tokens"], mask)


class TeacherStudent(Comparison):
    """Compares a student's outputs with its teacher's, both without dropout."""

    def __init__(self, teacher: SplicedModel, student: SplicedModel, config: LossConfig) -> None:
        self._teacher, self._student = teacher, student
        plugin, stack = student.plugin, student.backbone.stack("encoder")
        sites = SiteLosses(plugin, stack, config) if plugin else None
        super().__init__(config, teacher.backbone, sites)

    def arguments(self, trained: Any, frozen: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Parameters and plugin arrays of the teacher, and those of the student."""
        raise NotImplementedError

    def terms(
        self, trained: Any, frozen: Any, batch: Batch, rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Runs teacher and student and compares them; the teacher gets no gradient."""
        teacher, student = self.arguments(trained, frozen)
        expected = self._teacher.apply(*teacher, batch, capture=self.capture)
        outputs = self._student.apply(*student, batch, capture=self.capture)
        arrays = student[1].params if student[1] else {}
        return self.compare(outputs, jax.lax.stop_gradient(expected), batch, arrays)


class Distillation(TeacherStudent):
    """The student is the backbone with the plugin, the teacher the same backbone without it.

    `trained` is the plugin's parameters; `frozen` is `(backbone parameters, output scales)`.
    """

    def __init__(self, backbone: Backbone, plugin: PluginConfig, config: LossConfig) -> None:
        super().__init__(SplicedModel(backbone), SplicedModel(backbone, plugin), config)

    def arguments(self, trained: dict, frozen: tuple[dict, dict]) -> tuple[Any, Any]:
        """The backbone's parameters for both, the plugin's arrays for the student alone."""
        backbone, output_scales = frozen
        return (backbone, None), (backbone, PluginVariables(trained, output_scales))


class TaskTraining:
    """The task's own cross-entropy on the whole backbone: `trained` is it, `frozen` is ignored."""

    coefficients: Mapping[str, float] = {"task": 1.0}

    def __init__(self, backbone: Backbone) -> None:
        self._model = SplicedModel(backbone)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Valid positions of the targets."""
        targets = _count(batch["decoder_loss_weights"])
        return {"task": targets, "accuracy": targets}

    def terms(
        self, trained: dict, frozen: None, batch: Batch, rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Cross-entropy, and how many target tokens the largest logit hits."""
        # [batch, target length, vocab]
        logits = self._model.apply(trained, None, batch, rng).logits
        targets, mask = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        return {
            "task": losses.cross_entropy(logits, targets, mask)[0],
            "accuracy": losses.accuracy(logits, targets, mask)[0],
        }


class LoraTraining(TaskTraining):
    """The task's own cross-entropy: `trained` is A and B, `frozen` is the backbone's parameters."""

    def __init__(self, backbone: Backbone, config: LoraConfig) -> None:
        super().__init__(backbone)
        self._config = config

    def terms(
        self, trained: dict, frozen: dict | None, batch: Batch, rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Those of `TaskTraining` on the merged weights, which is what will be served."""
        merged = merge_lora(frozen or {}, trained, self._config)
        return super().terms(merged, None, batch, rng)


def _mask(term: str, masks: Mapping[str, Mask]) -> jax.Array:
    """`[batch, length]` of inputs or targets: where a term counts."""
    return masks["encoder" if term == "encoder_hidden" else "decoder"].valid


def _texts(mask: Mask) -> jax.Array:
    """How many texts the rows hold."""
    return jnp.sum(jnp.max(losses.members_of_texts(mask.valid, mask.segments), axis=1))


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask.astype(jnp.float32))
