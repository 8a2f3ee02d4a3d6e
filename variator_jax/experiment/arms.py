"""The arms of an experiment: the method itself, its ablations and its rivals, as a table.

How an arm is trained is given by the macros that it changes in a recipe's gin files, how it is
scored by one word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from variator_jax.errors import ConfigError, did_you_mean

TEACHER = "backbone"
METHOD = "variator"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run an encoder.

    Attributes:
      name: its name in files and on the command line.
      meaning: what it is, in a line of a table.
      scored: 'plugin' (a plugin beside the teacher), 'student' (a backbone of its own), 'teacher',
        'no_ffn', 'truncated', 'mean_pool' or 'similar_tokens'.
      compressed: whether it has a compression ratio.
      pretrained: whether its plugin is pre-trained.
      adapted: whether something is trained on the task.
      plugin: macros of its plugin, in pre-training and adaptation.
      loss: macros of its loss in adaptation.
    """

    name: str
    meaning: str
    scored: str = "plugin"
    compressed: bool = True
    pretrained: bool = True
    adapted: bool = True
    plugin: Mapping[str, object] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, object] = dataclasses.field(default_factory=dict)


def _loss(hidden: float, logits: float, task: float) -> dict[str, object]:
    names = ("ENCODER_HIDDEN_LOSS", "DECODER_HIDDEN_LOSS", "LOGITS_LOSS", "TASK_LOSS")
    return dict(zip(names, (hidden, hidden, logits, task), strict=True))


_UNTRAINED: dict[str, Any] = {"pretrained": False, "adapted": False}
_ALL = (
    Arm(TEACHER, "uncompressed", "teacher", compressed=False, **_UNTRAINED),
    Arm(METHOD, "compression plugin"),
    Arm("no_pretraining", "without plugin pre-training", pretrained=False),
    Arm("no_adaptation", "without plugin adaptation", adapted=False),
    Arm("mean_weights", "averaging, no learned weights", plugin={"COMPRESSION": "mean"}),
    Arm("no_decompression", "without decompression", plugin={"DECOMPRESSION": "repeat"}),
    Arm("loss_hidden", "adapted on hidden states", loss=_loss(1.0, 0.0, 0.0)),
    Arm("loss_task", "adapted on the task loss", loss=_loss(0.0, 0.0, 1.0)),
    Arm("loss_both", "adapted on hidden states and task", loss=_loss(1.0, 0.0, 1.0)),
    Arm("loss_logits", "adapted on the teacher's logits", loss=_loss(0.0, 1.0, 0.0)),
    Arm("student", "smaller student, distilled", "student", pretrained=False),
    Arm("mean_pool", "mean-pooling, untrained", "mean_pool", **_UNTRAINED),
    Arm("similar_tokens", "similar tokens merged, same FLOPs", "similar_tokens", **_UNTRAINED),
    Arm("truncated", "input cut to the same FLOPs", "truncated", **_UNTRAINED),
    Arm("no_ffn", "no encoder FFN (control)", "no_ffn", compressed=False, **_UNTRAINED),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}


def arms_named(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms of these names, the teacher first whether named or not.

    Raises:
      ConfigError: for an unknown name, with the nearest.
    """
    chosen = list(dict.fromkeys([TEACHER, *names]))
    for name in chosen:
        if name not in ARMS:
            raise ConfigError(
                f"There is no arm {name!r}.{did_you_mean(name, ARMS)} Arms: {', '.join(ARMS)}."
            )
    return tuple(ARMS[name] for name in chosen)
