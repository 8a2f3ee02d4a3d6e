"""`variator encode`: the encodings of a file of texts, in safetensors files; a killed run resumes.

Each window of lines becomes one file. A run that is started again compares each window of the
input with the one that its file was made of, and computes those whose file is missing.
"""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.base import Batch
from variator_jax.backbones.t5 import T5
from variator_jax.bench.output import log
from variator_jax.errors import ConfigError, check_known
from variator_jax.files import lock_folder
from variator_jax.model import LENGTH_BUCKETS, SplicedModel, VariatorModel
from variator_jax.serving.encoded import Counts, EncodedFolder, Prepared
from variator_jax.serving.engine import EngineLimits, Rows, check_rows_apart
from variator_jax.serving.rows import (
    RowError,
    Texts,
    make_batches,
    read_windows,
    row_ids,
    suffix_of,
    task_of,
)
from variator_jax.serving.sentences import Encoder, arrays_of
from variator_jax.serving.tasks import mean_pool, normalized, through_dense
from variator_jax.store import Plugin
from variator_jax.store.arrays import fingerprint
from variator_jax.store.description import owner_content
from variator_jax.texts import Tokenizer

POOLINGS = ("mean", "none")
DTYPES = ("float32", "bfloat16")
_EVERY = 5.0  # seconds between two lines of progress


@dataclasses.dataclass(frozen=True)
class BulkSettings:
    """How texts are encoded.

    Attributes:
      texts: where the text of a row is, and how long it may be.
      pooling: 'mean' of a text's tokens, or 'none' for a vector a token.
      normalize: whether a pooled vector gets the length 1.
      dtype: of the vectors that are written.
      window: rows that are sorted by length together and written to one file.
      batch_tokens: tokens of a batch, padding included.
    """

    texts: Texts = Texts()
    pooling: str = "mean"
    normalize: bool = True
    dtype: str = "float32"
    window: int = 2048
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        check_known("--pooling is", self.pooling, POOLINGS)
        check_known("--dtype is", self.dtype, DTYPES)
        sizes = (self.texts.max_length, self.window, self.batch_tokens)
        if min(sizes) < 1:
            raise ConfigError(f"max_length, window and batch_tokens are 1 or more; found {sizes}.")
        if task_of(self.texts.prompt).fields != ("text",):
            raise ConfigError(f"The prompt {self.texts.prompt!r} has no {{text}}, or other fields.")

    @property
    def limits(self) -> EngineLimits:
        """The shapes of batches."""
        tokens = self.batch_tokens
        return EngineLimits.up_to(self.texts.max_length, tokens, tokens, LENGTH_BUCKETS)


def encode_file(
    path: Path,
    folder: Path,
    encoder: Encoder,
    plugin: Plugin | None = None,
    settings: BulkSettings = BulkSettings(),
    mesh: Mesh | None = None,
) -> Counts:
    """Encodes every text of a file; the same call resumes a run that was stopped.

    Args:
      path: a .jsonl file of objects or texts, or a .txt file with a text a line; also with .gz.
      folder: where `encoded-*.safetensors`, `encode.json` and `bad_rows.jsonl` are written.
      encoder: the backbone, with its vocabulary, and layers behind pooling.
      plugin: the compression plugin; None for the backbone itself.
      settings: pooling, dtype, lengths, batches.
      mesh: the devices; None for the first one.

    Returns:
      Rows, tokens, bad rows and cut texts of the whole file.

    Raises:
      VariatorError: for a file that cannot be read, a folder of another run, or an input that has
        changed since a part of it was encoded.
    """
    suffix = suffix_of(path)
    check_rows_apart(plugin)
    # The model is not kept: it checks that the plugin is the backbone's, and loads the vocabulary.
    tokenizer = VariatorModel(encoder.backbone, plugin, mesh).tokenizer
    total, files, progress = Counts(), 0, _Progress(path)
    try:
        with lock_folder(folder):
            identity = _identity(encoder, plugin, settings, mesh)
            output = EncodedFolder(folder, {"format": suffix, **identity})
            encode = _compiled(encoder, plugin, settings, mesh)
            dense = encoder.dense if settings.pooling == "mean" else ()
            width = dense[-1].kernel.shape[1] if dense else encoder.backbone.config.embed_dim
            for prepared in _ahead(_prepared(path, output, tokenizer, settings)):
                counts, files = prepared.counts, files + 1
                if not prepared.written:
                    counts = _write(output, prepared, encode, settings, width)
                total = Counts(*map(sum, zip(total, counts, strict=True)))
                progress.show(prepared, total)
            output.finish(files, total)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}.") from error
    return total


def _prepared(
    path: Path, output: EncodedFolder, tokenizer: Tokenizer, settings: BulkSettings
) -> Iterator[Prepared]:
    """The windows of the input, tokenised where their file is missing."""
    suffix = suffix_of(path)
    for number, window in enumerate(read_windows(path, settings.window)):
        if (written := output.counts(number, window)) is not None:
            yield Prepared(number, window, {}, [], written, written=True)
            continue
        ids, bad, cuts = dict[int, list[int]](), list[dict[str, Any]](), 0
        for line, content in window.lines:
            try:
                ids[line], cut = row_ids(content, suffix, tokenizer, settings.texts)
                cuts += cut
            except RowError as error:
                bad.append({"line": line, "error": str(error)})
        counts = Counts(len(ids), sum(map(len, ids.values())), len(bad), cuts)
        yield Prepared(number, window, ids, bad, counts)


