"""Checkpoints that T5X itself wrote, where they are at hand; `t5x_test.py` makes its own."""

from pathlib import Path

import numpy as np
import pytest
import small_t5

from variator_jax.store.t5x import load_t5x, save_t5x

SAMPLES = Path(__file__).parents[3] / "shared" / "t5x_checkpoints"
pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="T5X's samples are not at hand")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_leaf_equals_its_reference(dtype):
    loaded = small_t5.flat(load_t5x(SAMPLES / "legacy" / dtype / "checkpoint_1000000").params)
    with np.load(SAMPLES / "legacy" / "reference_f32.npz") as reference:
        expected = {x.removeprefix("target/"): reference[x] for x in reference if "target/" in x}
    assert loaded.keys() == expected.keys()
    for path, array in loaded.items():
        assert array.dtype.name == dtype
        # float32 exactly, bfloat16 to its rounding.
        assert np.array_equal(array, expected[path].astype(array.dtype)), path


def test_todays_layout_loads_and_goes_back(tmp_path):
    loaded = load_t5x(SAMPLES / "orbax")
    assert loaded.config.num_encoder_layers == 2 and loaded.config.embed_dim == 16
    small_t5.assert_same(load_t5x(save_t5x(tmp_path, loaded)).params, loaded.params)
