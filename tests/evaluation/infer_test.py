"""`variator infer`: T5X's files, each example once and in order, complete or not at all."""

import itertools
import json

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from tiny import random_params, random_plugin
from tiny_runs import TINY

from variator_jax import gin_utils
from variator_jax.backbones.t5 import T5
from variator_jax.data import published
from variator_jax.data.file_task import span_corruption_task_from_text
from variator_jax.data.tasks import text_to_text_task
from variator_jax.errors import ConfigError, DataError, TrainingError, VariatorError
from variator_jax.evaluation import infer as infer_module
from variator_jax.evaluation.data import EvalData
from variator_jax.evaluation.infer import infer
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginConfig
from variator_jax.store import Plugin, load_backbone, load_plugin, save_backbone, save_plugin

LENGTHS = {"inputs": 16, "targets": 6}
TASK, OTHER, BOTH = "infer_test_one", "infer_test_two", "infer_test_both"
LONG = "infer_test_long"
WORDS = seqio.ByteVocabulary(extra_ids=100)
SPLITS = {"train": 3, "validation": 11, "empty": 0}
NETWORK = T5(TINY)


def _maker(name):
    def make(split):
        rng = np.random.default_rng(len(name))
        texts = ["".join(rng.choice(list("abcé"), rng.integers(3, 25))) for _ in range(20)]
        return [
            {"inputs": f"{i} {text}", "targets": text[: i % 5]}
            for i, text in enumerate(texts[: SPLITS[split]])
        ]

    return make


if TASK not in seqio.TaskRegistry.names():
    text_to_text_task(TASK, _maker(TASK), SPLITS, WORDS)
    text_to_text_task(OTHER, _maker(OTHER + "!"), ("train", "validation"), WORDS)
    text_to_text_task(LONG, _maker(TASK), SPLITS, seqio.ByteVocabulary(extra_ids=900))
    seqio.MixtureRegistry.add(BOTH, [TASK, OTHER], default_rate=1)


def _save_backbone(folder, scale=1.0):
    """A backbone that answers with letters, and other inputs with other ones."""
    # Kernels without a mean: with one, a random decoder answers the same whatever it reads.
    params = jax.tree.map(
        lambda x: (x - x.mean()) * 2 if x.ndim > 1 else np.ones_like(x), random_params(TINY)
    )
    letters = WORDS.encode("abcdefghijklmnopqrstuvwxyz")
    logits = params["decoder"]["logits_dense"]["kernel"]
    logits[:, WORDS.eos_id] /= 3
    logits[:, np.setdiff1d(np.arange(TINY.vocab_size), [*letters, WORDS.eos_id])] = 0
    for leaf in (logits, params["decoder"]["decoder_norm"]["scale"]):
        leaf *= np.float32(scale)
    save_backbone(folder / "backbone", TINY, params)
    return load_backbone(folder / "backbone")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a backbone, as a run leaves it, with plugins of ratio 2 and 4."""
    folder = tmp_path_factory.mktemp("models")
    owner = _save_backbone(folder)
    for ratio in (2, 4):
        settings = PluginConfig(ratio, bottleneck=4)
        save_plugin(folder / f"plugin_{ratio}", settings, random_plugin(settings, TINY), owner)
    return folder


def _infer(models, output, task=TASK, ratio=1, mode="predict", split="validation", batch_size=4):
    return infer(
        output_dir=str(output),
        data=EvalData(task, LENGTHS, batch_size, split),
        initial_checkpoint_path=str(models),
        plugin_path=None if ratio == 1 else str(models / f"plugin_{ratio}"),
        mode=mode,
    )


@pytest.fixture
def stand_in(monkeypatch):
    """In place of the model, where only the files matter: nothing is compiled."""

    def answer(mode, owner, plugin, length, mesh):
        if mode == "score":
            return lambda batch: batch["decoder_target_tokens"].sum(axis=-1)
        return lambda batch: batch["encoder_input_tokens"] + 1

    monkeypatch.setattr(infer_module, "_answer", answer)


def _read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def _model(models, ratio):
    """The model of a ratio with its arrays: (model, backbone's, plugin's)."""
    plugin = load_plugin(models / f"plugin_{ratio}") if ratio > 1 else Plugin(PluginConfig(1), None)
    params = load_backbone(models / "backbone").params
    return SplicedModel(NETWORK, plugin.config), params, plugin.variables


def _tokens():
    """All examples and their `[examples, length]` tokens, made without seqio's pipeline."""
    examples = _maker(TASK)("validation")
    columns = []
    for name, length in LENGTHS.items():
        rows = [[*WORDS.encode(e[name])[: length - 1], WORDS.eos_id] for e in examples]
        columns.append(np.array([row + [0] * (length - len(row)) for row in rows], np.int32))
    return examples, *columns


