"""A tiny Python installation with documentation, so that no test reads the real one."""

import random

import pytest

from variator_jax.data import docs_corpus, vocabulary

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


@pytest.fixture(scope="session", autouse=True)
def documentation(tmp_path_factory):
    """Makes a tiny installation the running one, and the cache a temporary folder."""
    root, rng = tmp_path_factory.mktemp("installation"), random.Random(0)
    for package in ("stdlib", *(f"site-packages/{package}" for package in PACKAGES)):
        (root / package).mkdir(parents=True)
        for number in range(14):
            (root / package / f"module_{number}.py").write_text(_module(rng, 6))
    patch = pytest.MonkeyPatch()
    patch.setenv("VARIATOR_CACHE", str(tmp_path_factory.mktemp("cache")))
    folders = (root / "stdlib", root / "site-packages")
    patch.setattr(docs_corpus, "source_folders", lambda: folders)
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
