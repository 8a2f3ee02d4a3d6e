"""Reads the golden vectors beside this file (see golden/README.md)."""

import pathlib

import numpy as np

from variator_jax.backbones.t5 import T5Config, shape_params
from variator_jax.store.arrays import flatten, unflatten
from variator_jax.store.hugging_face import is_transposed, name_of

FOLDER = pathlib.Path(__file__).parent / "golden"


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def under(arrays, prefix):
    """The arrays whose name starts with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def config(version, **overrides):
    """The tiny T5 of every golden file, version '1_0' or '1_1'."""
    plain = version == "1_0"
    fields = dict(
        name=f"golden_{version}", vocab_size=128, embed_dim=32, num_heads=4, head_dim=12,
        mlp_dim=80, num_encoder_layers=3, num_decoder_layers=2, logits_via_embedding=plain,
        mlp_activations=("relu",) if plain else ("gelu", "linear"),
    )  # fmt: skip
    return T5Config(**(fields | overrides))


def backbone(arrays, version, **overrides):
    """The config and our parameter tree of a golden file's backbone."""
    golden_config = config(version, **overrides)
    theirs = under(arrays, "backbone/")
    leaves = {path: theirs[name_of(path)] for path in flatten(shape_params(golden_config))}
    transposed = {k: v.T if is_transposed(k) else v for k, v in leaves.items()}
    return golden_config, unflatten({k: np.ascontiguousarray(v) for k, v in transposed.items()})


def relative_error(found, expected):
    """Largest difference over the largest expected magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
