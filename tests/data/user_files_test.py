"""Any file of a user: each row becomes an example that reads back as it stood, or a bad row."""

import json
import re

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from task_batches import take, texts

from variator_jax.data import rows
from variator_jax.data.file_task import file_task
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import byte_vocabulary
from variator_jax.errors import DataError

QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
NUMERALS = st.from_regex(r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,9})?(e-?[0-9]{1,4})?", fullmatch=True)
NESTED = st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
VALUES = SCALARS | NESTED
LABELS = ["0", "1", "no", "yes", "true", "false", True, False, 0, 1, None, 1.0, "x"]
WORDS = ("no", "yes")


@settings(max_examples=60, **QUICK)
@given(st.lists(VALUES.map(json.dumps) | NUMERALS, min_size=1, max_size=6))
def test_any_value_reads_back_as_it_stands_or_is_a_bad_row(tmp_path, literals):
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(f'{{"text": {literal}}}' for literal in literals))
    read, bad = rows.read_rows(path, lambda row: rows.text_field(row, "text"))
    expected, numbers = [], []
    for number, literal in enumerate(literals, 1):
        text = json.loads(literal) if literal.startswith('"') else literal
        numeral = literal[0] in "-0123456789" and literal[-1] != "y"  # not -Infinity
        surrogate = re.search("[\ud800-\udfff]", text)
        if (numeral or literal.startswith('"')) and text.strip() and not surrogate:
            expected.append(text.strip())
        else:
            numbers.append(number)
    assert read == expected
    assert [row.split(": ")[0] for row in bad] == [f"{path}:{number}" for number in numbers]


@settings(max_examples=25, **QUICK)
@given(st.lists(st.sampled_from(LABELS), min_size=2, max_size=8), st.permutations(WORDS))
def test_any_label_column_is_read_one_way_or_refused(tmp_path, column, words):
    path = tmp_path / "labels.jsonl"
    examples = [{"text": f"row {n}", "label": label} for n, label in enumerate(column)]
    path.write_text("\n".join(map(json.dumps, examples)))
    both = {"validation_path": str(path), "vocabulary": byte_vocabulary()}
    try:
        task = file_task(str(path), "{text}", labels=words, **both)
    except DataError as error:
        assert re.search(rf"{path}:\d+: |two ways", str(error))
        return
    truth = {"true": "yes", "false": "no"}
    ways = [{"no": "no", "yes": "yes"}, {"0": words[0], "1": words[1]}, truth]
    read = [[way.get(str(label).lower()) for label in column] for way in ways]
    assert [target for _, target in texts(task)] in read
    assert all(f"is {word!r}" in get_spec(task).note for word in words)


@settings(max_examples=10, **QUICK)
@given(st.text("ab \u00e9\u7684", min_size=1, max_size=80).filter(str.strip), st.integers(12, 60))
def test_any_length_keeps_the_prompt(tmp_path, text, length):
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join([json.dumps({"text": text})] * 2))
    both = {"validation_path": str(path), "vocabulary": byte_vocabulary()}
    task = file_task(str(path), "Q: {text} A:", target="{text}", **both)
    (batch,) = take(1, task, size=2, lengths={"inputs": length, "targets": 4})
    whole = f"Q: {text.strip()} A:"
    for ids in batch["encoder_input_tokens"].tolist():
        made = byte_vocabulary().decode(ids)
        fits = len(whole.encode()) < length
        assert made == whole if fits else made.startswith("Q: ") and made.endswith(" A:")
        assert fits or whole.startswith(made[:-3])
