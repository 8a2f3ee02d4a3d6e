"""What a run checks before its first step, with either engine: vocabulary, plugin and packing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_jax.backbones.base import Stack
from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.hf_tokenizer import JSON, SETTINGS
from variator_jax.plugin import PluginConfig, check_causal, plugin_specs
from variator_jax.store.arrays import file_checksum
from variator_jax.texts import Tokenizer, load_tokenizer

# What two vocabularies with the same ids write alike, but hardly two others.
_PROBES = (
    "The quick brown fox, 1984: (jumps) over 12.5% of lazy dogs\u2019 \u201chomes\u201d!",
    "two\nlines  and\ttab, na\u00efve \ufb01ne \u00bd \uff21 \u65e5\u672c\u8a9e \U0001f642",
)


def check_vocabulary(
    task: str, vocabulary: Any, config: T5Config, file: Path | None = None
) -> None:
    """Refuses a task whose tokens are not the backbone's.

    Args:
      task: its name, for the message.
      vocabulary: its seqio vocabulary.
      config: the backbone's shape.
      file: the vocabulary that the backbone came with, where it did.

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

    if file is None:
        return
    tokenizer, given = load_tokenizer(file, config.vocab_size), local_model_file(vocabulary)
    if file.name in (JSON, SETTINGS):
        same = not _differ(vocabulary, tokenizer)
    else:
        same = given is not None and file_checksum(given) == file_checksum(file)
    if not same:
        raise CheckpointError(
            f"The backbone was trained with another vocabulary than that of task {task!r}, "
            f"{vocabulary}. Set VOCABULARY to the backbone's own, {file}."
        )


def _differ(vocabulary: Any, tokenizer: Tokenizer) -> bool:
    """Whether a text becomes other ids."""
    sentinel = list(vocabulary.encode("<extra_id_0>"))
    if len(sentinel) == 1 and sentinel != [tokenizer.sentinels.get("<extra_id_0>")]:
        return True
    probes = [*_PROBES, *(f"a {token} b" for token in tokenizer.added)]
    return any([*vocabulary.encode(text), 1] != tokenizer.encode(text) for text in probes)


def check_steps(train_steps: int, done: int, folder: str) -> None:
    """Refuses a run that has made more steps already."""
    if done > train_steps:
        raise ConfigError(
            f"TRAIN_STEPS is {train_steps}, and {folder} holds this run after {done} steps "
            "already; raise it, or choose another MODEL_DIR."
        )


def take_longer(before: dict[str, Any], now: Mapping[str, Any]) -> str:
    """Takes a larger TRAIN_STEPS into the record of a run; returns a line on what that changes.

    The record has it where the schedule depends on it.
    """
    steps, longer = before.get("TRAIN_STEPS"), now.get("TRAIN_STEPS")
    if not (steps and longer and longer > steps):
        return ""
    before["TRAIN_STEPS"] = longer
    return (
        f"  TRAIN_STEPS was {steps}, is {longer}: the decay of the learning rate is stretched, and "
        f"the run ends as none that had {longer} from its start\n"
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

    `ratio` is the least common multiple of those of the plugin's sites.

    Raises:
      ConfigError: with the remedy.
    """
    if pack_multiple % ratio:
        raise ConfigError(
            f"Packed examples must start on multiples of the ratio {ratio}: set PACK_MULTIPLE to "
            f"one; found {pack_multiple}."
        )
