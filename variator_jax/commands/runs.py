"""`train`, `eval`, `infer`, `export` and `precompile`: what an engine runs."""

from __future__ import annotations

import argparse
import signal

from variator_jax.commands.engine import NOT_BUILTIN, on_builtin_engine
from variator_jax.commands.table import command, gin_arguments, process_arguments, run_arguments
from variator_jax.errors import ConfigError


@command(
    "train",
    "Train a compression plugin, or a backbone.",
    (
        "variator train --gin_file=nano_docs.gin --gin_file=runs/backbone.gin "
        "--gin.TRAIN_STEPS=1000 --gin.MODEL_DIR=runs/nano_docs",
        "variator train --gin_file=nano_docs.gin --gin.RATIO=4",
        "t5x train --gin_file=variator_xl.gin --dry_run",
    ),
    gin_arguments,
    run_arguments,
    process_arguments,
)
def _train(args: argparse.Namespace) -> None:
    if on_builtin_engine(args, "train"):
        from variator_jax import distributed, gin_utils
        from variator_jax.train import train

        distributed.initialize(
            args.coordinator_address, args.process_count, args.process_index, args.multiprocess
        )
        with distributed.together():
            interrupted = gin_utils.configured(train.train)().interrupted
        if interrupted:
            raise SystemExit(128 + signal.SIGTERM)  # as if the signal had ended it, for scripts


@command(
    "eval",
    "Evaluate a backbone with its compression plugins: quality, cost and latency per ratio.",
    (
        "variator eval --gin_file=nano_docs.gin --gin_file=runs/eval.gin "
        "--gin.MODEL_DIR=runs/nano_report --gin.INITIAL_CHECKPOINT_PATH=runs/nano_docs "
        "--gin.PLUGIN_PATHS=\"('runs/nano_docs/pretrain_4',)\"",
    ),
    gin_arguments,
    run_arguments,
)
def _eval(args: argparse.Namespace) -> None:
    if on_builtin_engine(args, "eval"):
        from variator_jax import gin_utils
        from variator_jax.evaluation import evaluate

        gin_utils.configured(evaluate.evaluate)()


@command(
    "infer",
    "Write a backbone's predictions, or scores of the targets, for every example of a task.",
    (
        "variator infer --gin_file=nano_docs.gin --gin_file=tasks/docs_tasks.gin "
        "--gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=runs/nano_docs "
        "--gin.PLUGIN_PATH=runs/nano_docs/pretrain_4 --gin.INFER_OUTPUT_DIR=runs/nano_answers",
    ),
    gin_arguments,
    run_arguments,
)
def _infer(args: argparse.Namespace) -> None:
    if on_builtin_engine(args, "infer"):
        from variator_jax import gin_utils
        from variator_jax.evaluation import infer

        gin_utils.configured(infer.infer)()


@command(
    "export",
    "Write a TensorFlow SavedModel that scores or decodes; T5X's, so T5X must be there.",
    (
        "t5x export --gin_file=variator_base.gin --gin_file=runs/export.gin "
        "--gin.CHECKPOINT_PATH=runs/base_4/checkpoint_60000 --gin.MODEL_OUTPUT_DIR=exported/1",
    ),
    gin_arguments,
    run_arguments,
)
def _export(args: argparse.Namespace) -> None:
    if on_builtin_engine(args, "export"):
        raise ConfigError(NOT_BUILTIN["export"])


@command(
    "precompile",
    "Compile the train step for a TPU that is not there; T5X's, so T5X must be there.",
    ("t5x precompile --gin_file=variator_xl.gin --gin.MODEL_DIR=compiled",),
    gin_arguments,
    run_arguments,
)
def _precompile(args: argparse.Namespace) -> None:
    if on_builtin_engine(args, "precompile"):
        raise ConfigError(NOT_BUILTIN["precompile"])
