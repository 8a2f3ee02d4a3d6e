"""What all tests share: JAX on the CPU, one cache for the session, and a clean work tree.

The settings below are made on import: before any test module imports JAX, and before pytest-xdist
starts its workers, which inherit them.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gin
import hypothesis
import pytest
from gin import selector_map
from hypothesis.configuration import set_hypothesis_home_dir

TESTS = Path(__file__).resolve().parent

sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # For the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# LLVM's own optimisation takes most of the time to compile, and nothing in the tests is large.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", QUICK)

# No database of failures, for each run stands alone; no deadline, for machines differ.
# No shrinking: each smaller example would be compiled anew, minutes for a slightly nicer message.
hypothesis.settings.register_profile(
    "variator",
    deadline=None,
    database=None,
    derandomize=True,  # the same examples in every run, so that a red run is a change of ours
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("variator")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the cache of the session; workers of pytest-xdist share that of their controller."""
    if not hasattr(config, "workerinput"):
        os.environ["VARIATOR_CACHE"] = tempfile.mkdtemp(prefix="variator_cache_")
        # One compilation cache for all workers and for the processes that tests start.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["VARIATOR_CACHE"], "xla")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    # Without a database it still keeps a folder, by default `.hypothesis` in the work tree.
    set_hypothesis_home_dir(Path(os.environ["VARIATOR_CACHE"]) / "hypothesis")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache, and this file's bytecode, written before it could say no."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("VARIATOR_CACHE"), ignore_errors=True)
        for written in (TESTS / "__pycache__").glob("conftest.*.pyc"):
            written.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Not there, or not empty and not ours.
            (TESTS / "__pycache__").rmdir()


@pytest.fixture
def fresh_gin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A gin that knows only its own configurables, and forgets those of the test afterwards.

    Else a stand-in called `train` would make `train.steps` ambiguous in the tests after it.
    """
    own = {name: found for name, found in gin.config._REGISTRY.items() if name.startswith("gin.")}
    registry = selector_map.SelectorMap()
    for name, found in own.items():
        registry[name] = found
    monkeypatch.setattr(gin.config, "_REGISTRY", registry)
    inverse = {found.wrapped: found for found in own.values()}
    monkeypatch.setattr(gin.config, "_INVERSE_REGISTRY", inverse)
    gin.clear_config()
    yield
    gin.clear_config()
