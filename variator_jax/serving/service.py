"""Engine, batcher and policy behind one asynchronous call, as the HTTP server uses them."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from variator_jax.errors import ConfigError, PluginError, check_known
from variator_jax.plugin.config import AUTO
from variator_jax.serving.batcher import BackendError, Batcher, Overloaded, Row, TooLarge
from variator_jax.serving.engine import Embedded, Engine
from variator_jax.serving.policy import PolicyConfig
from variator_jax.serving.tasks import Cut, Input, TaskConfig, normalized, probabilities, token_ids

#: Numbers that an answer of vectors of tokens may hold: 20 bytes each in JSON, 80 MB together.
MOST_NUMBERS = 1 << 22
_RECENT, _RECENT_S = 2_000, 60.0  # requests and seconds of which percentiles are made
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of one request.

    Attributes:
      values: for each input: of 'embed' a vector `[out]`, or `[length, embed]` for `per_token`; of
        'classify' label -> probability; of 'rerank' a score; of 'generate' a text.
      plugin: the plugin that answered all of it, 'none' for ratio 1.
      tokens: of each input, without padding.
    """

    values: list[Any]
    plugin: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the service takes.

    Attributes:
      wait_share: of the target, that the queue may hold as work of the fastest plugin; a request
        that finds more is refused.
      batch_share: of the target, that a batch may take, unless it is a single row.
      tokenizers: threads that tokenise.
      requests: at the same time, in whatever state; one more is refused.
      full_batches: that one request may fill, padding included; a larger one is refused.
    """

    wait_share: float = 0.6
    batch_share: float = 0.3
    tokenizers: int = 2
    requests: int = 1024
    full_batches: int = 64


class Service:
    """Answers requests for the tasks of an engine on the plugin that the load asks for.

    Attributes:
      engine: the compiled programs.
      progress: how many of how many programs are.
    """

    def __init__(self, engine: Engine, slo_ms: float = 100.0, limits: Limits = Limits()) -> None:
        """
        Args:
          engine: not warm yet.
          slo_ms: milliseconds within which 99 of 100 requests are to be answered.
          limits: of the queue.

        Raises:
          VariatorError: for another target, or a backbone whose vocabulary cannot be used.
        """
        if not 0 < slo_ms < math.inf:
            raise ConfigError(f"The target is a positive number of milliseconds; found {slo_ms}.")
        _ = engine.model.tokenizer  # loaded now, not with the first request
        self.engine, self.slo_ms, self.limits = engine, slo_ms, limits
        self._started, self.progress = False, (0, 0)
        self._policy = PolicyConfig(target=slo_ms / 1000)
        self._threads = concurrent.futures.ThreadPoolExecutor(limits.tokenizers, "variator-tokens")
        self._batcher: Batcher | None = None
        self._latencies: collections.deque[tuple[float, float]] = collections.deque(maxlen=_RECENT)
        self._counts = collections.Counter[str]()
        self._compiled, self._open = 0, 0

    @property
    def ready(self) -> bool:
        """Whether every program is compiled and batches run."""
        return self._started and self._running.alive

    @property
    def broken(self) -> bool:
        """Whether batches have ended by an error."""
        return self._started and not self._running.alive

    async def start(self) -> None:
        """Compiles every program; `ready` is true behind it."""

        cancelled = False

        def progress(done: int, total: int) -> None:
            self.progress = done, total
            if cancelled:
                raise asyncio.CancelledError  # ends the thread, for which the process waits

        longest = self.limits.batch_share * self._policy.target
        try:
            await asyncio.to_thread(self.engine.warm_up, progress, longest)
        except asyncio.CancelledError:
            cancelled = True
            raise
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
        most_wait = self.limits.wait_share * self._policy.target
        self._batcher = Batcher(self.engine, self._policy, most_wait)
        self._started = True

    async def drain(self) -> None:
        """Answers what is queued and refuses what comes."""
        was_started, self._started = self._started, False
        if self._batcher and was_started:
            await asyncio.to_thread(self._batcher.end)
            jax.monitoring.unregister_event_duration_listener(self._count_compilation)
        self._threads.shutdown(wait=False)

    async def submit(
        self,
        task: str,
        inputs: Sequence[Input],
        *,
        plugin: str | None = None,
        ratio: int | None = None,
        max_ratio: int | None = None,
        cut: Cut | None = None,
        normalize: bool = True,
        per_token: bool = False,
        raw_scores: bool = False,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """Answers the inputs of one request.

        Args:
          task: a task's name.
          inputs: texts, pairs of texts where the task takes them, or token ids.
          plugin: the plugin to use, 'none' for ratio 1; by default the task's.
          ratio: in place of a name, the compression ratio of one plugin.
          max_ratio: the policy chooses no higher one.
          cut: what becomes of an input that is too long; by default it is refused.
          normalize: whether a pooled vector has length 1.
          per_token: a vector a token in place of a pooled one.
          raw_scores: of 'classify', logits in place of probabilities.
          max_new_tokens: of 'generate', fewer than the task's.

        Raises:
          ConfigError: for a task or an input that cannot be answered.
          PluginError: for a plugin that is not loaded.
          Overloaded: if the queue is full, or the service is about to end.
          TooLarge: for more vectors of tokens than an answer holds.
          BackendError: if a result is not finite.
        """
        began = time.monotonic()
        check_known("No task is named", task, self.engine.tasks)
        if not inputs:
            raise ConfigError("A request has one input or more; found none.")
        config = self.engine.tasks[task]
        gears = self._gears(config, plugin, ratio, max_ratio)
        given = config, inputs, cut or Cut(self.engine.limits.max_length)
        with self._admitted():
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(self._threads, self._tokenize, *given)
            width = self.engine.model.backbone.config.embed_dim
            if per_token and width * sum(map(len, ids)) > MOST_NUMBERS:
                found = f"at most {MOST_NUMBERS:,} numbers, {width} for each token"
                raise TooLarge(
                    f"An answer holds {found}; send fewer texts, or use variator encode."
                )
            results, gear = await self._run(config.program, gears, ids, per_token)
        if not all(map(_is_finite, results)):
            raise BackendError("The encoding is not finite.")
        now = time.monotonic()
        self._latencies.append((now, now - began))
        values = self._values(config, results, max_new_tokens, normalize, per_token, raw_scores)
        # [inputs, rows]: a pair of texts may be two rows.
        lengths: np.ndarray = np.reshape([len(row) for row in ids], (len(inputs), -1))
        return Answer(values, self._running.gears[gear], lengths.sum(axis=1).tolist())

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts a request while it is here; refuses it before any work if there is no room."""
        self._counts["requests"] += 1
        self._open += 1
        try:
            if self._open > self.limits.requests:
                raise Overloaded(self.slo_ms / 1000)
            self._running.check_room()
            yield
        except Overloaded:
            self._counts["refused"] += 1
            raise
        finally:
            self._open -= 1

    def snapshot(self) -> dict[str, Any]:
        """Load, gear, latencies of the last requests and counters."""
        since = time.monotonic() - _RECENT_S
        recent = [1000 * seconds for at, seconds in self._latencies if at > since] or [0.0]
        p50, p99 = map(float, np.percentile(recent, (50, 99)))
        return {
            "ready": self.ready,
            "slo_ms": self.slo_ms,
            "p50_ms": p50,
            "p99_ms": p99,
            "compilations": self._compiled,
            **{name: self._counts[name] for name in ("requests", "refused")},
            **(self._batcher.state() if self._batcher else {}),
        }

    @property
    def _running(self) -> Batcher:
        if self._batcher is None:
            raise ConfigError("The service has not been started.")
        return self._batcher

    def _gears(
        self, task: TaskConfig, name: str | None, ratio: int | None, most: int | None
    ) -> list[int]:
        """The gears that may answer a request, the slowest first."""
        gears, ratios = self._running.gears, self.engine.ratios
        if name is not None:
            check_known("No plugin is named", name, ratios, PluginError)
        if name is not None and ratio not in (None, ratios[name]):
            raise PluginError(f"Plugin {name!r} has ratio {ratios[name]}; found ratio {ratio}.")
        if name is None and task.plugin != AUTO and ratio in (None, ratios[task.plugin]):
            name = task.plugin
        if name is None and ratio is None:
            # Ratio 1, the first, is below every cap.
            free = self._running.shifting
            return [i for i in free if most is None or ratios[gears[i]] <= most] or [0]
        named = [own for own in gears if own == name or (name is None and ratios[own] == ratio)]
        if not named:
            raise PluginError(f"Ratio {ratio} is not loaded; the plugins are {dict(ratios)}.")
        if len(named) > 1 and task.embeds and task.plugin != AUTO:
            found = f"Ratio {ratio} is that of several plugins, whose vectors differ"
            raise PluginError(f"{found}: name one of {', '.join(named)}.")
        if most is not None and ratios[named[0]] > most:
            raise PluginError(f"Plugin {named[0]!r} has a ratio above max_ratio {most}.")
        return [gears.index(own) for own in named]

    def _tokenize(self, task: TaskConfig, inputs: Sequence[Input], cut: Cut) -> list[list[int]]:
        """The rows of a request; of a bi-encoder's pairs, the two texts of each as two rows."""
        tokenizer = self.engine.model.tokenizer
        if task.kind == "rerank" and not task.labels:
            pairs: list[Any] = [x for x in inputs if isinstance(x, tuple) and len(x) == 2]
            if len(pairs) < len(inputs):
                raise ConfigError(f"Task {task.name!r} takes a query and a text.")
            # A query that all pairs share is encoded once.
            texts = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
            rows = {text: token_ids(task, text, tokenizer, cut) for text in texts}
            return [rows[text] for pair in pairs for text in pair]
        return [token_ids(task, value, tokenizer, cut) for value in inputs]

    async def _run(
        self, program: str, gears: Sequence[int], ids: Sequence[list[int]], per_token: bool
    ) -> tuple[list[Any], int]:
        """Results of rows in their order, equal ones run once, and their gear."""
        shared = list(gears)
        rows = {key: Row(key, program, shared, per_token) for key in map(tuple, ids)}
        limits = self.engine.limits
        tokens = sum(limits.length(len(key)) for key in rows)
        most = self.limits.full_batches * limits.batch_tokens
        if tokens > most:
            found = f"{tokens:,} tokens, padding included"
            raise ConfigError(f"The request has {found}; the most is {most:,}.")
        self._running.put(list(rows.values()))
        try:
            waiting = (asyncio.wrap_future(row.result) for row in rows.values())
            done = dict(zip(rows, await asyncio.gather(*waiting), strict=True))
        except BaseException:  # the client left, or a batch failed
            self._running.drop(list(rows.values()))
            raise
        return [done[tuple(row)] for row in ids], shared[0]

    def _values(
        self,
        task: TaskConfig,
        results: Sequence[Any],
        most: int | None,
        normalize: bool,
        per_token: bool,
        raw_scores: bool,
    ) -> list[Any]:
        """What a request's rows answer."""
        if task.kind == "generate":
            decode = self.engine.model.tokenizer.decode
            return [decode(row[: most or len(row)]) for row in results]
        if task.kind == "embed":
            if per_token:
                return [result.tokens for result in results]
            return [normalized(r.pooled) if normalize else r.pooled for r in results]
        if not task.labels:
            vectors = [normalized(result.pooled) for result in results]
            return [float(a @ b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        ids = self.engine.labels[task.name]
        # [labels]
        logits = [np.array([result[token] for token in ids]) for result in results]
        if task.kind == "rerank":
            return [float(row[0] - row[1]) for row in logits]
        if raw_scores:
            return [dict(zip(task.labels, row.tolist(), strict=True)) for row in logits]
        return [probabilities(row, task.labels) for row in logits]

    def _count_compilation(self, event: str, duration: float, **kwargs: Any) -> None:
        self._compiled += event == _COMPILED


def _is_finite(result: Any) -> bool:
    """Whether a row's result has no NaN and no infinity; ids have none."""
    if isinstance(result, Embedded):
        return bool(np.isfinite(result.pooled).all())  # a mean, which every token is in
    return not isinstance(result, Mapping) or all(map(math.isfinite, result.values()))
