"""Static configuration of a compression plugin, and its form in JSON."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from variator_jax.errors import PluginError
from variator_jax.plugin.schedule import SITE_KINDS, build, describe_site, make_site, parse_site
from variator_jax.plugin.sites.base import Site
from variator_jax.plugin.sites.ffn import ENCODER_MLP, Ffn

_DEFAULTS = ("ratio", "bottleneck", "rank")  # of sites in words that leave them out
NONE, AUTO = "none", "auto"  # for a plugin's name: the backbone itself, the server's choice


@dataclasses.dataclass(frozen=True, eq=False)
class PluginConfig:
    """Settings of a compression plugin.

    `PluginConfig(4)` is the paper's plugin: FFN sites of ratio 4 in every encoder layer. The fields
    `bottleneck` to `decompression` are those of its FFN sites, see `sites.ffn.Ffn`.

    Attributes:
      ratio: how many neighbouring hidden vectors become one; 1 is the backbone itself, whatever
        the sites. With a tuple of sites it is the largest of theirs, and need not be given.
      bottleneck: width of the hidden decompression; the paper's is 64.
      layers: the encoder layers to compress, None for all.
      compression: 'learned' or 'mean'.
      decompression: 'bottleneck' or 'repeat'.
      rank: of the low-rank adapters on the FFNs' matrices; 0 for none.
      pool_padding: let padding enter the merges, as the official code does. Only for its released
        plugins: a result then depends on how far its batch is padded.
      sites: module path of the FFNs to surround, with `(\\d+)` for the layer's number; or a site or
        a tuple of them with settings of their own, as objects or in words, such as
        `('ffn 0 x4', 'span 1-5 x8 rank=16')`, see `schedule`.
      given_name: what the plugin is called; '' for its kinds and ratio, such as 'span_x4'.
    """

    ratio: int = 0
    bottleneck: int = 64
    layers: Sequence[int] | None = None
    compression: str = "learned"
    decompression: str = "bottleneck"
    pool_padding: bool = False
    sites: str | Sequence[Site | str] = ENCODER_MLP
    rank: int = 0
    given_name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.pool_padding, bool):
            raise PluginError(f"pool_padding is True or False; found {self.pool_padding!r}.")
        name, form = self.given_name, r"(?!ratio_\d)([A-Za-z][A-Za-z0-9_]*)?"
        if name in (NONE, AUTO) or not isinstance(name, str) or not re.fullmatch(form, name):
            raise PluginError(
                "A plugin's name is a letter, then letters, digits and '_', but not "
                f"{NONE!r}, {AUTO!r} or 'ratio_4'; found {name!r}."
            )
        if isinstance(self.sites, Site) or isinstance(self.sites, str) and " " in self.sites:
            object.__setattr__(self, "sites", (self.sites,))
        if isinstance(self.sites, str):
            site = self._ffn()  # checks the settings
            object.__setattr__(self, "layers", site.layers)
            return
        if not isinstance(self.sites, Sequence):
            raise PluginError(f"A plugin's sites are a tuple of sites; found {self.sites!r}.")
        in_words = [site for site in self.sites if isinstance(site, str)]
        defaults = {name: getattr(self, name) for name in _DEFAULTS}
        sites = tuple(parse_site(s, defaults) if isinstance(s, str) else s for s in self.sites)
        object.__setattr__(self, "sites", sites)
        if not sites or not all(isinstance(s, tuple(SITE_KINDS.values())) for s in sites):
            raise PluginError(f"A plugin's sites are a tuple of sites; found {sites!r}.")
        if self.pool_padding and any(site.kind != "ffn" for site in sites):
            raise PluginError("pool_padding is for the official release's plugins: FFN sites only.")
        ratios = [site.ratio for site in sites]
        if self.ratio not in (0, 1, *(ratios if in_words else [max(ratios)])):
            raise PluginError(
                f"The plugin's ratio is {self.ratio}; its sites have {ratios}. RATIO is for sites "
                "without one of their own: set it to one of these, or leave it out of the sites."
            )
        if self.ratio != 1 and min(ratios) == 1:
            where = f"{describe_site(sites[ratios.index(1)])!r} merges nothing"
            raise PluginError(f"The site {where}: leave its layers out.")
        object.__setattr__(self, "ratio", 1 if self.ratio == 1 else max(ratios))
        _check_overlaps(sites)
        for field in dataclasses.fields(self):
            if field.name in ("ratio", "sites", "pool_padding", "given_name"):
                continue
            if getattr(self, field.name) != field.default and not (
                in_words and field.name in _DEFAULTS
            ):
                raise PluginError(
                    f"{field.name}={getattr(self, field.name)!r} is for a plugin of the paper's "
                    "sites; sites in words have their own layers and settings, such as "
                    "'ffn 0-3 x4 compression=mean'; found "
                    f"'{', '.join(map(describe_site, sites))}'."
                )
            object.__setattr__(self, field.name, field.default)

    @property
    def parts(self) -> tuple[Site, ...]:
        """The sites, each with its settings; none at ratio 1."""
        if self.ratio == 1:
            return ()
        if isinstance(self.sites, str):
            return (self._ffn(),)
        return tuple(s for s in self.sites if not isinstance(s, str))

    @property
    def period(self) -> int:
        """The number of tokens on whose multiples groups of all its sites begin."""
        return math.lcm(*(site.ratio for site in self.parts))

    @property
    def name(self) -> str:
        """The name that it was given, or its kinds of sites and its ratio, such as 'span_x4'.

        '' for the backbone itself.
        """
        kinds = "_".join(dict.fromkeys(site.kind for site in self.parts))
        return (self.given_name or f"{kinds}_x{self.ratio}") if kinds else ""

    def __eq__(self, other: object) -> bool:
        """Whether both have the same sites in the same order, whatever they are called."""
        return isinstance(other, PluginConfig) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[Any, ...]:
        return self.pool_padding and bool(self.parts), self.parts

    @property
    def description(self) -> str:
        """Its sites in words, such as 'ffn 0 x4, span 1-5 x8 rank=16'."""
        return ", ".join(describe_site(site) for site in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The form in which plugin folders keep it: `pool_padding` and a list of sites."""
        parts: Sequence[Any] = self.parts
        sites = [{"kind": site.kind, **dataclasses.asdict(site)} for site in parts]
        if len(sites) == 1 and "pattern" in sites[0]:  # `PluginConfig(4)` and its form in words
            sites[0]["pattern"] = sites[0]["pattern"] or ENCODER_MLP
        name = {"name": self.given_name} if self.given_name else {}
        return {"pool_padding": self.pool_padding, "sites": sites} | name

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PluginConfig":
        """The inverse of `to_json`; reads format 1, too. Absent fields take their defaults.

        Raises:
          PluginError: for an unknown field or kind, or a value that cannot be.
        """
        if not isinstance(content.get("sites"), list):  # format 1: the fields of this class
            return build(cls, dict(content))
        for name in content.keys() - {"pool_padding", "sites", "name"}:
            raise PluginError(
                f"Unknown field {name!r}; a newer version of this library may know it."
            )
        sites: list[Site] = []
        for site in content["sites"]:
            fields = dict(site) if isinstance(site, Mapping) else {}
            sites.append(make_site(fields.pop("kind", None), fields))
        padding, name = content.get("pool_padding", False), content.get("name", "")
        return cls(sites=sites, pool_padding=padding, given_name=name) if sites else cls(1)

    def to_run(self) -> dict[str, Any]:
        """The form in which the records of runs are compared: without the name."""
        return dataclasses.replace(self, given_name="").to_json()

    def _ffn(self) -> Ffn:
        parts, pattern = (self.compression, self.decompression), str(self.sites)
        return Ffn(self.ratio, self.layers, self.bottleneck, *parts, pattern, self.rank)


def _check_overlaps(sites: Sequence[Site]) -> None:
    """Refuses sites that want the same layer.

    Raises:
      PluginError: with the layer and both sites.
    """
    # Without the backbone's number of layers, 'all' has at least those that other sites name.
    layers = range(1 + max((layer for site in sites for layer in site.layers or ()), default=0))
    taken: dict[tuple[int, str], int] = {}
    for number, site in enumerate(sites):
        kinds = ("ffn", "kv") if site.kind == "span" else (site.kind,)
        for layer, kind in itertools.product(layers if site.layers is None else site.layers, kinds):
            other = taken.setdefault((layer, kind), number)
            if other != number:
                raise PluginError(
                    f"Layer {layer} is in two sites, '{describe_site(sites[other])}' and "
                    f"'{describe_site(site)}': a span shares its layers with nothing; an ffn and a "
                    "kv site may share one."
                )
