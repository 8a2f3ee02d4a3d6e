"""What a folder is, in a few lines for people: `variator inspect PATH`.

Descriptions and headers say it all, so that a backbone of any size is described at once; that its
weights are whole is only seen by reading them, which is done on request. What lies beside a
backbone is described in `inspect_plugins.py`.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError, VariatorError
from variator_jax.store import backbone_folder, inspect_plugins, kinds
from variator_jax.store.description import check_unchanged
from variator_jax.store.plugin_folder import Plugin
from variator_jax.store.rows import Rows, size_of, titled, values
from variator_jax.store.safetensors_file import read_header


def describe(path: str | os.PathLike, *, verify: bool = False) -> str:
    """Describes a backbone (ours, Hugging Face's or T5X's), plugins, a LoRA, a run or a report.

    Args:
      path: the folder, or a URL of a T5X checkpoint.
      verify: also reads every weight of a backbone, to see that it is whole and what its
        fingerprint is. Plugins and LoRAs are small and always read.

    Raises:
      CheckpointError: if the folder is missing, damaged or none of these.
    """
    kind, folder = kinds.kind_of(path), pathlib.Path(path)
    if kind == kinds.BACKBONE:
        return _backbone(folder, verify)
    if kind == kinds.HUGGING_FACE:
        from variator_jax.store.hf_folder import open_hf

        return _source("Hugging Face backbone", path, open_hf(path), verify)
    if kind == kinds.T5X:
        return _t5x(path, verify)
    if kind == kinds.PLUGIN:
        return inspect_plugins.describe_plugin(folder)
    if kind == kinds.LORA:
        return inspect_plugins.describe_lora(folder)
    if kind == kinds.RUN:
        return _run(folder, verify)
    if kind == kinds.PLUGIN_SET and inspect_plugins.is_set(folder):
        return inspect_plugins.describe_set(folder)
    if kind in (kinds.PLUGIN_SET, kinds.FOLDERS, kinds.REPORT):
        return _listing(folder)
    raise CheckpointError(
        f"{folder} is no backbone (backbone.json, config.json, a T5X checkpoint), no plugin "
        f"(plugin.json), no LoRA (lora.json), no set of plugins and no run folder: "
        f"{kinds.held(folder)}."
    )


def _backbone(folder: pathlib.Path, verify: bool) -> str:
    said = backbone_folder.read_backbone_description(folder)
    file = folder / backbone_folder.ARRAYS
    entries = read_header(file)
    backbone_folder.check_header(file, said.config, entries)
    check_unchanged(said.fields)
    if verify:
        backbone_folder.load_backbone(folder)
    return titled(
        f"backbone {said.config.name} in {folder}",
        [
            *_sizes(entries.values()),
            *_shape(said.config),
            ("fingerprint", said.fingerprint),
            ("vocabulary", said.vocabulary_fingerprint or "none in the folder"),
            ("fits", "plugins of that fingerprint"),
            ("weights", "read and whole" if verify else "not read; only their names and shapes"),
        ],
    )


def _t5x(path: str | os.PathLike, verify: bool) -> str:
    """A checkpoint of T5X, perhaps of a run that trained a plugin, which is read."""
    from variator_jax.store import t5x, t5x_run

    checkpoint = t5x.open_checkpoint(path)
    if not checkpoint.plugin:
        return _source("T5X backbone", path, t5x.backbone_source(checkpoint), verify)
    run = t5x_run.run_of(checkpoint)
    plugin = Plugin(run.config, t5x_run.read_variables(run))
    ratio = run.config.ratio
    owner = _source("T5X backbone", path, run.source, verify, f" with plugin ratio {ratio}")
    rows = [
        ("ratio", str(ratio)),
        *inspect_plugins.describe_method(plugin),
        ("trained", values(run.training)),
    ]
    return f"{owner}\n{titled('compression plugin beside it', rows)}"


def _source(what: str, path: str | os.PathLike, source: Any, verify: bool, beside: str = "") -> str:
    """A backbone in another's format, from its headers."""
    fingerprint = "not known before every weight was read: variator inspect --verify"
    fits: Rows = []
    if verify:
        from variator_jax.store import stream

        fingerprint = stream.copy(source, lambda *_: None).fingerprint
        fits = [("fits", f"plugins of fingerprint {fingerprint}")]
    vocabulary = source.vocabulary_file
    return titled(
        f"{what} {source.config.name}{beside} in {path}",
        [
            *_sizes(source.leaves),
            *_shape(source.config),
            ("fingerprint", fingerprint),
            ("vocabulary", vocabulary.name if vocabulary else "none in the folder"),
            *fits,
            ("weights", "read and whole" if verify else "not read; only their names and shapes"),
        ],
    )


def _sizes(leaves: Iterable[Any]) -> Rows:
    leaves = list(leaves)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    return [("parameters", f"{count:,} in {len(leaves)} leaves, {size_of(size)} of {dtypes}")]


def _shape(config: T5Config) -> Rows:
    decoder = f"and {config.num_decoder_layers} decoder layers"
    narrow = (
        "" if config.encoder_mlp == config.mlp_dim else f" ({config.encoder_mlp} in the encoder)"
    )
    return [
        (
            "shape",
            f"{config.num_encoder_layers} encoder {decoder if config.has_decoder else 'layers'}, "
            f"embed {config.embed_dim}, mlp {config.mlp_dim}{narrow}, "
            f"{config.num_heads} heads of {config.head_dim}, vocabulary {config.vocab_size}",
        ),
        ("feed-forward", " * ".join(config.mlp_activations)),
    ]


def _run(folder: pathlib.Path, verify: bool) -> str:
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    lines = titled(
        f"run folder {folder}",
        [("training checkpoints", ", ".join(map(str, steps)) or "none")],
    )
    written = [folder / part for part in ("backbone", "lora", "plugin") if (folder / part).is_dir()]
    parts = [describe(part, verify=verify) for part in written]
    if not parts:
        parts = ["  nothing written yet: a run writes what it trained when it ends"]
    return "\n".join([lines, *_report(folder), *parts])


def _listing(folder: pathlib.Path) -> str:
    """A folder of runs, one line each, and the report on them."""
    lines = [f"folder {folder}", *_report(folder)]
    for part in kinds.parts(folder):
        lines.append(f"  {part.name}: {_headline(part)}")
    return "\n".join(lines)


def _headline(folder: pathlib.Path) -> str:
    try:
        kind = kinds.kind_of(folder)
        if kind == kinds.UNKNOWN:
            return "something else"
        lines = describe(folder).splitlines()
    except VariatorError as error:
        return f"cannot be read: {error}"
    if kind != kinds.RUN:
        return lines[0]
    found = [line for line in lines[1:] if not line.startswith(" ")]
    return f"run folder: {'; '.join(found) or 'nothing written yet'}"


def _report(folder: pathlib.Path) -> list[str]:
    """A finished evaluation: quality and saved work of each ratio."""
    if not (folder / "report.json").is_file():
        return []
    from variator_jax.evaluation.report import read_report

    report = read_report(folder / "report.json")
    rows = [
        (
            f"ratio {entry.ratio}",
            f"{values(entry.quality)}; {100 * entry.flops_saved:.1f} % of the encoder's FLOPs "
            "saved",
        )
        for entry in report.ratios
    ]
    owner = report.backbone
    title = f"report on backbone {owner.name} with fingerprint {owner.fingerprint}"
    return [titled(title, rows)]
