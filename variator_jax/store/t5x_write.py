"""Writes T5X's checkpoints of today, array by array, as its Orbax reads them.

Orbax's own writer takes a whole tree from memory, which an 11B backbone does not leave room for; so
the arrays go through tensorstore, and the few JSON files around them are written here.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorstore

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError
from variator_jax.store import scan as scan_lib
from variator_jax.store import stores
from variator_jax.store.scan import Place
from variator_jax.store.stream import Leaf
from variator_jax.store.t5x_orbax import METADATA

_STEP = ("state", "step")
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_CHUNK = 1 << 28  # bytes; a host that restores a shard reads little beyond it
_DICTIONARY = 2  # Orbax's kind of a key


class Writer:
    """Fills the folder of a checkpoint with leaves that come one by one.

    Args:
      folder: an empty folder, to be called `checkpoint_<step>`.
      config: the backbone's shape.
      leaves: what will come.
      dtype: what the leaves will have been cast to; None for their own.
      scan: whether to write `scalable_t5`'s form with scanned layers.
      step: the training step that the checkpoint is said to be of.

    Raises:
      CheckpointError: if the config has settings that are not told by the leaves, which are all
        that such a checkpoint holds.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config: T5Config,
        leaves: Iterable[Leaf],
        dtype: np.dtype | None = None,
        scan: bool = False,
        step: int = 0,
    ) -> None:
        leaves = list(leaves)
        _check_told_by_leaves(config, leaves)
        self._folder, self._started = folder, time.time_ns()
        (folder / "state").mkdir()
        base = {"driver": "file", "path": f"{(folder / 'state').absolute()}/"}
        self._kvstore = {"driver": "ocdbt", "base": base}
        # Whoever puts the folder in place waits for the disk, once.
        self._context = tensorstore.Context({"file_io_sync": False})
        self._places: dict[str, Place] = {}
        self._arrays: dict[tuple[str, ...], tensorstore.TensorStore] = {}
        depth = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
        for leaf in leaves:
            place = scan_lib.place(config, leaf.path, leaf.shape, scan)
            self._places[leaf.path] = place
            name = ("target", *place.path.split("/"))
            shape, chunks = place.shape, place.shape
            if place.layer is not None:
                layers = depth[name[1]]
                shape = (shape[0], layers, *shape[1:])
                chunks = (chunks[0], 1, *chunks[1:])
            if name not in self._arrays:
                self._arrays[name] = self._create(name, shape, chunks, dtype or leaf.dtype)
        self._arrays[_STEP] = self._create(_STEP, (), (), np.dtype(np.int32))
        self._arrays[_STEP].write(np.int32(step)).result()

    def _create(
        self,
        name: tuple[str, ...],
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype,
    ) -> tensorstore.TensorStore:
        size = math.prod(chunks) * dtype.itemsize
        if size > _CHUNK:
            chunks = (max(1, chunks[0] * _CHUNK // size), *chunks[1:])
        spec = {
            "driver": "zarr",
            "kvstore": {**self._kvstore, "path": f"{'.'.join(name)}/"},
            "dtype": dtype.name,
            "metadata": {
                "shape": shape,
                "chunks": chunks,
                "compressor": {"id": "zstd", "level": 1},
            },
            "store_data_equal_to_fill_value": True,
        }
        with stores.telling(f"{self._folder} cannot be written"):
            return tensorstore.open(spec, create=True, context=self._context).result()

    def write(self, path: str, array: np.ndarray) -> None:
        """Writes one leaf; in scanned form, into its layer's part of the stack's array."""
        place = self._places[path]
        store = self._arrays["target", *place.path.split("/")]
        with stores.telling(f"{self._folder} cannot be written"):
            if place.layer is None:
                store.write(array).result()
            elif path.endswith("rel_embedding"):
                for i in range(store.shape[1]):
                    store[:, i].write(array).result()
            else:
                store[place.layer].write(array.reshape(place.shape)).result()

    def close(self) -> None:
        """Writes the descriptions, by which Orbax recognises a checkpoint that is whole."""
        state = {
            "tree_metadata": {
                str(name): {
                    "key_metadata": [{"key": key, "key_type": _DICTIONARY} for key in name],
                    "value_metadata": {
                        "value_type": "np.ndarray",
                        "skip_deserialize": False,
                        "write_shape": list(store.shape),
                    },
                }
                for name, store in self._arrays.items()
            },
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        self._write_json("state/" + METADATA, state)
        checkpoint = {
            "item_handlers": {"state": _HANDLER},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self._started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }
        self._write_json("_CHECKPOINT_METADATA", checkpoint)
        # Orbax asks for these where folders cannot be renamed, as on gs://.
        for place in ("state/commit_success.txt", "commit_success.txt"):
            name = self._folder.name if "/" not in place else "state"
            (self._folder / place).write_text(f"Checkpoint commit was successful to {name}\n")

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(content), encoding="utf8")


def _check_told_by_leaves(config: T5Config, leaves: list[Leaf]) -> None:
    """Compares the settings that a reader would deduce with those of the backbone."""
    deduced = scan_lib.deduce_config(f"backbone {config.name}", leaves)
    settings = ["mlp_activations", "layer_norm_epsilon", "mlp_dim"]
    if config.has_decoder:
        settings.append("logits_via_embedding")
    for name in settings:
        ours, read = getattr(config, name), getattr(deduced, name)
        if ours != read:
            raise CheckpointError(
                f"Backbone {config.name!r} has {name} {ours}. A T5X checkpoint holds no settings, "
                f"and this one would be read as having {read}. Write another format."
            )
