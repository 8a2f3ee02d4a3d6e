"""What the tests of this folder share: two finished runs, and a backbone for each module."""

import dataclasses

import pytest
import tiny_runs

EVALUATED = dataclasses.replace(tiny_runs.DATA, eval_batches=1)


@pytest.fixture(scope="session")
def backbone_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone_run")
    tiny_runs.run(folder, trained="backbone", plugin=None, checkpoint_period=3, data=EVALUATED)
    return folder


@pytest.fixture(scope="session")
def plugin_run(backbone_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin_run")
    path = str(backbone_run)
    tiny_runs.run(folder, initial_checkpoint_path=path, checkpoint_period=3, data=EVALUATED)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tiny_runs.save_tiny_backbone(tmp_path_factory.mktemp("work"))
