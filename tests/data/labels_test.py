"""One column of labels is read one way, or refused."""

import pytest

from variator_jax.data.labels import choose, label_of, readings
from variator_jax.errors import DataError

NO_YES, YES_NO = ("no", "yes"), ("yes", "no")
TRUTH = {"false": "no", "true": "yes"}
READ = [
    (NO_YES, "no yes", {"no": "no", "yes": "yes"}),
    (YES_NO, "0 1", {"0": "yes", "1": "no"}),
    (NO_YES, [False, True], TRUTH),
    (NO_YES, "False TRUE", TRUTH),
    (("negative", "positive"), [True], {"false": "negative", "true": "positive"}),
    (("true", "false"), [True, False], {"true": "true", "false": "false"}),
    (("True", "False"), "true False", {"true": "True", "false": "False"}),
    (("0", "1"), "0 1", {"0": "0", "1": "1"}),
    (("1", "2", "3"), "1 2 3", {"1": "1", "2": "2", "3": "3"}),
    (("1", "2", "3"), "0 1 2", {"0": "1", "1": "2", "2": "3"}),
    ({True: "yes", False: "no"}, [True, False], TRUTH),
    ({"true": "no", "False": "yes"}, "True false", {"true": "no", "false": "yes"}),
    ({1: "good", 2: "bad", 3: "bad"}, "1 3", {"1": "good", "2": "bad", "3": "bad"}),
]
TWO_WAYS = [
    (YES_NO, [True, False], "'false' is 'yes'.*'false' is 'no'"),
    (YES_NO, "true", "'true' is 'no'.*'true' is 'yes'"),
    (("positive", "negative"), "False", "order of the list.*what the words mean"),
    (("ham", "spam"), [True], "order of the list.*reverse order"),
    (("1", "0"), "0 1", "'0' is '0'.*'0' is '1'"),
    (("1", "2", "3"), "1 2", "words themselves.*indices"),
    (("1", "2", "3"), "0 1 2 3", "words themselves.*indices|indices.*words themselves"),
]


def _column(values):
    values = values.split() if isinstance(values, str) else values
    return [label_of({"label": value}, "label") for value in values]


@pytest.mark.parametrize("labels, column, table", READ)
def test_a_column_is_read_one_way(labels, column, table):
    reading = choose(labels, _column(column))
    assert reading.table == table
    assert all(f"{raw!r} is {word!r}" in str(reading) for raw, word in table.items())


@pytest.mark.parametrize("labels, column, both", TWO_WAYS)
def test_a_column_of_two_readings_is_refused_with_both(labels, column, both):
    with pytest.raises(DataError, match=f"two ways: .*{both}.*as a dict, such as"):
        choose(labels, _column(column))


def test_rows_of_another_reading_are_left_to_be_bad():
    assert choose(NO_YES, ["no", "yes", "0"]).table == {"no": "no", "yes": "yes"}
    assert choose(NO_YES, ["0", "1", "1", "true"]).name == "indices"
    with pytest.raises(DataError, match="one label twice"):
        readings({1: "no", "1": "yes"})
