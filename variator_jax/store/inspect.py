"""What a folder holds, in a few lines for people: `variator inspect PATH`.

Descriptions and headers are enough for a backbone of any size; whether its weights are whole is
known only when all were read, which is done on request. Plugins and LoRAs are small and always read.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import VariatorError
from variator_jax.store import backbone_folder, formats, lora, plugin_folder
from variator_jax.store.plugin_folder import Plugin
from variator_jax.store.source import Source, identify

_Rows = list[tuple[str, str]]


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
        source = backbone_folder.open_folder(folder, verify)
        return _backbone("backbone", path, source, verify)
    if kind == formats.HUGGING_FACE:
        from variator_jax.store.hugging_face import open_hf

        return _backbone("Hugging Face backbone", path, open_hf(path), verify)
    if kind == formats.T5X:
        return _t5x(path, verify)
    if kind == formats.RUN:
        return _run(folder, verify)
    describers = {formats.PLUGIN: _plugin, formats.LORA: _lora}
    if kind in describers:
        return describers[kind](folder)
    if kind == formats.PLUGIN_SET and _holds_only_plugins(folder):
        return _plugin_set(folder)
    if kind in (formats.PLUGIN_SET, formats.FOLDERS, formats.REPORT):
        return _listing(folder)
    raise formats.unknown(
        folder,
        "backbone (backbone.json, config.json, a T5X checkpoint), plugin (plugin.json), LoRA "
        "(lora.json), set of plugins or run folder",
    )


def _titled(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title and its rows, the texts one below another."""
    return "\n".join(
        [title, *(f"  {name + ':' if name else '':<12} {text}" for name, text in rows)]
    )


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
    config, fingerprint, leaves = source.config, source.fingerprint, source.leaves
    if verify:
        fingerprint = identify(source).fingerprint
    fits = (
        "plugins of that fingerprint"
        if what == "backbone"
        else f"plugins of fingerprint {fingerprint}"
    )
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in leaves}))
    vocabulary = source.vocabulary_file
    return _titled(
        f"{what} {config.name} in {path}",
        [
            ("parameters", f"{count:,} in {len(leaves)} leaves, {_size(size)} of {dtypes}"),
            ("shape", _shape(config)),
            ("feed-forward", " * ".join(config.mlp_activations)),
            (
                "fingerprint",
                fingerprint or "not known before every weight was read: variator inspect --verify",
            ),
            ("vocabulary", _vocabulary(source)),
            *([("fits", fits)] if fingerprint else []),
            ("weights", "read and whole" if verify else "not read; only their names and shapes"),
        ],
    )


def _shape(config: T5Config) -> str:
    decoder = f"and {config.num_decoder_layers} decoder layers" if config.has_decoder else "layers"
    narrow = config.encoder_mlp != config.mlp_dim
    return (
        f"{config.num_encoder_layers} encoder {decoder}, embed {config.embed_dim}, "
        f"mlp {config.mlp_dim}{f' ({config.encoder_mlp} in the encoder)' if narrow else ''}, "
        f"{config.num_heads} heads of {config.head_dim}, vocabulary {config.vocab_size}"
    )


def _t5x(path: str | os.PathLike, verify: bool) -> str:
    """A checkpoint of T5X, perhaps of a run that trained a plugin, which is read."""
    from variator_jax.store import t5x, t5x_run

    checkpoint = t5x.open_checkpoint(path)
    if not checkpoint.plugin:
        return _backbone("T5X backbone", path, t5x.backbone_source(checkpoint), verify)
    run = t5x_run.open_run(checkpoint)
    rows = _method(Plugin(run.config, t5x_run.read_variables(run)))
    return "\n".join(
        [
            _backbone(
                "T5X backbone", f"{path}, with plugin ratio {run.config.ratio}", run.source, verify
            ),
            _titled("compression plugin beside it", [*rows, ("trained", _values(run.training))]),
        ]
    )


