"""Where a run's numbers go: one console line, `log.jsonl`, and TensorBoard events beside it."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax


class RunLog:
    """Writes metrics by step. A resumed run appends to what is there.

    Of several processes the first one writes; the others are silent.
    """

    def __init__(self, model_dir: str | os.PathLike, train_steps: int) -> None:
        folder = pathlib.Path(model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._train_steps, self._main = train_steps, jax.process_index() == 0
        # The others' lines go nowhere.
        name = folder / "log.jsonl" if self._main else os.devnull
        self._jsonl = open(name, "a", encoding="utf8")  # noqa: SIM115
        self._tensorboard = _tensorboard(folder) if self._main else None

    def say(self, text: str) -> None:
        """Prints one line for people."""
        if self._main:
            print(text, file=sys.stderr, flush=True)

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends `metrics` of 'train' or 'eval' to the files."""
        row: dict[str, Any] = {"kind": kind, "step": step, "time": round(time.time(), 3), **metrics}
        self._jsonl.write(json.dumps(row) + "\n")
        self._jsonl.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints a line of training progress; `metrics` has steps/s and tokens/s among others."""
        left = (self._train_steps - step) / max(metrics["steps_per_second"], 1e-9)
        width = len(str(self._train_steps))
        self.say(
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
    """TensorFlow's own event writer."""

    def __init__(self, folder: pathlib.Path) -> None:
        import tensorflow

        self._summary = tensorflow.summary
        self._writer = self._summary.create_file_writer(str(folder))

    def scalar(self, name: str, value: float, step: int) -> None:
        with self._writer.as_default():
            self._summary.scalar(name, value, step=step)

    def close(self) -> None:
        self._writer.close()


def _tensorboard(folder: pathlib.Path) -> _TensorBoard | None:
    """A run without TensorBoard (and TensorFlow) keeps the JSONL file alone."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    return _TensorBoard(folder / "tensorboard")
