"""What is written beside a backbone, in a few lines for people: plugins, sets of them, LoRAs."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping

import jax

from variator_jax.store import kinds, lora_folder, plugin_folder, plugin_set
from variator_jax.store.plugin_folder import Plugin
from variator_jax.store.rows import Rows, size_of, titled, values


def describe_plugin(folder: pathlib.Path) -> str:
    """Describes a plugin folder, which is read."""
    plugin = plugin_folder.load_plugin(folder)
    said, owner = plugin.description, plugin.description["backbone"]
    return titled(
        f"compression plugin in {folder}",
        [
            ("ratio", str(plugin.config.ratio)),
            *describe_method(plugin),
            ("fits", f"backbone {owner['name']} with fingerprint {owner['fingerprint']}"),
            ("", f"of {owner['num_encoder_layers']} encoder layers, embed {owner['embed_dim']}"),
            *([("", _merged(owner["lora"]))] if "lora" in owner else []),
            ("vocabulary", said["vocabulary_fingerprint"] or "not recorded"),
            ("trained", values(said["training"])),
            ("quality", values(said["quality"])),
        ],
    )


def describe_method(plugin: Plugin) -> Rows:
    """What a plugin's settings come to."""
    config = plugin.config
    return [
        ("parameters", f"{_count(plugin):,}, {size_of(4 * _count(plugin))}"),
        ("layers", ", ".join(plugin.variables.output_scales) or "none"),
        (
            "method",
            f"compression {config.compression}, decompression {config.decompression}, "
            f"bottleneck {config.bottleneck}",
        ),
        ("sites", str(config.sites)),
    ]


def _merged(lora: Mapping[str, str]) -> str:
    task = f" of task {lora['task']}" if lora["task"] else ""
    return f"with the LoRA{task} merged in whose fingerprint is {lora['fingerprint']}"


def describe_lora(folder: pathlib.Path) -> str:
    """Describes a LoRA folder, which is read."""
    lora = lora_folder.load_lora(folder)
    config, said, owner = lora.config, lora.description, lora.description["backbone"]
    size = lora_folder.lora_bytes(lora)
    return titled(
        f"LoRA in {folder}",
        [
            ("rank", f"{config.rank}, alpha {config.alpha:g}"),
            ("parameters", f"{size // 4:,} for {len(said['weights'])} weights, {size_of(size)}"),
            *(("sites" if not i else "", site) for i, site in enumerate(config.sites)),
            ("fits", f"backbone {owner['name']} with fingerprint {owner['fingerprint']}"),
            ("fingerprint", lora.fingerprint),
            ("vocabulary", said["vocabulary_fingerprint"] or "not recorded"),
            ("trained", values(said["training"])),
        ],
    )


def is_set(folder: pathlib.Path) -> bool:
    """Whether a folder holds plugins of one backbone, one a ratio, and nothing beside them."""
    if (folder / plugin_set.INDEX).exists():
        return True
    found = kinds.plugin_folders(folder)
    return len(found) == len(kinds.parts(folder)) and not (folder / "report.json").exists()


def describe_set(folder: pathlib.Path) -> str:
    """Describes a set of plugins, each of which is read."""
    plugins = plugin_set.load_plugins(folder)
    owner = next(iter(plugins.values())).description["backbone"]
    rows = [("ratios", ", ".join(map(str, plugins)))]
    rows += [
        (
            f"ratio {ratio}",
            f"{_count(plugin):,} parameters, {len(plugin.variables.output_scales)} layers, "
            f"bottleneck {plugin.config.bottleneck}; quality "
            f"{values(plugin.description['quality'])}",
        )
        for ratio, plugin in plugins.items()
    ]
    rows.append(("fits", f"backbone {owner['name']} with fingerprint {owner['fingerprint']}"))
    return titled(f"set of {len(plugins)} compression plugins in {folder}", rows)


def _count(plugin: Plugin) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plugin.variables.params))
