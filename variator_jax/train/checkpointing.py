"""Training checkpoints through Orbax. They hold the train state: what a step changes."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from variator_jax import mesh as meshes
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.train.step import TrainState

_LONGEST = 4096  # bytes of a message between processes


class Checkpoints:
    """The training checkpoints of one run folder.

    Its `run.json` holds what the run trains; a folder is never continued as another run.
    """

    def __init__(self, model_dir: str | os.PathLike, keep: int, identity: dict[str, Any]) -> None:
        folder = _local_folder(model_dir)
        _check_identity(folder / "run.json", identity)
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder / "checkpoints", options=options)

    def latest_step(self) -> int | None:
        """The newest step that was saved whole, None for a fresh run."""
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, in the shapes, dtypes and shardings of `like`.

        Raises:
          CheckpointError: if it does not fit.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        step = self._manager.latest_step()
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._folder} cannot be restored: "
                f"{str(error).splitlines()[0]} Choose another MODEL_DIR to start afresh."
            ) from error

    def save(self, state: TrainState) -> None:
        """Saves in the background, unless that step is saved already."""
        step = int(state.step)
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _local_folder(model_dir: str | os.PathLike) -> pathlib.Path:
    if not isinstance(model_dir, str | os.PathLike):
        raise ConfigError(f"MODEL_DIR is {model_dir!r}; it must be a path, in quotes.")
    if "://" in str(model_dir):
        raise ConfigError(
            f"MODEL_DIR {str(model_dir)!r} is not a local folder; the built-in engine writes to "
            "local or mounted folders only."
        )
    folder = pathlib.Path(model_dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"MODEL_DIR {folder} cannot be made: {error.strerror}.") from error
    return folder


def _check_identity(path: pathlib.Path, identity: dict[str, Any]) -> None:
    """Process 0 reads the file; all processes raise its error, so that none waits for another."""
    error = _from_process_0(_other_run(path, identity) if jax.process_index() == 0 else "")
    if error:
        raise CheckpointError(error)


def _other_run(path: pathlib.Path, identity: dict[str, Any]) -> str:
    """Writes what the run trains; returns how the folder's run differs, empty if it does not."""
    identity = json.loads(json.dumps(identity))
    try:
        if not path.is_file():
            path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf8")
            return ""
        before = json.loads(path.read_text(encoding="utf8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"{path} is not readable JSON: {error}."
    except OSError as error:
        return f"{path} cannot be read or written: {error.strerror}."
    if before.get("trained") == "plugin" and "sites" not in (before.get("plugin") or {}):
        return (
            f"{path.parent} holds a plugin run of variator_jax 0.1, whose training checkpoints "
            f"this version cannot continue. Choose another MODEL_DIR; where {path.parent}/plugin "
            "exists, INITIAL_PLUGIN_PATH starts from it."
        )
    for name in identity:
        if before.get(name) != identity[name]:
            return (
                f"{path.parent} holds another run: its {name} is {before.get(name)!r}, this one's "
                f"is {identity[name]!r}. Choose another MODEL_DIR, or remove that folder."
            )
    return ""


def _from_process_0(text: str) -> str:
    """Process 0's text, in every process; all call this together."""
    # All processes bring an array of the same shape.
    content = text.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    given = bytes(meshes.from_first(np.frombuffer(content, np.uint8)))
    return given.rstrip(b"\0").decode(errors="ignore")
