"""What is cut of a text that is too long, and how it is counted."""

import json
import re

import pytest
from task_batches import take, texts

from variator_jax.data import docs_tasks, published
from variator_jax.data.cuts import count_cuts, describe_data, describe_local
from variator_jax.data.file_task import file_task
from variator_jax.data.vocabulary import byte_vocabulary, docs_vocabulary, load_vocabulary
from variator_jax.errors import DataError

LONG, SHORT = " ".join(["the array"] * 100), "an axis"
LENGTHS = {"inputs": 48, "targets": 8}


def _task(folder, rows, template, **arguments):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return file_task(str(path), template, validation_path=str(path), **arguments)


def _inputs(task, vocabulary, lengths=LENGTHS):
    """Each example's inputs as a text."""
    (batch,) = take(1, task, size=len(texts(task)), lengths=lengths, shuffle=False, repeat=False)
    decoded = [vocabulary.decode(row.tolist()) for row in batch["encoder_input_tokens"]]
    return decoded, batch["encoder_input_tokens"]


@pytest.mark.parametrize("make", [byte_vocabulary, docs_vocabulary])
def test_the_longest_field_is_cut_and_the_rest_of_the_prompt_stays(tmp_path, make):
    asked = ((LONG, SHORT), ("\u7684\u00e9" * 200, SHORT), (SHORT, LONG), ("x", "y"))
    rows = [{"text": text, "q": q} for text, q in asked]
    template = "T: {text} Q: {q}?"
    task = _task(tmp_path, rows, template, target="{q}", vocabulary=make())
    decoded, tokens = _inputs(task, make())
    assert all(text.startswith("T: ") and text.endswith("?") for text in decoded)
    assert decoded[0].endswith(f" Q: {SHORT}?") and decoded[1].endswith(f" Q: {SHORT}?")
    assert decoded[0].startswith("T: the arr") and decoded[2].startswith(f"T: {SHORT} Q: the arr")
    assert decoded[3] == "T: x Q: y?"
    assert ((tokens[:3:2] != 0).sum(axis=1) >= LENGTHS["inputs"] - 5).all()  # as much as fits
    whole = [template.format_map(row) for row in rows]
    assert [text for text, _ in texts(task)] == whole  # nothing is cut where no length is given
    cut = decoded[1].removesuffix(f" Q: {SHORT}?")  # and no letter is cut in two
    assert whole[1].startswith(cut) or make is docs_vocabulary


def test_a_text_that_fits_has_the_tokens_of_the_whole_text(tmp_path):
    rows, template = [{"text": f"array {n}"} for n in (1, 2, 33)], "Say:{text}!{text}."
    task = _task(tmp_path, rows, template, target="{text}")
    whole = [[*docs_vocabulary().encode(template.format_map(row)), 1] for row in rows]
    lengths = {**LENGTHS, "inputs": max(map(len, whole))}  # just enough
    for ids, expected in zip(_inputs(task, docs_vocabulary(), lengths)[1], whole, strict=True):
        assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any()


def test_a_prompt_that_does_not_fit_by_itself_loses_its_end(tmp_path):
    task = _task(tmp_path, [{"text": LONG}] * 2, "{text}" + "word " * 50, target="{text}")
    _, tokens = _inputs(task, docs_vocabulary(), {"inputs": 8, "targets": 8})
    assert (tokens[:, -1] == 1).all() and (tokens != 0).all()


def test_prompts_of_the_published_data_sets_keep_their_ends(tmp_path, verbalizer_model):
    rows = f"sentence1\tsentence2\tlabel\n{LONG}\t{LONG}\tentailment\n"
    (tmp_path / "train.tsv").write_text(rows)
    asked = {"question": "Who?", "context": LONG, "answers": ["an axis"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(asked))
    vocabulary, lengths = load_vocabulary(verbalizer_model), {"inputs": 160, "targets": 16}
    rte = published.glue_task("rte", verbalizer_model, str(tmp_path))
    squad = published.squad_task(verbalizer_model, str(tmp_path))
    for task, kept in ((rte, "Does sentence 1 entails sentence 2?"), (squad, "Answer:")):
        ((text,), tokens) = _inputs(task, vocabulary, lengths)
        assert kept in text and vocabulary.vocab_size - 1 in tokens[0].tolist()  # the sentinel
        assert text.count("Sentence 2: the") == (task == rte)


def test_pairs_of_the_documentation_keep_both_sentences():
    decoded, _ = _inputs("docs_pair", docs_vocabulary(), {"inputs": 40, "targets": 4})
    assert all("First:" in text and "Second:" in text for text in decoded)
    examples = docs_tasks.docs_examples_of("docs_pair", "train")
    assert set(texts("docs_pair")) == {(e["inputs"], e["targets"]) for e in examples}


def test_what_is_cut_is_counted_in_numbers_and_shares(tmp_path):
    rows = [{"text": LONG}, {"text": "x"}, {"text": "y"}, {"text": "z"}]
    task = _task(tmp_path, rows, "Text: {text}", target="{text}")
    (line,) = count_cuts(task, "validation", {"inputs": 48, "targets": 400})
    assert "of 4 examples, cut are 1 inputs (25.0%) to 48 tokens and 0 targets (0.0%) to" in line
    (line,) = describe_data(task, "train", LENGTHS)
    assert "of 4 examples, cut are 1 inputs (25.0%) to 48 tokens and 1 targets (25.0%) to 8" in line
    assert describe_local(task, ("train",), LENGTHS) == [line]
    (line,) = describe_data(task, "train", LENGTHS, most=2)
    assert "of the first 2 examples, cut are 1 inputs (50.0%)" in line
    for targets, cut in ((8, 9), (100, 0)):  # 48 tokens with noise have targets of 12 tokens
        lengths = {**LENGTHS, "targets": targets}
        (line,) = count_cuts("docs_span_corruption", "train", lengths, most=9)
        assert re.search(rf"the first 9 examples, cut are 0 inputs .* and {cut} targets", line)
    labelled = _task(tmp_path, [{"text": LONG, "label": 1}] * 2, "{text}", labels=("no", "yes"))
    line, *_ = describe_data(labelled, "train", LENGTHS)
    assert "labels are read as indices: '0' is 'no', '1' is 'yes'" in line


@pytest.mark.parametrize("lengths", [{"inputs": 8, "targets": 1}, {"inputs": 1, "targets": 8}])
def test_lengths_that_leave_only_the_end_of_sequence_are_refused(tmp_path, lengths):
    labelled = _task(tmp_path, [{"text": "x", "label": 1}] * 2, "{text}", labels=("no", "yes"))
    generated = _task(tmp_path, [{"text": "x"}] * 2, "{text}", target="{text}")
    for task in (labelled, generated, "docs_labels"):
        for refused in (count_cuts, lambda *a: describe_local(a[0], [a[1]], a[2])):
            with pytest.raises(DataError, match="TASK_FEATURE_LENGTHS .* or more"):
                refused(task, "train", lengths)
        with pytest.raises(DataError, match="end of sequence need"):
            take(1, task, lengths=lengths)
