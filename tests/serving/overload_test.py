"""A minute at three times the load that the fastest plugin carries."""

import dataclasses

import http_server
import jax
import numpy as np

from variator_jax import PluginConfig
from variator_jax.backbones.t5 import T5, get_config, shape_params
from variator_jax.bench.latency import random_params
from variator_jax.plugin import init_plugin
from variator_jax.serving import loadreport
from variator_jax.serving.engine import Engine, EngineLimits
from variator_jax.serving.loadtest import Load, run
from variator_jax.serving.service import Service
from variator_jax.serving.tasks import TaskConfig
from variator_jax.store import Backbone, Plugin

SECONDS, SLO_MS, LENGTH = 60, 2_000, 512


def engine():
    """A network whose batches take tens of milliseconds, so that the client is not the limit."""
    config = get_config("mini", vocab_size=384, num_decoder_layers=0)
    config = dataclasses.replace(config, name="byt5_mini")
    backbone = Backbone(config, random_params(config, shape_params(config)), "m" * 64)
    settings = PluginConfig(sites=("span all x4 size=1 rank=16",))
    plugin = Plugin(settings, init_plugin(settings, T5(config).stack(), jax.random.key(0)))
    tasks = [TaskConfig("embed", "embed", plugin="auto")]
    return Engine(backbone, [plugin], tasks, EngineLimits((LENGTH,), 2 * LENGTH, 2))


def test_a_minute_of_three_times_the_load_is_answered_in_time_or_refused(tmp_path):
    service = Service(engine(), SLO_MS)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{i} ".ljust(LENGTH - 1, "x") for i in range(50)))
    with http_server.running(service) as url:
        fastest = min(service.engine.row_seconds("embed", p, LENGTH) for p in service.engine.ratios)
        load = Load(url, rate=3 / fastest, seconds=SECONDS, texts=str(texts))
        result = run(load)
        state = service.snapshot()
        assert state["ready"] and state["compilations"] == 0
    total = loadreport.whole(result, load, SLO_MS)
    assert not total.failed and 0 < total.refused < total.requests
    # [answered], milliseconds
    answered = np.array([1e3 * (s.seconds - s.behind) for s in result.samples if s.status == 200])
    # Other tests may have come to the cores since it was timed.
    slowdown = max(1.0, *(row["slowdown"] for row in result.metrics if "slowdown" in row))
    assert np.percentile(answered, 99) < 2 * SLO_MS * slowdown and total.ratio > 2
    assert total.goodput > 0.2 / (fastest * max(1.0, state["slowdown"]))
    memory = [row["memory"] for row in result.metrics if "memory" in row]
    assert memory[-1] < 1.05 * memory[len(memory) // 5]
