"""Several compression ratios of one backbone in one folder, with an index or without.

A set that `save_plugins` wrote holds `plugins.json` and a plugin folder `ratio_<k>` each. Any other
folder whose folders are plugins, or runs that ended with one, will do as well.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping

from variator_jax.errors import CheckpointError
from variator_jax.store import folders, kinds
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.description import (
    CHECKSUMS,
    check_unchanged,
    read_description,
    write_description,
)
from variator_jax.store.files import check_folder
from variator_jax.store.plugin_folder import (
    ARRAYS,
    DESCRIPTION,
    Plugin,
    check_belongs,
    load_plugin,
    save_plugin,
)

INDEX = "plugins.json"
_MEMBER = rf"ratio_\d+/({re.escape(DESCRIPTION)}|{re.escape(ARRAYS)})"


def load_plugins(path: str | os.PathLike, backbone: Backbone | None = None) -> dict[int, Plugin]:
    """Reads the plugins of one backbone, by compression ratio in rising order.

    Args:
      path: a plugin folder, a set, a run folder, or a folder of plugin or run folders; or a T5X
        checkpoint with a plugin, whose backbone is read to the end for its fingerprint.
      backbone: the backbone they must belong to; None leaves that to whoever uses them.

    Raises:
      CheckpointError: if there is none, one is damaged, two have the same ratio, or not all belong
        to the same backbone.
    """
    folder = check_folder(path)
    kind = kinds.kind_of(folder)
    if kind == kinds.RUN:
        folder = _plugin_of_run(folder)
        kind = kinds.kind_of(folder)
    if kind == kinds.T5X:
        from variator_jax.store.t5x_run import load_t5x_plugin  # most users have none

        plugin = load_t5x_plugin(folder, backbone)
        return {plugin.config.ratio: plugin}
    if kind == kinds.PLUGIN:
        plugin = load_plugin(folder, backbone)
        return {plugin.config.ratio: plugin}
    members = [] if kind == kinds.BACKBONE else _members(folder)
    if not members:
        raise kinds.unknown(folder, f"plugin ({DESCRIPTION}) and no folder of plugins")
    return _collected(folder, {member: load_plugin(member, backbone) for member in members})


def save_plugins(
    path: str | os.PathLike, plugins: Mapping[int, Plugin], backbone: Backbone
) -> None:
    """Writes a set, whole or not at all: one folder `ratio_<k>` a plugin, and the index.

    Args:
      path: the folder; a set that is there already is replaced.
      plugins: by compression ratio; what they say of training and quality is kept.
      backbone: the backbone they belong to.

    Raises:
      CheckpointError: if there are none, a key is not its plugin's ratio, or one belongs to
        another backbone.
    """
    if not plugins:
        raise CheckpointError(f"There are no plugins to write to {path}.")
    with folders.atomic_folder(path, replaces=(INDEX,), holds=(_MEMBER,)) as draft:
        for ratio, plugin in sorted(plugins.items()):
            what = f"The plugin of ratio {plugin.config.ratio}"
            if ratio != plugin.config.ratio:
                raise CheckpointError(f"{what} is given as that of ratio {ratio}.")
            said = plugin.description
            if "backbone" in said:
                check_belongs(what, said, backbone)
            member = draft / f"ratio_{ratio}"
            save_plugin(
                member,
                plugin.config,
                plugin.variables,
                backbone,
                said.get("training"),
                said.get("quality"),
            )
        content = {
            "backbone": {"name": backbone.config.name, "fingerprint": backbone.fingerprint},
            "ratios": sorted(plugins),
            CHECKSUMS: {},  # each member's description has its own
        }
        write_description(draft / INDEX, "plugin_set", content)


def _plugin_of_run(folder: pathlib.Path) -> pathlib.Path:
    place = folder / "plugin"
    if not place.is_dir():
        raise CheckpointError(
            f"The run folder {folder} holds no plugin (yet): a run writes it when it ends."
        )
    return place


def _members(folder: pathlib.Path) -> list[pathlib.Path]:
    """The plugin folders of a set; where there is an index, exactly those that it names."""
    found = kinds.plugin_folders(folder)
    if not os.path.lexists(folder / INDEX):
        return found
    fields = read_description(folder / INDEX, "plugin_set")
    ratios = fields.get("ratios", list)
    if not ratios or any(type(ratio) is not int or ratio < 1 for ratio in ratios):
        raise CheckpointError(f"{fields.path}: 'ratios' is no list of compression ratios.")
    fields.fields("backbone").fingerprint("fingerprint")
    check_unchanged(fields)
    named = [folder / f"ratio_{ratio}" for ratio in ratios]
    for missing in sorted(set(named) - set(found)):
        raise CheckpointError(f"{fields.path} names {missing.name}, but there is no plugin in it.")
    for surplus in sorted(set(found) - set(named)):
        raise CheckpointError(
            f"{folder} holds the plugin {surplus.name}, which {INDEX} does not name. Write the "
            f"set anew with save_plugins, or remove {INDEX}."
        )
    return named


def _collected(folder: pathlib.Path, loaded: Mapping[pathlib.Path, Plugin]) -> dict[int, Plugin]:
    """The members by ratio, after seeing that they can lie beside one backbone."""
    by_ratio: dict[int, tuple[pathlib.Path, Plugin]] = {}
    first, first_plugin = next(iter(loaded.items()))
    for member, plugin in loaded.items():
        owners = [each.description["backbone"] for each in (first_plugin, plugin)]
        if owners[0]["fingerprint"] != owners[1]["fingerprint"]:
            raise CheckpointError(
                f"{folder} mixes backbones: {first.relative_to(folder)} belongs to "
                f"{owners[0]['name']!r} with fingerprint {owners[0]['fingerprint']}, "
                f"{member.relative_to(folder)} to {owners[1]['name']!r} with fingerprint "
                f"{owners[1]['fingerprint']}."
            )
        ratio = plugin.config.ratio
        if ratio in by_ratio:
            raise CheckpointError(
                f"{folder} holds two plugins of ratio {ratio}: "
                f"{by_ratio[ratio][0].relative_to(folder)} and {member.relative_to(folder)}."
            )
        by_ratio[ratio] = (member, plugin)
    return {ratio: by_ratio[ratio][1] for ratio in sorted(by_ratio)}