@pytest.mark.parametrize("ratio", [1, 4])
def test_predictions_are_those_of_greedy_decoding_one_by_one(models, tmp_path, ratio):
    path, other = _infer(models, tmp_path, BOTH, ratio)
    assert path.name == f"{TASK}-predict.jsonl-00000-of-00001"
    names = [path.name, other.name]
    assert {p.name for p in tmp_path.iterdir()} == {*names, *(f"{n}.COMPLETED" for n in names)}
    model, params, variables = _model(models, ratio)
    column, length = "encoder_input_tokens", LENGTHS["targets"]
    alone = jax.jit(lambda row: model.generate(params, variables, {column: row}, length))
    examples, inputs, _ = _tokens()
    expected = [WORDS.decode(alone(row[None])[0].tolist()) for row in inputs]
    assert len(set(expected)) > 3  # else any order would do
    assert len(_read(other)) == SPLITS["validation"] and path.read_text() != other.read_text()
    assert _read(path) == [
        {"inputs": {f"{k}_pretokenized": v for k, v in example.items()}, "prediction": prediction}
        for example, prediction in zip(examples, expected, strict=True)
    ]


def test_scores_are_sums_of_log_probabilities_without_padding(models, tmp_path):
    scores = []
    examples, inputs, targets = _tokens()
    for ratio in (1, 4):
        (path,) = _infer(models, tmp_path / str(ratio), ratio=ratio, mode="score")
        assert path.name == f"{TASK}-score.jsonl-00000-of-00001"
        rows = _read(path)
        texts = [row["inputs"]["inputs_pretokenized"] for row in rows]
        assert texts == [example["inputs"] for example in examples]
        scores.append([row["score"] for row in rows])
        # The same by numpy, from the logits of all examples in one batch.
        model, params, variables = _model(models, ratio)
        shifted = np.pad(targets, [(0, 0), (1, 0)])[:, :-1]
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": shifted}
        logits = np.asarray(jax.jit(model.logits)(params, variables, batch), np.float64)
        likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(likelihood, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(scores[-1], (chosen * (targets > 0)).sum(-1), rtol=1e-4)
    assert not np.isclose(*scores, rtol=1e-3).any()


def test_the_noise_of_an_example_is_the_same_each_time_and_wherever_reading_begins(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a text" for i in range(400)))
    task = span_corruption_task_from_text(str(tmp_path / "text.txt"), vocabulary=WORDS)
    data = EvalData(task, {"inputs": 64, "targets": 24}, 2)

    def read(start):
        texts, batches = zip(*itertools.islice(data.examples(task, start), 4 - start), strict=True)
        assert texts[0] == [{}, {}]  # its texts are not kept
        return np.stack([batch["encoder_input_tokens"] for batch in batches])

    first = read(0)
    np.testing.assert_array_equal(first, read(0))
    np.testing.assert_array_equal(first[2:], read(2))


def test_a_task_that_cannot_be_read_is_refused_and_one_without_the_split_left_out(monkeypatch):
    def check(example):
        tf.debugging.assert_less(tf.size(example["inputs"]), 3, "row 7 is bad")
        return example

    task = seqio.get_mixture_or_task(TASK)
    real = task.get_dataset
    monkeypatch.setattr(task, "get_dataset", lambda *a, **k: real(*a, **k).map(check))
    with pytest.raises(DataError, match=f"{TASK}.* cannot be read: .*row 7 is bad"):
        next(EvalData(TASK, LENGTHS, 4).examples(TASK))
    assert EvalData(BOTH, LENGTHS, 4, "empty").tasks() == [TASK]  # the one that has the split


def test_a_finished_file_is_not_computed_again(models, tmp_path, stand_in):
    (path,) = _infer(models, tmp_path, mode="score")
    before = path.read_bytes()
    path.write_bytes(before + b"kept")
    assert _infer(models, tmp_path, mode="score", batch_size=5) == [path]
    assert path.read_bytes() == before + b"kept"
    path.with_name(f"{path.name}.COMPLETED").unlink()
    _infer(models, tmp_path, mode="score")
    assert path.read_bytes() == before


def test_the_results_of_another_run_are_neither_taken_nor_lost(models, tmp_path, stand_in):
    (path,) = _infer(models, tmp_path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another run, with ratio 1 and not 2, plugin"):
        _infer(models, tmp_path, ratio=2)
    with pytest.raises(ConfigError, match="split 'validation' and not 'train'"):
        _infer(models, tmp_path, split="train")
    path.with_name(f"{path.name}.COMPLETED").write_text("")  # as T5X writes it
    with pytest.raises(ConfigError, match="another run, with mode None and not .predict."):
        _infer(models, tmp_path)
    assert path.read_bytes() == before


def test_the_results_of_other_rows_under_the_same_path_are_refused(models, tmp_path, stand_in):
    def task(rows):
        (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
        seqio.TaskRegistry._REGISTRY.pop(name, None)  # as in another process
        return published.glue_task("sst2", WORDS, str(tmp_path), sentinel=False)

    name = None
    name = task(["a film\t1", "a number\t0"])
    _infer(models, tmp_path / "out", name)
    task(["a film\t1", "a letter\t0"])
    with pytest.raises(ConfigError, match="another run, with data"):
        _infer(models, tmp_path / "out", name)


@pytest.mark.parametrize("torn, ratio, starts", [
    ("", 1, [2]),
    ('{"inputs": {"inputs_preto', 1, [2]),
    ('{"whole": "line"}\n', 1, [2]),
    ("", 2, [0, 0]),  # of another run
])  # fmt: skip
def test_an_interrupted_run_continues_behind_its_last_complete_batch(
    models, tmp_path, monkeypatch, stand_in, torn, ratio, starts
):
    complete = [path.read_bytes() for path in _infer(models, tmp_path / "complete", BOTH)]
    real, seen, begun, last = EvalData.examples, [], [], 5  # the second task's second batch

    def stopped(self, task, start):
        begun.append(start)
        for batch in real(self, task, start):
            if len(seen) == last:
                raise KeyboardInterrupt
            seen.append(batch)
            yield batch

    monkeypatch.setattr(EvalData, "examples", stopped)
    cut, name = tmp_path / "cut", f"{OTHER}-predict.jsonl-00000-of-00001"
    with pytest.raises(KeyboardInterrupt):
        _infer(models, cut, BOTH, ratio)
    assert not (cut / name).exists()
    with (cut / f"tmp-{name}" / name).open("a") as draft:
        draft.write(torn)
    if ratio > 1:  # what another run has finished is refused; what it left is started over
        for finished in cut.glob(f"{TASK}*"):
            finished.unlink()
    last = None
    paths = _infer(models, cut, BOTH)
    assert begun[2:] == starts
    assert [path.read_bytes() for path in paths] == complete
    names = [path.name for path in paths]
    assert {p.name for p in cut.iterdir()} == {*names, *(f"{name}.COMPLETED" for name in names)}


@pytest.mark.parametrize("change, message", [
    ({"mode": "scores"}, "Did you mean 'score'"),
    ({"output_dir": None}, "INFER_OUTPUT_DIR is None"),
    ({"output_dir": "gs://bucket/x"}, "path of a local folder"),
    ({"initial_checkpoint_path": None}, "set CHECKPOINT_PATH"),
    ({"data": EvalData(TASK, LENGTHS, split="empty")}, "no examples in the split 'empty'"),
    ({"data": EvalData(LONG, LENGTHS)}, "only 384 embeddings"),
    ({"plugin_path": "nowhere"}, "There is no folder .nowhere"),
    ({"ratio": 4}, "RATIO is 4, the plugin's ratio None: .* --gin.RATIO=1"),
    ({"ratio": 4, "plugin_path": "plugin_2"}, "4, the plugin's ratio 2: .* --gin.RATIO=2"),
])  # fmt: skip
def test_wrong_arguments_are_refused(models, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(models)
    arguments = {"output_dir": str(tmp_path / "output"), "initial_checkpoint_path": "."}
    with pytest.raises(VariatorError, match=message):
        infer(**{"data": EvalData(TASK, LENGTHS)} | arguments | change)
    assert not list(tmp_path.glob("output/infer*"))


def test_scores_that_are_not_finite_are_never_written(models, tmp_path):
    _save_backbone(tmp_path, scale=1e38)
    with pytest.raises(TrainingError, match="not finite"):
        _infer(tmp_path, tmp_path / "output", mode="score")
    assert not list((tmp_path / "output").glob("infer*"))


def test_the_packaged_gin_file_answers(models, tmp_path, stand_in):
    engine = gin_utils.engine_dir()
    macros = {"MIXTURE_OR_TASK_NAME": TASK, "TASK_FEATURE_LENGTHS": LENGTHS, "SPLIT": "train"}
    macros |= {"CHECKPOINT_PATH": models, "PLUGIN_PATH": models / "plugin_4", "BATCH_SIZE": 2}
    macros |= {"INFER_MODE": "score", "INFER_OUTPUT_DIR": tmp_path / "gin"}
    bindings = [f"{name}={value}" for name, value in macros.items()]
    gin_utils.parse(("nano_docs.gin", "runs/infer.gin"), bindings, [engine])
    (path,) = gin_utils.configured(infer)()
    (expected,) = _infer(models, tmp_path, TASK, 4, "score", "train", batch_size=2)
    assert path.parent == tmp_path / "gin" and path.read_bytes() == expected.read_bytes()
    # The backbone of other runs serves, too.
    bindings = ["INFER_OUTPUT_DIR=x", "INITIAL_CHECKPOINT_PATH=runs/backbone"]
    gin_utils.parse(("nano_docs.gin", "runs/infer.gin"), bindings, [engine])
    assert gin_utils.macro("CHECKPOINT_PATH") == "runs/backbone"
