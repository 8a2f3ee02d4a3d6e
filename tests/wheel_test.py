"""The package as pip builds it, away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("variator_jax", "gin_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")

RUN = """
import runpy, sys, variator_jax
assert variator_jax.__file__.startswith(sys.argv.pop(1)), variator_jax.__file__
runpy.run_module("variator_jax", run_name="__main__")
"""


def test_a_wheel_runs_from_another_folder(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    subprocess.run([*pip, *options], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("variator_jax-*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    arguments = ["train", "--engine=builtin", "--gin_file=nano_docs.gin", "--dry_run"]
    program = [sys.executable, "-c", RUN, target, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "without activations" in result.stdout
    [entry_points] = target.glob("*.dist-info/entry_points.txt")
    assert "variator = variator_jax.cli:main" in entry_points.read_text()
