"""What a run writes while it trains: its identity, its training checkpoints and its metrics."""

import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from variator_jax import mesh as meshes
from variator_jax.errors import CheckpointError
from variator_jax.files import local_path, lock_folder, wrap_errors, write_json
from variator_jax.plugin import PluginConfig
from variator_jax.train.checks import take_longer
from variator_jax.train.step import TrainState

_LONGEST = 4096  # bytes of a message between processes


class Checkpoints:
    """The training checkpoints of one run folder: the train state, which is what a step changes.

    Its `run.json` holds what the run trains and how; a folder is never continued as another run.
    One run at a time writes a folder: its process 0 holds a lock until `close`.
    """

    def __init__(self, model_dir: str | os.PathLike, keep: int, identity: dict[str, Any]) -> None:
        self._folder = local_path("MODEL_DIR", model_dir).absolute()
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        if others := meshes.differing(np.frombuffer(digest, np.uint8)):
            raise CheckpointError(
                f"Processes {others} have other settings, weights or data than process 0; all need "
                "the same gin files, folders and rows."
            )
        # Process 0 reads the file; all processes raise its error, so that none waits for another.
        self._lock, difference = contextlib.ExitStack(), ""
        self._longer: dict[str, Any] | None = None  # a record to write once a step was made with it
        if jax.process_index() == 0:
            try:
                self._lock.enter_context(lock_folder(self._folder))
                difference, self._longer = _other_run(self._folder, identity)
            except CheckpointError as error:
                difference = f"MODEL_DIR {error}"
        text = difference.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
        text = bytes(meshes.from_first(np.frombuffer(text, np.uint8))).rstrip(b"\0")
        if text:
            self._lock.close()
            raise CheckpointError(text.decode(errors="ignore"))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._lock.close)
            self._manager = ocp.CheckpointManager(self._folder / "checkpoints", options=options)
            on_error.pop_all()

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
        with wrap_errors(f"The checkpoint of step {step} in {self._folder} cannot be restored"):
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def save(self, state: TrainState) -> None:
        """Saves in the background, unless that step is saved already."""
        step = int(state.step)
        if step != self._manager.latest_step():
            with wrap_errors(f"The checkpoint of step {step} in {self._folder} cannot be saved"):
                self._manager.save(step, args=ocp.args.StandardSave(state))
                if self._longer is not None:
                    self._manager.wait_until_finished()
                    write_json(self._folder / "run.json", self._longer)
                    self._longer = None

    def close(self) -> None:
        """Waits until everything is on disk."""
        with self._lock, wrap_errors(f"A checkpoint in {self._folder} cannot be saved"):
            self._manager.wait_until_finished()
            self._manager.close()


def _other_run(folder: pathlib.Path, identity: dict[str, Any]) -> tuple[str, dict | None]:
    """Writes what a fresh run trains, or compares it.

    Returns:
      How the folder's run differs, empty if it does not; and the record of one that has become
      longer.
    """
    path = folder / "run.json"
    identity = json.loads(json.dumps(identity))
    try:
        if not path.is_file():
            write_json(path, identity)
            return "", None
        before = json.loads(path.read_text(encoding="utf8"))
        if "sites" in (before.get("plugin") or ()):  # in the form of this version
            plugin = PluginConfig.from_json(before["plugin"]).to_run()
            before["plugin"] = json.loads(json.dumps(plugin))
        longer = take_longer(before, identity)
    except (ValueError, OSError) as error:
        return f"{path} cannot be read as JSON, or written: {error}.", None
    # Earlier versions wrote less; what is unknown is not compared.
    differs = [
        f"its {name} is {before[name]!r}, this one's is {value!r}"
        for name, value in identity.items()
        if name in before and before[name] != value
    ]
    if not differs:
        print(longer, end="", file=sys.stderr)
        return "", before if longer else None
    remedy = "Give the former again, choose another MODEL_DIR, or remove that folder."
    tasks = [str(each.get("task")) for each in (before, identity)]
    if tasks[0] != tasks[1] and len({re.sub("_[0-9a-f]{8}$", "", task) for task in tasks}) == 1:
        remedy += (
            " A task's name ends in a hash of its settings, the absolute paths of DATA_DIR and "
            "VOCABULARY among them: if those have moved, a link at the former place serves."
        )
    return f"{folder} holds another run: {'; '.join(differs)}. {remedy}", None


class RunLog:
    """Metrics by step: console lines, `log.jsonl`, and TensorBoard events where it is installed.

    A resumed run appends. Of several processes only the first writes.
    """

    def __init__(self, model_dir: str | os.PathLike, train_steps: int) -> None:
        self._folder = folder = pathlib.Path(model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._train_steps, self._main = train_steps, jax.process_index() == 0
        name = folder / "log.jsonl" if self._main else os.devnull
        self._jsonl = open(name, "a", encoding="utf8")  # noqa: SIM115
        self._events: Any = None
        if self._main and importlib.util.find_spec("tensorboard") is not None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._events = EventFileWriter(str(folder / "tensorboard"))

    def print(self, text: str) -> None:
        """Prints one line to standard error."""
        if self._main:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends `metrics` of 'train' or 'eval' to the files."""
        row: dict[str, Any] = {"kind": kind, "step": step, "time": round(time.time(), 3), **metrics}
        with wrap_errors(f"The log in {self._folder} cannot be written"):
            self._jsonl.write(json.dumps(row) + "\n")
            self._jsonl.flush()
            if self._events is not None:
                from tensorboard.compat.proto import event_pb2, summary_pb2

                summary = summary_pb2.Summary()
                for name, value in metrics.items():
                    summary.value.add(tag=f"{kind}/{name}", simple_value=value)
                event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
                self._events.add_event(event)
                self._events.flush()

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints a line of training progress; `metrics` has steps/s and tokens/s among others."""
        seconds = (self._train_steps - step) / max(metrics["steps_per_second"], 1e-9)
        width = len(str(self._train_steps))
        self.print(
            f"  step {step:>{width}}/{self._train_steps}  loss {metrics['loss']:.4f}  "
            f"{metrics['steps_per_second']:.2f} steps/s  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  "
            f"ETA {datetime.timedelta(seconds=round(seconds))}"
        )

    def close(self) -> None:
        """Flushes and closes the files."""
        with wrap_errors(f"The log in {self._folder} cannot be written"):
            self._jsonl.close()
            if self._events is not None:
                self._events.close()
