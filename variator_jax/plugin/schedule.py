"""Sites in words, as gin files and reports write them: 'ffn 0 x4', 'span 3-5 x8 rank=16'.

A site is KIND LAYERS xRATIO and settings: KIND is ffn, kv or span, LAYERS is 'all', a layer, or
layers such as 0,2,4-7, and settings are NAME=VALUE with the names of the kind's fields. What a site
leaves out, its ratio too, is the plugin's.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from variator_jax.errors import PluginError, did_you_mean
from variator_jax.plugin.sites.base import Site
from variator_jax.plugin.sites.ffn import Ffn
from variator_jax.plugin.sites.key_value import KeyValue
from variator_jax.plugin.sites.span import Span

SITE_KINDS: dict[str, type] = {"ffn": Ffn, "kv": KeyValue, "span": Span}
_SITE = re.compile(r"(\w+) +(all|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)(?: +x(\d+))?((?: +\w+=\S+)*) *")


def parse_site(text: str, defaults: Mapping[str, Any]) -> Site:
    """A site from words; `defaults` are for the fields that it leaves out.

    Raises:
      PluginError: with the form, for what is none; with the nearest name, for an unknown kind or
        setting.
    """
    match = _SITE.fullmatch(text.strip())
    if match is None:
        raise PluginError(
            f"The site {text!r} is not KIND LAYERS xRATIO with NAME=VALUE, such as 'span 3-5 x8' "
            "or 'ffn all x4 rank=16'."
        )
    kind, layers, ratio, rest = match.groups()
    settings = [setting.split("=", 1) for setting in rest.split()]
    if ratio:
        settings.append(["ratio", ratio])
    fields: dict[str, Any] = {k: int(v) if v.isdecimal() else v for k, v in settings}
    if len(fields) < len(settings) or "layers" in fields:
        raise PluginError(f"The site {text!r} gives a setting twice.")
    if "ratio" not in fields and not defaults.get("ratio"):
        raise PluginError(
            f"The site {text!r} has no ratio: write one, such as '{text.strip()} x4'."
        )
    names = [field.name for field in dataclasses.fields(SITE_KINDS.get(kind, Ffn))]
    inherited = {name: value for name, value in defaults.items() if name in names}
    return make_site(kind, inherited | fields | {"layers": _layers(layers)})


def split_sites(text: str) -> list[str]:
    """The sites of a text, separated by ';' or, as descriptions are written, by ','."""
    return [part for part in re.split(r";|,(?= *[A-Za-z])", text) if part.strip()]


def make_site(kind: str, fields: dict[str, Any]) -> Site:
    """A site of a kind from its fields by name; absent ones take their defaults.

    Raises:
      PluginError: for an unknown kind or field, with the nearest name.
    """
    if kind not in SITE_KINDS:
        raise PluginError(
            f"No site is of kind {kind!r}.{did_you_mean(str(kind), SITE_KINDS)} Known: "
            f"{', '.join(SITE_KINDS)}. A newer version of this library may know it."
        )
    site: Site = build(SITE_KINDS[kind], fields)
    return site


def build(kind: type, fields: dict[str, Any]) -> Any:
    """A dataclass from its fields by name; lists become tuples.

    Raises:
      PluginError: for an unknown field, with the nearest name.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in names:
            raise PluginError(
                f"{kind.__name__} has no field {name!r}.{did_you_mean(name, names)} A newer "
                "version of this library may know it."
            )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise PluginError(f"{kind.__name__} cannot have the fields {values}: {error}.") from error


def describe_site(site: Site) -> str:
    """The inverse of `parse_site`; settings that have their default are left out."""
    settings = [
        f"{field.name}={getattr(site, field.name)}"
        for field in dataclasses.fields(site)  # type: ignore[arg-type]
        if field.name not in ("ratio", "layers") and getattr(site, field.name) != field.default
    ]
    numbers = "all" if site.layers is None else ",".join(_runs(site.layers))
    return " ".join([site.kind, numbers, f"x{site.ratio}", *settings])


def _layers(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise PluginError(f"The layers {part!r} are none; write them in rising order.")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def _runs(layers: Iterable[int]) -> list[str]:
    """Layers as '0', '2-4'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
