import pytest

from variator_jax.data.trained_vocabulary import trained_vocabulary
from variator_jax.errors import DataError

WORDS = ("Yes", "negative")


def _texts(folder):
    text = "A sentence about rivers and mountains. " * 40 + "No river is negative, yes. " * 10
    (folder / "one.txt").write_text(f"{text}\n{text}\n")
    (folder / "valid.txt").write_text("Unseen words: zebra.\n")
    return str(folder)


def test_a_vocabulary_is_trained_once_and_has_whole_words_and_sentinels(tmp_path):
    file = tmp_path / "new" / "spiece.model"
    made = trained_vocabulary(str(file), _texts(tmp_path), 120, WORDS)
    for word in WORDS:
        assert len(made.encode(word)) == 1
    assert made.encode("<extra_id_0>") == [made.vocab_size - 1]
    content = file.read_bytes()
    again = trained_vocabulary(str(file), None)
    assert again.encode("rivers and mountains") == made.encode("rivers and mountains")
    assert file.read_bytes() == content


def test_without_file_and_texts_it_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no vocabulary file .*DATA_DIR"):
        trained_vocabulary(str(tmp_path / "spiece.model"), None)
    with pytest.raises(DataError, match="no text for train"):
        trained_vocabulary(str(tmp_path / "spiece.model"), str(tmp_path))
