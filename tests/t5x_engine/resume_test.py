"""A run that is killed goes on as if nothing had happened, from a legacy checkpoint of T5X."""

import subprocess
import time

import t5x_runs


def test_kill_and_resume_from_a_legacy_checkpoint(work, trained):
    run = work / "killed"
    arguments = ("train", "--gin_file=tiny.gin", "--gin_file=decoded.gin", f"--gin.MODEL_DIR={run}")
    legacy = f"--gin.INITIAL_CHECKPOINT_PATH={work / 'legacy'}"
    program = t5x_runs.command(*arguments, legacy)
    with open(work / "killed.log", "w") as log:
        process = subprocess.Popen(
            program, cwd=work, env=t5x_runs.environment(), stdout=log, stderr=log
        )
        while not (run / "checkpoint_10" / "commit_success.txt").exists():
            assert process.poll() is None, (work / "killed.log").read_text()[-6000:]
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert not list(run.glob("checkpoint_20*"))

    t5x_runs.call(program, work)
    first, second = t5x_runs.event_files(run)
    resumed = t5x_runs.file_losses(second)
    assert list(resumed) == list(range(11, 21))  # It did go on, and did not start over.
    undisturbed = t5x_runs.losses(trained)
    # The batches are those that would have followed.
    assert resumed == {step: undisturbed[step] for step in resumed}
    one, other = run / "checkpoint_20", trained / "checkpoint_20"
    t5x_runs.same_bits(t5x_runs.plugin_leaves(one), t5x_runs.plugin_leaves(other))
    restored = t5x_runs.backbone_leaves(work / "legacy" / "checkpoint_1000")
    t5x_runs.same_bits(t5x_runs.backbone_leaves(one), restored)
