"""What a backbone serves: tasks with their prompts, and how rows of tokens become answers.

A row of tokens goes through one of a few programs, which all tasks share: `embed` (the encoder),
`labels` (the decoder's logits behind the start, or behind a prefix) or a `generate`. Rows of
different tasks share a batch.
"""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.errors import ConfigError, check_known
from variator_jax.files import wrap_errors
from variator_jax.hf_tokenizer import SENTINEL
from variator_jax.plugin.config import AUTO, NONE
from variator_jax.texts import EOS, Tokenizer, text_ids

KINDS = ("embed", "classify", "rerank", "generate")
_OWN_IDS = (
    "A client that tokenises by itself, such as LangChain's OpenAIEmbeddings, sends texts with "
    "check_embedding_ctx_length=False."
)
#: A text, a pair of texts, or token ids.
Input = str | tuple[str, str] | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """One task of a server.

    Attributes:
      name: its name in requests.
      kind: 'embed' (a vector a text, and one a token), 'classify' (probabilities of label words),
        'rerank' (a score for a query and a text) or 'generate' (a short text).
      prompt: with one field, such as {text}, or two, which a pair of texts fills in their order.
      labels: words of which the decoder's first token decides: the classes; or, for 'rerank', the
        word for relevant and the other one (monoT5). A 'rerank' without is the cosine of the
        embeddings of query and text.
      prefix: what the decoder is given before a label, such as '<extra_id_0>' for a backbone that
        was fine-tuned on the tasks of GLUE here, whose targets begin with it; none by default.
      plugin: which one answers where a request names none: a plugin's name, 'none' for ratio 1,
        or 'auto', which follows the load. By default what gives embeddings is pinned to 'none',
        because vectors of different plugins in one index corrupt it; all else is 'auto'.
      max_length: tokens to generate at the most, EOS included.
      num_beams: beams of the search; 1 is greedy.
    """

    name: str
    kind: str
    prompt: str = "{text}"
    labels: tuple[str, ...] = ()
    plugin: str = ""
    max_length: int = 32
    num_beams: int = 1
    prefix: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError(f"A task of kind {self.kind!r} has an empty name.")
        task = f"Task {self.name!r}"
        check_known(f"{task} is of kind", self.kind, KINDS)
        fewest = {"classify": 2, "rerank": 2 if self.labels else 0}.get(self.kind, 0)
        if len(self.labels) < fewest or (self.kind == "rerank" and len(self.labels) > 2):
            expected = "two" if self.kind == "rerank" else "two or more"
            raise ConfigError(f"{task} has {len(self.labels)} labels; expected {expected}.")
        self._check_fields()
        sentinel = SENTINEL.search(self.prompt)
        if sentinel and self.labels and self.prefix is None:
            raise ConfigError(
                f"The prompt of task {self.name!r} has {sentinel[0]}: give the task the prefix "
                f"{sentinel[0]!r} if its backbone's answers begin with that, as T5's do, else ''."
            )
        if (self.labels or self.prefix) and self.kind not in ("classify", "rerank"):
            raise ConfigError(f"{task}: the kind {self.kind!r} has neither labels nor a prefix.")
        if min(self.max_length, self.num_beams) < 1:
            raise ConfigError(f"{task}: max_length and num_beams are 1 or more.")
        if not self.plugin:
            object.__setattr__(self, "plugin", NONE if self.embeds else AUTO)

    def _check_fields(self) -> None:
        """Refuses a prompt whose fields the inputs of its kind cannot fill."""
        if self.kind == "embed":
            counts, expected = {1}, "one field, such as {text}"
        elif self.kind != "rerank":
            counts, expected = {1, 2}, "one field, such as {text}, or two"
        elif self.labels:
            prompt = "'Query: {query} Document: {text} Relevant:'"
            counts, expected = {2}, f"fields for the query and the text, such as {prompt}"
        else:
            counts, expected = {1}, "one field, such as {text}, as the task has no labels"
        fields, found = self.fields, f"The prompt {self.prompt!r} of task {self.name!r}"
        if len({*fields}) < len(fields):
            raise ConfigError(f"{found} has a field twice; expected two names that differ.")
        if len(fields) not in counts:
            raise ConfigError(f"{found}: expected {expected}; found {len(fields)}.")
        if not all(map(str.isidentifier, fields)):
            raise ConfigError(f"{found} has fields that are no names; expected such as {{text}}.")
        with wrap_errors(f"{found} cannot be filled with texts", ConfigError):
            self.prompt.format_map(dict.fromkeys(fields, "text"))

    @property
    def embeds(self) -> bool:
        """Whether it gives vectors, or compares them."""
        return self.kind == "embed" or (self.kind == "rerank" and not self.labels)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the prompt in their order."""
        with wrap_errors(f"Task {self.name!r}: {self.prompt!r} is no prompt", ConfigError):
            parts = list(string.Formatter().parse(self.prompt))
        return tuple(field for _, field, _, _ in parts if field is not None)

    @property
    def program(self) -> str:
        """The program that its rows go through."""
        if self.kind == "generate":
            return f"generate {self.max_length} {self.num_beams}"
        return "embed" if self.embeds else " ".join(filter(None, ["labels", self.prefix]))

    @property
    def takes_pairs(self) -> bool:
        """Whether an input is a pair of texts."""
        return self.kind == "rerank" or len(self.fields) == 2


class Cut(NamedTuple):
    """What becomes of an input that is longer than a row.

    Attributes:
      longest: tokens of a row, EOS included.
      allowed: whether a text may be cut; else the input is refused.
      keep_end: whether a cut text loses its beginning.
    """

    longest: int
    allowed: bool = False
    keep_end: bool = False


def token_ids(task: TaskConfig, value: Input, tokenizer: Tokenizer, cut: Cut) -> list[int]:
    """The row of an input: its texts in the prompt, tokenised, EOS last.

    A text that is too long is cut inside the longest field, so that the rest of the prompt stays.

    Raises:
      ConfigError: for an input of another form than the task's, ids that are not this backbone's,
        or an input that is too long and may not be cut.
    """
    texts = (value,) if isinstance(value, str) else value
    if all(isinstance(item, int) for item in texts):
        return _checked_ids(task, texts, tokenizer, cut)  # type: ignore[arg-type]
    if len(texts) != len(names := task.fields):
        raise ConfigError(
            f"Task {task.name!r} takes {' and '.join(names)}; found {len(texts)} texts."
        )
    fields = dict(zip(names, map(str, texts), strict=True))
    most = 16 * cut.longest  # characters, with runs of spaces as one; a token rarely has 16
    if cut.allowed:  # no tokenizer is given more than could stay
        step = -1 if cut.keep_end else 1
        long = {k: v[::step] for k, v in fields.items() if len(" ".join(v.split())) > most}
        kept = {k: re.match(rf"(\s*\S){{0,{most}}}", text) for k, text in long.items()}
        fields |= {k: match[0][::step] for k, match in kept.items() if match}
    filled, owner = task.prompt.format_map(fields), f"An input of task {task.name!r}"
    if not cut.allowed and len(filled) > most:  # before work is done for it
        if (characters := len(" ".join(filled.split()))) > most:
            found = f"{characters:,} characters; the longest has {most:,}, which is 16 a token"
            raise ConfigError(f"{owner} has {found}. Set truncate to have it cut.")
    ids = text_ids(tokenizer, filled)
    if len(ids) > cut.longest and not cut.allowed:
        found = f"{len(ids):,} tokens; the longest has {cut.longest:,}"
        raise ConfigError(f"{owner} has {found}. Set truncate to have it cut.")
    if len(ids) > cut.longest and task.prompt == "{text}":  # as sentence-transformers cuts it
        return _cut(ids, cut)
    while len(ids) > cut.longest:
        name = max(fields, key=lambda key: len(fields[key]))
        if not fields[name]:
            raise ConfigError(f"The prompt of task {task.name!r} has over {cut.longest} tokens.")
        # Characters in proportion to the tokens that are too many, at least one.
        text, excess = fields[name], len(ids) - cut.longest
        keep = max(0, int(len(text) * (1 - excess / len(ids))) - 1)
        fields[name] = text[len(text) - keep :] if cut.keep_end else text[:keep]
        ids = text_ids(tokenizer, task.prompt.format_map(fields))
    return ids


def _checked_ids(task: TaskConfig, ids: Sequence[int], tokenizer: Tokenizer, cut: Cut) -> list[int]:
    """Ids as they were given, if they can be this tokenizer's."""
    if task.prompt != "{text}" or not task.embeds:
        raise ConfigError(
            f"Task {task.name!r} puts texts into a prompt; it takes no token ids. {_OWN_IDS}"
        )
    known = all(0 < i < tokenizer.size for i in ids) and list(ids) != [EOS]
    # Those of another vocabulary are words in this one, too, but hardly in the way it splits them.
    if not known or tokenizer.encode(tokenizer.decode(ids)) != list(ids):
        expected = f"which has 1 to {tokenizer.size - 1} and ends a text in {EOS}"
        raise ConfigError(f"No text has these token ids on this backbone, {expected}. {_OWN_IDS}")
    if len(ids) > cut.longest and not cut.allowed:
        raise ConfigError(f"Found {len(ids):,} token ids; the longest input has {cut.longest:,}.")
    return list(ids) if len(ids) <= cut.longest else _cut(ids, cut)


