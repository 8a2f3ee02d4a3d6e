"""Answers of a running service: equal to the library's, on the plugin that is due."""

import asyncio
import dataclasses

import hf_files
import jax
import numpy as np
import pytest
import served
import small_t5
import tiny
import tiny_model

from variator_jax.data.vocabulary import train_sentencepiece
from variator_jax.errors import ConfigError, PluginError
from variator_jax.plugin import PluginConfig
from variator_jax.serving import engine, latencies
from variator_jax.serving.batcher import Overloaded
from variator_jax.serving.service import Limits, Service
from variator_jax.serving.tasks import TaskConfig
from variator_jax.store import Plugin, load_backbone

TEXTS = ["one text", "another"]


def rows(texts, length=16):
    """Token ids as the service pads them: one bucket of lengths."""
    tokens = served.model().tokenize(texts)
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


@served.run
async def test_at_low_load_every_answer_is_ratio_1_and_the_librarys_bit_by_bit(monkeypatch):
    for bucket in [*served.warm().latency]:  # two rows take the time of one: they share a batch
        monkeypatch.setitem(served.warm().latency, bucket, 1e-3)
    async with served.started() as service:
        found = await service.submit("embed_auto", TEXTS, per_token=True)
        named = await service.submit("embed_auto", TEXTS, per_token=True, ratio=4)
        letters = await service.submit("letter", ["x"], raw_scores=True)
        names = await service.submit("name", TEXTS)
    library = served.model()
    for answer, ratio in ((found, 1), (named, 4)):
        expected = np.asarray(library.encode(rows(TEXTS), ratio=ratio))
        for vectors, states, tokens in zip(answer.values, expected, answer.tokens, strict=True):
            assert vectors.tobytes() == states[:tokens].tobytes()
    assert (found.plugin, named.plugin) == ("none", served.PLUGIN.config.name)
    logits = np.asarray(library.logits(rows(["x?"]), [[0]]))[0, 0]
    assert list(letters.values[0].values()) == [float(logits[ord(c) + 3]) for c in "ab"]
    assert names.values == library.generate([f"N: {t}" for t in TEXTS], max_length=4)


