"""What a run checks before its first step, with either engine: vocabulary, plugin and packing."""

import sys
from collections.abc import Mapping
from typing import Any

from variator_jax.backbones.base import Stack
from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig, check_causal, plugin_specs
from variator_jax.store.arrays import file_checksum


def check_vocabulary(
    task: str, vocabulary: Any, config: T5Config, fingerprint: str | None = None
) -> None:
    """Refuses a task whose tokens are not the backbone's.

    Args:
      task: its name, for the message.
      vocabulary: its seqio vocabulary.
      config: the backbone's shape.
      fingerprint: of the SentencePiece model that the backbone was trained with, where known.

    Raises:
      ConfigError: if the vocabulary has more tokens than the backbone has embeddings.
      CheckpointError: if the backbone was trained with another vocabulary.
    """
    if vocabulary.vocab_size > config.vocab_size:
        raise ConfigError(
            f"Task {task!r} has a vocabulary of {vocabulary.vocab_size} tokens, backbone "
            f"{config.name!r} only {config.vocab_size} embeddings."
        )
    from variator_jax.data.vocabulary import local_model_file

    file = local_model_file(vocabulary) if fingerprint else None
    if file and file_checksum(file) != fingerprint:
        raise CheckpointError(
            f"The backbone was trained with another vocabulary than that of task {task!r}, "
            f"{vocabulary.sentencepiece_model_file}. Set VOCABULARY to the backbone's own."
        )


def check_steps(train_steps: int, done: int, folder: str) -> None:
    """Refuses a run that has made more steps already."""
    if done > train_steps:
        raise ConfigError(
            f"TRAIN_STEPS is {train_steps}, and {folder} holds this run after {done} steps "
            "already; raise it, or choose another MODEL_DIR."
        )


def take_longer(before: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Takes a larger TRAIN_STEPS into the record of a run, and prints what that changes.

    The record has it where the schedule depends on it.
    """
    steps, longer = before.get("TRAIN_STEPS"), now.get("TRAIN_STEPS")
    if steps and longer and longer > steps:
        before["TRAIN_STEPS"] = longer
        text = f"TRAIN_STEPS was {steps}, is {longer}: the decay of the learning rate is stretched"
        print(
            f"  {text}, and the run ends as none that had {longer} from its start", file=sys.stderr
        )


def check_trainable(plugin: PluginConfig | None, stack: Stack) -> PluginConfig:
    """Refuses a plugin that has nothing to train on a stack.

    Raises:
      ConfigError: with the remedy.
    """
    if plugin is None or plugin.ratio == 1:
        raise ConfigError("A plugin run needs a compression ratio of 2 or more; set RATIO.")
    check_causal(plugin, stack)
    if not any(plugin_specs(plugin, stack).values()):
        raise ConfigError(
            "This plugin has nothing to train: compression 'mean' with decompression 'repeat' has "
            "no parameters. Evaluate it without training."
        )
    return plugin


def check_packing(pack_multiple: int, ratio: int) -> None:
    """Refuses packed examples that a merge group could span.

    Raises:
      ConfigError: with the remedy.
    """
    if pack_multiple % ratio:
        raise ConfigError(
            f"Packed examples must start on multiples of the ratio {ratio}: set PACK_MULTIPLE to "
            f"one; found {pack_multiple}."
        )
