"""What trains on a mesh also evaluates, infers and serves. As a script this file is the child."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs
from tiny import random_params, random_plugin

from variator_jax import mesh as meshes
from variator_jax.evaluation.data import EvalData, load_for
from variator_jax.evaluation.evaluate import evaluate
from variator_jax.evaluation.infer import infer
from variator_jax.plugin import PluginConfig
from variator_jax.serving.engine import Engine, EngineLimits
from variator_jax.serving.tasks import TaskConfig
from variator_jax.store import load_backbone, load_plugins, save_backbone, save_plugin

DATA = EvalData(tiny_runs.TASK, {"inputs": 18, "targets": 6}, 12)
MESH = (2, 1, 2)
ROWS = [[5, 6, 7, 1], [9, 1], [8, 7, 1]]
TOKENS = np.array([[5, 6, 7, 1], [9, 1, 0, 0]])


def results(folder: Path, mesh_shape=None) -> dict:
    common = {"initial_checkpoint_path": str(folder), "mesh_shape": mesh_shape, "data": DATA}
    name, plugin = "mesh" if mesh_shape else "one", str(folder / "plugin")
    report = evaluate(model_dir=str(folder / f"{name}_report"), plugin_paths=plugin, **common)
    scored = {"output_dir": str(folder / f"{name}_scores"), "mode": "score"}
    (path,) = infer(plugin_path=plugin, **scored, **common)
    backbone = load_backbone(folder / "backbone")
    mesh = mesh_shape and meshes.make_mesh(backbone.config, 2, mesh_shape)
    plugins = list(load_plugins(folder / "plugin", backbone).values())
    tasks = [TaskConfig("embed", "embed"), TaskConfig("name", "generate", max_length=3)]
    engine = Engine(backbone, plugins, tasks, EngineLimits((8,), 32, 4), mesh=mesh)
    engine.warm_up()
    # [batch, length] of a bucket, and shorter: a JAX array in both cases.
    assert all(isinstance(engine.model.encode(np.ones((2, n), int)), jax.Array) for n in (7, 8))
    return {
        "logits": [
            np.asarray(engine.model.logits(TOKENS, TOKENS[:, :1] * 0, ratio=ratio)).tolist()
            for ratio in engine.ratios.values()
        ],
        "served": {
            plugin: [
                [row.pooled.tolist() for row in engine.dispatch("embed", plugin, ROWS)()],
                np.asarray(engine.dispatch("generate 3 1", plugin, ROWS)()).tolist(),
            ]
            for plugin in engine.ratios
        },
        "quality": [entry.quality[DATA.task] for entry in report.ratios],
        "control": report.control_no_ffn[DATA.task],
        "identical": [entry.identical_to_backbone for entry in report.ratios],
        "scores": [json.loads(line)["score"] for line in path.read_text().splitlines()],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    save_backbone(folder / "backbone", tiny_runs.TINY, random_params(tiny_runs.TINY))
    settings = PluginConfig(sites=("ffn 0 x4 bottleneck=4", "kv 0 x2", "span 1 x4 rank=2"))
    variables = random_plugin(settings, tiny_runs.TINY)
    save_plugin(folder / "plugin", settings, variables, load_backbone(folder / "backbone"))
    return folder


def test_scores_on_a_mesh_are_those_of_one_device(folder):
    child = tiny_runs.start(str(folder), devices=4, script=__file__)
    one = results(folder)
    [mesh], _ = tiny_runs.finish(child)
    assert len(one["scores"]) == 64 and np.std(one["scores"]) > 0.1
    np.testing.assert_allclose(mesh["scores"], one["scores"], rtol=1e-5)
    np.testing.assert_allclose(mesh["quality"], one["quality"], rtol=1e-5)
    np.testing.assert_allclose(mesh["logits"], one["logits"], rtol=1e-4, atol=1e-5)
    for plugin, (vectors, generated) in one["served"].items():
        np.testing.assert_allclose(mesh["served"][plugin][0], vectors, rtol=1e-4, atol=1e-5)
        assert mesh["served"][plugin][1] == generated
    assert mesh["control"] == one["control"] and mesh["identical"] == [True, False]
    # Half of the heads and units on each device.
    assert mesh["kernel"] == [16, 16] and tiny_runs.TINY.mlp_dim == 32


if __name__ == "__main__":
    run_folder = Path(json.loads(sys.argv[1])[1])
    backbone, _ = load_for(DATA, str(run_folder), None, MESH)
    kernel = backbone.params["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    assert jax.device_count() == 4
    print(json.dumps(results(run_folder, MESH) | {"kernel": shard}))