def _cut(ids: Sequence[int], cut: Cut) -> list[int]:
    """The first or the last ids of a row, EOS last."""
    return list(ids[-cut.longest :] if cut.keep_end else [*ids[: cut.longest - 1], EOS])


def label_ids(task: TaskConfig, tokenizer: Tokenizer) -> list[int]:
    """The first token of each label word.

    Raises:
      ConfigError: if two labels begin with the same token, or one with an unknown one.
    """
    before = f"{task.prefix} " if task.prefix else ""  # tokenised with the label, as targets are
    behind = len(tokenizer.encode(task.prefix or "")) - 1
    ids = [tokenizer.encode(before + label)[behind] for label in task.labels]
    if len(set(ids)) < len(ids) or min(ids) < 3:  # padding, EOS and the unknown token come first
        found = f"The labels {list(task.labels)} of task {task.name!r} begin with the tokens {ids}"
        raise ConfigError(f"{found}; expected known ones that differ.")
    return ids


class Dense(NamedTuple):
    """A layer behind pooling, as `2_Dense` of sentence-transformers.

    Attributes:
      kernel: `[embed, out]` float32.
      bias: `[out]` float32, or None.
      tanh: whether its output goes through tanh.
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None
    tanh: bool = False


def mean_pool(encoded: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean over each row's tokens: `[batch, length, embed]` -> `[batch, embed]` float32."""
    valid = (tokens > 0)[..., None]
    total = jnp.sum(encoded.astype(jnp.float32), axis=1, where=valid)
    # A row without tokens fills a batch up; its mean is 0.
    return total / jnp.maximum(valid.sum(axis=1), 1)


def through_dense(pooled: jax.Array, layers: Sequence[Dense]) -> jax.Array:
    """`[batch, embed]` through the layers behind pooling."""
    for layer in layers:
        # [batch, out]
        pooled = pooled @ layer.kernel + (0.0 if layer.bias is None else layer.bias)
        pooled = jnp.tanh(pooled) if layer.tanh else pooled
    return pooled


def normalized(vectors: Any) -> Any:
    """Arrays of NumPy or JAX, `[..., embed]`, with length 1 along the last axis; 0 stays 0."""
    # Methods alone, for in a server an operation of JAX would compile for each new shape.
    return vectors / ((vectors * vectors).sum(-1, keepdims=True) ** 0.5).clip(1e-12)


def probabilities(logits: np.ndarray, labels: Sequence[str]) -> Mapping[str, float]:
    """Label -> probability among the labels, from `[labels]` logits."""
    shares = np.exp(logits - logits.max())
    return dict(zip(labels, (shares / shares.sum()).tolist(), strict=True))
