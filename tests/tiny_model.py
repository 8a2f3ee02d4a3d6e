"""A tiny model with two plugins, as the tests of the four lines load it."""

import dataclasses

import numpy as np
from golden_vectors import config
from tiny import random_params, random_plugin

from variator_jax.plugin import PluginConfig
from variator_jax.store import Backbone, Plugin
from variator_jax.store.arrays import fingerprint

SHAPE = config("1_1", vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
PARAMS = random_params(SHAPE)
BACKBONE = Backbone(SHAPE, PARAMS, fingerprint(PARAMS))
TOKENS = np.array([[5, 6, 7, 8, 9, 1], [11, 12, 1, 0, 0, 0]], np.int32)
DECODER = np.array([[0, 20, 21], [0, 22, 23]], np.int32)
_ENCODER = {name: PARAMS[name] for name in ("encoder", "token_embedder")}
ENCODER = Backbone(dataclasses.replace(SHAPE, num_decoder_layers=0), _ENCODER, "e" * 64)


def make_plugin(ratio, owner=BACKBONE):
    settings = PluginConfig(ratio, bottleneck=4)
    variables = random_plugin(settings, owner.config, seed=ratio)
    owned = {"name": owner.config.name, "fingerprint": owner.fingerprint}
    return Plugin(settings, variables, {"backbone": owned, "vocabulary_fingerprint": None})


PLUGINS = {ratio: make_plugin(ratio) for ratio in (2, 4)}
