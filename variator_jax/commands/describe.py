"""What a folder holds, in a few lines for people: `variator inspect PATH`.

Descriptions and headers are enough for a backbone of any size; whether its weights are whole is
known only when all were read, which is done on request. Plugins and LoRAs are always read.
"""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from variator_jax.errors import VariatorError
from variator_jax.evaluation.report import read_report
from variator_jax.store import arrays, backbone, formats, load_lora, load_plugin, other_plugins, t5x
from variator_jax.store.plugins import INDEX, Plugin


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
        return _backbone("backbone", path, backbone.open_folder(folder, verify), verify)
    if kind == formats.HUGGING_FACE:
        return _backbone("Hugging Face backbone", path, formats.open_backbone(path), verify)
    if kind == formats.T5X:
        return _t5x(path, verify)
    if kind == formats.PLUGIN:
        plugin = load_plugin(folder)
        return _titled(f"compression plugin in {folder}: {plugin.config.name}", _plugin(plugin))
    if kind == formats.LORA:
        return _titled(f"LoRA in {folder}", _lora(folder))
    if kind == formats.RUN:
        return _run(folder, verify)
    if (folder / INDEX).exists():
        plugins = formats.load_plugins(folder).items()
        parts = [_titled(f"{_ratio_or_name(key)}:", _plugin(plugin)) for key, plugin in plugins]
        return "\n".join([f"set of {len(parts)} compression plugins in {folder}", *parts])
    if kind == formats.UNKNOWN:
        kinds = "backbone (backbone.json, config.json), T5X checkpoint, plugin, LoRA or run folder"
        raise formats.unknown(folder, kinds)
    parts = [f"  {part.name}: {_headline(part)}" for part in formats.folders_in(folder)]
    return "\n".join([f"folder {folder}", *_report(folder), *parts])


def _titled(title: str, rows: Mapping[str, Any]) -> str:
    """A title and its rows, the texts one below another."""
    return "\n".join([title, *(f"  {name + ':':<12} {text}" for name, text in rows.items())])


def _values(values: Mapping[str, Any]) -> str:
    shown = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return ", ".join(shown) or "not recorded"


def _backbone(what: str, path: str | os.PathLike, source: backbone.Source, verify: bool) -> str:
    config, leaves = source.config, source.leaves.values()
    fingerprint = backbone.identify(source).fingerprint if verify else source.fingerprint
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    vocabulary = source.vocabulary_file
    unread = "not known before every weight was read: variator inspect --verify"
    rows = {
        "parameters": f"{count:,} in {len(leaves)} leaves, {size / 1e6:,.3f} MB of {dtypes}",
        "shape": f"{config.num_encoder_layers} encoder and {config.num_decoder_layers} decoder "
        f"layers, embed {config.embed_dim}, mlp {config.mlp_dim} "
        f"({config.encoder_mlp} in the encoder), "
        f"{config.num_heads} heads of {config.head_dim}, vocabulary {config.vocab_size}",
        "feed-forward": " * ".join(config.mlp_activations),
        "fits": f"plugins of fingerprint {fingerprint}" if fingerprint else unread,
        "vocabulary": arrays.file_checksum(vocabulary) if vocabulary else "none in the folder",
        "weights": "read and whole" if verify else "not read; only their names and shapes",
    }
    return _titled(f"{what} {config.name} in {path}", rows)


def _t5x(path: str | os.PathLike, verify: bool) -> str:
    """A checkpoint of T5X, perhaps of a run that trained a plugin, which is read."""
    checkpoint = t5x.open_checkpoint(path)
    if not checkpoint.plugin:
        return _backbone("T5X backbone", path, t5x.backbone_source(checkpoint), verify)
    source, plugin = other_plugins.open_run(checkpoint)
    described = _backbone("T5X backbone beside a plugin:", path, source, verify)
    return f"{described}\n{_titled('compression plugin beside it', _plugin(plugin))}"


def _plugin(plugin: Plugin) -> dict[str, Any]:
    return {
        "plugin": plugin.config.name,
        "ratio": plugin.config.ratio,
        "parameters": _count(plugin.variables.params),
        "places": ", ".join(plugin.variables.output_scales) or "none",
        "sites": plugin.config.description,
        **_record(plugin.description),
    }


def _lora(folder: pathlib.Path) -> dict[str, Any]:
    lora = load_lora(folder)
    return {
        "rank": f"{lora.config.rank}, alpha {lora.config.alpha:g}",
        "parameters": f"{_count(lora.params)} for {len(lora.description['weights'])} weights",
        "sites": ", ".join(lora.config.sites),
        "fingerprint": lora.fingerprint,
        **_record(lora.description),
    }


def _count(params: Any) -> str:
    return f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,}"


def _record(record: Mapping[str, Any]) -> dict[str, str]:
    """What the description of a plugin or a LoRA holds of its backbone and its training."""
    rows = {key: _values(record[key]) for key in ("training", "quality") if key in record}
    if "backbone" in record:
        owner = record["backbone"]
        rows["fits"] = f"backbone {owner['name']} with fingerprint {owner['fingerprint']}"
        rows["vocabulary"] = record["vocabulary_fingerprint"] or "not recorded"
        if "lora" in owner:
            rows["merged LoRA"] = _values(owner["lora"])
    return rows


def _run(folder: pathlib.Path, verify: bool) -> str:
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    rows = {"training checkpoints": ", ".join(map(str, steps)) or "none"}
    written = [folder / part for part in ("backbone", "lora", "plugin") if (folder / part).is_dir()]
    parts = [describe(part, verify=verify) for part in written] or ["  nothing written yet"]
    return "\n".join([_titled(f"run folder {folder}", rows), *_report(folder), *parts])


def _headline(folder: pathlib.Path) -> str:
    """One line on a folder: the titles of what it holds, or why it cannot be read."""
    try:
        titles = [line for line in describe(folder).splitlines() if not line.startswith(" ")]
    except VariatorError as error:
        return str(error)
    return "; ".join(titles)


def _ratio_or_name(key: int | str) -> str:
    return f"ratio {key}" if str(key).isdigit() else str(key)


def _report(folder: pathlib.Path) -> list[str]:
    """A finished evaluation: quality and saved work of each ratio."""
    if not (folder / "report.json").is_file():
        return []
    report, saved = read_report(folder / "report.json"), "of the encoder's FLOPs saved"
    owner = f"backbone {report.backbone.name} with fingerprint {report.backbone.fingerprint}"
    rows = {
        _ratio_or_name(entry.label): f"{_values(entry.quality)}; {entry.flops_saved:.1%} {saved}"
        for entry in report.ratios
    }
    return [_titled(f"report on {owner}", rows)]
