"""Writing a folder: the old one or the new one, whatever happens, and never in another's place."""

import os
import subprocess
import sys
import time

import pytest

from variator_jax.errors import CheckpointError
from variator_jax.files import atomic_folder, expand_home, lock_folder

KIND = {"replaces": ("plugin.json",), "holds": r"plugin\.safetensors"}


def write(folder, content):
    with atomic_folder(folder, **KIND) as draft:
        (draft / "plugin.json").write_text(content)
        (draft / "plugin.safetensors").write_text(content * 9)


def contents(folder):
    assert sorted(item.name for item in folder.iterdir()) == ["plugin.json", "plugin.safetensors"]
    content = (folder / "plugin.json").read_text()
    assert (folder / "plugin.safetensors").read_text() == content * 9
    return content


@pytest.mark.parametrize("error, raised, message", [
    (OSError(28, "disk full"), CheckpointError, "plugin cannot be written: disk full"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
])  # fmt: skip
def test_a_failure_while_writing_leaves_what_was_there(tmp_path, error, raised, message):
    write(tmp_path / "plugin", "old")
    with pytest.raises(raised, match=message):
        with atomic_folder(tmp_path / "plugin", **KIND) as draft:
            (draft / "plugin.json").write_text("new")
            raise error
    assert contents(tmp_path / "plugin") == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["plugin"]


HOME = os.path.expanduser("~")
ROOT = os.path.expanduser("~root")


@pytest.mark.parametrize(("text", "expanded"), [
    ("~/x", f"{HOME}/x"),
    ("~", HOME),
    ("~root/x", f"{ROOT}/x"),
    ("--output=~/x", f"--output={HOME}/x"),
    ("--gin_search_paths=a,~/b", f"--gin_search_paths=a,{HOME}/b"),
    ("('~/a', 'b')", f"('{HOME}/a', 'b')"),
    *((same, same) for same in ("a~/b", "gs://b/~x", "--x=a~", "('~', 'a')", "~none_such/x")),
])  # fmt: skip
def test_the_home_folder_stands_for_a_leading_tilde(text, expanded):
    assert expand_home(text) == expanded


LOCKS = """
import pathlib, sys, time
from variator_jax.files import lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_and_a_killed_one_leaves_it_free(tmp_path):
    command = [sys.executable, "-c", LOCKS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(CheckpointError, match=f"in use by process {writer.pid} on "):
            lock_folder(tmp_path).__enter__()
        writer.kill()
        writer.wait()
        for _ in range(2):
            with lock_folder(tmp_path):
                pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("surprise", ["thesis.tex", "notes/plugin.json", "pluginXsafetensors"])
@pytest.mark.parametrize("folder", ["other", "plugin"])
def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path, surprise, folder):
    if folder == "plugin":
        write(tmp_path / folder, "old")
    (tmp_path / folder / surprise).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / folder / surprise).write_text("years of work")
    for path, words in ((folder, f"holds {surprise}"), (f"{folder}/{surprise}", "is a file")):
        with pytest.raises(CheckpointError, match=words):
            write(tmp_path / path, "new")
    assert (tmp_path / folder / surprise).read_text() == "years of work"


def test_a_linked_folder_is_replaced_where_it_is(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == "new"


def test_drafts_of_running_writers_stay_and_abandoned_ones_go(tmp_path):
    with atomic_folder(tmp_path / "a", **KIND) as slow:
        write(tmp_path / "a", "fast")
        assert contents(tmp_path / "a") == "fast" and slow.is_dir()
        (slow / "plugin.json").write_text("slow")
        (slow / "plugin.safetensors").write_text("slow" * 9)
    assert contents(tmp_path / "a") == "slow"
    abandoned = tmp_path / ".a.draft-x"
    abandoned.mkdir()
    os.utime(abandoned, (0, time.time() - 100_000))
    write(tmp_path / "a", "new")
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


# Dies at each system-visible event in turn, as if the power button were pressed there.
KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
from files_test import contents, write
from variator_jax import files

folder = pathlib.Path(sys.argv[1])

def in_child(deadly):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if str(folder.parent) in str(arguments):
            seen += 1
            if seen == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    write(folder, "new")
    os._exit(0)

left = set()
for deadly in range(1, 1000):
    write(folder, "old")
    ended = in_child(deadly)
    if not folder.is_dir():  # between two renames; the next writer puts the old one back first
        left.add("aside")
        files._clean_up(folder, folder.with_name(".plugin.old"))
    left.add(contents(folder))
    if ended == 0:
        break
    assert ended == -signal.SIGKILL
print(deadly, *sorted(left))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_at_any_point_leaves_the_old_folder_or_the_new_one(tmp_path):
    (tmp_path / "place").mkdir()
    here = os.path.dirname(__file__)
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "place" / "plugin"), here]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    points, *left = result.stdout.split()
    assert int(points) > 10 and left == ["aside", "new", "old"]
