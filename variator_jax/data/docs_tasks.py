"""The documentation tasks, registered with seqio on import; nothing is built until one is read.

`docs_span_corruption` is for pre-training; `docs_topic`, `docs_pair` (classification) and
`docs_name` (generation) are the tasks that plugins are adapted to. `docs_recall` (generation) asks
for one of a passage's words by its number, so that it cannot be answered without every token.
Examples are pure functions of one split's records, in a fixed order that looks random, so that a
prefix is a fair sample.
"""

import collections
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from variator_jax.data import docs_corpus
from variator_jax.data._tf import seqio
from variator_jax.data.fitting import template_parts
from variator_jax.data.spec import Kind, TaskSpec, normalise_answer
from variator_jax.data.tasks import Examples, text_to_text_task
from variator_jax.data.vocabulary import docs_vocabulary

Record = Mapping[str, str]

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
RECALL_PROMPT = "{number}? {text}"
VALIDATION_CAP = 2_000

_GIVE_AWAY = re.compile(
    r"\b[\w.]*(?:numpy|ndarray|scipy|tensorflow|keras|jax|flax|linen|optax|orbax|matplotlib|pyplot|"
    r"python|mplot3d)\w*\.?|\b(?:np|sp|tf|jnp|lax|nnx|nn|mpl|plt|mtri)\.|\b(?:np|tf|jnp|mpl|nnx)\b",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TOPIC_WORDS, _NAME_WORDS = (8, 20), (5, 20)  # fewest and most words of a text
_RECALL_WORDS = (6, 20)
_RECALL_SHOWN, _RECALL_ASKED, _RECALL_KNOWN = 9, 3, 1000  # words; see `recall_examples`
_PAIR_WORDS = range(4, 19)  # words of each sentence of a pair
_PAIR_SHOWN = 8  # words of each sentence that are shown, so that short inputs hold a pair
_TOPIC_CAP = 5_000  # most examples of one topic in a split


def docs_examples_of(task: str, split: str) -> Examples:
    """Returns the texts of one split of a documentation task, building the corpus if need be.

    Validation has at most `VALIDATION_CAP` examples, and shares no text with training.
    """
    return _examples(task, split, docs_corpus.ensure_corpus())


@functools.lru_cache(maxsize=16)
def _examples(task: str, split: str, folder: Path) -> Examples:
    make, kind, _ = _MAKERS[task]
    records = docs_corpus.read_split(folder, split)
    if split == "train" or kind == "span_corruption":
        return make(records)
    balanced = {"cap": VALIDATION_CAP // len(TOPICS)} if task == "docs_topic" else {}
    train, validation = _examples(task, "train", folder), make(records, **balanced)
    return held_out(train, validation, VALIDATION_CAP)


def text_examples(records: Iterable[Record]) -> Examples:
    """Returns {'targets': text} of every record, in the order of the corpus."""
    return [{"targets": record["text"].replace("\n", " ")} for record in records]


def topic_examples(records: Iterable[Record], cap: int = _TOPIC_CAP) -> Examples:
    """Returns texts without libraries' names, and the library of each; `cap` of each at most."""
    owner = {package: topic for topic, packages in TOPICS.items() for package in packages}
    topics_of: dict[str, set[str]] = collections.defaultdict(set)  # by inputs
    for record in records:
        if topic := owner.get(record["package"]):
            for passage in _passages(_GIVE_AWAY.sub("", record["text"]), *_TOPIC_WORDS):
                topics_of[TOPIC_PROMPT.format(text=passage)].add(topic)
    by_topic: dict[str, Examples] = {topic: [] for topic in TOPICS}
    for inputs in sorted(topics_of, key=_order):
        topic, *others = topics_of[inputs]
        if not others and len(by_topic[topic]) < cap:
            by_topic[topic].append({"inputs": inputs, "targets": topic})
    return _shuffled(example for examples in by_topic.values() for example in examples)


def pair_examples(records: Iterable[Record]) -> Examples:
    """Returns openings of neighbouring sentences, in the written order ('yes') and swapped ('no').

    Both orders of every pair are there, so the words of an input do not give the answer.
    """
    pairs: dict[tuple[str, str], None] = {}  # in their order
    for record in records:
        words = [line.split() for line in record["text"].split("\n")[:2]]
        if len(words) < 2 or not all(len(w) in _PAIR_WORDS and w[0][0].isupper() for w in words):
            continue
        first, second = (" ".join(sentence[:_PAIR_SHOWN]) for sentence in words)
        if first != second and (second, first) not in pairs:
            pairs[first, second] = None
    examples: Examples = []
    for pair in sorted(pairs, key=lambda pair: _order(" ".join(sorted(pair)))):
        for first, second in sorted([pair, pair[::-1]]):
            inputs = PAIR_PROMPT.format(first=first, second=second)
            label = "yes" if (first, second) == pair else "no"
            examples.append({"inputs": inputs, "targets": label})
    return examples


def name_examples(records: Iterable[Record]) -> Examples:
    """Returns the opening of each function's or class's text with the words of its name."""
    examples = []
    for record in records:
        targets = " ".join(name_words(record["name"]))
        opening = next(_passages(record["text"], *_NAME_WORDS), None)
        if targets and opening and record["kind"] != "module":
            examples.append({"inputs": NAME_PROMPT.format(text=opening), "targets": targets})
    return _shuffled(examples)


def recall_examples(records: Iterable[Record]) -> Examples:
    """Returns the first words of passages, numbered, and a number, with the word of that number.

    Every word of an input may be asked for, so nothing of it can be dropped; up to `_RECALL_ASKED`
    are, of those that are among the `_RECALL_KNOWN` most frequent.
    """
    texts = dict.fromkeys(p for r in records for p in _passages(r["text"], *_RECALL_WORDS))
    passages = [[w for w in map(_bare, text.split()[:_RECALL_SHOWN]) if w] for text in texts]
    counts = collections.Counter(itertools.chain.from_iterable(passages))
    known = {word for word, _ in counts.most_common(_RECALL_KNOWN)}
    examples: Examples = []
    for words in passages:
        text = " ".join(f"{number} {word}" for number, word in enumerate(words, start=1))
        asked = [RECALL_PROMPT.format(number=n, text=text) for n in range(1, len(words) + 1)]
        pairs = [pair for pair in zip(asked, words, strict=True) if pair[1] in known]
        for inputs, word in sorted(pairs, key=lambda pair: _order(pair[0]))[:_RECALL_ASKED]:
            examples.append({"inputs": inputs, "targets": word})
    return _shuffled(examples)


def _bare(word: str) -> str:
    """The word without punctuation; nothing for what is not one, and for an article."""
    word = word.strip(".,;:()")
    return word if word.isalpha() and normalise_answer(word) else ""


def name_words(qualified: str) -> list[str]:
    """Splits the last part of a qualified name into one to four words; [] if it makes no target."""
    last = qualified.rsplit(".", 1)[-1]
    words = [word.lower() for word in _CAMEL.findall(last)]
    plain = not last.startswith("__") and not any(map(str.isdigit, last))
    suitable = plain and 1 <= len(words) <= 4 and all(len(word) > 1 for word in words)
    return words if suitable and len("".join(words)) > 2 else []


def texts_of(inputs: str) -> list[str]:
    """Returns the two sentences of a pair's input, the passage of a recall's; else the input."""
    pair = PAIR_PROMPT.format(first="(.*?)", second="(.*)")
    match = re.fullmatch(pair, inputs) or re.fullmatch(r"\d\? (1 .*)", inputs)
    return list(match.groups()) if match else [inputs]


def held_out(train: Examples, validation: Examples, cap: int) -> Examples:
    """Returns at most `cap` validation examples of which no text or sentence is in training."""
    known = {text for example in train for text in texts_of(example["inputs"])}
    return [e for e in validation if known.isdisjoint(texts_of(e["inputs"]))][:cap]


def _passages(text: str, fewest: int, most: int) -> Iterator[str]:
    """Yields runs of consecutive sentences that have between `fewest` and `most` words."""
    run: list[str] = []
    for sentence in text.split("\n"):
        words = sentence.split()
        if len(run) + len(words) > most:
            if len(run) >= fewest:
                yield " ".join(run)
            run = []
        if len(words) <= most:
            run += words
    if len(run) >= fewest:
        yield " ".join(run)


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _shuffled(examples: Iterable[dict[str, str]]) -> Examples:
    """Returns the examples without repeated inputs, in an order fixed by their texts."""
    unique = {example["inputs"]: example for example in examples}
    return sorted(unique.values(), key=lambda example: _order(example["inputs"]))


_MAKERS: dict[str, tuple[Callable[..., Examples], Kind, tuple[str, ...]]] = {
    "docs_span_corruption": (text_examples, "span_corruption", ()),
    "docs_topic": (topic_examples, "classification", tuple(TOPICS)),
    "docs_pair": (pair_examples, "classification", ("no", "yes")),
    "docs_name": (name_examples, "generation", ()),
    "docs_recall": (recall_examples, "generation", ()),
}


def _with_parts(task: str, split: str) -> Examples:
    """Returns examples, pairs in the parts of their prompt; the other prompts end with text."""
    examples = docs_examples_of(task, split)
    if task != "docs_pair":
        return examples
    pairs = [dict(zip(("first", "second"), texts_of(e["inputs"]), strict=True)) for e in examples]
    parts = [template_parts(PAIR_PROMPT, pair) for pair in pairs]
    return [{**e, "inputs": inputs} for e, inputs in zip(examples, parts, strict=True)]


def _register() -> None:
    for name, (_, kind, labels) in _MAKERS.items():
        make, spec = functools.partial(_with_parts, name), TaskSpec(name, kind, labels)
        text_to_text_task(name, make, docs_corpus.SPLITS, docs_vocabulary(), spec)
    labelled = ["docs_topic", "docs_pair"]
    seqio.MixtureRegistry.add("docs_labels", labelled, default_rate=1.0)
    seqio.MixtureRegistry.add("docs_tasks", [*labelled, "docs_name"], default_rate=1.0)
    all_tasks = [*labelled, ("docs_name", 0.5), ("docs_recall", 1.5)]
    seqio.MixtureRegistry.add("docs_all", all_tasks, default_rate=1.0)


if "docs_topic" not in seqio.TaskRegistry.names():
    _register()
