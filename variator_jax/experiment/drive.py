"""Checks an experiment and runs it step by step in one process, which may be killed and restarted.

A step that is done is never repeated; a run of training that was cut off continues from its own
checkpoint.
"""

import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from variator_jax import gin_utils
from variator_jax.backbones.t5 import T5, get_config
from variator_jax.errors import ConfigError, VariatorError
from variator_jax.experiment import rivals
from variator_jax.experiment.grid import Cell, Experiment, Step, configure, plan
from variator_jax.files import write_json
from variator_jax.plugin import PluginConfig
from variator_jax.train.losses import LossConfig

RunTraining = Callable[[Experiment, Step], None]
# Returns a cell's record, ready for JSON.
ScoreCell = Callable[[Experiment, Cell], dict[str, Any]]
# The configuration of steps: `Step.config` -> macro -> value, as text.
Configs = dict[str, dict[str, str]]

# Macros that differ from run to run; the last is inference's, by default the initial one.
_PER_RUN = {"MODEL_DIR", "SEED", "RATIO", "INITIAL_CHECKPOINT_PATH", "INITIAL_PLUGIN_PATH"}
_PER_RUN |= {"CHECKPOINT_PATH"}
_RIVALS = ("similar_tokens", "mean_pool")  # what can be scored only beside some sites
_MACRO = r"%([A-Z]\w*)"
# Macros that may change, for they change no number.
_FREE = {"LOG_PERIOD", "CHECKPOINT_PERIOD", "KEEP_CHECKPOINTS", "EVAL_PERIOD", "MESH_SHAPE"}


def preflight(experiment: Experiment, data: bool = False) -> Configs:
    """Parses the configuration of every step, so that an error shows before anything runs.

    Args:
      experiment: the grid.
      data: whether to look for the data, too, which may train a vocabulary.

    Returns:
      What each configuration sets of what it reads.

    Raises:
      ConfigError: what the first step of a run would raise, after the names of its files.
    """
    from variator_jax.train import loop, optimizers, settings

    # What a run of training is made of, as far as making it costs little.
    parts: list[Callable[..., object]] = [optimizers.optimizer, loop.Schedule]
    parts += [settings.DataConfig] if data else []
    configs: Configs = {}
    derived: dict[str, set[str]] = {}
    checked, examples = [], functools.cache(_examples)
    for step in plan(experiment):
        own = step.macros.keys() - (_PER_RUN - {"RATIO"})
        shared = {name: step.macros[name] for name in own}
        rival = step.cell and step.cell.arm.scored in _RIVALS and (step.cell.arm, step.cell.ratio)
        if (step.files, shared, rival) in checked:
            continue
        checked.append((step.files, shared, rival))
        try:
            configure(experiment, step)
            made: list[Any] = [gin_utils.configured(part)() for part in parts if step.cell is None]
            if rival or step.kind in ("pretrain", "adapt", "student"):
                _check_method(step)
        except VariatorError as error:
            reason = str(error).partition("\n  In call to configurable")[0]  # gin's addition
            raise ConfigError(f"{step.config}: {reason}") from None
        # What an arm sets is part of the arm, not of the recipe.
        arm = {k for k, value in step.macros.items() if value != experiment.settings.get(k)}
        text = gin_utils.resolved_config()
        derived.setdefault(step.config, set()).update(_derived(text, arm) - arm)
        names = {*re.findall(_MACRO, text)} - _PER_RUN - _FREE - arm
        macros = {name: str(gin_utils.macro(name)) for name in sorted(names)}
        if data and made:
            macros["DATA"] = examples(made[-1].task)
        configs[step.config] = configs.get(step.config, {}) | macros
    # What an arm's macros decide in one run is recorded by them, and by those that it reads else.
    return {k: {n: macros[n] for n in macros.keys() - derived[k]} for k, macros in configs.items()}


def _check_method(step: Step) -> None:
    """Refuses sites, losses and rivals that do not fit each other, or the backbone."""
    from variator_jax.train.checks import check_trainable
    from variator_jax.train.objectives import Distillation
    from variator_jax.train.student import StudentDistillation, student_shape

    backbone = T5(gin_utils.configured(get_config)())
    plugin, loss = gin_utils.configured(PluginConfig)(), gin_utils.configured(LossConfig)()
    length = gin_utils.macro("TASK_FEATURE_LENGTHS")["inputs"]
    if step.cell:
        plugin = gin_utils.configured(PluginConfig)(ratio=step.cell.ratio)
        if step.cell.arm.scored == "mean_pool":
            rivals.mean_pool(plugin)
        else:
            rivals.same_flops_ratio(backbone.stack(), length, plugin)
    elif step.kind == "student":
        student = T5(student_shape(backbone.config, length, plugin))
        StudentDistillation(backbone, student, loss)
    else:
        Distillation(backbone, check_trainable(plugin, backbone.stack()), loss)


def _examples(task: str) -> str:
    """What identifies the examples that are in memory, with which scores are compared, too."""
    from variator_jax.data.batches import digest

    return " ".join(digest(task, split)[:16] for split in ("train", "validation"))


