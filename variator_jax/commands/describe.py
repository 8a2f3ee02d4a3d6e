"""What a folder holds, in a few lines for people: `variator inspect PATH`.

Descriptions and headers are enough for a backbone of any size; whether its weights are whole is
known only when all were read, which is done on request. Plugins and LoRAs are always read.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from variator_jax.errors import VariatorError
from variator_jax.store import backbone_folder, formats, lora, plugin_folder
from variator_jax.store.arrays import file_checksum
from variator_jax.store.plugin_folder import Plugin
from variator_jax.store.source import Source, identify

_INDENT = " " * 15


def describe(path: str | os.PathLike, *, verify: bool = False) -> str:
    """Describes a backbone (ours, Hugging Face's or T5X's), plugins, a LoRA, a run or a report.

    Args:
      path: the folder, or a URL of a T5X checkpoint.
      verify: also reads every weight of a backbone, to see that it is whole and what its
        fingerprint is.

    Raises:
      CheckpointError: if the folder is missing, damaged or none of these.
    """
    kind, folder = formats.kind_of(path), pathlib.Path(path)
    if kind == formats.BACKBONE:
        return _backbone("backbone", path, backbone_folder.open_folder(folder, verify), verify)
    if kind == formats.HUGGING_FACE:
        return _backbone("Hugging Face backbone", path, formats.open_backbone(path), verify)
    if kind == formats.T5X:
        return _t5x(path, verify)
    if kind == formats.RUN:
        return _run(folder, verify)
    if kind == formats.PLUGIN:
        return _plugin(folder)
    if kind == formats.LORA:
        return _lora(folder)
    if kind == formats.PLUGIN_SET and _holds_only_plugins(folder):
        return _plugin_set(folder)
    if kind in (formats.PLUGIN_SET, formats.FOLDERS, formats.REPORT):
        return _listing(folder)
    kinds = "backbone (backbone.json, config.json), T5X checkpoint, plugin, LoRA or run folder"
    raise formats.unknown(folder, kinds)


def _titled(title: str, rows: Mapping[str, str]) -> str:
    """A title and its rows, the texts one below another."""
    return "\n".join([title, *(f"  {name + ':':<12} {text}" for name, text in rows.items())])


def _values(values: Mapping[str, Any]) -> str:
    shown = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return ", ".join(shown) or "not recorded"


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _backbone(what: str, path: str | os.PathLike, source: Source, verify: bool) -> str:
    config, leaves = source.config, source.leaves
    fingerprint = identify(source).fingerprint if verify else source.fingerprint
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    unknown = "not known before every weight was read: variator inspect --verify"
    vocabulary = source.vocabulary_file
    decoder = f"and {config.num_decoder_layers} decoder layers" if config.has_decoder else "layers"
    encoder_mlp = f" ({config.encoder_mlp} in the encoder)"
    rows = {
        "parameters": f"{count:,} in {len(leaves)} leaves, {_size(size)} of {dtypes}",
        "shape": f"{config.num_encoder_layers} encoder {decoder}, embed {config.embed_dim}, "
        f"mlp {config.mlp_dim}{encoder_mlp if config.encoder_mlp != config.mlp_dim else ''}, "
        f"{config.num_heads} heads of {config.head_dim}, vocabulary {config.vocab_size}",
        "feed-forward": " * ".join(config.mlp_activations),
        "fingerprint": fingerprint or unknown,
        "vocabulary": file_checksum(vocabulary) if vocabulary else "none in the folder",
        "fits": f"plugins of fingerprint {fingerprint}" if fingerprint else "not known",
        "weights": "read and whole" if verify else "not read; only their names and shapes",
    }
    return _titled(f"{what} {config.name} in {path}", rows)


def _t5x(path: str | os.PathLike, verify: bool) -> str:
    """A checkpoint of T5X, perhaps of a run that trained a plugin, which is read."""
    from variator_jax.store import t5x, t5x_run

    checkpoint = t5x.open_checkpoint(path)
    if not checkpoint.plugin:
        return _backbone("T5X backbone", path, t5x.backbone_source(checkpoint), verify)
    run = t5x_run.open_run(checkpoint)
    rows = _method(Plugin(run.config, t5x_run.read_variables(run)))
    rows["training"] = _values(run.training)
    backbone = _backbone("T5X backbone beside a plugin:", path, run.source, verify)
    return f"{backbone}\n{_titled('compression plugin beside it', rows)}"


def _plugin(folder: pathlib.Path) -> str:
    plugin = plugin_folder.load_plugin(folder)
    rows = _method(plugin) | _record(plugin.description)
    return _titled(f"compression plugin in {folder}", rows)


def _record(record: Mapping[str, Any]) -> dict[str, str]:
    """What the description of a plugin or a LoRA holds of its backbone and its training."""
    owner = record["backbone"]
    rows = {"fits": _owner(owner), "vocabulary": record["vocabulary_fingerprint"] or "not recorded"}
    if "embed_dim" in owner:
        rows["encoder"] = f"{owner['num_encoder_layers']} layers, embed {owner['embed_dim']}"
    if "lora" in owner:
        rows["merged LoRA"] = _values(owner["lora"])
    return rows | {key: _values(record[key]) for key in ("training", "quality") if key in record}


def _owner(owner: Mapping[str, Any]) -> str:
    return f"backbone {owner['name']} with fingerprint {owner['fingerprint']}"


def _method(plugin: Plugin) -> dict[str, str]:
    config, count = plugin.config, _count(plugin.variables.params)
    return {
        "ratio": str(config.ratio),
        "parameters": f"{count:,}, {_size(4 * count)}",
        "places": ", ".join(plugin.variables.output_scales) or "none",
        "sites": f"\n{_INDENT}".join(map(str, config.parts)),
    }


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _lora(folder: pathlib.Path) -> str:
    loaded = lora.load_lora(folder)
    config, record, count = loaded.config, loaded.description, _count(loaded.params)
    rows = {
        "rank": f"{config.rank}, alpha {config.alpha:g}",
        "parameters": f"{count:,} for {len(record['weights'])} weights, {_size(4 * count)}",
        "sites": f"\n{_INDENT}".join(config.sites),
        "fingerprint": loaded.fingerprint,
    }
    return _titled(f"LoRA in {folder}", rows | _record(record))


def _holds_only_plugins(folder: pathlib.Path) -> bool:
    """Whether a folder holds plugins of one backbone, one a ratio, and no other folders."""
    every = len(formats.plugin_folders(folder)) == len(formats.folders_in(folder))
    return (folder / plugin_folder.INDEX).exists() or (
        every and not (folder / "report.json").exists()
    )


def _plugin_set(folder: pathlib.Path) -> str:
    plugins = plugin_folder.load_plugins(folder)
    rows = {"ratios": ", ".join(map(str, plugins))}
    for ratio, plugin in plugins.items():
        variables, quality = plugin.variables, _values(plugin.description["quality"])
        rows[f"ratio {ratio}"] = (
            f"{_count(variables.params):,} parameters, {len(variables.output_scales)} layers, "
            f"bottleneck {plugin.config.bottleneck}; quality {quality}"
        )
        rows["fits"] = _owner(plugin.description["backbone"])
    return _titled(f"set of {len(plugins)} compression plugins in {folder}", rows)


def _run(folder: pathlib.Path, verify: bool) -> str:
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    title = _titled(
        f"run folder {folder}", {"training checkpoints": ", ".join(map(str, steps)) or "none"}
    )
    written = [folder / part for part in ("backbone", "lora", "plugin") if (folder / part).is_dir()]
    parts = [describe(part, verify=verify) for part in written]
    nothing = ["  nothing written yet: a run writes what it trained when it ends"]
    return "\n".join([title, *_report(folder), *(parts or nothing)])


def _listing(folder: pathlib.Path) -> str:
    """A folder of runs, one line each, and the report on them."""
    parts = [f"  {part.name}: {_headline(part)}" for part in formats.folders_in(folder)]
    return "\n".join([f"folder {folder}", *_report(folder), *parts])


def _headline(folder: pathlib.Path) -> str:
    try:
        kind = formats.kind_of(folder)
        if kind == formats.UNKNOWN:
            return "something else"
        lines = describe(folder).splitlines()
    except VariatorError as error:
        return f"cannot be read: {error}"
    parts = [line for line in lines[1:] if not line.startswith(" ")]
    is_run = kind == formats.RUN
    return f"run folder: {'; '.join(parts) or 'nothing written yet'}" if is_run else lines[0]


def _report(folder: pathlib.Path) -> list[str]:
    """A finished evaluation: quality and saved work of each ratio."""
    if not (folder / "report.json").is_file():
        return []
    from variator_jax.evaluation.report import read_report

    report = read_report(folder / "report.json")
    rows = {
        f"ratio {x.ratio}": f"{_values(x.quality)}; {100 * x.flops_saved:.1f} % of the encoder's "
        "FLOPs saved"
        for x in report.ratios
    }
    owner = {"name": report.backbone.name, "fingerprint": report.backbone.fingerprint}
    return [_titled(f"report on {_owner(owner)}", rows)]
