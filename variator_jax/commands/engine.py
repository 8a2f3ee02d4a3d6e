"""From arguments to an engine: parsing for it, starting T5X's program, or telling the plan."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from variator_jax.errors import ConfigError

# What the built-in engine leaves to T5X, and what to do without T5X.
NOT_BUILTIN = {
    "export": (
        "the built-in engine writes no SavedModel: that is T5X's, and docs/t5x.md says how T5X is "
        "installed. Without it, variator infer scores and decodes, and VariatorModel serves a "
        "plugin folder from Python."
    ),
    "precompile": (
        "the built-in engine compiles nothing for machines that are not there: that is T5X's, and "
        "docs/t5x.md says how T5X is installed. Without it, --dry_run tells what a run needs."
    ),
}


def on_builtin_engine(args: argparse.Namespace, command: str) -> bool:
    """Parses the configuration, and says whether the caller shall go on with it.

    Otherwise it was a check or a dry run; or, on T5X, this process has become T5X's program.
    """
    from variator_jax.commands import engines

    engine = engines.choose(args.engine)
    print(f"engine: {engine.name} ({engine.why})", file=sys.stderr, flush=True)
    if engine.name == engines.BUILTIN:
        if command in NOT_BUILTIN:
            raise ConfigError(NOT_BUILTIN[command])
        if args.t5x_flags:
            raise ConfigError(f"{' '.join(args.t5x_flags)}: these are T5X's, not the engine's.")
    overrides = parse(args, command, engine, not args.dry_run or args.check, not args.check)
    if args.check:
        return False
    if args.tfds_data_dir and engine.name == engines.BUILTIN:
        import seqio

        seqio.set_tfds_data_dir_override(args.tfds_data_dir)
    if engine.name == engines.BUILTIN and not args.dry_run:
        return True
    flags = [f"--tfds_data_dir={args.tfds_data_dir}"] if args.tfds_data_dir else []
    flags += _t5x_process_flags(args)
    paths = _search_paths(args, command, engine)
    program = engines.command_line(
        command, args.gin_file, overrides, paths, [*flags, *args.t5x_flags]
    )
    if not args.dry_run:
        engines.run_program(program)
    _tell_plan(command, engine.name == engines.BUILTIN)
    if engine.name == engines.T5X:
        print(f"T5X's own command:\n  {shlex.join(program)}")
    return False


def _t5x_process_flags(args: argparse.Namespace) -> list[str]:
    """The flags by which T5X's training joins several processes."""
    names = ("coordinator_address", "process_count", "process_index")
    given = {name: getattr(args, name, None) for name in names}
    if all(value is None for value in given.values()) and not getattr(args, "multiprocess", False):
        return []
    return ["--multiprocess_gpu", *(f"--{k}={v}" for k, v in given.items() if v is not None)]


def _tell_plan(command: str, builtin: bool) -> None:
    """Prints the configuration, what it leaves open, and what the run will need."""
    from variator_jax import gin_utils

    print(gin_utils.resolved_config())
    missing = gin_utils.leave_unset()
    if builtin:
        from variator_jax.train import plan

        train_only = {} if command == "train" else {"optimizer": None}
        print(gin_utils.configured(plan.plan)(**train_only))
    else:
        from variator_jax.t5x_engine import plan as t5x_plan

        print(gin_utils.configured(t5x_plan.plan)())
    print(f"still to be set: {', '.join(missing) or 'nothing'}")


def parse(
    args: argparse.Namespace, command: str, engine: Any, require: bool, rehearse: bool = True
) -> Any:
    """Parses the gin files for an engine's command; returns the overrides as gin literals.

    Args:
      args: what `gin_arguments` has added.
      command: whose part of the engine's configuration is meant.
      engine: the engine, of `engines.choose`.
      require: whether required macros must be set.
      rehearse: whether T5X's checkpoints and folders are looked at, too.

    Raises:
      ConfigError: as `gin_utils.parse`, and for macros of the other engine.
    """
    from variator_jax import gin_utils
    from variator_jax.commands import engines

    if not args.gin_file:
        raise ConfigError(
            "no gin file given: --gin_file=nano_docs.gin is the smallest packaged one."
        )
    engines.refuse_foreign(engine.name, command, args.bindings)
    paths = _search_paths(args, command, engine)
    if engine.name == engines.BUILTIN:
        return gin_utils.parse(args.gin_file, args.bindings, paths, require)
    return engines.check(command, args.gin_file, args.bindings, paths, require, rehearse)


def _search_paths(args: argparse.Namespace, command: str, engine: Any) -> list[str]:
    """The user's folders, then what the engine's part of the configuration lies in."""
    return [*own_search_paths(args), *engine.search_paths(command)]


def own_search_paths(args: argparse.Namespace) -> list[str]:
    """The folders of `--gin_search_paths`."""
    return [path for group in args.gin_search_paths for path in group.split(",") if path]
