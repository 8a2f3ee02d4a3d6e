"""The T5X model that trains and runs a compression plugin: distillation loss, start values.

Training evaluation, `predict` and `score` are T5X's own, over the spliced network.
"""

import copy
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from t5x import decoding, metrics, models

from variator_jax.backbones.base import INTERMEDIATES, Batch, Outputs, captured, captures
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.data.batches import GroupedFeatureConverter
from variator_jax.data.vocabulary import load_vocabulary
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig
from variator_jax.t5x_engine import network as t5x_network
from variator_jax.t5x_engine.network import PLUGIN, PluginOptimizer, Start
from variator_jax.train.checks import check_trainable
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Comparison
from variator_jax.train.site_losses import SiteLosses
from variator_jax.train.step import combine

# The modules whose outputs are the last hidden states, in T5X's network.
LAST_NORMS = ("encoder/encoder_norm", "decoder/decoder_norm")


class DistillationModel(models.EncoderDecoderModel):
    """A spliced T5X network whose loss compares it with itself uncompressed.

    Modifications to the host:
      `loss_fn` is the distillation loss, a mean over the whole batch and not a sum.
      `get_initial_variables` starts the plugin where the built-in engine starts it.
      `predict_batch_with_aux` is defined here, because T5X's export.gin binds it, and gin refuses
      to register a subclass that only inherits what is bound.
    """

    def __init__(
        self,
        module: t5x_network.SplicedTransformer,
        vocabulary: Any,
        optimizer: PluginOptimizer | None,
        comparison: Comparison,
        start: Start,
        decode_fn: Any = decoding.beam_search,
        last_norms: tuple[str, str] = LAST_NORMS,
        feature_converter_cls: Any = None,
    ) -> None:
        host = {"decode_fn": decode_fn, "feature_converter_cls": feature_converter_cls}
        super().__init__(module, vocabulary, vocabulary, optimizer, **host)
        self.start = start
        self._comparison = comparison
        self._last_norms = last_norms
        self._whole_weights: Mapping[str, jax.Array] | None = None

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> flax.core.FrozenDict:
        """The network's variables, the plugin's being those of `start`."""
        # T5X's evaluation leaves the types out and then asks for tokens of float32.
        types = {name: jnp.int32 for name in input_shapes} | dict(input_types or {})
        variables = dict(super().get_initial_variables(rng, input_shapes, types))
        if PLUGIN in variables["params"]:
            branch = t5x_network.to_tree(self.start.values())
            variables["params"] = {**variables["params"], PLUGIN: branch}
        return flax.core.freeze(variables)

    def for_batch(self, batch: Batch) -> "DistillationModel":
        """This model with the whole batch's weights, for losses of the batch's parts.

        T5X adds the gradients of microbatches up. Divided by the whole batch's weights, their sum
        is the whole batch's gradient, however many they are.
        """
        model = copy.copy(self)
        model._whole_weights = self._comparison.weights(batch)
        return model

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The distillation loss of a batch, or a microbatch's share of it. Runs without dropout."""
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x if t5x_network.is_trained(path) else jax.lax.stop_gradient(x), params
        )
        teacher = jax.lax.stop_gradient(self.outputs(params, batch, compressed=False))
        student = self.outputs(params, batch, compressed=True)
        arrays = t5x_network.from_tree(params[PLUGIN]).params
        sums = self._comparison.compare(student, teacher, batch, arrays)
        weights = self._whole_weights or self._comparison.weights(batch)
        loss, figures = combine(sums, weights, self._comparison.coefficients)
        return loss, _metrics(figures, batch)

    def outputs(self, params: Any, batch: Batch, compressed: bool) -> Outputs:
        """Last hidden states and logits of one pass, with the plugin in place or without it."""
        stacks = ("encoder", "decoder")
        packing = {f"{stack}_{name}" for stack in stacks for name in ("segment_ids", "positions")}
        logits, variables = self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            **{name: batch[name] for name in packing & batch.keys()},
            enable_dropout=False,
            compressed=compressed,
            capture_intermediates=captures({*self._last_norms, *self._comparison.capture}),
            mutable=[INTERMEDIATES],
        )
        hidden = captured(variables)
        lasts = zip(stacks, self._last_norms, strict=True)
        return Outputs(hidden | {stack: hidden[path] for stack, path in lasts}, logits)

    def predict_batch_with_aux(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
        """T5X's decoding, over the spliced encoder."""
        return super().predict_batch_with_aux(*args, **kwargs)


def model(
    *,
    backbone: T5Config,
    plugin: PluginConfig,
    vocabulary: Any,
    optimizer: Any = None,
    loss: LossConfig | None = None,
    plugin_path: Any = None,
    seed: int = 0,
    trained: str = "plugin",
    initial_lora_path: str | None = None,
    network: nn.Module | None = None,
    last_norms: tuple[str, str] = LAST_NORMS,
    pack_multiple: int = 1,
    decode_fn: Any = decoding.temperature_sample,
) -> DistillationModel:
    """T5X's MODEL, from the settings of the built-in engine.

    Args:
      backbone: shape of the backbone.
      plugin: the compression plugin; ratio 1 evaluates the backbone itself.
      vocabulary: a seqio vocabulary, or the path of a SentencePiece model.
      optimizer: an optax transformation for the plugin's parameters; None where nothing is trained.
      loss: the distillation losses' weights, the paper's by default.
      plugin_path: a plugin folder whose arrays the plugin starts as; None for a fresh one.
      seed: of a fresh plugin.
      trained: must be 'plugin'.
      initial_lora_path: must be None.
      network: a Linen network with T5X's interface, in place of `t5x.examples.t5`'s.
      last_norms: paths of the modules that put out its last hidden states.
      pack_multiple: packed examples start on multiples of it.
      decode_fn: T5X's decoding function; by default greedy, as T5X's temperature 0.

    Raises:
      ConfigError: for settings that T5X cannot serve, with what can.
      CheckpointError: for a plugin folder that is damaged or has another plugin.
    """
    _check_served(trained, initial_lora_path)
    if plugin.pool_padding:  # T5X gives padded rows another result
        raise ConfigError("pool_padding runs on the built-in engine only: use --engine=builtin.")
    if network is not None:
        t5x_network.refuse_scanned(network)
    if optimizer is not None:
        check_trainable(plugin, T5(backbone).stack())
    start = Start(plugin, backbone, plugin_path, seed)
    stack, loss = t5x_network.stack_of(backbone), loss or LossConfig()
    _ = start.loaded  # refuses now what cannot be loaded, and is not read while T5X traces
    network = network or t5x_network.network_of(backbone)
    module = t5x_network.SplicedTransformer(network, plugin, stack)
    converter = type("Converter", (GroupedFeatureConverter,), {"group": pack_multiple})
    return DistillationModel(
        module,
        load_vocabulary(vocabulary) if isinstance(vocabulary, str) else vocabulary,
        None if optimizer is None else PluginOptimizer(optimizer),
        Comparison(loss, T5(backbone), SiteLosses(plugin, stack, loss)),
        start,
        decode_fn=decode_fn,
        last_norms=last_norms,
        feature_converter_cls=converter,
    )


def _check_served(trained: str, initial_lora_path: str | None) -> None:
    if trained != "plugin":
        raise ConfigError(
            f"TRAINED is {trained!r}: under T5X this library trains plugins. A backbone is trained "
            "by t5x/configs/runs/finetune.gin of T5X, or with --engine=builtin."
        )
    if initial_lora_path is not None:
        raise ConfigError(
            f"INITIAL_LORA_PATH is {initial_lora_path!r}: T5X merges no LoRA. Merge it by "
            "save_backbone and variator convert --to t5x, or use --engine=builtin."
        )


def _metrics(figures: Mapping[str, jax.Array], batch: Batch) -> dict[str, Any]:
    """The loss's terms, per step whatever the microbatches, and T5X's clocks."""
    averages = {name: metrics.AveragePerStep.from_model_output(x) for name, x in figures.items()}
    rows, length = batch["encoder_input_tokens"].shape
    rate = metrics.TimeRate.from_model_output
    return averages | {
        "timing/seqs_per_second": rate(numerator=rows),
        "timing/steps_per_second": metrics.StepsPerTime.from_model_output(),
        "timing/input_tokens_per_second": rate(numerator=rows * length),
    }