def _ahead(windows: Iterator[Prepared]) -> Iterator[Prepared]:
    """The same windows; the next one is read and tokenised in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, windows, None)
        while (prepared := pending.result()) is not None:
            pending = thread.submit(next, windows, None)
            yield prepared


Encode = Callable[[np.ndarray], jax.Array]


def _compiled(
    encoder: Encoder, plugin: Plugin | None, settings: BulkSettings, mesh: Mesh | None
) -> Encode:
    """Tokens `[batch, length]` to `[batch, out]`, or `[batch, length, embed]` without pooling."""
    backbone, dense, _ = encoder
    model = SplicedModel(T5(backbone.config), plugin.config if plugin else None)

    def run(params: dict, variables: Any, batch: Batch) -> jax.Array:
        # [batch, length, embed]
        states = model.encode(params, variables, batch)
        if settings.pooling == "mean":
            # [batch, out]
            states = through_dense(mean_pool(states, batch["encoder_input_tokens"]), dense)
            states = normalized(states) if settings.normalize else states
        return states.astype(settings.dtype)

    compiled = meshes.compile_on(mesh, run)
    params = meshes.place_parameters(backbone.params, backbone.config, mesh)
    variables = meshes.place_everywhere(plugin.variables, mesh) if plugin else None
    return lambda tokens: compiled(params, variables, {"encoder_input_tokens": tokens})


def _encoded(ids: Rows, encode: Encode, settings: BulkSettings) -> list[Any]:
    """The vectors of each row, in the rows' order; two batches are on the device at a time."""
    results: list[Any] = [None] * len(ids)
    running: deque[tuple[np.ndarray, jax.Array]] = deque()

    def fetch() -> None:
        rows, vectors = running.popleft()
        for row, vector in zip(rows, np.asarray(vectors), strict=False):
            # A copy, or the whole batch would stay in memory.
            whole = vector if settings.pooling == "mean" else vector[: len(ids[row])]
            results[row] = whole.copy()

    for rows, tokens in make_batches(ids, settings.limits):
        running.append((rows, encode(tokens)))
        if len(running) > 2:
            fetch()
    while running:
        fetch()
    return results


def _write(
    output: EncodedFolder, prepared: Prepared, encode: Encode, settings: BulkSettings, width: int
) -> Counts:
    """Encodes a window and writes its file; a row whose numbers are not finite is a bad one."""
    encoded = _encoded([*prepared.ids.values()], encode, settings)
    vectors = dict(zip(prepared.ids, encoded, strict=True))
    infinite = [line for line, x in vectors.items() if not np.isfinite(x.astype(np.float32)).all()]
    reason = f"the encoding is not finite in {settings.dtype}"
    bad = [*prepared.bad, *({"line": line, "error": reason} for line in infinite)]
    for line in infinite:
        del vectors[line]
    counts = prepared.counts._replace(rows=len(vectors), bad=len(bad))
    output.write(prepared._replace(counts=counts, bad=bad), _arrays(vectors, settings, width))
    return counts


def _arrays(
    vectors: Mapping[int, np.ndarray], settings: BulkSettings, width: int
) -> dict[str, np.ndarray]:
    """The arrays of a file: `lines`, `embeddings`, and without pooling `offsets` of the rows."""
    lines, rows = np.array(list(vectors), np.int64), list(vectors.values())
    empty: np.ndarray = np.zeros((0, width), jnp.dtype(settings.dtype))
    if settings.pooling == "mean":
        # [rows, embed]
        return {"lines": lines, "embeddings": np.concatenate([empty, *(x[None] for x in rows)])}
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    # [tokens of all rows, embed]
    return {"lines": lines, "embeddings": np.concatenate([empty, *rows]), "offsets": offsets}


def _identity(
    encoder: Encoder, plugin: Plugin | None, settings: BulkSettings, mesh: Mesh | None
) -> dict[str, Any]:
    """What decides the numbers, in JSON's types."""
    found = plugin.config.to_run() | {"arrays": plugin.fingerprint} if plugin else None
    identity = {
        "backbone": owner_content(encoder.backbone),
        "vocabulary": encoder.backbone.vocabulary_fingerprint,
        "compute": encoder.backbone.config.dtype,
        "plugin": found,
        "dense": [fingerprint(arrays_of(layer)) + " tanh" * layer.tanh for layer in encoder.dense],
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "devices": mesh.size if mesh else 1,
        **dataclasses.asdict(settings),
        "texts": settings.texts._asdict(),
    }
    return json.loads(json.dumps(identity))


class _Progress:
    """A line every few seconds: rows, bad rows, rows a second, minutes left."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, path.stat().st_size
        self._last = self._start = time.monotonic()
        self._rows = self._bytes = 0  # that an earlier run encoded

    def show(self, prepared: Prepared, total: Counts) -> None:
        """Prints how far the run is, behind a window."""
        now, done = time.monotonic(), prepared.window.bytes_read
        if prepared.written:
            self._rows, self._bytes, self._start = total.rows, done, now
        elif now - self._last > _EVERY or done >= self._size:
            self._last, seconds = now, now - self._start
            left = seconds * (self._size - done) / max(1, done - self._bytes)
            log(
                f"{self._path.name}: {total.rows:,} rows, {total.bad:,} bad, "
                f"{(total.rows - self._rows) / seconds:,.1f} rows/s, {left / 60:,.1f} min left"
            )
