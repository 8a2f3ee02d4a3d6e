import numpy as np

from variator_jax.data import noise
from variator_jax.data._tf import seqio
from variator_jax.data.docs_tasks import docs_examples_of
from variator_jax.data.vocabulary import docs_vocabulary

LENGTHS = {"inputs": 48, "targets": 16}


def _task():
    return seqio.get_mixture_or_task("docs_span_corruption")


def _examples(seed, **options):
    dataset = _task().get_dataset(LENGTHS, "train", shuffle=False, seed=seed, **options)
    return list(dataset.as_numpy_iterator())


def test_the_seqio_task_restores_to_the_text_and_fills_its_inputs():
    vocabulary = docs_vocabulary()
    base = vocabulary.vocab_size - vocabulary.extra_ids
    examples = _examples(0)
    text = []
    for example in examples:
        assert example["inputs"][-1] == example["targets"][-1] == 1
        spans = np.split(example["targets"][:-1], np.flatnonzero(example["targets"] >= base))[1:]
        by_sentinel = {span[0]: span[1:].tolist() for span in spans}
        for token in example["inputs"][:-1]:
            text += by_sentinel[token] if token >= base else [int(token)]
    texts = [e["targets"] for e in docs_examples_of("docs_span_corruption", "train")]
    assert text == [token for one in texts for token in vocabulary.encode(one)]
    full = noise.corrupted_lengths(noise.chunk_length(48))
    assert (len(examples[0]["inputs"]), len(examples[0]["targets"])) == full
    assert full[0] in (47, 48)


def test_noise_depends_on_the_seed_and_is_new_in_every_epoch():
    def inputs(examples):
        return [e["inputs"].tolist() for e in examples]

    once = inputs(_examples(3))
    assert once == inputs(_examples(3)) != inputs(_examples(4))
    twice = inputs(_examples(3, num_epochs=2))
    assert len(twice) == 2 * len(once) and twice[len(once) :] != once


def test_targets_that_are_cut_are_announced(caplog):
    with caplog.at_level("WARNING", logger="absl"):
        noise.check_room({"inputs": 48, "targets": 4}, 100)
    assert "cut to 4" in caplog.text
