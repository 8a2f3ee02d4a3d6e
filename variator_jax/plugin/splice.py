"""Running a backbone with a compression plugin in place, by Flax's method interception.

While a splice is active, the calls of a site's modules (`encoder/layers_3/mlp`) are surrounded. The
backbone's code, parameters and checkpoint stay as they are, so any Linen network whose modules have
paths will do, T5X's own included.

Calibration measures the output scale `a` of each key: how much the modules inside a site add in the
teacher. T5's FFN outputs grow by orders of magnitude with depth and size, so that one learning rate
serves every backbone only if the plugin works in units of them.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from variator_jax.backbones.base import FfnStack, Mask, Stack
from variator_jax.errors import PluginError
from variator_jax.plugin.arrays import PluginVariables, plugin_specs
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.groups import Groups, key_columns, make_groups, stride_bias
from variator_jax.plugin.schedule import describe_site
from variator_jax.plugin.sites.base import Call, Site
from variator_jax.plugin.sites.ffn import Ffn

# Stands in for one call: (module path, the module's own call, its arguments) -> its result.
Handler = Callable[[str, Callable[..., Any], tuple, dict], Any]


class _Active(threading.local):
    """How many splices are active in this thread, as Flax's stack of interceptors is a thread's."""

    count = 0


_ACTIVE = _Active()


@contextlib.contextmanager
def intercept_modules(
    wanted: Callable[[str], bool],
    handler: Handler,
    also: Container[str] = (),
    needed: Iterable[str] = (),
) -> Iterator[None]:
    """While active, hands every call of a module whose path is `wanted` to `handler`.

    While such a call runs, calls that report the same path pass through: a module may share its
    path with an inner one. Modules whose path is in `also` are handed over, too, but do not count
    as wanted; those in `needed` must run.

    Raises:
      PluginError: on leaving, if no wanted or not every needed module ran, with the paths that did;
        or if none ran at all, as around a function that was compiled before.
    """
    served: set[str] = set()
    seen: dict[str, None] = {}
    inside: list[str] = []
    active = True

    def interceptor(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = "/".join(context.module.path)
        if not active or context.method_name != "__call__":
            return call(*args, **kwargs)
        seen[path] = None
        if path in inside or not (path in also or wanted(path)):
            return call(*args, **kwargs)
        if path not in also:
            served.add(path)
        inside.append(path)
        try:
            return handler(path, call, args, kwargs)
        finally:
            inside.pop()

    _ACTIVE.count += 1
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        _ACTIVE.count -= 1
        # Flax removes an interceptor inside an `assert`, which `python -O` leaves out.
        active = False
    if not seen:
        raise PluginError(
            "No Linen module ran inside the splice. Enter it inside the function that is jitted: "
            "one that was compiled outside stays as it was compiled."
        )
    idle = sorted({*needed} - {*seen})
    if idle or not served:
        paths = ", ".join(path for path in seen if path) or "none"
        reason = f"need {idle[0]!r}, which did not run" if served else "match no module"
        raise PluginError(f"The plugin's sites {reason}. Modules that ran: {paths}.")


def check_not_spliced() -> None:
    """Refuses a call inside a splice, which would be compiled into a program that is kept.

    Raises:
      PluginError: if one is active here.
    """
    if _ACTIVE.count:
        raise PluginError(
            "VariatorModel was called inside a splice, which would stay in its compiled programs; "
            "call it outside: it splices its own plugins."
        )


def check_causal(config: PluginConfig, stack: Stack) -> None:
    """Refuses sites in a causal stack.

    Raises:
      PluginError: naming the first such site.
    """
    sites = [(site, layer) for site in config.parts for layer in site.selected(stack)]
    for path in (site.module(stack, layer) for site, layer in sites):
        if stack.causal or "decoder" in path.split("/"):
            raise PluginError(
                f"The plugin's site {path!r} is in a causal stack: a merge of neighbours would let "
                "later tokens leak into earlier positions. Sites belong in an encoder."
            )


@contextlib.contextmanager
def splice(
    config: PluginConfig,
    plugin: PluginVariables | None,
    mask: Mask | jax.Array,
    stack: Stack | None = None,
) -> Iterator[None]:
    """While active, the encoder runs compressed. Ratio 1 changes nothing at all.

    Enter it inside the function that is jitted or differentiated, around the network's `apply`:

        with splice(config, plugin, tokens > 0):
            encoded = network.apply({'params': backbone}, tokens, method='encode')

    A function that was jitted outside and first runs inside keeps the splice in its program, with
    this mask, for all later calls.

    Args:
      config: the plugin's settings.
      plugin: its arrays; may be None at ratio 1.
      mask: of the stack's input, with the examples of a packed batch; or only `[batch, length]`,
        True or not 0 on tokens. With `config.pool_padding` padding is merged, too.
      stack: where the sites are; None for a network of one's own, which has FFN sites only.

    Raises:
      PluginError: if the plugin has no arrays for a site, no site matched, or a site is below a
        module called `decoder` or in a stack declared causal, where a merge would show a position
        what comes after it. Other causal networks of one's own are not recognised.
    """
    if config.ratio == 1:
        yield
        return
    if plugin is None:
        raise PluginError(f"Ratio {config.ratio} needs a plugin's arrays; found None.")
    known = stack or _own_stack(config, plugin)
    check_causal(config, known)
    points = _points(config, known, plugin.params)
    groups = _groups(config, mask)
    biases = _Biases(groups, config.parts, known.path("bias", 0))

    def wanted(path: str) -> bool:
        if path not in points and stack is None:
            _refuse_uncovered(config, path, plugin.params)
        return path in points

    def handler(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if path == biases.path:
            return biases.call(call, args, kwargs)
        site, key = points[path]
        arrays = {**plugin.params[key], "output_scale": plugin.output_scales[key]}
        outer = biases.span
        biases.span = site.ratio if site.kind == "span" else outer
        try:
            merged = groups[site.ratio], biases.of_keys.get(site.ratio)
            return site.call(Call(path, call, args, kwargs, known, arrays, *merged))
        finally:
            biases.span = outer

    needed = [*points, *biases.needed]
    with intercept_modules(wanted, handler, also={biases.path}, needed=needed):
        yield


def _groups(config: PluginConfig, mask: Mask | jax.Array) -> dict[int, Groups]:
    """Ratio -> the merge groups of a mask `[batch, length]`."""
    mask = mask if isinstance(mask, Mask) else Mask(mask)
    if getattr(mask.valid, "ndim", 0) != 2:
        found = getattr(mask.valid, "shape", type(mask.valid).__name__)
        raise PluginError(f"The mask is an array [batch, length]; found {found}.")
    ratios = {site.ratio for site in config.parts}
    return {ratio: make_groups(mask, ratio, config.pool_padding) for ratio in ratios}


class _Biases:
    """The calls of a host's module for position biases, while a splice is active.

    A host may ask for its bias once, before its layers (ours), or in each layer for the length that
    the layer sees (T5X). Merged vectors stand at their groups' positions in the whole sequence, so
    the module is called for the whole length. What is kept here is read by the next attention, at
    the same or a deeper level of tracing: no array leaves a rematerialised layer.
    """

    def __init__(self, groups: Mapping[int, Groups], sites: Iterable[Site], path: str) -> None:
        self.path = path  # of the module; '' for a host without one
        self.needed = [path for site in sites if path and site.kind != "ffn"]
        self._groups = groups
        self._key_ratios = {site.ratio for site in sites if site.kind == "kv"}
        self.span = 0  # ratio of the span one of whose layers is running; 0 outside of spans
        self.of_keys: dict[int, jax.Array] = {}  # ratio -> [batch, heads, length, groups]

    def call(self, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The bias for `(query length, key length)`, of merged vectors inside a span."""
        if self.span:
            length = self._rounded(self.span)
            # [1, heads, length, length] -> [batch, heads, groups, groups]
            bias = call(length, length, *args[2:], **kwargs)
            return stride_bias(bias, self._groups[self.span])
        if not self._key_ratios:
            return call(*args, **kwargs)
        queries, keys = args[:2]
        # A module runs once a call: for the longest length, from which all others are cut.
        lengths = {ratio: self._rounded(ratio) for ratio in self._key_ratios}
        longest = max(queries, keys, *lengths.values())
        # [1, heads, longest, longest]
        bias = call(longest, longest, *args[2:], **kwargs)
        for ratio, length in lengths.items():
            self.of_keys[ratio] = key_columns(bias[:, :, :queries, :length], self._groups[ratio])
        return bias[:, :, :queries, :keys]

    def _rounded(self, ratio: int) -> int:
        """The length rounded up to whole groups."""
        return self._groups[ratio].members.shape[1] * ratio