def _derived(text: str, names: Collection[str]) -> set[str]:
    """Macros and those whose value in a gin file reads them, directly or through others."""
    found = set(names)
    values = dict(re.findall(r"^([A-Z]\w*) = ((?:.|\n )*)", text, re.MULTILINE))
    while more := {k for k, v in values.items() if found & {*re.findall(_MACRO, v)}} - found:
        found |= more
    return found


def lock(experiment: Experiment, configs: Configs) -> dict[str, Any]:
    """What a folder's numbers are made with, as in its `experiment.json`.

    It must not change under them. A grid may grow, and only what has been made counts: a setting
    that was corrected before anything was made with it is no change.

    Raises:
      ConfigError: if the folder was made with another recipe, other backbones or other macros.
    """
    folder = Path(experiment.model_dir)
    file = folder / "experiment.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    fixed = {
        "recipe": experiment.recipe,
        "backbone_paths": dict(experiment.backbone_paths),
        "teacher_seed": experiment.seeds[0] if experiment.one_teacher else None,
    }
    made = kept.get("configs", {})
    begun = {step.config for step in plan(experiment) if step.begun}
    pairs: dict[str, Any] = {"": (fixed, kept if begun else {})}
    pairs |= {f"{name}: ": (configs[name], made[name]) for name in sorted(begun & made.keys())}
    arms, arms_made = _arms(experiment), kept.get("arms", {})
    for name in sorted(_begun_arms(folder, arms.keys() & arms_made.keys())):
        if arms[name] != arms_made[name]:
            raise ConfigError(
                f"{name} is {arms[name]}; what is in {folder} was made with {arms_made[name]}. "
                "Give the plugin another name."
            )
    for place, (now, before) in pairs.items():
        for name in sorted(now.keys() & before.keys()):
            if now[name] != before[name]:
                raise ConfigError(
                    f"{place}{name} is {now[name]!r}; what is in {folder} was made with "
                    f"{before[name]!r}. Choose another MODEL_DIR; its BACKBONE_PATHS may name a "
                    f"backbone of this one, such as {folder}/{experiment.backbones[0]}/pretrained."
                )
    kept_names = made.keys() - (configs.keys() - begun)
    configs = configs | {n: configs.get(n, {}) | made[n] for n in kept_names}
    return {**fixed, "arms": arms_made | arms, "configs": configs}


def _arms(experiment: Experiment) -> dict[str, Any]:
    """What an arm's runs and scores depend on, by name, as JSON keeps it."""
    names = ("scored", "pretrained", "adapted", "plugin", "loss")
    arms = {arm.name: {n: getattr(arm, n) for n in names} for arm in experiment.all_arms()}
    return json.loads(json.dumps(arms))


def _begun_arms(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the arms of which a folder holds something, whatever the grid is now."""
    places = ("cells/*.{}.k[0-9]*.json", "*/*/seed_*/{}_k[0-9]*/*/*", "*/plugins/{}_k[0-9]*/*/*")
    return {n for n in names if any(any(folder.glob(p.format(n))) for p in places)}


def drive(
    experiment: Experiment, configs: Configs, run_training: RunTraining, score_cell: ScoreCell
) -> list[dict[str, Any]]:
    """Runs what is missing and returns the records of all cells.

    Args:
      experiment: the grid.
      configs: of `preflight`.
      run_training: runs a step of training; see `grid.run_training`.
      score_cell: scores a cell whose training is done; see `score.score_cell`.

    Raises:
      ConfigError: as `lock`.
      VariatorError: from a step.
    """
    write_json(Path(experiment.model_dir) / "experiment.json", lock(experiment, configs))
    steps, started = plan(experiment), time.monotonic()
    arms = {cell.arm.name for cell in experiment.cells()}
    for name in [a.name for a in experiment.all_arms() if a.seeds and a.name not in arms]:
        print(f"Left out: {name}, which has none of the experiment's SEEDS", file=sys.stderr)
    for number, step in enumerate(steps, start=1):
        if step.done:
            continue
        elapsed = datetime.timedelta(seconds=int(time.monotonic() - started))
        print(f"[{number}/{len(steps)}] {step.name}  ({elapsed})", file=sys.stderr, flush=True)
        if step.cell is None:
            run_training(experiment, step)
        else:
            record = score_cell(experiment, step.cell)
            write_json(step.result, record)
            print(f"    {step.cell}: {record['score']:.1f}", file=sys.stderr, flush=True)
        if not step.done:
            raise VariatorError(f"{step.name} ended without {step.result}.")
    files = map(experiment.cell_file, experiment.cells())
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def describe(experiment: Experiment) -> str:
    """What is done and what is missing, for `--dry_run`."""
    steps = plan(experiment)
    lines = [f"experiment {experiment.model_dir}, recipe {experiment.recipe}"]
    for kind in dict.fromkeys(step.kind for step in steps):
        done = [step.done for step in steps if step.kind == kind]
        lines.append(f"  {kind:<9} {sum(done)} of {len(done)} done")
    missing = [step.name for step in steps if not step.done]
    lines += [f"  missing: {name}" for name in missing[:20]]
    if len(missing) > 20:
        lines.append(f"  ... and {len(missing) - 20} more")
    return "\n".join(lines)
