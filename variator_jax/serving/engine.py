"""The programs of a server, compiled before the first request, and their latencies.

A program runs rows of tokens, padded to a bucket of rows and lengths, on one plugin. The weights
are on the device once. After `warm_up` nothing compiles any more.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from variator_jax.backbones.t5.decoding import START_TOKEN
from variator_jax.errors import ConfigError, PluginError, check_known
from variator_jax.model import VariatorModel
from variator_jax.plugin.config import AUTO, NONE
from variator_jax.serving.latencies import Bucket, KeptLatencies
from variator_jax.serving.tasks import Dense, TaskConfig, label_ids, mean_pool, through_dense
from variator_jax.store import Backbone, Plugin

#: Token ids of rows, which may differ in length.
Rows = Sequence[Sequence[int]]
_COMPILERS = 8  # programs that are compiled at the same time, at the most
_ROUNDS, _ENOUGH = 3, 0.2  # timed runs of each program, and seconds after which they end


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """The shapes that are compiled.

    Attributes:
      lengths: tokens of a row, padding included, in rising order; the last one is the longest.
      batch_tokens: of a batch, padding included. Rows are 1, 2, 4 and so on within it.
      most_rows: of a batch.
    """

    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    batch_tokens: int = 4096
    most_rows: int = 64

    def __post_init__(self) -> None:
        if list(self.lengths) != sorted({*self.lengths}) or not self.lengths:
            raise ConfigError(f"Lengths rise; found {self.lengths}.")
        if self.lengths[0] < 1 or self.batch_tokens < self.lengths[-1]:
            raise ConfigError(
                f"A batch of {self.batch_tokens} tokens holds no row of {self.lengths[-1]}: raise "
                "batch_tokens, or lower the longest length."
            )

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return self.lengths[-1]

    def length(self, tokens: int) -> int:
        """The bucket of a row."""
        return next(length for length in self.lengths if length >= tokens)

    def rows(self, length: int) -> int:
        """The most rows of a bucket of lengths."""
        return 1 << (min(self.most_rows, self.batch_tokens // length).bit_length() - 1)

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Every (rows, length)."""
        for length in self.lengths:
            for power in range(self.rows(length).bit_length()):
                yield 1 << power, length

    @classmethod
    def up_to(
        cls, longest: int, rows: int, tokens: int = batch_tokens, lengths: Sequence[int] = lengths
    ) -> "EngineLimits":
        """Those of the lengths that are below `longest`, and that one."""
        return cls((*(n for n in lengths if n < longest), longest), max(tokens, longest), rows)


class Embedded(NamedTuple):
    """The vectors of a row.

    Attributes:
      pooled: `[out]` float32, the mean of its tokens behind the dense layers.
      tokens: `[length, embed]` float32, if they were asked for.
    """

    pooled: np.ndarray
    tokens: np.ndarray | None


def check_rows_apart(plugin: Plugin | None) -> None:
    """Refuses a plugin whose results for a row depend on the batch that it is in.

    Raises:
      PluginError: if it merges padding.
    """
    if plugin is not None and plugin.config.pool_padding:
        raise PluginError(
            f"The plugin {plugin.config.name} merges padding, so its results depend on the other "
            "rows of a batch; only VariatorModel runs it."
        )


