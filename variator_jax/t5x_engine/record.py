"""What a T5X run trains, written once beside its checkpoints and compared when it is resumed.

`variator convert --from t5x-run` reads it; T5X itself would go on with anything whose shapes fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from tensorflow.io import gfile

from variator_jax.errors import CheckpointError
from variator_jax.store.description import config_content
from variator_jax.store.t5x_run import SETTINGS
from variator_jax.t5x_engine.model import DistillationModel


def check_same_run(folder: str, model: DistillationModel, training: Mapping[str, Any]) -> None:
    """Refuses to go on with a run in whose folder another one was begun.

    Args:
      folder: MODEL_DIR.
      model: what is trained now.
      training: `task`, `batch_size` and `seed`, which decide what the next batches are.

    Raises:
      CheckpointError: naming what differs.
    """
    file = os.path.join(folder, SETTINGS)
    if not gfile.exists(file):
        return
    with gfile.GFile(file, "r") as lines:
        before = json.loads(lines.read())
    now = _plain({**_shape_of(model), "training": dict(training)})
    differing = [
        f"{name} {before.get(part, {}).get(name)!r}"
        for part, fields in now.items()
        for name, value in fields.items()
        if before.get(part, {}).get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"MODEL_DIR {folder} holds another run, with {', '.join(differing)}; choose another "
            "MODEL_DIR."
        )


def write_record(
    folder: str, model: DistillationModel, training: Mapping[str, Any], checkpoint: str | None
) -> None:
    """Writes what a run trains, unless it is a run that goes on."""
    file = os.path.join(folder, SETTINGS)
    if gfile.exists(file):
        return
    content = {
        **_shape_of(model),
        "training": {"engine": "t5x", **training},
        "initial_checkpoint_path": checkpoint,
        "initial_plugin_path": model.start.path,
    }
    gfile.makedirs(folder)
    with gfile.GFile(file, "w") as out:
        out.write(json.dumps(content, indent=2) + "\n")


def _shape_of(model: DistillationModel) -> dict[str, Any]:
    start = model.start
    return {
        "plugin": start.plugin.to_json(),
        "backbone": config_content(start.backbone),
    }


def _plain(content: Any) -> Any:
    return json.loads(json.dumps(content))
