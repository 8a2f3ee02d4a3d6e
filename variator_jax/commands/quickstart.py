"""`launch/quickstart.sh`: a small T5 trained, compressed and measured, from nothing to a report.

A list of `variator` commands, run one after the other in this process, each printed as it could be
typed. A stage that ended is not run again; one that was interrupted is resumed.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import shlex
import sys
import time
from typing import Any, NamedTuple

from variator_jax.commands import registry, verbs  # noqa: F401 - verbs enters the commands
from variator_jax.errors import ConfigError
from variator_jax.files import local_path, write_json
from variator_jax.gin_utils import as_override

# Folder -> macros: the paper's plugin at two ratios, and spans of one layer with adapters.
PLUGINS: dict[str, dict[str, Any]] = {
    "2": {"RATIO": 2},
    "4": {"RATIO": 4},
    "span_4": {
        "RATIO": 4,
        "SITES": ("span all size=1",),
        "ADAPTER_RANK": 16,
        "DECODER_HIDDEN_LOSS": 10.0,
        "RESIDUAL_LOSS": 1.0,
    },
}
_NOTE = (
    "A figure may be missed by chance: a minute of training and 2,000 examples a task leave about "
    "half a point, and other work on the machine distorts the latencies. Longer adaptation "
    "(TRAIN_STEPS in quickstart/adapt.gin, into another folder) and a quiet machine help."
)
_NEXT = """\
Table, figures and plot: {folder}/report.md, report.json, report.png
Where to go next:
  variator inspect {folder}/adapted_4          what a plugin is
  docs/usage.md, 'Your own data'             adapt a plugin to your task
  variator train --gin_file=mini_docs.gin ... a larger backbone of the same family"""


class Stage(NamedTuple):
    """One command, and the file whose presence means that it has ended."""

    name: str
    command: tuple[str, ...]
    result: pathlib.Path


def stages(folder: pathlib.Path) -> list[Stage]:
    """The commands of the quickstart, in order, writing below `folder`."""
    pretrained, finetuned = folder / "pretrained", folder / "finetuned"
    general = {"INITIAL_CHECKPOINT_PATH": str(pretrained)}
    tuned = {"INITIAL_CHECKPOINT_PATH": str(finetuned)}
    plan = [
        _stage("backbone pre-training", "backbone", pretrained),
        _stage("backbone fine-tuning", "finetune", finetuned, **general),
    ]
    for name, sites in PLUGINS.items():
        plugin, adapted = folder / f"plugin_{name}", folder / f"adapted_{name}"
        initial = {"INITIAL_PLUGIN_PATH": str(plugin)}
        plan += [
            _stage(f"plugin pre-training, {name}", "pretrain", plugin, **sites, **general),
            _stage(f"plugin adaptation, {name}", "adapt", adapted, **sites, **tuned, **initial),
        ]
    plugins = tuple(str(folder / f"adapted_{name}") for name in PLUGINS)
    return [*plan, _stage("evaluation", "eval", folder, **tuned, PLUGIN_PATHS=plugins)]


def _stage(name: str, recipe: str, folder: pathlib.Path, **macros: object) -> Stage:
    """The stage of `quickstart/RECIPE.gin` with these macros, writing to `folder`."""
    part = "plugin" if recipe in ("pretrain", "adapt") else "backbone"
    result = "report.json" if recipe == "eval" else f"{part}/{part}.json"
    verb, files = "eval" if recipe == "eval" else "train", f"--gin_file=quickstart/{recipe}.gin"
    overrides = itertools.starmap(as_override, [("MODEL_DIR", str(folder)), *macros.items()])
    return Stage(name, (verb, "--engine=builtin", files, *overrides), folder / result)


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
            code = registry.run(stage.command)
        finally:
            # Added up, because an interrupted stage took time before.
            seconds[stage.name] = seconds.get(stage.name, 0.0) + time.monotonic() - started
            write_json(clock, seconds)
        if code:
            return code
    _finish(folder, seconds)
    return 0


def _finish(folder: pathlib.Path, seconds: dict[str, float]) -> None:
    """Adds the stages' seconds to the report and prints it, and what to do next."""
    from variator_jax.evaluation.report import read_report, write_report
    from variator_jax.evaluation.schema import targets_missed

    report = read_report(folder / "report.json")
    notes = [note for note in report.notes if note != _NOTE]
    notes += [_NOTE] if targets_missed(report) else []
    write_report(dataclasses.replace(report, seconds=seconds, notes=notes), folder, promised=True)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(_NEXT.format(folder=folder))


def main(argv: list[str] | None = None) -> int:
    """Runs the quickstart."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    where = "the folder of all results (%(default)s)"
    parser.add_argument("--model_dir", default="runs/quickstart", help=where)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        folder = local_path("--model_dir", parser.parse_args(argv).model_dir).expanduser()
    except ConfigError as error:
        parser.error(str(error))
    return run(folder)


if __name__ == "__main__":
    sys.exit(main())