class Engine:
    """The compiled programs of one backbone, its plugins and its tasks.

    Attributes:
      model: the backbone and its plugins on the device.
      tasks: by name, the first of a kind being its default.
      labels: the name of each task with labels -> the first tokens of its words.
      limits: the shapes that are compiled.
      ratios: the name of each plugin -> its compression ratio; 'none' is 1.
      latency: bucket -> seconds of a batch, measured by `warm_up`.
    """

    def __init__(
        self,
        backbone: Backbone,
        plugins: Sequence[Plugin] = (),
        tasks: Sequence[TaskConfig] = (),
        limits: EngineLimits = EngineLimits(),
        dense: Sequence[Dense] = (),
        mesh: Mesh | None = None,
    ) -> None:
        """Puts the weights on the device; nothing is compiled yet.

        Args:
          backbone: a loaded backbone with its vocabulary.
          plugins: its plugins, with names that differ.
          tasks: what is served, with names that differ.
          limits: the shapes to compile.
          dense: layers behind pooling, of a folder of sentence-transformers.
          mesh: where the weights go; None for the first device.

        Raises:
          VariatorError: for plugins of another backbone, tasks that it cannot serve, or labels
            that its vocabulary cannot tell apart.
        """
        self.model = VariatorModel(backbone, list(plugins), mesh, limits.lengths)
        self.tasks = {task.name: task for task in tasks}
        self.limits, self.latency, self._mesh = limits, dict[Bucket, float](), mesh
        loaded = list(self.model.plugins.values())
        self.ratios = {NONE: 1} | {plugin.config.name: plugin.config.ratio for plugin in loaded}
        for plugin in loaded:
            check_rows_apart(plugin)
        self._check_tasks(tasks)
        self.labels = {t.name: label_ids(t, self.model.tokenizer) for t in tasks if t.labels}
        self._label_ids = sorted({*itertools.chain(*self.labels.values())})
        # Of a program that scores labels, what the decoder is given: [1, tokens].
        self._starts = {t.program: self._start(t) for t in tasks if t.labels}
        self._generating = concurrent.futures.ThreadPoolExecutor(1, "variator-generate")
        # [batch, tokens, vocab] -> [batch, labels]: no other logits leave the device.
        self._select = jax.jit(lambda logits: logits[:, -1, np.array(self._label_ids)])
        # [batch, length, embed] -> [batch, out]
        self._pool = jax.jit(lambda x, tokens: through_dense(mean_pool(x, tokens), dense))

    def _start(self, task: TaskConfig) -> np.ndarray:
        prefix = self.model.tokenizer.encode(task.prefix or "")[:-1]
        return np.array([[START_TOKEN, *prefix]], np.int32)

    def _check_tasks(self, tasks: Sequence[TaskConfig]) -> None:
        if not tasks or len(self.tasks) < len(tasks):
            names = [task.name for task in tasks]
            raise ConfigError(f"A server has one or more tasks of different names; found {names}.")
        for task in tasks:
            if task.program != "embed" and not self.model.backbone.config.has_decoder:
                name = self.model.backbone.config.name
                raise ConfigError(f"Task {task.name!r} needs a decoder; {name!r} has none.")
            check_known(f"Task {task.name!r} is pinned to", task.plugin, (AUTO, *self.ratios))

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs of the tasks."""
        return tuple(dict.fromkeys(task.program for task in self.tasks.values()))

    def warm_up(
        self,
        progress: Callable[[int, int], None] = lambda done, total: None,
        longest_batch: float = math.inf,
    ) -> None:
        """Compiles and times every program on every plugin and bucket.

        Latencies that an earlier start has kept in JAX's compilation cache are not measured again.

        Args:
          progress: called with how many of how many are done.
          longest_batch: in seconds; larger batches are not compiled, but for those of one row.
        """
        cases = itertools.product(self.programs, self.ratios, self.limits.shapes())
        buckets = [(program, plugin, *shape) for program, plugin, shape in cases]
        done, total = 0, len(buckets)
        kept = KeptLatencies(self.model, self._mesh)
        if not self._as_fast_as(kept.seconds):
            kept.seconds.clear()
        # Collectives that two threads start could meet in another order on each device.
        workers = min(_COMPILERS, os.cpu_count() or 1) if self._mesh is None else 1
        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            # Fewest rows first: they show which larger batches would take too long.
            for rows in sorted({bucket[2] for bucket in buckets}):
                level = [bucket for bucket in buckets if bucket[2] == rows]
                least = {b: kept.seconds.get(b) or self._expected(b) for b in level}
                wanted = [b for b in level if rows == 1 or least[b] <= longest_batch]
                done += len(level) - len(wanted)
                for _ in threads.map(lambda b: self._compile(b, b in kept.seconds), wanted):
                    done += 1
                    progress(done, total)
                kept.add({b: self._measure(b) for b in wanted if b not in kept.seconds})
                short = (b for b in wanted if rows == 1 or kept.seconds[b] <= longest_batch)
                self.latency |= {bucket: kept.seconds[bucket] for bucket in short}
        progress(total, total)

    def _as_fast_as(self, seconds: Mapping[Bucket, float]) -> bool:
        """Whether each program takes about as long as an earlier start has kept, in a sample."""
        for program in self.programs:
            buckets = [(program, NONE, 1, length) for length in self.limits.lengths]
            if known := [bucket for bucket in buckets if bucket in seconds]:
                bucket = known[-1]
                self._run_once(bucket)
                if not 0.5 < self._measure(bucket) / seconds[bucket] < 2:
                    return False
        return True

    def _expected(self, bucket: Bucket) -> float:
        """The least seconds that a batch takes, from the one of half its rows."""
        program, plugin, rows, length = bucket
        return 1.5 * self.latency.get((program, plugin, rows // 2, length), math.inf)

    def _compile(self, bucket: Bucket, timed: bool) -> None:
        """Compiles a program, and runs it once unless that takes long and is of no use.

        On accelerators the first run loads the program.
        """
        program, plugin, rows, length = bucket
        if not timed or self._mesh is not None or jax.default_backend() != "cpu":
            self._run_once(bucket)
            return
        name = _named(plugin)
        tokens: np.ndarray = np.ones((rows, length), np.int32)
        batch = {"encoder_input_tokens": tokens}
        if program == "embed":
            out = self.model.compile("encode", batch, **name)
            # [batch, length, embed]; the pooling is cheap enough to run.
            self._pool(jnp.zeros(out.shape, out.dtype), tokens)
        elif program in self._starts:
            starts = batch["decoder_input_tokens"] = self._starts[program].repeat(rows, axis=0)
            out = self.model.compile("logits", batch, **name)
            self._select(jnp.zeros((*starts.shape, out.shape[-1]), out.dtype))
        else:
            self.model.compile("generate", batch, **name, **_generation(program))

    def _run_once(self, bucket: Bucket) -> None:
        program, plugin, rows, length = bucket
        self.dispatch(program, plugin, [[2] * (length - 1) + [1]] * rows)()

    def _measure(self, bucket: Bucket) -> float:
        """The median seconds of a compiled batch; slow ones run once."""
        seconds: list[float] = []
        while len(seconds) < _ROUNDS and sum(seconds) < _ENOUGH:
            began = time.perf_counter()
            self._run_once(bucket)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def sizes(self, program: str, plugin: str, length: int) -> dict[int, float]:
        """Rows of each compiled batch of a bucket of lengths -> its latency in seconds."""
        keys = ((1 << power) for power in range(self.limits.rows(length).bit_length()))
        found = {rows: self.latency.get((program, plugin, rows, length)) for rows in keys}
        return {rows: seconds for rows, seconds in found.items() if seconds is not None}

    def row_seconds(self, program: str, plugin: str, length: int) -> float:
        """What a row of a bucket of lengths costs in the best batch."""
        return min(s / rows for rows, s in self.sizes(program, plugin, length).items())

    def relative_seconds(self, plugin: str) -> float:
        """The time of the longest rows against that of ratio 1, the mean over the programs."""
        longest = self.limits.max_length
        return statistics.fmean(
            self.row_seconds(program, plugin, longest) / self.row_seconds(program, NONE, longest)
            for program in self.programs
        )

    def dispatch(
        self, program: str, plugin: str, rows: Rows, per_token: Sequence[bool] = ()
    ) -> Callable[[], list[Any]]:
        """Starts a batch, and returns a function that waits for its results.

        Args:
          program: one of `programs`.
          plugin: one of `ratios`.
          rows: token ids, no more than the limits allow.
          per_token: of 'embed', for each row whether the vectors of its tokens are wanted.

        Returns:
          A function to a list, for each row: of 'embed' an `Embedded`, of 'labels' a mapping of
          token ids to logits, of a 'generate' the ids `[max_length]`.
        """
        length = self.limits.length(max(map(len, rows)))
        tokens: np.ndarray = np.zeros((1 << (len(rows) - 1).bit_length(), length), np.int32)
        for row, ids in zip(tokens, rows, strict=False):
            row[: len(ids)] = ids
        if program == "embed":
            return self._embed(tokens, [len(row) for row in rows], per_token, plugin)
        name = _named(plugin)
        if program in self._starts:
            starts = self._starts[program].repeat(len(tokens), axis=0)
            # [batch, tokens, vocab]
            logits = self.model.logits(tokens, starts, **name)
            return functools.partial(self._label_logits, self._select(logits), len(rows))
        generate = functools.partial(self.model.generate, tokens, **_generation(program), **name)
        if self._mesh is not None:  # one thread starts all collectives, in one order
            ids = np.asarray(generate())[: len(rows)]
            return lambda: list(ids)
        # It waits for its result, which is why it has a thread.
        generated = self._generating.submit(generate)
        return lambda: list(np.asarray(generated.result())[: len(rows)])

    def _embed(
        self, tokens: np.ndarray, lengths: Sequence[int], per_token: Sequence[bool], plugin: str
    ) -> Callable[[], list[Any]]:
        # [batch, length, embed], [batch, out]
        encoded = self.model.encode(tokens, **_named(plugin))
        pooled = self._pool(encoded, tokens)
        # The vectors of tokens leave the device only if they are asked for.
        wanted = encoded if any(per_token) else None

        def results() -> list[Any]:
            means = np.asarray(pooled)
            if wanted is None:
                return [Embedded(means[i], None) for i in range(len(lengths))]
            vectors = np.asarray(wanted, np.float32)
            # Copies: a row keeps no batch in memory.
            return [
                Embedded(means[i], vectors[i, :length].copy() if asked else None)
                for i, (length, asked) in enumerate(zip(lengths, per_token, strict=True))
            ]

        return results

    def _label_logits(self, logits: jax.Array, rows: int) -> list[Mapping[int, float]]:
        columns = np.asarray(logits)[:rows]
        return [dict(zip(self._label_ids, map(float, row), strict=True)) for row in columns]


def _named(plugin: str) -> dict[str, Any]:
    return {"ratio": 1} if plugin == NONE else {"plugin": plugin}


def _generation(program: str) -> dict[str, Any]:
    """The lengths of a program such as 'generate 64 1'."""
    _, most, beams = program.split()
    return {"max_length": int(most), "num_beams": int(beams)}