def _points(
    config: PluginConfig, stack: Stack, params: Mapping[str, Any]
) -> dict[str, tuple[Site, str]]:
    """Module path -> site and key of its arrays."""
    points = {
        path: (site, key) for site in config.parts for path, key in site.points(stack).items()
    }
    missing = sorted({key for _, key in points.values()} - set(params))
    if missing:
        raise PluginError(
            f"The plugin has no arrays for {missing[0]!r}; it has them for: "
            f"{', '.join(sorted(params)) or 'no site'}."
        )
    for key, specs in plugin_specs(config, stack).items():
        arrays = traverse_util.flatten_dict(params[key], sep="/")
        if differ := sorted(arrays.keys() ^ specs.keys()):
            reason = "is not in the plugin" if differ[0] in specs else "is not of its settings"
            raise PluginError(f"{key}: the array {differ[0]!r} {reason}, {config.description}.")
        for name, spec in specs.items():
            # The width of a network of one's own is not known: 0 in its stack.
            expected, have = [size or "width" for size in spec.shape], arrays[name].shape
            pairs = itertools.zip_longest(have, expected)
            if any(size not in (found, "width") for found, size in pairs):
                shape = f"has the shape {have}; its settings, {config.description}, have"
                raise PluginError(f"{key}: {name!r} {shape} ({', '.join(map(str, expected))}).")
    return points