def _plugin(folder: pathlib.Path) -> str:
    plugin = plugin_folder.load_plugin(folder)
    owner, merged = plugin.description["backbone"], plugin.description["backbone"].get("lora")
    task = f" of task {merged['task']}" if merged and merged["task"] else ""
    return _titled(
        f"compression plugin in {folder}",
        [
            *_method(plugin),
            ("fits", _owner(owner)),
            ("", f"of {owner['num_encoder_layers']} encoder layers, embed {owner['embed_dim']}"),
            *([("", f"with the LoRA{task} merged in whose fingerprint is {merged['fingerprint']}")]
              if merged else []),
            ("vocabulary", plugin.description["vocabulary_fingerprint"] or "not recorded"),
            ("trained", _values(plugin.description["training"])),
            ("quality", _values(plugin.description["quality"])),
        ],
    )  # fmt: skip


def _owner(owner: Mapping[str, Any]) -> str:
    return f"backbone {owner['name']} with fingerprint {owner['fingerprint']}"


def _method(plugin: Plugin) -> _Rows:
    config, count = plugin.config, _count(plugin)
    return [
        ("ratio", str(config.ratio)),
        ("parameters", f"{count:,}, {_size(4 * count)}"),
        ("layers", ", ".join(plugin.variables.output_scales) or "none"),
        (
            "method",
            f"compression {config.compression}, decompression {config.decompression}, "
            f"bottleneck {config.bottleneck}",
        ),
        ("sites", config.sites),
    ]


def _count(plugin: Plugin) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plugin.variables.params))


def _lora(folder: pathlib.Path) -> str:
    found = lora.load_lora(folder)
    config, description = found.config, found.description
    count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    weights = f"{count:,} for {len(description['weights'])} weights, {_size(4 * count)}"
    return _titled(
        f"LoRA in {folder}",
        [
            ("rank", f"{config.rank}, alpha {config.alpha:g}"),
            ("parameters", weights),
            *(("" if i else "sites", site) for i, site in enumerate(config.sites)),
            ("fits", _owner(description["backbone"])),
            ("fingerprint", found.fingerprint),
            ("vocabulary", description["vocabulary_fingerprint"] or "not recorded"),
            ("trained", _values(description["training"])),
        ],
    )


def _holds_only_plugins(folder: pathlib.Path) -> bool:
    """Whether a folder holds plugins of one backbone, one a ratio, and no other folders."""
    if (folder / plugin_folder.INDEX).exists():
        return True
    every = len(formats.plugin_folders(folder)) == len(formats.folders_in(folder))
    return every and not (folder / "report.json").exists()


def _plugin_set(folder: pathlib.Path) -> str:
    plugins = plugin_folder.load_plugins(folder)
    owner = next(iter(plugins.values())).description["backbone"]
    rows = [
        (
            f"ratio {ratio}",
            f"{_count(plugin):,} parameters, {len(plugin.variables.output_scales)} layers, "
            f"bottleneck {plugin.config.bottleneck}; quality "
            f"{_values(plugin.description['quality'])}",
        )
        for ratio, plugin in plugins.items()
    ]
    title = f"set of {len(plugins)} compression plugins in {folder}"
    return _titled(
        title, [("ratios", ", ".join(map(str, plugins))), *rows, ("fits", _owner(owner))]
    )


def _run(folder: pathlib.Path, verify: bool) -> str:
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    checkpoints = ", ".join(map(str, steps)) or "none"
    written = [folder / part for part in ("backbone", "lora", "plugin") if (folder / part).is_dir()]
    parts = [describe(part, verify=verify) for part in written]
    return "\n".join(
        [
            _titled(f"run folder {folder}", [("training checkpoints", checkpoints)]),
            *_report(folder),
            *(parts or ["  nothing written yet: a run writes what it trained when it ends"]),
        ]
    )


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
    if kind != formats.RUN:
        return lines[0]
    parts = [line for line in lines[1:] if not line.startswith(" ")]
    return f"run folder: {'; '.join(parts) or 'nothing written yet'}"


def _report(folder: pathlib.Path) -> list[str]:
    """A finished evaluation: quality and saved work of each ratio."""
    if not (folder / "report.json").is_file():
        return []
    from variator_jax.evaluation.report import read_report

    report = read_report(folder / "report.json")
    rows = [
        (
            f"ratio {entry.ratio}",
            f"{_values(entry.quality)}; {100 * entry.flops_saved:.1f} % of the encoder's FLOPs saved",
        )
        for entry in report.ratios
    ]
    owner = report.backbone
    return [_titled(f"report on backbone {owner.name} with fingerprint {owner.fingerprint}", rows)]
