"""Tasks: their settings, prompts, cutting and token ids."""

import pytest

from variator_jax.errors import ConfigError
from variator_jax.hf_tokenizer import AddedToken
from variator_jax.serving.tasks import Cut, TaskConfig, token_ids
from variator_jax.texts import ByteTokenizer

TOKENIZER = ByteTokenizer(384)
PAIR = TaskConfig("pair", "rerank", "Query: {query} Text: {text}?", ("true", "false"))


def text_of(ids):
    return TOKENIZER.decode(ids)


def test_what_gives_vectors_is_pinned_and_all_else_follows_the_load():
    assert TaskConfig("e", "embed").plugin == "none"
    assert TaskConfig("r", "rerank").plugin == "none"
    assert TaskConfig("e", "embed", plugin="auto").plugin == "auto"
    assert PAIR.plugin == TaskConfig("g", "generate").plugin == "auto"


@pytest.mark.parametrize("settings, words", [
    (("t", "embedd"), "embed"),
    (("t", "classify", "{text}", ("one",)), "two or more"),
    (("t", "rerank", "{text}", ("true", "false")), "query"),
    (("t", "rerank", "Text: {text}", ("true", "false")), "query and the text, .* found 1"),
    (("t", "rerank", "Query: {query} Text: {text}"), "one field, .* no labels; found 2"),
    (("t", "classify", "{text} <extra_id_0>.", ("no", "yes")), "the prefix '<extra_id_0>'"),
    (("t", "generate", "{text}", ("no", "yes")), "'generate' has neither labels"),
    (("t", "embed", "no field"), "found 0"),
    (("t", "embed", "{first} {second}"), "expected one field, .* found 2"),
    (("t", "embed", "{text} {text}"), "a field twice"),
    (("t", "embed", "{open"), "no prompt"),
    (("t", "embed", "{text:d}"), "cannot be filled with texts: Unknown format code"),
    (("t", "embed", "{text:{width}}"), "cannot be filled with texts: KeyError 'width'"),
])  # fmt: skip
def test_a_task_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        TaskConfig(*settings)


def test_a_text_fills_the_prompt_and_its_own_braces_stay():
    ids = token_ids(PAIR, ("{text}", "b{}"), TOKENIZER, Cut(64))
    assert text_of(ids) == "Query: {text} Text: b{}?" and ids[-1] == 1


@pytest.mark.parametrize("keep_end", [False, True])
def test_a_cut_takes_from_the_longest_text_and_leaves_the_prompt(keep_end):
    texts = "who", "".join(map(chr, range(48, 122)))
    ids = token_ids(PAIR, texts, TOKENIZER, Cut(40, True, keep_end))
    found = text_of(ids)
    assert 30 < len(ids) <= 40 and found.startswith("Query: who Text: ") and found.endswith("?")
    assert found[:-1].endswith("y") == keep_end and ("Text: 0" in found) != keep_end


def test_a_text_alone_keeps_its_first_or_last_tokens_as_ids_do():
    embed, text = TaskConfig("e", "embed"), "a" + " " * 999 + "b" * 50
    ids = TOKENIZER.encode(text)
    assert token_ids(embed, text, TOKENIZER, Cut(30, True)) == [*ids[:29], 1]
    assert token_ids(embed, text, TOKENIZER, Cut(30, True, True)) == ids[-30:]


def test_a_text_that_is_too_long_is_refused_unless_it_may_be_cut():
    with pytest.raises(ConfigError, match=r"31 tokens; the longest has 30\. Set truncate"):
        token_ids(TaskConfig("e", "embed"), "x" * 30, TOKENIZER, Cut(30))
    with pytest.raises(ConfigError, match="481 characters; the longest has 480"):
        token_ids(TaskConfig("e", "embed"), "x" * 481, TOKENIZER, Cut(30))


def test_a_text_with_the_token_of_padding_is_refused():
    tokenizer = ByteTokenizer(384, [AddedToken("<pad>", 0, {})])
    with pytest.raises(ConfigError, match="holds '<pad>'"):
        token_ids(TaskConfig("e", "embed"), "a <pad> b", tokenizer, Cut(30))


def test_token_ids_are_taken_if_they_can_be_this_backbones():
    embed = TaskConfig("e", "embed")
    ids = TOKENIZER.encode("text")
    assert token_ids(embed, ids, TOKENIZER, Cut(30)) == ids
    assert token_ids(embed, ids, TOKENIZER, Cut(3, True)) == [*ids[:2], 1]
    for wrong in ([], [5, 6], [99_999, 1]):
        with pytest.raises(ConfigError, match="check_embedding_ctx_length=False"):
            token_ids(embed, wrong, TOKENIZER, Cut(30))
    with pytest.raises(ConfigError, match="no token ids.*check_embedding_ctx_length=False"):
        token_ids(PAIR, ids, TOKENIZER, Cut(30))
