"""A plugin folder that release 0.1 wrote: it loads, and computes what it computed then."""

import json
from pathlib import Path

import numpy as np
from small_t5 import GATED, backbone

from variator_jax import VariatorModel, load_plugin, load_plugins, save_plugin

FOLDER = Path(__file__).parent / "format_1"


def test_it_loads_and_gives_the_states_that_release_0_1_gave():
    expected = np.load(FOLDER / "encoded.npz")
    model = VariatorModel(backbone(GATED), load_plugins(FOLDER))
    encoded = np.asarray(model.encode(expected["tokens"], ratio=4))
    valid = expected["tokens"] > 0
    np.testing.assert_allclose(encoded[valid], expected["encoded"][valid], atol=1e-5)


def test_it_is_saved_as_format_2_and_is_the_same_plugin(tmp_path):
    before = load_plugin(FOLDER)
    save_plugin(tmp_path / "new", before.config, before.variables, backbone(GATED))
    content = json.loads((tmp_path / "new" / "plugin.json").read_text())
    assert content["format_version"] == 2
    (site,) = content["config"]["sites"]
    assert site["kind"] == "ffn" and site["ratio"] == 4 and site["layers"] == [0, 2]
    after = load_plugin(tmp_path / "new", backbone(GATED))
    assert after.config == before.config
    assert set(after.variables.params) == {f"encoder/layers_{i}/mlp" for i in (0, 2)}
