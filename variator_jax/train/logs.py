"""A run's metrics: console lines, `log.jsonl` and TensorBoard events."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax


class RunLog:
    """Writes metrics by step; a resumed run appends. Of several processes only the first writes."""

    def __init__(self, model_dir: str | os.PathLike, train_steps: int) -> None:
        folder = pathlib.Path(model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._train_steps, self._main = train_steps, jax.process_index() == 0
        name = folder / "log.jsonl" if self._main else os.devnull
        self._jsonl = open(name, "a", encoding="utf8")  # noqa: SIM115
        self._tensorboard = _tensorboard(folder) if self._main else None

    def print(self, text: str) -> None:
        """Prints one line to standard error."""
        if self._main:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends `metrics` of 'train' or 'eval' to the files."""
        row: dict[str, Any] = {"kind": kind, "step": step, "time": round(time.time(), 3), **metrics}
        self._jsonl.write(json.dumps(row) + "\n")
        self._jsonl.flush()
        if self._tensorboard is not None:
            self._tensorboard.scalars({f"{kind}/{k}": v for k, v in metrics.items()}, step)

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints a line of training progress; `metrics` has steps/s and tokens/s among others."""
        left = (self._train_steps - step) / max(metrics["steps_per_second"], 1e-9)
        width = len(str(self._train_steps))
        self.print(
            f"  step {step:>{width}}/{self._train_steps}  loss {metrics['loss']:.4f}  "
            f"{metrics['steps_per_second']:.2f} steps/s  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  ETA {_clock(left)}"
        )

    def close(self) -> None:
        """Flushes and closes the files."""
        self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _TensorBoard:
    """Writes scalars with TensorBoard's own record writer, which does not import TensorFlow."""

    def __init__(self, folder: pathlib.Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._event, self._summary = Event, Summary
        self._writer = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        value = self._summary.Value
        row = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._write(step=step, summary=self._summary(value=row))
        self._writer.flush()

    def _write(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        self._writer.close()


def _tensorboard(folder: pathlib.Path) -> _TensorBoard | None:
    """A run without TensorBoard keeps the JSONL file alone."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    return _TensorBoard(folder / "tensorboard")
