"""Open-loop load over HTTP: requests leave at random moments, however slow the answers are.

Arrivals are a Poisson process, as those of many independent users. A latency counts from the moment
at which its request was to leave, so a client that is behind does not flatter the server.
"""

import asyncio
import dataclasses
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from variator_jax.errors import ConfigError, DataError, check_known, check_whole
from variator_jax.files import wrap_errors

SHAPES = ("steady", "burst", "ramp")
ROUTES = ("embed", "rerank", "predict")
FAILED = 0  # in place of a status: no answer
_SAMPLED_EVERY = 1.0  # seconds between two looks at /metrics
_WORDS = "the library returns a list of values and draws one line for each axis in file".split()
_METRICS = {  # of the server -> our names
    "process_resident_memory_bytes": "memory",
    "variator_compilations": "compilations",
    "variator_slowdown": "slowdown",
}


@dataclasses.dataclass(frozen=True)
class Load:
    """What a load test sends.

    Attributes:
      url: the server.
      route: 'embed', 'rerank' or 'predict'.
      shape: 'steady'; 'burst', `peak` in the middle third; 'ramp', from `rate` to `peak`.
      rate: requests a second.
      peak: of a burst or a ramp, requests a second.
      seconds: how long requests leave.
      words: of a random text.
      texts: a file with a text a line, in place of random ones.
      documents: texts of a request to rerank.
      plugin: the plugin that every request names, 'none' for ratio 1; by default none is named.
      token: for a server that asks for one.
      timeout: seconds after which an answer counts as failed.
      seed: of arrivals and texts.
    """

    url: str = "http://127.0.0.1:8080"
    route: str = "embed"
    shape: str = "steady"
    rate: float = 10.0
    peak: float | None = None
    seconds: float = 60.0
    words: int = 40
    texts: str | None = None
    documents: int = 8
    plugin: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)  # a secret
    timeout: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("The shape of the load is", self.shape, SHAPES)
        check_known("The route is", self.route, ROUTES)
        numbers = (self.rate, self.highest, self.seconds, self.words, self.documents, self.timeout)
        if not all(0 < number < float("inf") for number in numbers):
            raise ConfigError(f"Rates, seconds and sizes are above 0; found {self}.")
        check_whole("The seed", self.seed, 0)
        with wrap_errors(f"{self.url!r} is no URL", ConfigError):
            _ = httpx.URL(self.url), urllib.parse.urlsplit(self.url).port  # checks its range

    @property
    def highest(self) -> float:
        """The highest rate; by default three times the lowest, where the shape has two."""
        if self.shape == "steady":
            return self.rate
        return 3 * self.rate if self.peak is None else self.peak

    def rates(self, times: np.ndarray) -> np.ndarray:
        """Requests a second at moments `[n]` in seconds from the start."""
        part = times / self.seconds
        if self.shape == "ramp":
            return self.rate + (self.highest - self.rate) * part
        middle = (part >= 1 / 3) & (part < 2 / 3)
        return np.where(middle, self.highest, self.rate)


class Sample(NamedTuple):
    """One request: when it was to leave, and its answer."""

    start: float  # seconds from the start of the test
    seconds: float  # until the answer
    status: int  # HTTP's, or FAILED
    ratio: int  # 0 where there was no answer
    behind: float  # seconds that the client itself was late


class Run(NamedTuple):
    """A load test's samples, in the order of their starts, and the server's metrics meanwhile."""

    samples: list[Sample]
    metrics: list[dict[str, float]]  # 'time', and of `_METRICS` what the server has


def arrivals(load: Load) -> np.ndarray:
    """The moments `[n]` at which requests leave, in seconds, rising: a thinned Poisson process."""
    rng = np.random.default_rng(load.seed)
    most = max(load.rate, load.highest)
    count = rng.poisson(most * load.seconds)
    times = np.sort(rng.uniform(0, load.seconds, count))
    return times[rng.uniform(0, most, count) < load.rates(times)]