def _own_stack(config: PluginConfig, plugin: PluginVariables) -> Stack:
    """A stack of the layers for which a plugin has arrays, for networks of one's own."""
    layers = [-1]
    for site in config.parts:
        if not isinstance(site, Ffn) or site.rank:
            raise PluginError(
                f"The site '{describe_site(site)}' needs to know the network's layers: give "
                "stack=, such as variator_jax.backbones.t5.T5(config).stack()."
            )
        numbers = (site.layer_of(key) for key in plugin.params)
        layers += [layer for layer in numbers if layer is not None]
    return FfnStack(layers=max(layers) + 1, width=0)


def _refuse_uncovered(config: PluginConfig, path: str, params: Mapping[str, Any]) -> None:
    """Refuses a module that a site's pattern matches, but for which the plugin has no arrays."""
    for site in config.parts:
        if isinstance(site, Ffn) and (layer := site.layer_of(path)) is not None:
            raise PluginError(
                f"The backbone runs encoder layer {layer}, but the plugin has arrays only for: "
                f"{', '.join(sorted(params)) or 'no site'}."
            )


def site_output_rms(
    run: Callable[[], object], config: PluginConfig, stack: Stack, mask: Mask
) -> dict[str, jax.Array]:
    """Runs the uncompressed network once and returns, for each key, the RMS of what it adds.

    Args:
      run: applies the network, for example `lambda: network.apply(...)`; call it outside remat.
      config: the plugin's settings.
      stack: where its sites are.
      mask: of the stack's input; padding does not count.
    """
    keys = {
        key: (site, around) for site in config.parts for key, around in site.around(stack).items()
    }
    firsts = {around.first for _, around in keys.values()}
    lasts = {around.last for _, around in keys.values()}
    before: dict[str, jax.Array] = {}
    after: dict[str, jax.Array] = {}

    def record(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if path in firsts:
            before[path] = stack.stream("ffn", args, kwargs)
        out = call(*args, **kwargs)
        if path in lasts:
            after[path] = out
        return out

    with intercept_modules((firsts | lasts).__contains__, record, needed=firsts | lasts):
        run()
    return {
        key: _rms(site.change(before[around.first], after[around.last]), mask.valid)
        for key, (site, around) in keys.items()
    }


def calibrate(plugin: PluginVariables, rms: dict[str, jax.Array]) -> PluginVariables:
    """Returns the plugin with its output scales set to the measured ones of its keys."""
    floor = jnp.float32(1e-6)  # modules that add nothing would otherwise divide by zero
    scales = {key: jnp.maximum(rms[key], floor) for key in plugin.output_scales}
    return PluginVariables(plugin.params, scales)


def _rms(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The RMS over valid positions of `[batch, length, embed]`."""
    # [batch, length, 1]
    weight = valid[..., None].astype(jnp.float32)
    total = jnp.sum(jnp.square(x.astype(jnp.float32)) * weight)
    return jnp.sqrt(total / (jnp.maximum(jnp.sum(weight), 1) * x.shape[-1]))
