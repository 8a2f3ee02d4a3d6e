"""`variator infer`: T5X's files, each example once and in order, whole or not at all."""

import json

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from tiny import random_params, random_plugin

from variator_jax import gin_utils
from variator_jax.backbones.t5 import Transformer, get_config
from variator_jax.backbones.t5.decoding import greedy_decode
from variator_jax.data.tasks import LazySource, text_to_text_task
from variator_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    VariatorError,
)
from variator_jax.evaluation import infer as infer_module
from variator_jax.evaluation.infer import infer
from variator_jax.evaluation.infer_data import InferData
from variator_jax.evaluation.result_files import writing
from variator_jax.plugin import PluginConfig
from variator_jax.plugin.splice import splice
from variator_jax.store import load_backbone, load_plugin, save_backbone, save_plugin

LENGTHS = {"inputs": 16, "targets": 6}
TASK, OTHER, BOTH = "infer_test_one", "infer_test_two", "infer_test_both"
NOISE, WORDS = "infer_test_noise", seqio.ByteVocabulary(extra_ids=100)
SPLITS = {"train": 3, "validation": 11, "empty": 0}
TINY = get_config(
    "nano", vocab_size=384, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip


def _maker(name):
    def make(split):
        rng = np.random.default_rng(len(name))
        texts = ["".join(rng.choice(list("abcé"), rng.integers(3, 25))) for _ in range(20)]
        return [
            {"inputs": f"{i} {text}", "targets": text[: i % 5]}
            for i, text in enumerate(texts[: SPLITS[split]])
        ]

    return make


@seqio.map_over_dataset(num_seeds=1)
def _noise(example, seed):
    drawn = tf.random.stateless_uniform([4], seed, 3, 250, tf.int32)
    return example | {"inputs": tf.concat([drawn, example["inputs"][:8]], axis=0)}


if TASK not in seqio.TaskRegistry.names():
    text_to_text_task(TASK, _maker(TASK), SPLITS, WORDS)
    text_to_text_task(OTHER, _maker(OTHER + "!"), ("train", "validation"), WORDS)
    seqio.TaskRegistry.add(
        NOISE,
        source=LazySource(_maker(NOISE), SPLITS),
        preprocessors=[seqio.preprocessors.tokenize, _noise, seqio.preprocessors.append_eos],
        output_features={name: seqio.Feature(WORDS) for name in LENGTHS},
    )
    seqio.MixtureRegistry.add(BOTH, [TASK, OTHER], default_rate=1)


def _save_backbone(folder, seed=0, change=None):
    """A backbone that answers with letters, and other inputs with other ones."""
    # Kernels without a mean: with one, a random decoder says the same whatever it reads.
    params = jax.tree.map(
        lambda x: (x - x.mean()) * 2 if x.ndim > 1 else np.ones_like(x), random_params(TINY, seed)
    )
    letters = WORDS.encode("abcdefghijklmnopqrstuvwxyz")
    logits = params["decoder"]["logits_dense"]["kernel"]
    logits[:, WORDS.eos_id] /= 3
    logits[:, np.setdiff1d(np.arange(TINY.vocab_size), [*letters, WORDS.eos_id])] = 0
    if change is not None:
        change(params)
    save_backbone(folder / "backbone", TINY, params)
    return load_backbone(folder / "backbone")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a backbone, as a run leaves it, with a plugin of ratio 2 and one of ratio 4."""
    folder = tmp_path_factory.mktemp("models")
    backbone = _save_backbone(folder)
    for ratio in (2, 4):
        settings = PluginConfig(ratio, bottleneck=4)
        save_plugin(folder / f"plugin_{ratio}", settings, random_plugin(settings, TINY), backbone)
    return folder


def _infer(models, output, task=TASK, ratio=1, mode="predict", split="validation", batch_size=4):
    return infer(
        output_dir=str(output),
        data=InferData(task, LENGTHS, batch_size, split),
        initial_checkpoint_path=str(models),
        plugin_path=None if ratio == 1 else str(models / f"plugin_{ratio}"),
        mode=mode,
    )


@pytest.fixture
def stand_in(monkeypatch):
    """In place of the model, where only the files matter: nothing is compiled."""

    def answer(mode, backbone, plugin, length):
        ratio = plugin.config.ratio if plugin else 1
        if mode == "score":
            return lambda batch: batch["decoder_target_tokens"].sum(axis=-1) / ratio
        return lambda batch: batch["encoder_input_tokens"] + ratio

    monkeypatch.setattr(infer_module, "_answer", answer)


def _read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def _spliced(models, ratio, tokens):
    if ratio == 1:
        return splice(PluginConfig(1), None, tokens > 0)
    plugin = load_plugin(models / f"plugin_{ratio}")
    return splice(plugin.config, plugin.variables, tokens > 0)


def _tokens(example):
    """`[1, length]` of inputs and of targets, made without seqio's pipeline."""
    rows = {}
    for name, length in LENGTHS.items():
        ids = [*WORDS.encode(example[name])[: length - 1], WORDS.eos_id]
        rows[name] = np.array([ids + [0] * (length - len(ids))], np.int32)
    return rows["inputs"], rows["targets"]


@pytest.mark.parametrize("ratio", [1, 4])
def test_predictions_are_those_of_greedy_decoding_one_by_one(models, tmp_path, ratio, monkeypatch):
    traced = []

    def counted(*args):
        traced.append(args[2].shape)
        return greedy_decode(*args)

    monkeypatch.setattr(infer_module, "greedy_decode", counted)
    path, other = _infer(models, tmp_path, BOTH, ratio)
    assert traced == [(4, LENGTHS["inputs"], TINY.embed_dim)]  # compiled once for all batches
    assert path.name == f"{TASK}-predict.jsonl-00000-of-00001"
    whole = [path.name, other.name]
    assert {p.name for p in tmp_path.iterdir()} == {*whole, *(f"{n}.COMPLETED" for n in whole)}
    module, params = Transformer(TINY), load_backbone(models / "backbone").params

    @jax.jit
    def alone(tokens):
        with _spliced(models, ratio, tokens):
            encoded = module.apply({"params": params}, tokens, method="encode")
        return greedy_decode(module, params, encoded, tokens, LENGTHS["targets"]).tokens

    examples = _maker(TASK)("validation")
    expected = [WORDS.decode(alone(_tokens(example)[0])[0].tolist()) for example in examples]
    assert len(set(expected)) > 3  # else any order would do
    assert _read(path) == [
        {"inputs": {f"{k}_pretokenized": v for k, v in example.items()}, "prediction": prediction}
        for example, prediction in zip(examples, expected, strict=True)
    ]


def test_scores_are_sums_of_log_probabilities_without_padding(models, tmp_path):
    found = []
    for ratio in (1, 4):
        (path,) = _infer(models, tmp_path / str(ratio), ratio=ratio, mode="score")
        assert path.name == f"{TASK}-score.jsonl-00000-of-00001"
        rows = _read(path)
        examples = _maker(TASK)("validation")
        texts = [row["inputs"]["inputs_pretokenized"] for row in rows]
        assert texts == [example["inputs"] for example in examples]
        found.append([row["score"] for row in rows])
        np.testing.assert_allclose(found[-1], _scores(models, ratio, examples), rtol=1e-4)
    assert not np.isclose(*found, rtol=1e-3).any()


def _scores(models, ratio, examples):
    """The same by numpy, from the logits of all examples in one batch."""
    rows = [_tokens(example) for example in examples]
    tokens, targets = (np.concatenate(column) for column in zip(*rows, strict=True))
    shifted = np.pad(targets, [(0, 0), (1, 0)])[:, :-1]
    params = load_backbone(models / "backbone").params

    @jax.jit
    def forward():
        with _spliced(models, ratio, tokens):
            return Transformer(TINY).apply({"params": params}, tokens, shifted)

    logits = np.asarray(forward(), np.float64)
    normaliser = np.log(np.exp(logits).sum(-1))
    scores = []
    for row, ids in enumerate(targets):
        length = int((ids > 0).sum())  # EOS counts
        scores.append(sum(logits[row, i, ids[i]] - normaliser[row, i] for i in range(length)))
    return scores


def test_a_mixture_writes_a_file_a_task_and_leaves_out_those_without_the_split(
    models, tmp_path, stand_in
):
    one, other = _infer(models, tmp_path, BOTH)
    assert [one.name, other.name] == [f"{t}-predict.jsonl-00000-of-00001" for t in (TASK, OTHER)]
    assert len(_read(one)) == len(_read(other)) == SPLITS["validation"]
    assert one.read_text() != other.read_text()
    assert InferData(BOTH, LENGTHS, 4, "empty").tasks() == [seqio.get_mixture_or_task(TASK)]


def test_the_noise_of_an_example_is_the_same_each_time_and_wherever_reading_begins():
    data = InferData(NOISE, LENGTHS, 4)
    first, second, later = (
        np.concatenate([batch["encoder_input_tokens"] for _, batch in data.batches(*start)])
        for start in ((data.tasks()[0], 0), (data.tasks()[0], 0), (data.tasks()[0], 4))
    )
    assert len(np.unique(first[:, :4], axis=0)) == SPLITS["validation"]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[4:], later)


