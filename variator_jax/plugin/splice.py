"""Running a backbone with a compression plugin in place, by Flax's method interception.

While a splice is active, each call of a site's module (`encoder/layers_3/mlp`) is surrounded by
hidden compression and hidden decompression. The backbone's code, parameters and checkpoint stay as
they are, so any Linen network whose feed-forward layers have a path will do, T5X's own included.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax.linen.partitioning import with_sharding_constraint

from variator_jax.errors import PluginError
from variator_jax.plugin.arrays import PluginVariables, layer_name
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.sites.ffn import PluginLayer, from_groups, group_members, to_groups

# Surrounds one call: (layer number, the module's own call on one array, its input) -> its output.
Surround = Callable[[int, Callable[[jax.Array], jax.Array], jax.Array], jax.Array]


@contextlib.contextmanager
def surround_sites(pattern: str, surround: Surround) -> Iterator[None]:
    """While active, hands every call of a module whose path matches `pattern` to `surround`.

    Args:
      pattern: regular expression for the whole path, with one group, the layer's number.
      surround: what to do instead of the call.

    Raises:
      PluginError: on leaving, if no module matched, with the paths that ran; or if none ran at all,
        as round a function that was compiled before and so knows nothing of this context.
    """
    matcher = re.compile(pattern)
    matched: set[str] = set()
    seen: dict[str, None] = {}

    def interceptor(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = "/".join(context.module.path)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        seen[path] = None
        match = matcher.fullmatch(path)
        if match is None:
            return call(*args, **kwargs)
        matched.add(path)
        x, *rest = args
        return surround(int(match.group(1)), lambda short: call(short, *rest, **kwargs), x)

    with nn.intercept_methods(interceptor):
        yield
    if not seen:
        raise PluginError(
            "No Linen module ran inside the splice. Enter it inside the function that is jitted: "
            "one that was compiled outside stays as it was compiled."
        )
    if not matched:
        paths = ", ".join(path for path in seen if path) or "none"
        raise PluginError(
            f"The site pattern {pattern!r} matches no module. Modules that ran: {paths}."
        )


@contextlib.contextmanager
def splice(
    config: PluginConfig,
    plugin: PluginVariables | None,
    token_mask: jax.Array,
    segment_ids: jax.Array | None = None,
) -> Iterator[None]:
    """While active, the encoder runs compressed. Ratio 1 changes nothing at all.

    Enter it inside the function that is jitted or differentiated, round the network's `apply`:

        with splice(config, plugin, tokens > 0):
            encoded = network.apply({'params': backbone}, tokens, method='encode')

    Args:
      config: the plugin's settings.
      plugin: its arrays; may be None at ratio 1.
      token_mask: `[batch, length]` bool, True on tokens. With `config.pool_padding` it is ignored.
      segment_ids: `[batch, length]` int of a packed batch, or None.

    Raises:
      PluginError: if the plugin has no parameters for a compressed layer, or no site matched.
    """
    if config.ratio == 1:
        yield
        return
    if plugin is None:
        raise PluginError(f"Ratio {config.ratio} needs a plugin's arrays; found None.")
    members = group_members(token_mask | config.pool_padding, config.ratio, segment_ids)
    # Only in a packed batch can a group hold tokens that must not see what their group became.
    receivers = members if segment_ids is not None else None
    # `parent=None` keeps the module from becoming a child of whichever module is being run.
    module = PluginLayer(config, parent=None)

    def surround(layer: int, ffn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        if not config.covers(layer):
            return ffn(x)
        params, scale = _layer_arrays(plugin, layer)
        length = x.shape[1]
        # [batch, groups, k, embed]
        x = to_groups(x, config.ratio)
        # [batch, groups, embed]
        merged = module.apply({"params": params}, x, members, method="compress")
        y = ffn(_constrain(merged))
        # [batch, groups, k, embed]
        z = module.apply({"params": params}, y, x, scale, receivers, method="decompress")
        return _constrain(from_groups(z, length))

    with surround_sites(config.sites, surround):
        yield


def _constrain(x: jax.Array) -> jax.Array:
    """Keeps `[batch, length or groups, embed]` cut along the batch, where there is a mesh."""
    return with_sharding_constraint(x, ("batch", "length", "embed"))


def _layer_arrays(plugin: PluginVariables, layer: int) -> tuple[dict, jax.Array]:
    name = layer_name(layer)
    if name not in plugin.params or name not in plugin.output_scales:
        raise PluginError(
            f"The backbone runs encoder layer {layer}, but the plugin has arrays only for: "
            f"{', '.join(sorted(plugin.params))}."
        )
    return plugin.params[name], plugin.output_scales[name]
