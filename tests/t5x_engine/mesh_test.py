"""Four devices, however they are laid out, train as one does."""

import t5x_runs

MESHES = ((1, 4), (4, 1), (2, 2))  # (data, model)


def test_the_losses_of_one_device_on_meshes_of_four(work, trained):
    runs = {mesh: work / f"mesh_{mesh[0]}x{mesh[1]}" for mesh in MESHES}
    options = ("train", "--gin_file=tiny.gin", "--gin.EVAL_PERIOD=20")
    commands = [
        (*options, f"--gin.MESH_SHAPE={mesh}", f"--gin.MODEL_DIR={run}")
        for mesh, run in runs.items()
    ]
    t5x_runs.call_together(commands, work, devices=4)
    expected = t5x_runs.losses(trained)
    for mesh, run in runs.items():
        found = t5x_runs.losses(run)
        assert list(found) == list(range(1, 21))
        difference = max(abs(found[step] / expected[step] - 1) for step in found)
        print(f"mesh {mesh}: losses differ by {difference:.1e}")
        assert difference < 1e-5
        t5x_runs.same_bits(
            t5x_runs.backbone_leaves(run / "checkpoint_20"),
            t5x_runs.backbone_leaves(work / "backbone" / "checkpoint_1000"),
        )