def test_a_task_that_cannot_be_read_is_told(monkeypatch):
    def check(example):
        tf.debugging.assert_less(tf.size(example["inputs"]), 3, "row 7 is bad")
        return example

    data = InferData(TASK, LENGTHS, 4)
    (task,) = data.tasks()
    real = task.get_dataset
    monkeypatch.setattr(task, "get_dataset", lambda *a, **k: real(*a, **k).map(check))
    with pytest.raises(DataError, match=f"{TASK}.* cannot be read: .*row 7 is bad"):
        next(data.batches(task, 0))


def test_a_finished_file_is_not_computed_again(models, tmp_path, stand_in, monkeypatch):
    (path,) = _infer(models, tmp_path, mode="score")
    before = path.read_bytes()
    path.write_bytes(before + b"kept")
    with monkeypatch.context() as patched:
        patched.setattr(InferData, "batches", None)
        assert _infer(models, tmp_path, mode="score", batch_size=5) == [path]
    assert path.read_bytes() == before + b"kept"
    path.with_name(f"{path.name}.COMPLETED").unlink()
    _infer(models, tmp_path, mode="score")
    assert path.read_bytes() == before


def test_the_results_of_another_run_are_neither_taken_nor_lost(models, tmp_path, stand_in):
    (path,) = _infer(models, tmp_path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another run, with plugin None and not .*, ratio 1 and"):
        _infer(models, tmp_path, ratio=2)
    with pytest.raises(ConfigError, match="split 'validation' and not 'train'"):
        _infer(models, tmp_path, split="train")
    path.with_name(f"{path.name}.COMPLETED").write_text("")  # as T5X writes it
    with pytest.raises(ConfigError, match="does not say from which run"):
        _infer(models, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("stand_in")
class TestAnInterruptedRun:
    @pytest.fixture
    def whole(self, models, tmp_path):
        return [path.read_bytes() for path in _infer(models, tmp_path / "whole", BOTH)]

    def _interrupt(self, models, output, monkeypatch, after, ratio=1):
        """Stops a run before its batch number `after`, as a signal would."""
        real, seen = InferData.batches, []

        def batches(self, task, start):
            for batch in real(self, task, start):
                if len(seen) == after:
                    raise KeyboardInterrupt
                seen.append(start)
                yield batch

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(InferData, "batches", batches)
            _infer(models, output, BOTH, ratio)

    def _starts(self, monkeypatch):
        """The first example of each task that a later run asks for."""
        real, starts = InferData.batches, []

        def batches(self, task, start):
            starts.append(start)
            return real(self, task, start)

        monkeypatch.setattr(InferData, "batches", batches)
        return starts

    @pytest.mark.parametrize("torn", ["", '{"inputs": {"inputs_preto', '{"whole": "line"}\n'])
    def test_it_goes_on_behind_the_last_whole_batch(
        self, models, tmp_path, monkeypatch, whole, torn
    ):
        cut = tmp_path / "cut"
        self._interrupt(
            models, cut, monkeypatch, after=5
        )  # three of the first task, two of the next
        name = f"{OTHER}-predict.jsonl-00000-of-00001"
        assert [p.name for p in cut.glob("infer_test_two*")] == []
        with (cut / f"tmp-{name}" / name).open("a") as draft:
            draft.write(torn)
        starts = self._starts(monkeypatch)
        paths = _infer(models, cut, BOTH)
        assert starts == [8]
        assert [path.read_bytes() for path in paths] == whole
        assert sorted(p.name for p in cut.iterdir()) == sorted(
            [*(p.name for p in paths), *(f"{p.name}.COMPLETED" for p in paths)]
        )

    def test_what_another_run_left_is_started_over(self, models, tmp_path, monkeypatch, whole):
        self._interrupt(models, tmp_path / "cut", monkeypatch, after=2, ratio=2)
        starts = self._starts(monkeypatch)
        paths = _infer(models, tmp_path / "cut", BOTH)
        assert starts == [0, 0]
        assert [path.read_bytes() for path in paths] == whole


def test_two_runs_never_write_one_file(tmp_path):
    with writing(tmp_path / "results", {}) as file:
        file.append([{"a": 1}])
        with (
            pytest.raises(ConfigError, match="another run is writing"),
            writing(tmp_path / "results", {}),
        ):
            pass
    assert (tmp_path / "results").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    "change,said",
    [
        ({"mode": "scores"}, "Did you mean 'score'"),
        ({"output_dir": None}, "INFER_OUTPUT_DIR is None"),
        ({"output_dir": "gs://bucket/x"}, "not a local folder"),
        ({"initial_checkpoint_path": None}, "set CHECKPOINT_PATH"),
        ({"data": InferData("infer_test_onne", LENGTHS)}, f"Did you mean '{TASK}'"),
        ({"data": InferData(TASK, LENGTHS, split="validatoin")}, "Did you mean 'validation'"),
        ({"data": InferData(TASK, {"inputs": 4})}, "expected positive 'inputs' and 'targets'"),
        ({"data": InferData(TASK, LENGTHS, batch_size=0)}, "BATCH_SIZE is 0"),
        ({"data": InferData(TASK, LENGTHS, split="empty")}, "no examples in the split 'empty'"),
        ({"plugin_path": "nowhere"}, "There is no folder"),
    ],
)
def test_slips_are_told(models, tmp_path, change, said):
    arguments = {
        "output_dir": str(tmp_path / "output"),
        "data": InferData(TASK, LENGTHS),
        "initial_checkpoint_path": str(models),
    }
    with pytest.raises(VariatorError, match=said):
        infer(**arguments | change)
    assert not list(tmp_path.glob("output/infer*"))


def test_a_plugin_of_another_backbone_is_refused(models, tmp_path):
    _save_backbone(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="belongs to backbone"):
        infer(
            output_dir=str(tmp_path / "output"),
            data=InferData(TASK, LENGTHS),
            initial_checkpoint_path=str(tmp_path / "other"),
            plugin_path=str(models / "plugin_2"),
        )


def test_a_task_with_more_tokens_than_the_backbone_is_refused(models, tmp_path):
    name = "infer_test_long"
    if name not in seqio.TaskRegistry.names():
        text_to_text_task(name, _maker(TASK), SPLITS, seqio.ByteVocabulary(extra_ids=900))
    with pytest.raises(ConfigError, match="only 384 embeddings"):
        _infer(models, tmp_path, name)


def test_scores_that_are_no_numbers_are_never_written(models, tmp_path):
    def huge(params):
        params["decoder"]["logits_dense"]["kernel"] *= np.float32(1e38)
        params["decoder"]["decoder_norm"]["scale"] *= np.float32(1e38)

    _save_backbone(tmp_path, change=huge)
    with pytest.raises(TrainingError, match="not finite"):
        _infer(tmp_path, tmp_path / "output", mode="score")
    assert not list((tmp_path / "output").glob("infer*"))


class TestGin:
    def _parse(self, *bindings, files=("nano_docs.gin", "runs/infer.gin")):
        engine = gin_utils.configs_dir() / "engines" / "builtin"
        gin_utils.parse(files, bindings, [str(engine)])
        return gin_utils.configured(infer)

    def test_the_packaged_run_answers(self, models, tmp_path, stand_in):
        run = self._parse(
            f"MIXTURE_OR_TASK_NAME={TASK}",
            f"TASK_FEATURE_LENGTHS={LENGTHS}",
            f"CHECKPOINT_PATH={models}",
            f"PLUGIN_PATH={models / 'plugin_4'}",
            "INFER_MODE=score",
            "SPLIT=train",
            "BATCH_SIZE=2",
            f"INFER_OUTPUT_DIR={tmp_path / 'gin'}",
        )
        (path,) = run()
        (expected,) = _infer(models, tmp_path, TASK, 4, "score", "train", batch_size=2)
        assert path.parent == tmp_path / "gin"
        assert path.read_bytes() == expected.read_bytes()

    def test_a_backbone_and_a_place_are_required(self):
        with pytest.raises(ConfigError, match="INFER_OUTPUT_DIR"):
            self._parse("CHECKPOINT_PATH=x")
        with pytest.raises(ConfigError, match="set CHECKPOINT_PATH"):
            self._parse("INFER_OUTPUT_DIR=x")()

    def test_the_backbone_of_other_runs_serves_too(self):
        self._parse("INFER_OUTPUT_DIR=x", "INITIAL_CHECKPOINT_PATH=runs/backbone")
        assert gin_utils.macro("CHECKPOINT_PATH") == "runs/backbone"
