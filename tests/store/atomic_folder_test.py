"""Writing a folder: the old one or the new one, whatever happens, and never in another's place."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from golden_vectors import config
from tiny import random_params, random_plugin

from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import (
    arrays_file,
    folders,
    load_backbone,
    load_plugin,
    save_backbone,
    save_plugin,
)

SHAPE = config("1_1")
PARAMS = random_params(SHAPE)
PLUGIN = PluginConfig(4, bottleneck=8, layers=(0, 2))
VARIABLES = random_plugin(PLUGIN, SHAPE)


@pytest.fixture
def backbone(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"a vocabulary")
    save_backbone(tmp_path / "backbone", SHAPE, PARAMS, str(tmp_path / "spiece.model"))
    return load_backbone(tmp_path / "backbone")


def _equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_crash_while_writing_leaves_what_was_there(backbone, tmp_path, monkeypatch):
    folder = tmp_path / "plugin"
    save_plugin(folder, PLUGIN, VARIABLES, backbone)
    before = sorted(p.name for p in tmp_path.iterdir())

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(arrays_file, "write_arrays", crash)
    with pytest.raises(CheckpointError, match="plugin cannot be written: disk full"):
        save_plugin(folder, PLUGIN, VARIABLES, backbone)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    load_plugin(folder, backbone)


def test_somebody_elses_folder_is_never_replaced(backbone, tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other things .thesis.tex."):
        save_plugin(tmp_path / "papers", PLUGIN, VARIABLES, backbone)
    with pytest.raises(CheckpointError, match="is a file"):
        save_plugin(tmp_path / "spiece.model", PLUGIN, VARIABLES, backbone)
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "spiece.model").read_bytes() == b"a vocabulary"


def test_a_folder_of_another_kind_is_never_replaced(backbone, tmp_path):
    with pytest.raises(CheckpointError, match="holds other things .backbone.json"):
        save_plugin(tmp_path / "backbone", PLUGIN, VARIABLES, backbone)
    save_plugin(tmp_path / "plugin", PLUGIN, VARIABLES, backbone)
    with pytest.raises(CheckpointError, match="holds other things .plugin.json"):
        save_backbone(tmp_path / "plugin", SHAPE, PARAMS)
    load_backbone(tmp_path / "backbone")
    load_plugin(tmp_path / "plugin")


@pytest.mark.parametrize("surprise", ["thesis.tex", "notes/plugin.json", "pluginXsafetensors"])
def test_a_folder_with_a_file_beyond_its_kind_is_not_replaced(backbone, tmp_path, surprise):
    folder = tmp_path / "plugin"
    save_plugin(folder, PLUGIN, VARIABLES, backbone)
    (folder / surprise).parent.mkdir(exist_ok=True)
    (folder / surprise).write_text("years of work")
    with pytest.raises(CheckpointError, match=f"holds {surprise} too, which would be lost"):
        save_plugin(folder, PLUGIN, VARIABLES, backbone)
    assert (folder / surprise).read_text() == "years of work"


def test_a_linked_folder_is_replaced_where_it_lies(backbone, tmp_path):
    save_plugin(tmp_path / "real", PLUGIN, VARIABLES, backbone)
    (tmp_path / "link").symlink_to("real")
    other = jax.tree.map(lambda x: x + 1, VARIABLES)
    save_plugin(tmp_path / "link", PLUGIN, other, backbone)
    assert (tmp_path / "link").is_symlink()
    _equal(load_plugin(tmp_path / "real").variables, other)


# Dies at each system-visible event in turn, as if the power button were pressed there.
KILLED = """
import os, pathlib, signal, sys
from variator_jax.store import folders

folder, swap = pathlib.Path(sys.argv[1]), sys.argv[2] == "swap"
if not swap:
    folders._exchange = lambda one, other: False

def write(content):
    kind = {"replaces": ["plugin.json"], "holds": ["plugin.safetensors"]}
    with folders.atomic_folder(folder, **kind) as draft:
        folders.write_json(draft / "plugin.json", {"is": content})
        (draft / "plugin.safetensors").write_bytes(content.encode() * 9)

def in_child(deadly):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if str(folder.parent) in str(arguments) or event.startswith("ctypes.call"):
            seen += 1
            if seen == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    write("new")
    os._exit(0)

def state():
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    if held is None:
        return "none"
    assert held == ["plugin.json", "plugin.safetensors"], held
    content = (folder / "plugin.safetensors").read_text()[:3]
    assert (folder / "plugin.safetensors").read_text() == content * 9
    assert content in (folder / "plugin.json").read_text()
    return content

seen = []
for deadly in range(1, 1000):
    write("old")
    left = [p.name for p in folder.parent.iterdir() if p != folder]
    assert not left, left
    ended = in_child(deadly)
    seen.append(state())
    if ended == 0:
        break
    assert ended == -signal.SIGKILL
    if seen[-1] == "none":  # between two renames; the next write puts the old one back first
        folders._clear_left_over(folder)
        assert state() == "old"
print(deadly, *sorted(set(seen)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("rename", ["swap", "in two steps"])
def test_a_writer_killed_at_any_point_leaves_the_old_folder_or_the_new_one(tmp_path, rename):
    (tmp_path / "place").mkdir()
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "place" / "plugin"), rename]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    points, *seen = result.stdout.split()
    assert int(points) > 10
    if sys.platform == "linux" and rename == "swap":
        assert seen == ["new", "old"]
    else:
        assert set(seen) <= {"new", "old", "none"} and {"new", "old"} <= set(seen)


def test_a_draft_that_is_being_written_is_left_alone(tmp_path):
    with folders.atomic_folder(tmp_path / "a", replaces=("plugin.json",)) as slow:
        (slow / "plugin.json").write_text("slow")
        with folders.atomic_folder(tmp_path / "a", replaces=("plugin.json",)) as fast:
            (fast / "plugin.json").write_text("fast")
        assert (tmp_path / "a" / "plugin.json").read_text() == "fast"
        assert slow.is_dir()
    assert (tmp_path / "a" / "plugin.json").read_text() == "slow"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
