"""A tiny model of bytes with two plugins, as the tests of serving run it; compiled once."""

import asyncio
import contextlib
import dataclasses
import functools

import numpy as np
import tiny_model

from variator_jax.model import VariatorModel
from variator_jax.serving.engine import Engine, EngineLimits
from variator_jax.serving.service import Limits, Service
from variator_jax.serving.tasks import TaskConfig

# A vocabulary of bytes needs no file.
SHAPE = dataclasses.replace(tiny_model.SHAPE, name="byt5_tiny")
BACKBONE = dataclasses.replace(tiny_model.BACKBONE, config=SHAPE)
PLUGIN = tiny_model.make_plugin(4, BACKBONE)
TASKS = [
    TaskConfig("embed", "embed"),
    TaskConfig("embed_auto", "embed", plugin="auto"),
    TaskConfig("letter", "classify", prompt="{text}?", labels=("a", "b")),
    TaskConfig("same", "classify", prompt="{first}{second}", labels=("n", "y")),
    TaskConfig("relevant", "rerank", prompt="{query} {text}", labels=("t", "f")),
    TaskConfig("similar", "rerank"),
    TaskConfig("name", "generate", prompt="N: {text}", max_length=4),
    TaskConfig("both", "generate", prompt="{first}{second}", max_length=4),
]
BUCKETS = (16, 32)
SLO_MS = 4_000


@functools.cache
def warm():
    """The engine, all of whose programs are compiled."""
    engine = Engine(BACKBONE, [PLUGIN], TASKS, EngineLimits(BUCKETS, 32, 4))
    engine.warm_up()
    engine.warm_up = lambda *_: None  # it has been
    return engine


@functools.cache
def model():
    """The library's model, for what answers must equal."""
    return VariatorModel(BACKBONE, [PLUGIN], buckets=BUCKETS)


def pooled(model, texts, **options):
    """The texts' vectors by the library: means of the tokens', of length 1."""
    vectors = means(model, texts, **options)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def means(model, texts, **options):
    """The mean of each text's states."""
    return np.array([np.asarray(model.encode(x, **options))[0].mean(axis=0) for x in texts])


@contextlib.asynccontextmanager
async def started(limits=None, slo_ms=SLO_MS, engine=None):
    """A service that is ready; its programs are compiled by the first test of a process."""
    service = Service(engine or warm(), slo_ms, limits or Limits())
    try:
        await service.start()
        yield service
    finally:
        await service.drain()


def run(test):
    """Runs an asynchronous test."""
    return functools.wraps(test)(lambda *args, **named: asyncio.run(test(*args, **named)))