@served.run
async def test_pooled_vectors_are_means_of_length_1_and_scores_compare_them():
    async with served.started() as service:
        pooled = (await service.submit("embed", TEXTS)).values
        plain = (await service.submit("embed", TEXTS, normalize=False)).values
        tokens = (await service.submit("embed", TEXTS, per_token=True)).values
        (score,) = (await service.submit("similar", [(TEXTS[0], TEXTS[1])])).values
        (shares,) = (await service.submit("letter", ["x"])).values
        (raw,) = (await service.submit("letter", ["x"], raw_scores=True)).values
    for vector, mean, states in zip(pooled, plain, tokens, strict=True):
        np.testing.assert_allclose(mean, states.mean(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=1e-6)
    np.testing.assert_allclose(score, pooled[0] @ pooled[1], rtol=1e-5)
    assert sum(shares.values()) == pytest.approx(1)
    assert np.log(shares["a"] / shares["b"]) == pytest.approx(raw["a"] - raw["b"], abs=1e-4)


@served.run
async def test_a_burst_shifts_the_gear_but_not_the_embeddings_nor_a_named_or_capped_request(
    monkeypatch,
):
    for bucket, seconds in [*served.warm().latency.items()]:
        # The tiny plugin need not be faster than the tiny backbone.
        faster = seconds / 4 if bucket[1] != "none" else seconds
        monkeypatch.setitem(served.warm().latency, bucket, faster)
    async with served.started(Limits(wait_share=1e3), slo_ms=5) as service:
        burst = []
        for i in range(60):
            task = ("embed_auto", "embed", "letter")[i % 3]
            options = [{}, {"plugin": "none"}, {"max_ratio": 2}][i // 3 % 3]
            burst.append((task, options, service.submit(task, [f"{i}"], **options)))
        answers = await asyncio.gather(*(x for _, _, x in burst), return_exceptions=True)
    plugins = {}
    for (task, options, _), answer in zip(burst, answers, strict=True):
        if not isinstance(answer, Overloaded):
            plugins.setdefault((task, *options), set()).add(answer.plugin)
    bound = {key: found for key, found in plugins.items() if key[0] == "embed" or len(key) > 1}
    assert all(found == {"none"} for found in bound.values()), plugins
    assert served.PLUGIN.config.name in plugins["embed_auto",] | plugins["letter",]


@served.run
async def test_nothing_compiles_after_the_start_and_other_shapes_change_nothing():
    async with served.started() as service:
        texts = [chr(97 + i) * (1 + i) for i in range(24)]
        await asyncio.gather(
            *(service.submit(task, texts[:n]) for n in (1, 3, 24) for task in ("embed", "letter")),
            *(service.submit("embed", [text], ratio=4) for text in texts),
            service.submit("name", texts),
        )
        assert service.snapshot()["compilations"] == 0
        jax.jit(lambda x: x + 41)(1)
        assert service.snapshot()["compilations"] > 0  # the counter counts


def test_the_next_start_runs_a_sample_alone_and_nothing_compiles_behind_it(tmp_path, monkeypatch):
    ran, compiled, seconds = [], [], [1.0]
    run_once, settings = engine.Engine._run_once, jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(engine.Engine, "_run_once", lambda e, b: ran.append(b) or run_once(e, b))
    monkeypatch.setattr(engine.Engine, "_measure", lambda _, bucket: seconds[0] * bucket[2])
    monkeypatch.setattr(latencies, "hardware", lambda: "a machine")

    def start():
        """A started engine, and the batches that the start ran."""
        ran.clear()
        tasks = [task for task in served.TASKS if task.name in ("embed", "letter", "name")]
        limits = engine.EngineLimits((16,), 32)
        found = engine.Engine(served.BACKBONE, [served.PLUGIN], tasks, limits)
        found.warm_up(longest_batch=1.5 * seconds[0])
        return found, list(ran)

    def count(name, *_, **__):
        compiled.append(name)

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        (first, all_ran), (second, sample) = start(), start()
        compiled.clear()
        for program, plugin, *_ in second.latency:
            second.dispatch(program, plugin, [[5, 1]])()
        assert not [name for name in compiled if "compile" in name or "trace" in name]
        seconds[0] = 3.0  # a machine that has become slower
        slower, again = start()
        # Lengths that are new: those that are kept are still compared.
        first.limits = engine.EngineLimits((16, 24), 32)
        assert first._as_fast_as(slower.latency) and not first._as_fast_as(first.latency)
        monkeypatch.setattr(latencies, "hardware", lambda: "another machine")
        _, other = start()
        for file in tmp_path.glob("latencies_*"):
            file.write_text("[damaged")
        _, damaged = start()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
        jax.config.update("jax_compilation_cache_dir", settings)
    # Two plugins and two sizes of three programs; the larger is too slow to be kept.
    assert len(all_ran) == 12 and len(first.latency) == 6 and first.latency == second.latency
    assert sample == [(program, "none", 1, 16) for program in first.programs]
    assert len(again) == 1 + 12 and set(slower.latency.values()) == {3.0}
    assert len(other) == len(damaged) == 12


def test_a_vocabulary_that_cannot_be_used_is_refused_before_anything_is_compiled():
    backbone = dataclasses.replace(tiny_model.BACKBONE, vocabulary_file=None)
    with pytest.raises(ConfigError, match="has no vocabulary"):
        Service(engine.Engine(backbone, [], [served.TASKS[0]]))


@served.run
async def test_monot5_scores_are_those_of_transformers(tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    config = dataclasses.replace(small_t5.CONFIGS["1.0"], vocab_size=256)
    hf_files.save_hf(tmp_path, small_t5.backbone(config))
    prompt = "Query: {query} Document: {text} Relevant:"
    task = TaskConfig("monot5", "rerank", prompt, ("true", "false"))
    words = [prompt.format(query="who is quick", text="the fox jumps"), "true", "false"]
    (tmp_path / "spiece.model").write_bytes(train_sentencepiece(words * 30, 130, task.labels))
    pairs = [("who is quick", "the fox jumps"), ("the fox", "who jumps who"), ("is", "quick")]
    cloze = "Query: {query} Document: {text} Relevant: <extra_id_0>"
    behind = TaskConfig("behind", "rerank", cloze, task.labels, prefix="<extra_id_0>")
    limits = engine.EngineLimits((64,), 256)
    loaded = engine.Engine(load_backbone(tmp_path), (), [task, behind], limits)
    async with served.started(slo_ms=10_000, engine=loaded) as service:
        scores = (await service.submit("monot5", pairs)).values
        (prefixed,) = (await service.submit("behind", pairs[:1])).values
    network = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    true, false = (tokenizer.encode(word)[0] for word in task.labels)
    # As monoT5 scores: the log of the share of "true" among the two, at the first position.
    # Behind a prefix, the second token of the decoder decides.
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    cases = [(prompt, pair, [0], score) for pair, score in zip(pairs, scores, strict=True)]
    cases.append((cloze, pairs[0], [0, sentinel], prefixed))
    for asked, (query, text), start, score in cases:
        ids = tokenizer(asked.format(query=query, text=text), return_tensors="pt").input_ids
        with torch.no_grad():
            logits = network(input_ids=ids, decoder_input_ids=torch.tensor([start])).logits[0, -1]
        share = torch.softmax(logits[[true, false]], 0)[0].item()
        assert 1 / (1 + np.exp(-score)) == pytest.approx(share, abs=1e-4)
        assert score == pytest.approx((logits[true] - logits[false]).item(), abs=5e-4)
    assert np.std(scores) > 0.1


@served.run
async def test_a_ratio_that_several_plugins_have_shifts_among_them_but_names_none_for_vectors():
    sites = PluginConfig(sites=("kv all x4",))
    others = tiny.random_plugin(sites, served.BACKBONE.config)
    plugins = [served.PLUGIN, Plugin(sites, others)]
    tasks = [task for task in served.TASKS if task.kind == "embed"]
    loaded = engine.Engine(served.BACKBONE, plugins, tasks, engine.EngineLimits((16,), 16))
    names = set(loaded.ratios) - {"none"}
    assert len(names) == 2
    async with served.started(engine=loaded) as service:
        assert (await service.submit("embed_auto", ["x"], ratio=4)).plugin in names
        for name in names:
            assert (await service.submit("embed", ["x"], plugin=name, ratio=4)).plugin == name
        with pytest.raises(PluginError, match="several plugins.*name one of"):
            await service.submit("embed", ["x"], ratio=4)


@served.run
async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    async with served.started(Limits(wait_share=1e-6)) as service:
        requests = [service.submit("letter", [f"{i}", f"{i}."]) for i in range(30)]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert refused and all(error.retry_after_s > 0 for error in refused)
        assert len(refused) < len(answers) and service.snapshot()["refused"] == len(refused)
        assert (await service.submit("letter", ["again"])).plugin == "none"
    async with served.started(Limits(requests=2)) as service:
        requests = [service.submit("letter", [f"{i}"]) for i in range(3)]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert [isinstance(answer, Overloaded) for answer in answers] == [False, False, True]


@served.run
async def test_a_client_that_left_is_dropped_from_the_queue(held_device):
    async with served.started() as service:
        first = asyncio.ensure_future(service.submit("name", [f"{i}" for i in range(64)]))
        while not service.snapshot()["queued"]:
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert service.snapshot()["queued"] == 0
        held_device.set()
        assert (await service.submit("name", ["x"])).values
        assert service.snapshot()["batches"] <= 3  # two at the most were on the device


@served.run
async def test_draining_answers_what_is_queued_and_refuses_what_comes(held_device):
    async with served.started() as service:
        requests = (service.submit("letter", [f"{i}"]) for i in range(8))
        queued = asyncio.gather(*requests, return_exceptions=True)
        while not service.snapshot()["queued"]:
            await asyncio.sleep(0.001)
        drained = asyncio.ensure_future(service.drain())
        await asyncio.sleep(0)
        held_device.set()
        await drained
        answers = await queued
        # One that was still being tokenised is refused.
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        assert len(refused) < 8 and not service.ready
        assert all(isinstance(error, Overloaded) for error in refused)
        with pytest.raises(Overloaded):
            await service.submit("letter", ["late"])


@served.run
async def test_a_request_that_cannot_be_answered_names_the_reason():
    async with served.started() as service:
        for task, inputs, options, error, words in (
            ("embedd", ["x"], {}, ConfigError, "embed"),
            ("embed", [], {}, ConfigError, "found none"),
            ("embed", ["x" * 99], {}, ConfigError, "truncate"),
            ("embed", [[300, 9]], {}, ConfigError, "check_embedding_ctx_length=False"),
            ("relevant", ["x"], {}, ConfigError, "query and text"),
            ("similar", ["x"], {}, ConfigError, "a query and a text"),
            ("embed", ["x"], {"ratio": 3}, PluginError, "not loaded"),
            ("embed", ["x"], {"plugin": "non"}, PluginError, "none"),
            ("letter", ["x"], {"plugin": "none", "ratio": 4}, PluginError, "has ratio 1"),
            ("letter", ["x"], {"ratio": 4, "max_ratio": 2}, PluginError, "above max_ratio 2"),
            ("embed", list(map(str, range(200))), {}, ConfigError, "the most is 2,048"),
        ):
            with pytest.raises(error, match=words):
                await service.submit(task, inputs, **options)
