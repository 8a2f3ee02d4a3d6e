"""`launch/quickstart.sh`: a small T5 trained, compressed and measured, from nothing to a report.

A list of `variator` commands, run one after the other in this process, each printed as it could be
typed. A stage that ended is not run again; one that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import shlex
import sys
import time

from variator_jax import cli
from variator_jax.gin_utils import as_override

RATIOS = (2, 4, 8)
_WHY = (
    "Why a figure may be missed: a minute of plugin training and 2,000 validation examples a task "
    "leave a difference of about half a point to chance, and other work on the machine spoils the "
    "clock. Longer adaptation (TRAIN_STEPS in quickstart/adapt.gin) and a quiet machine help."
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, and the file whose presence means that it has ended."""

    name: str
    command: tuple[str, ...]
    result: pathlib.Path


def stages(folder: pathlib.Path) -> list[Stage]:
    """The commands of the quickstart, in order, writing below `folder`."""
    pretrained, finetuned = folder / "pretrained", folder / "finetuned"
    plan = [
        _train(folder, "backbone pre-training", pretrained, "backbone", "quickstart/backbone.gin"),
        _train(
            folder,
            "backbone fine-tuning",
            finetuned,
            "backbone",
            "quickstart/finetune.gin",
            INITIAL_CHECKPOINT_PATH=str(pretrained),
        ),
    ]
    for ratio in RATIOS:
        plugin, adapted = folder / f"plugin_{ratio}", folder / f"adapted_{ratio}"
        plan += [
            _train(
                folder,
                f"plugin pre-training, ratio {ratio}",
                plugin,
                "plugin",
                "quickstart/pretrain.gin",
                RATIO=ratio,
                INITIAL_CHECKPOINT_PATH=str(pretrained),
            ),
            _train(
                folder,
                f"plugin adaptation, ratio {ratio}",
                adapted,
                "plugin",
                "quickstart/adapt.gin",
                RATIO=ratio,
                INITIAL_CHECKPOINT_PATH=str(finetuned),
                INITIAL_PLUGIN_PATH=str(plugin),
            ),
        ]
    plugins = tuple(str(folder / f"adapted_{ratio}") for ratio in RATIOS)
    command = _command(
        "eval",
        "quickstart/eval.gin",
        MODEL_DIR=str(folder),
        INITIAL_CHECKPOINT_PATH=str(finetuned),
        PLUGIN_PATHS=plugins,
    )
    return [*plan, Stage("evaluation", command, folder / "report.json")]


def _train(
    folder: pathlib.Path, name: str, model_dir: pathlib.Path, part: str, gin: str, **macros: object
) -> Stage:
    command = _command("train", gin, MODEL_DIR=str(model_dir), **macros)
    return Stage(name, command, model_dir / part / f"{part}.json")


def _command(verb: str, gin: str, **macros: object) -> tuple[str, ...]:
    return (
        verb,
        "--engine=builtin",
        f"--gin_file={gin}",
        *itertools.starmap(as_override, macros.items()),
    )


def run(folder: pathlib.Path) -> int:
    """Runs the stages that have not ended yet; returns the exit code of the first that fails."""
    plan, clock = stages(folder), folder / "seconds.json"
    seconds: dict[str, float] = json.loads(clock.read_text()) if clock.is_file() else {}
    for number, stage in enumerate(plan, start=1):
        if stage.result.is_file():
            continue
        print(f"\n[{number}/{len(plan)}] {stage.name}\n  $ variator {shlex.join(stage.command)}")
        started = time.monotonic()
        try:
            code = cli.main(stage.command)
        finally:
            # Added up, because a stage that was cut off took time before.
            seconds[stage.name] = seconds.get(stage.name, 0.0) + time.monotonic() - started
            folder.mkdir(parents=True, exist_ok=True)
            clock.write_text(json.dumps(seconds, indent=2) + "\n")
        if code:
            return code
    return _finish(folder, seconds)


def _finish(folder: pathlib.Path, seconds: dict[str, float]) -> int:
    """Puts the stages' seconds into the report and says where to go next."""
    from variator_jax.evaluation.report import read_report, write_report
    from variator_jax.evaluation.targets import QUICKSTART, targets_missed

    report = dataclasses.replace(read_report(folder / "report.json"), seconds=seconds)
    notes = (_WHY,) if targets_missed(report, QUICKSTART) else ()
    write_report(dataclasses.replace(report, notes=notes), folder, QUICKSTART)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(
        f"Table, figures and plot: {folder}/report.md, report.json, report.png\n"
        "Where to go next:\n"
        f"  variator inspect {folder}/adapted_4          what a plugin is\n"
        "  README.md, 'Your own data'                 adapt a plugin to your task\n"
        "  variator train --gin_file=mini_docs.gin ... a larger backbone of the same family"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the quickstart."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model_dir", default="runs/quickstart", help="where everything goes (%(default)s)"
    )
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return run(pathlib.Path(parser.parse_args(argv).model_dir))


if __name__ == "__main__":
    sys.exit(main())
