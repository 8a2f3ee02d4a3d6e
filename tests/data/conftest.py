"""A tiny Python installation with documentation, so that no test reads the real one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from variator_jax.data import docs_corpus, vocabulary
from variator_jax.data.docs_corpus import Installation

PACKAGES = ("numpy", "scipy", "keras", "jax", "flax", "matplotlib", "tensorflow", "someone")
_WORDS = (
    "array axis value window colour shape number order matrix layer gradient weight path file "
    "string parser token tree figure legend marker sample noise filter signal batch epoch device "
    "thread socket client server header record field table index column"
).split()


def _sentence(rng: random.Random, opening: str) -> str:
    return f"{opening} {' '.join(rng.choices(_WORDS, k=rng.randint(4, 9)))}."


def _module(rng: random.Random, functions: int) -> str:
    parts = [f'"""{_sentence(rng, "Tools that handle the")}"""']
    for _ in range(functions):
        name = "_".join(rng.sample(_WORDS, 2))
        text = f"{_sentence(rng, 'Return the')} {_sentence(rng, 'This also needs the')}"
        parts.append(f'def {name}(x):\n    """{text}\n\n    Args:\n      x: a thing.\n    """\n')
    return "\n\n".join(parts)


def write_installation(root: Path, seed: int = 0, files: int = 14) -> Installation:
    """Writes Python files below `root` and describes them as an installation."""
    rng = random.Random(seed)
    site = root / "site-packages"
    for package in ("", *PACKAGES):
        folder = site / package if package else root / "stdlib"
        folder.mkdir(parents=True)
        for number in range(files):
            (folder / f"module_{number}.py").write_text(_module(rng, 6))
    return Installation(root / "stdlib", (site,))


@pytest.fixture(scope="session")
def tiny_installation(tmp_path_factory) -> Installation:
    return write_installation(tmp_path_factory.mktemp("installation"))


@pytest.fixture(scope="session", autouse=True)
def documentation(tmp_path_factory, tiny_installation):
    """Makes the tiny installation the running one, and the cache a temporary folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VARIATOR_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(docs_corpus, "running_installation", lambda: tiny_installation)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def verbalizer_model(tmp_path_factory) -> str:
    """A SentencePiece model file in which each of the paper's verbalizers is one piece."""
    words = ("Yes", "No", "Maybe", "negative", "positive", "Sentence", "Question", "Answer")
    rng = random.Random(1)
    lines = [" ".join(rng.choices((*words, *_WORDS), k=12)) for _ in range(300)]
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    path.write_bytes(vocabulary.train_sentencepiece(lines, 200, words[:5]))
    return str(path)
