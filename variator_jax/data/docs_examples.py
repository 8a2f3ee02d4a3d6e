"""Examples made from the documentation corpus: pure functions of its records, no TensorFlow.

Each function takes one split's records and returns {'inputs', 'targets'} texts in a fixed order
that looks random, so that a prefix is a fair sample. `held_out` then removes from validation
whatever text training has too.
"""

from __future__ import annotations

import collections
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

Record = Mapping[str, str]
Examples = list[dict[str, str]]

#: Topic label -> the packages of its family. All come with the `train` extra.
TOPICS = {
    "standard": ("python",),
    "numpy": ("numpy", "scipy"),
    "tensorflow": ("tensorflow", "tensorflow_text", "keras"),
    "jax": ("jax", "jaxlib", "flax", "optax", "orbax"),
    "matplotlib": ("matplotlib", "mpl_toolkits"),
}
TOPIC_PROMPT = "Library? {text}"
PAIR_PROMPT = "First: {first} Second: {second}"
NAME_PROMPT = "Name: {text}"

_GIVE_AWAY = re.compile(
    r"\b[\w.]*(?:numpy|ndarray|scipy|tensorflow|keras|jax|flax|linen|optax|orbax|matplotlib|pyplot|"
    r"python|mplot3d)\w*\.?|\b(?:np|sp|tf|jnp|lax|nnx|nn|mpl|plt|mtri)\.|\b(?:np|tf|jnp|mpl|nnx)\b",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TOPIC_WORDS = (8, 20)  # fewest and most words of a topic text
_PAIR_WORDS = (4, 18)  # fewest and most words of each sentence of a pair
_PAIR_SHOWN = 8  # words of each sentence that are shown, so that short inputs hold a pair
_NAME_WORDS = (5, 20)
_TOPIC_CAP = 5_000  # most examples of one topic in a split


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _shuffled(examples: Iterable[dict[str, str]]) -> Examples:
    """Returns the examples without repeated inputs, in an order fixed by their texts."""
    unique = {example["inputs"]: example for example in examples}
    return sorted(unique.values(), key=lambda example: _order(example["inputs"]))


def text_examples(records: Iterable[Record]) -> Examples:
    """Returns {'targets': text} of every record, in the order of the corpus."""
    return [{"targets": record["text"].replace("\n", " ")} for record in records]


def passages(text: str, fewest: int, most: int) -> Iterator[str]:
    """Yields runs of consecutive sentences that have between `fewest` and `most` words."""
    run: list[str] = []
    for sentence in [*text.split("\n"), None]:
        words = (sentence or "").split()
        if sentence is None or len(run) + len(words) > most:
            if len(run) >= fewest:
                yield " ".join(run)
            run = []
        if len(words) <= most:
            run += words


def topic_examples(records: Iterable[Record], cap: int = _TOPIC_CAP) -> Examples:
    """Returns passages with the library that they document; the libraries' names are taken out.

    No topic has more than `cap` examples.
    """
    owner = {package: topic for topic, packages in TOPICS.items() for package in packages}
    by_topic: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
    topics_of: dict[str, set[str]] = collections.defaultdict(set)
    for record in records:
        topic = owner.get(record["package"])
        if topic is None:
            continue
        for passage in passages(_GIVE_AWAY.sub("", record["text"]), *_TOPIC_WORDS):
            inputs = TOPIC_PROMPT.format(text=passage)
            topics_of[inputs].add(topic)
            by_topic[topic].append({"inputs": inputs, "targets": topic})
    clear = [
        [e for e in _shuffled(examples) if len(topics_of[e["inputs"]]) == 1][:cap]
        for _, examples in sorted(by_topic.items())
    ]
    return _shuffled(example for examples in clear for example in examples)


def pair_examples(records: Iterable[Record]) -> Examples:
    """Returns openings of neighbouring sentences, in the written order ('yes') and swapped ('no').

    Both orders of every pair are there, so the words of an input as a whole say nothing.
    """
    pairs: dict[tuple[str, str], None] = {}
    for record in records:
        lines = record["text"].split("\n")
        if len(lines) < 2 or not (_fits_pair(lines[0]) and _fits_pair(lines[1])):
            continue
        first, second = (" ".join(line.split()[:_PAIR_SHOWN]) for line in lines[:2])
        if first != second and (second, first) not in pairs:
            pairs[first, second] = None
    found: Examples = []
    for first, second in sorted(pairs, key=lambda pair: _order(" ".join(sorted(pair)))):
        orders = [((first, second), "yes"), ((second, first), "no")]
        for (one, two), label in sorted(orders):
            inputs = PAIR_PROMPT.format(first=one, second=two)
            found.append({"inputs": inputs, "targets": label})
    return found


def _fits_pair(sentence: str) -> bool:
    return sentence[0].isupper() and _PAIR_WORDS[0] <= len(sentence.split()) <= _PAIR_WORDS[1]


def name_examples(records: Iterable[Record]) -> Examples:
    """Returns the opening of each function's or class's text with the words of its name."""
    found = []
    for record in records:
        words = name_words(record["name"])
        opening = next(passages(record["text"], *_NAME_WORDS), None)
        if words and opening and record["kind"] != "module":
            found.append({"inputs": NAME_PROMPT.format(text=opening), "targets": " ".join(words)})
    return _shuffled(found)


def name_words(qualified: str) -> list[str]:
    """Splits the last part of a qualified name into lower-case words; [] if it makes no target.

    Dunder names, names with digits, names of more than four words, and short abbreviations do not.
    """
    last = qualified.rsplit(".", 1)[-1]
    if last.startswith("__") or any(character.isdigit() for character in last):
        return []
    words = [word.lower() for word in _CAMEL.findall(last)]
    suitable = 1 <= len(words) <= 4 and all(len(word) > 1 for word in words)
    return words if suitable and len("".join(words)) > 2 else []


def pair_sentences(inputs: str) -> list[str]:
    """Returns the two sentences of a pair task's input."""
    before, after = PAIR_PROMPT.split("{first}")[0], PAIR_PROMPT.split("{second}")[1]
    middle = PAIR_PROMPT.split("{first}")[1].split("{second}")[0]
    return inputs.removeprefix(before).removesuffix(after).split(middle)


def held_out(train: Examples, validation: Examples, pairs: bool, cap: int) -> Examples:
    """Returns at most `cap` validation examples that share no text with training.

    Args:
      train: the examples of the train split.
      validation: the examples of the validation split.
      pairs: whether inputs are sentence pairs; then neither sentence may occur in training.
      cap: the most examples to keep.
    """

    def texts(example: Mapping[str, str]) -> list[str]:
        return pair_sentences(example["inputs"]) if pairs else [example["inputs"]]

    known = {text for example in train for text in texts(example)}
    return [e for e in validation if known.isdisjoint(texts(e))][:cap]
