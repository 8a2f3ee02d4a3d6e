"""The gin files of the paper's data sets, stacked on another task as adaptation stacks them."""

import copy

import pytest
from task_batches import texts

from variator_jax import gin_utils
from variator_jax.data.batches import task_or_mixture
from variator_jax.data.vocabulary import T5_VOCABULARIES

# Name of the file -> (name of the task, tokens of the inputs and of the targets), by the paper.
TASKS = {
    "mnli": ("mnli", 256, 4),
    "qnli": ("qnli", 356, 4),
    "qqp": ("qqp", 256, 4),
    "rte": ("rte", 256, 4),
    "sst2": ("sst2", 96, 4),
    "mrpc": ("mrpc", 96, 4),
    "squad": ("squad", 512, 32),
    "wikipedia": ("wikipedia_span_corruption", 224, 48),
    "variator_glue": ("variator_glue", 356, 4),
}


def _parse(name, *bindings):
    gin_utils.parse(["tasks/text.gin", f"tasks/{name}.gin"], list(bindings))
    # Copying a reference is how gin evaluates one that is called.
    return copy.deepcopy(gin_utils.macro("MIXTURE_OR_TASK_NAME"))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_needs_a_vocabulary_and_reads_nothing(name, fresh_gin):
    task, inputs, targets = TASKS[name]
    assert _parse(name, f"VOCABULARY='{T5_VOCABULARIES[1]}'") == task
    lengths = {"inputs": inputs, "targets": targets}
    assert gin_utils.macro("TASK_FEATURE_LENGTHS") == lengths
    assert gin_utils.macro("TEXT_FILE") is None


def test_a_folder_is_given_as_data_dir(tmp_path, verbalizer_model, fresh_gin):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\n")
    bindings = [f"VOCABULARY='{verbalizer_model}'", f"DATA_DIR='{tmp_path}'"]
    plain = task_or_mixture(_parse("sst2", *bindings, "TASK_SENTINEL=False"))
    assert texts(plain.name, "validation")[0][1] == "positive"
