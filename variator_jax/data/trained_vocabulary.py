"""A SentencePiece vocabulary of a user's own texts, trained once and kept in a file.

For backbones that are trained from nothing; a published backbone has its vocabulary already.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from variator_jax.data._tf import seqio
from variator_jax.data.sentencepiece_training import train_sentencepiece
from variator_jax.data.text_files import read_text_lines, text_files
from variator_jax.data.vocabulary import EXTRA_IDS, load_vocabulary
from variator_jax.errors import DataError
from variator_jax.files import write_file

_SENTENCES = 60_000  # sampled for training; more of them only cost time
_LONGEST = 1000  # characters of a sentence that SentencePiece reads


def trained_vocabulary(
    path: str, data_dir: str | None, pieces: int = 4000, whole_words: Sequence[str] = ()
) -> seqio.SentencePieceVocabulary:
    """Returns the vocabulary in `path`; trains it on the texts of `data_dir` if there is none yet.

    Args:
      path: the model file. Once written it stays, whatever the texts become.
      data_dir: a folder of .txt or .txt.gz files, as for `wikipedia.wikipedia_task`; those for
        validation are left out.
      pieces: size, without the 100 sentinels.
      whole_words: words that shall each be one piece, such as a task's verbalizers.

    Raises:
      DataError: if there is neither a file nor a folder with texts, or they are too few.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        if data_dir is None:
            raise DataError(
                f"no vocabulary file {file}, and no texts to train it on: give a folder of .txt or "
                ".txt.gz files (DATA_DIR)"
            )
        write_file(file, train_sentencepiece(_sample(data_dir), pieces, whole_words))
    return load_vocabulary(file, EXTRA_IDS)


def _sample(data_dir: str) -> list[str]:
    """Sentences from all files, the same ones in every run."""
    sentences = [
        sentence
        for path in text_files(data_dir)["train"]
        for line in read_text_lines(path).as_numpy_iterator()
        for sentence in _sentences(line["text"].decode("utf-8", "replace"))
    ]
    random.Random(0).shuffle(sentences)
    return sentences[:_SENTENCES]


def _sentences(text: str) -> Iterator[str]:
    for sentence in text.split(". "):
        for start in range(0, len(sentence), _LONGEST):
            yield sentence[start : start + _LONGEST]
