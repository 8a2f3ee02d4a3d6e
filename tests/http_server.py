"""A server of a tiny model of bytes, in a thread of this process; started once for a worker."""

import contextlib
import dataclasses
import functools
import threading
import time

import httpx
import tiny_model

from variator_jax.model import VariatorModel
from variator_jax.serving.engine import Engine, EngineLimits
from variator_jax.serving.http import HttpLimits, bind, create_app, make_server
from variator_jax.serving.service import Service
from variator_jax.serving.tasks import TaskConfig

# A vocabulary of bytes needs no file.
BACKBONE = dataclasses.replace(
    tiny_model.BACKBONE, config=dataclasses.replace(tiny_model.SHAPE, name="byt5_tiny")
)
PLUGINS = [tiny_model.make_plugin(ratio, BACKBONE) for ratio in (2, 4)]
TASKS = [
    TaskConfig("embed", "embed"),
    TaskConfig("letter", "classify", prompt="Letter? {text}", labels=("a", "b")),
    TaskConfig("same", "classify", prompt="{first} or {second}", labels=("n", "y")),
    TaskConfig("rerank", "rerank", prompt="{query} {text}", labels=("f", "t")),
    TaskConfig("name", "generate", prompt="Name: {text}", max_length=4),
]
LIMITS = EngineLimits(lengths=(16, 64), batch_tokens=256, most_rows=4)


@functools.cache
def model():
    """The library's model, for what answers must equal."""
    return VariatorModel(BACKBONE, PLUGINS)


def service():
    """A service that is not started."""
    return Service(Engine(BACKBONE, PLUGINS, TASKS, LIMITS))


@contextlib.contextmanager
def running(served, token=None, limits=None, ready=True):
    """The address of a running server."""
    limits = limits or HttpLimits()
    bound = bind("127.0.0.1", 0, limits.seconds)
    server = make_server(create_app(served, "tiny", token, limits))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        while ready and httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.05)
        yield url
    finally:
        server.should_exit = True
        thread.join()
