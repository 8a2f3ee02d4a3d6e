"""The report of an experiment: a row for each arm, and from the rows tables and figures.

The conclusions are the reader's: tables compare arms with the teacher, the majority class and the
method.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from variator_jax.bench.output import NONE, hardware
from variator_jax.experiment import figures, score
from variator_jax.experiment.grid import ARMS, MEAN, METHOD, TEACHER, Experiment
from variator_jax.experiment.paired import LENGTH, as_table, paired_gaps, paired_table, sizes_table
from variator_jax.experiment.score import Rows
from variator_jax.files import write_json

_HOW_TO_READ = (
    "Scores are on a scale of 0 to 100, mean ± standard deviation over seeds; the gap is the "
    "teacher's score less the arm's, seed by seed."
)
_ONE_TEACHER = (
    " The seeds share one teacher and vary what is trained beside it; what is not trained "
    "is the same each time."
)
_PAIRED = (
    "Points below the teacher over the same examples, ± the standard error over examples and seeds "
    "together. A schedule is chosen by the first half of the classification tasks' examples and "
    "judged by the second."
)
_PUBLISHED = (
    f"The plugins on published sizes, by formula: the encoder's FLOPs saved at {LENGTH} tokens, "
    "plugin and adapters counted, and the plugin's share of the backbone's parameters."
)
# What a cell's record holds beside its score, the same for each of its seeds.
_COSTS = ["flops_saved", "extra_parameters", "extra_parameters_share", "parameters", "majority"]
_LATENCY = ["milliseconds", "spread", "speedup", "allowed"]
_HEADLINES = ("accuracy", "token_f1")  # these are the scores themselves


def report(experiment: Experiment, records: Rows) -> str:
    """Aggregates, measures what is missing, writes everything; returns the Markdown."""
    folder = Path(experiment.model_dir)
    latency, neurons = score.latencies(experiment), score.neurons(experiment)
    table = rows(records, latency)
    table.to_json(folder / "results.json", orient="records", indent=2, double_precision=15)
    table.drop(columns=["scores", "details"]).to_csv(folder / "results.csv", index=False)
    write_json(folder / "neurons.json", neurons)
    plots = _plots(experiment, table, neurons)
    for name, draw in plots.items():
        figures.save(draw, folder / f"{name}.png")
    text = _markdown(experiment, table, latency, neurons, records)
    text += "".join(f"\n![{name}.png]({name}.png)\n" for name in plots)
    (folder / "results.md").write_text(text, encoding="utf-8")
    names = ", ".join(f"{name}.png" for name in plots)
    return f"{text}\nWritten: {folder}/results.md, .csv, .json, {names}"


def rows(records: Rows, latency: Iterable[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """Aggregates cells over seeds, task by task and over all tasks.

    Args:
      records: of all cells, see `score.score_cell`.
      latency: of encoder passes, see `score.latencies`.

    Returns:
      A row for each backbone, task, arm and ratio, with the columns:
        task: a task's name, or 'mean': of the mean over several tasks, after all tasks.
        ratio: 1 where nothing is compressed.
        seeds: how many runs.
        mean, std: of the score, 0 to 100; the sample standard deviation is 0 for one seed.
        scores: seed -> score.
        gap, gap_std: of the teacher's score less this one, seed by seed, in points.
        details: means of further scores, such as F1.
        examples: that a score is over, of all tasks together for 'mean'.
        flops_saved: share of the encoder's FLOPs; negative where it costs more.
        extra_parameters, extra_parameters_share: weights beside the backbone's, over them.
        parameters: the backbone's.
        majority: score of the majority class, NaN where there is none.
        milliseconds, spread: a measured encoder pass and its interquartile range; NaN if not
          measured.
        speedup, allowed: measured over the backbone's, and the one that the saved FLOPs allow.
    """
    cells = pd.DataFrame(records).astype({"majority": float})
    if cells["task"].nunique() > 1:
        seeds = cells.groupby(["backbone", "arm", "ratio", "seed"], sort=False)
        means = seeds[["score", *_COSTS]].mean(skipna=False)
        means["examples"] = seeds["examples"].sum()
        means = means.reset_index().astype({"extra_parameters": int, "parameters": int})
        cells = pd.concat([cells, means.assign(task=MEAN, details=[{}] * len(means))])
    pairs = ["backbone", "task", "seed"]
    teachers = cells[cells["arm"] == TEACHER].set_index(pairs)["score"].rename("teacher")
    cells = cells.join(teachers, on=pairs)
    cells["gap"] = cells["teacher"] - cells["score"]
    groups = cells.groupby(["backbone", "task", "arm", "ratio"], sort=False)
    table = groups.agg(
        seeds=("score", "size"),
        mean=("score", "mean"),
        std=("score", "std"),
        gap=("gap", "mean"),
        gap_std=("gap", "std"),
        **{name: (name, "first") for name in ("examples", *_COSTS)},
    ).fillna({"std": 0.0, "gap_std": 0.0})
    table["scores"] = [dict(zip(g["seed"], g["score"], strict=True)) for _, g in groups]
    table["details"] = [pd.DataFrame(list(g["details"])).mean().to_dict() for _, g in groups]
    keys = {"backbone": str, "arm": str, "ratio": int}
    measured = pd.DataFrame(latency, columns=[*keys, *_LATENCY])
    measured = measured.astype(keys | dict.fromkeys(_LATENCY, float))
    return table.reset_index().merge(measured, "left", [*keys])


def _plots(
    experiment: Experiment, table: pd.DataFrame, neurons: Rows
) -> dict[str, Callable[[], Any]]:
    metric = "score" if table["majority"].isna().any() else "accuracy"
    plots: dict[str, Callable[[], Any]] = {}
    for backbone, part in table.groupby("backbone", sort=False):
        if METHOD in experiment.arms:
            plots[f"ratios_{backbone}"] = partial(figures.ratio_figure, part, metric)
        for ratio in experiment.arm_ratios if experiment.arms else ():
            plots[f"arms_{backbone}_k{ratio}"] = partial(figures.arms_figure, part, ratio, metric)
    if METHOD in experiment.arms and len(experiment.backbones) > 1:
        plots["sizes"] = partial(figures.size_figure, table)
    if neurons:
        plots["neurons"] = partial(figures.neuron_figure, pd.DataFrame(neurons))
    return plots


def _markdown(
    experiment: Experiment, table: pd.DataFrame, latency: Rows, neurons: Rows, records: Rows
) -> str:
    seeds = ", ".join(map(str, experiment.seeds))
    one_teacher = experiment.one_teacher and len(experiment.seeds) > 1
    sections = [
        f"# Experiment {Path(experiment.model_dir).name}",
        f"{time.strftime('%Y-%m-%d')}, {hardware()}; recipe `{experiment.recipe}`, seeds {seeds}. "
        f"{_HOW_TO_READ}{_ONE_TEACHER if one_teacher else ''}",
    ]
    for backbone, part in table.groupby("backbone", sort=False):
        own = [record for record in records if record["backbone"] == backbone]
        sections += [f"## {backbone}", quality_table(part), standard_errors(own)]
        if compared := rivals_table(part):
            sections += ["The plugin's score less that of other arms of its ratio:", compared]
        if experiment.plugins:
            if paired := paired_table(paired_gaps(own)):
                sections += [_PAIRED, paired]
            if published := sizes_table(own):
                sections += [_PUBLISHED, published]
    if METHOD in experiment.arms:
        sections += ["## Sizes and latency", size_table(table)]
    if latency:
        words = "{backbone}: {batch} x {length} tokens in {dtype} on {hardware}"
        passes = dict.fromkeys(words.format(**row) for row in latency)
        sections.append(
            f"Encoder passes ({'; '.join(passes)}), medians of interleaved rounds; "
            "the last column is the measured speed-up over the one that the saved FLOPs allow."
        )
    if neurons:
        sections += ["## Activated neurons", neuron_table(neurons)]
        sections.append(
            "Share of the encoder's FFN neurons that fire, mean over layers; "
            "task {task}, seed {seed}.".format(**neurons[0])
        )
    return "\n\n".join(filter(None, sections)) + "\n"


# Tables.


def quality_table(rows: pd.DataFrame) -> str:
    """One line an arm and ratio of a backbone: mean ± deviation, the gap, the costs, and the rest.

    The rest is what a task is scored by besides its headline, such as F1.
    """
    gap = "gap of the mean" if MEAN in set(rows["task"]) else "gap"
    lines = []
    for (arm, ratio), group in rows.groupby(["arm", "ratio"], sort=False):
        line = _names(arm, ratio) | {row["task"]: _score(row) for _, row in group.iterrows()}
        overall = group.iloc[-1]
        line |= {gap: NONE if arm == TEACHER else _gap(overall), **_costs(overall)}
        for row in group.itertuples():
            names = [name for name in row.details if name not in _HEADLINES]
            line |= {f"{row.task} {name}": _plain(row.details[name]) for name in names}
        lines.append(line)
    majority = rows.groupby("task")["majority"].first()
    lines.append({"arm": "majority class"} | {task: _plain(x) for task, x in majority.items()})
    return as_table(lines)


def size_table(table: pd.DataFrame) -> str:
    """One line a backbone and ratio of the method: gap, costs and latency."""
    lines = [
        {
            "backbone": row["backbone"],
            "parameters": f"{row['parameters'] / 1e6:,.2f} M",
            "k": str(row["ratio"]),
            "gap": _gap(row),
            **_costs(row),
            "encoder pass": _plain(row["milliseconds"], "{:.2f} ms"),
            "speed-up": _plain(row["speedup"], "{:.2f}x"),
            "of allowed": _plain(100 * row["speedup"] / row["allowed"], "{:.0f} %"),
        }
        for _, row in figures.overall_rows(table).iterrows()
    ]
    return as_table(lines)


def neuron_table(neurons: Sequence[Mapping[str, Any]]) -> str:
    """Mean shares over layers, one line a backbone and ratio; see `score.neurons`."""
    kinds = {"token": "one token", "share": "merged vector", "union": "a group's tokens together"}
    return as_table(
        {"backbone": row["backbone"], "k": str(row["ratio"])}
        | {name: _percent(row[kind]) for kind, name in kinds.items()}
        for row in neurons
        if row["layer"] == "mean"
    )


def rivals_table(rows: pd.DataFrame) -> str:
    """The method's score less that of each arm of the same ratio, seed by seed: mean ± deviation.

    One line an arm and ratio of a backbone; empty without such an arm.
    """
    ours = rows[rows["arm"] == METHOD].set_index(["ratio", "task"])["scores"]
    rivals = rows[rows["ratio"].isin(ours.index.unique("ratio")) & (rows["arm"] != METHOD)]
    lines = []
    for (arm, ratio), group in rivals.groupby(["arm", "ratio"], sort=False):
        line = _names(arm, ratio)
        for row in group.itertuples():
            gains = (pd.Series(ours[ratio, row.task]) - pd.Series(row.scores)).dropna()
            deviation = f" ± {gains.std():.1f}" if len(gains) > 1 else ""
            line[row.task] = f"{gains.mean():+.1f}{deviation}"
        lines.append(line)
    return as_table(lines)


def standard_errors(records: Rows) -> str:
    """A sentence on what each task's number of examples leaves uncertain; empty without scores.

    Args:
      records: of the cells of one backbone; the teachers' scores of each example count.
    """
    errors: dict[str, str] = {}
    for record in [record for record in records if record["arm"] == TEACHER]:
        parts = [np.asarray(scores) for scores in record.get("scores", {}).values()]
        if parts and all(map(len, parts)):  # of a mixture, the score is the mean over its tasks
            error = math.sqrt(sum(part.var() / len(part) for part in parts)) / len(parts)
            place = f"{record['task']} ({record['examples']:,} examples)"
            errors.setdefault(place, f"{error:.1f} on {place}")
    if not errors:
        return ""
    return (
        "Whatever the deviation over seeds, a score has a standard error of "
        f"{', '.join(errors.values())}; a difference between two arms has up to 1.4 times as much."
    )


# Cells.


def _names(arm: str, ratio: int) -> dict[str, str]:
    known = ARMS.get(arm)  # others are the experiment's own plugins
    compressed = known is None or known.compressed
    return {"arm": known.meaning if known else arm, "k": str(ratio) if compressed else ""}


def _costs(row: pd.Series) -> dict[str, str]:
    if row["arm"] == TEACHER:
        return {"FLOPs saved": "", "extra parameters": ""}
    extra = _percent(row["extra_parameters_share"], 2)
    return {"FLOPs saved": _percent(row["flops_saved"]), "extra parameters": extra}


def _score(row: pd.Series) -> str:
    return f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["seeds"] > 1 else "")


def _gap(row: pd.Series) -> str:
    return f"{row['gap']:+.2f}" + (f" ± {row['gap_std']:.2f}" if row["seeds"] > 1 else "")


def _plain(value: float, form: str = "{:.1f}") -> str:
    return NONE if pd.isna(value) else form.format(value)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
