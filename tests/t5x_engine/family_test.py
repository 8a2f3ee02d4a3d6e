"""The packaged gin files on both engines, and what a dry run says of the largest."""

import re
import time

import jax
import jax.numpy as jnp
import pytest

from variator_jax import cli, gin_utils
from variator_jax.commands import engines

FAMILY = sorted(path.name for path in gin_utils.configs_dir().glob("variator_*.gin"))


@pytest.fixture
def t5x_count(fresh_gin):
    """Counts the parameters of T5X's network as T5X's own gin file configures it."""
    import gin
    from t5x.examples.t5 import network

    def count(size):
        root = engines._t5x_root()
        gin_utils.parse([f"t5x/examples/t5/t5_1_1/{size}.gin"], ["DROPOUT_RATE=0.0"], [str(root)])
        config = gin.get_configurable(network.T5Config)()
        tokens = jnp.ones((1, 4), jnp.int32)
        init = network.Transformer(config).init
        shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    return count


@pytest.mark.parametrize("engine", ["t5x", "builtin"])
@pytest.mark.parametrize(("size", "billions"), [("xl", 2.850), ("xxl", 11.135)])
def test_a_dry_run_counts_what_t5x_counts(size, billions, engine, t5x_count, capsys):
    expected = t5x_count(size)
    started = time.monotonic()
    options = ("train", f"--engine={engine}", f"--gin_file=variator_{size}.gin", "--dry_run")
    code = cli.main(options)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    with capsys.disabled():
        print(f"dry run of {size} on {engine}: {time.monotonic() - started:.1f} s")
    found = re.search(r"^backbone +([\d,]+) ", captured.out, re.MULTILINE)
    assert int(found[1].replace(",", "")) == expected
    assert round(expected / 1e9, 3) == billions
    assert "still to be set: INITIAL_CHECKPOINT_PATH, MODEL_DIR" in captured.out
    assert ("-m t5x.train" in captured.out) == (engine == "t5x")


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_parses_on_both_engines(name, fresh_gin):
    assert len(FAMILY) >= 5
    for engine in (engines.choose("builtin"), engines.choose("t5x")):
        paths = engine.search_paths("train")
        if engine.name == engines.T5X:
            with engines.as_main("t5x.train"):
                gin_utils.parse([name], [], paths, require=False)
        else:
            gin_utils.parse([name], [], paths, require=False)
        assert set(gin_utils.unset_required()) <= {"INITIAL_CHECKPOINT_PATH", "MODEL_DIR"}