def bodies(load: Load) -> Iterator[dict[str, Any]]:
    """Endless bodies for the route.

    Raises:
      DataError: for a file without texts.
    """
    rng, known = np.random.default_rng(load.seed + 1), list[str]()
    if load.texts is not None:
        with wrap_errors(f"{load.texts} cannot be read", DataError):
            known = [line for line in Path(load.texts).read_text("utf8").splitlines() if line]
        if not known:
            raise DataError(f"{load.texts} has no texts.")

    def text() -> str:
        if known:
            return known[rng.integers(len(known))]
        return " ".join(rng.choice(_WORDS, load.words))

    choice = {} if load.plugin is None else {"plugin": load.plugin}
    while True:
        if load.route == "rerank":
            documents = [text() for _ in range(load.documents)]
            yield {"query": " ".join(rng.choice(_WORDS, 6)), "texts": documents, **choice}
        else:
            yield {"inputs": text(), **choice}


def run(load: Load) -> Run:
    """Sends the load and waits for every answer.

    Raises:
      ConfigError: if there is no server, it is not ready, or refuses the first request as wrong.
    """
    token = {"Authorization": f"Bearer {load.token}"} if load.token else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)

    async def drive() -> Run:
        options: Any = {"headers": token, "timeout": load.timeout, "limits": limits}
        async with httpx.AsyncClient(base_url=load.url, **options) as client:
            await _check(client, load)
            return await _drive(client, load)

    return asyncio.run(drive())


async def _check(client: httpx.AsyncClient, load: Load) -> None:
    """Sends one request before the test: its errors are the user's."""
    try:
        answer = await client.post(f"/{load.route}", json=next(bodies(load)))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"No answer from {load.url}: {reason}.") from error
    if answer.status_code not in (200, 429):
        found = f"{load.url}/{load.route} answers {answer.status_code}"
        raise ConfigError(f"{found}: {answer.text[:300]}")


async def _drive(client: httpx.AsyncClient, load: Load) -> Run:
    clock = asyncio.get_running_loop().time
    begin, samples, metrics = clock(), list[Sample](), list[dict[str, float]]()
    running: set[asyncio.Task] = set()

    async def send(start: float, body: Mapping[str, Any]) -> None:
        behind = clock() - begin - start
        status, ratio = await _request(client, load.route, body)
        samples.append(Sample(start, clock() - begin - start, status, ratio, behind))

    async def watch() -> None:
        while True:
            metrics.append({"time": clock() - begin, **await _metrics(client)})
            await asyncio.sleep(_SAMPLED_EVERY)

    watching = asyncio.create_task(watch())
    for start, body in zip(arrivals(load), bodies(load), strict=False):
        await asyncio.sleep(begin + start - clock())
        running.add(task := asyncio.create_task(send(float(start), body)))
        task.add_done_callback(running.discard)
    await asyncio.sleep(begin + load.seconds - clock())
    await asyncio.gather(*running)
    watching.cancel()
    return Run(sorted(samples), metrics)


async def _request(client: httpx.AsyncClient, route: str, body: Any) -> tuple[int, int]:
    """The status and the ratio of an answer."""
    try:
        answer = await client.post(f"/{route}", json=body)
    except httpx.HTTPError:
        return FAILED, 0
    if answer.status_code != 200:
        return answer.status_code, 0
    return 200, int(answer.headers.get("x-variator-ratio", 1))


async def _metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Of the server's Prometheus metrics those of `_METRICS`; nothing from one without them."""
    try:
        answer = await client.get("/metrics")
    except httpx.HTTPError:
        return {}
    pairs = (line.rsplit(" ", 1) for line in answer.text.splitlines() if line.count(" ") == 1)
    found = {name.removesuffix("_total"): value for name, value in pairs}
    return {ours: float(found[name]) for name, ours in _METRICS.items() if name in found}
