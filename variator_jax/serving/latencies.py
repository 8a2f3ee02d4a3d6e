"""The measured latencies of a server's programs, kept for its next start."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

import variator_jax
from variator_jax.bench.output import hardware, log
from variator_jax.files import is_url, write_json
from variator_jax.model import VariatorModel

#: (program, plugin, rows, length)
Bucket = tuple[str, str, int, int]


class KeptLatencies:
    """Latencies in the folder where JAX keeps compiled programs; without one nothing is kept.

    A folder that cannot be read or written costs the next start its time, and nothing else.

    Attributes:
      seconds: bucket -> seconds of a batch, also of those that were too slow.
    """

    def __init__(self, model: VariatorModel, mesh: Mesh | None) -> None:
        # What decides over the time of a program: not the values of the weights.
        plugins = {plugin.config.name: repr(plugin.config) for plugin in model.plugins.values()}
        place = hardware(), mesh and mesh.devices.shape, os.environ.get("XLA_FLAGS")
        key = repr((place, variator_jax.__version__, repr(model.backbone.config), plugins))
        folder, name = jax.config.jax_compilation_cache_dir, hashlib.sha256(key.encode())
        local = folder and not is_url(folder)
        self._file = Path(folder) / f"latencies_{name.hexdigest()[:16]}.json" if local else None
        self.seconds: dict[Bucket, float] = {}
        if self._file and self._file.is_file():
            with self._unless_broken("read"):
                rows = json.loads(self._file.read_text())
                self.seconds = {(p, name, int(r), int(n)): float(s) for p, name, r, n, s in rows}

    def add(self, seconds: Mapping[Bucket, float]) -> None:
        """Keeps new ones for the next start."""
        self.seconds |= seconds
        if self._file and seconds:
            with self._unless_broken("written"):
                write_json(self._file, [[*bucket, s] for bucket, s in self.seconds.items()])

    @contextlib.contextmanager
    def _unless_broken(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError) as error:
            log(f"{self._file} cannot be {done}: {error}")
