"""Losses inside the encoder: at each site, where the plugin's own work can be compared.

`residual` compares the residual stream behind each site with the teacher's. `neurons` compares the
input of the FFN's last matrix for a merged vector with the merge-weighted mean of the teacher's
over its members (the paper's future work, section 5).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Mask, Outputs, Stack
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig
from variator_jax.plugin.groups import Groups, make_groups
from variator_jax.train import losses


class SiteLosses:
    """The terms of a plugin's sites on a stack that have a weight.

    Raises:
      ConfigError: for a weight of a loss that has nothing to compare.
    """

    def __init__(self, plugin: PluginConfig, stack: Stack, config: losses.LossConfig) -> None:
        self._plugin = plugin
        around = [a for site in plugin.parts for a in site.around(stack).values()]
        streams = sorted({stack.path("layer", a.layer) for a in around})
        self._streams = streams if config.residual else []
        merges = {
            key: (site, *merge)
            for site in plugin.parts
            for key, merge in site.merges(stack).items()
        }
        self._merges = merges if config.neurons else {}
        weights = {"residual": (config.residual, streams), "neurons": (config.neurons, merges)}
        self.coefficients = {name: w for name, (w, _) in weights.items() if w}
        for name in self.coefficients:
            if plugin.parts and not weights[name][1]:
                raise ConfigError(
                    f"{name.upper()}_LOSS is {weights[name][0]}, but no site of this plugin, "
                    f"{plugin.description}, has what it compares; set it to 0."
                )
        neurons = {path for _, _, paths in self._merges.values() for path in paths}
        #: Paths of modules whose results must be among the hidden states of student and teacher.
        self.capture = {*self._streams, *neurons, *(m[1] for m in self._merges.values())}

    def weights(self, mask: Mask) -> dict[str, jax.Array]:
        """Valid tokens behind each site; groups with a member in each layer of merged neurons."""
        found = {"residual": jnp.sum(mask.valid, dtype=jnp.float32) * len(self._streams)}
        groups = [
            jnp.sum(self._groups(site, mask).valid, dtype=jnp.float32) * len(paths)
            for site, _, paths in self._merges.values()
        ]
        found["neurons"] = jnp.asarray(sum(groups), jnp.float32)
        return {name: found[name] for name in self.coefficients}

    def terms(
        self, student: Outputs, teacher: Outputs, mask: Mask, arrays: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Each term's sum over the batch; `arrays` are the plugin's parameters, by key."""

        def residual(path: str) -> jax.Array:
            return losses.relative_mse(student.hidden[path], teacher.hidden[path], mask.valid)[0]

        def neurons(key: str, path: str) -> jax.Array:
            site, merged_from, _ = self._merges[key]
            groups = self._groups(site, mask)
            # [batch, groups, k]
            weights = site.weights(arrays[key], student.hidden[merged_from], groups)
            # [batch, groups, k, neurons] -> [batch, groups, neurons]
            members = groups.split(teacher.hidden[path])
            expected = jnp.einsum("bgk,bgkn->bgn", weights, members)
            return losses.relative_mse(student.hidden[path], expected, groups.valid)[0]

        merged = [(key, path) for key, (_, _, paths) in self._merges.items() for path in paths]
        found = {"residual": sum(map(residual, self._streams))}
        found["neurons"] = sum(neurons(key, path) for key, path in merged)
        return {name: jnp.asarray(found[name]) for name in self.coefficients}

    def _groups(self, site: Any, mask: Mask) -> Groups:
        return make_groups(mask, site.ratio, self._plugin.pool_padding)
