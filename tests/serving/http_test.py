"""The HTTP API over the real service: answers equal the library's, errors have each API's form."""

import asyncio
import base64
import concurrent.futures
import contextlib
import socket
import threading
import time

import http_server
import httpx
import numpy as np
import pytest
import served
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from variator_jax.errors import ConfigError
from variator_jax.serving import routes, schemas, service
from variator_jax.serving.http import HttpLimits, create_app, serve
from variator_jax.serving.service import Limits

TEXTS = ["one text", "another one that is longer"]


@pytest.fixture(scope="module")
def client(url):
    # Shorter than the server keeps one: it could close it as the next request comes.
    limits = httpx.Limits(keepalive_expiry=1)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as client:
        yield client


def pooled(texts, ratio=1):
    return served.pooled(served.model(), texts, ratio=ratio)


def test_embeddings_are_the_librarys_in_both_encodings(client):
    body = {"input": TEXTS, "model": "any"}
    answer = client.post("/v1/embeddings", json=body)
    found = [row["embedding"] for row in answer.json()["data"]]
    np.testing.assert_allclose(found, pooled(TEXTS), atol=1e-5)
    assert answer.headers["x-variator-plugin"] == "none"
    assert answer.headers["x-variator-ratio"] == "1"
    tokens = sum(len(text) + 1 for text in TEXTS)
    assert answer.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    coded = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    decoded = [np.frombuffer(base64.b64decode(r["embedding"]), "<f4") for r in coded["data"]]
    np.testing.assert_array_equal(np.array(found, "f4"), decoded)


@pytest.mark.parametrize("choice", [{"ratio": 4}, {"plugin": "ffn_x4"}])
def test_a_request_chooses_its_plugin(client, choice):
    answer = client.post("/embed", json={"inputs": TEXTS, **choice})
    np.testing.assert_allclose(answer.json(), pooled(TEXTS, 4), atol=1e-5)
    assert answer.headers["x-variator-ratio"] == "4"


def test_embed_takes_ids_normalizes_and_cuts(client):
    [ids] = client.post("/tokenize", json={"inputs": TEXTS[0]}).json()
    ids = [token["id"] for token in ids]
    assert ids == served.model().tokenizer.encode(TEXTS[0])
    by_ids = client.post("/embed", json={"inputs": ids}).json()
    np.testing.assert_allclose(by_ids, pooled(TEXTS[:1]), atol=1e-5)
    raw = client.post("/embed", json={"inputs": TEXTS[0], "normalize": False}).json()[0]
    np.testing.assert_allclose(raw / np.linalg.norm(raw), by_ids[0], atol=1e-5)
    assert abs(np.linalg.norm(raw) - 1) > 1e-2
    short = client.post("/embed", json={"inputs": TEXTS[0], "dimensions": 4}).json()[0]
    np.testing.assert_allclose(short, by_ids[0][:4] / np.linalg.norm(by_ids[0][:4]), atol=1e-5)


def test_embed_all_gives_a_vector_for_each_token(client):
    found = client.post("/embed_all", json={"inputs": TEXTS}).json()
    for text, vectors in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(vectors, served.model().encode(text)[0], atol=1e-5)


def test_rerank_in_both_forms_is_sorted_and_agrees(client):
    texts = ["a", "bb", "ccc"]
    ranks = client.post("/rerank", json={"query": "q", "texts": texts, "return_text": True}).json()
    assert [r["score"] for r in ranks] == sorted((r["score"] for r in ranks), reverse=True)
    assert all(rank["text"] == texts[rank["index"]] for rank in ranks)
    raw = client.post("/rerank", json={"query": "q", "texts": texts, "raw_scores": True}).json()
    for rank, unscaled in zip(ranks, raw, strict=True):
        assert rank["score"] == pytest.approx(1 / (1 + np.exp(-unscaled["score"])), abs=1e-6)
    body = {"query": "q", "documents": ["a", {"text": "bb"}, "ccc"], "top_n": 2}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        found = client.post(path, json={**body, "return_documents": True}).json()["results"]
        assert [r["index"] for r in found] == [r["index"] for r in ranks[:2]]
        assert found[0]["document"] == {"text": texts[found[0]["index"]]}


def test_predict_takes_a_text_a_pair_and_lists(client):
    one = client.post("/predict", json={"inputs": "x"}).json()
    assert {p["label"] for p in one} == {"a", "b"}
    assert sum(p["score"] for p in one) == pytest.approx(1)
    assert one[0]["score"] > one[1]["score"]
    pair = client.post("/predict", json={"inputs": ["x", "y"]}).json()  # the task of pairs
    assert {p["label"] for p in pair} == {"n", "y"}
    listed = client.post("/predict", json={"inputs": [["x"], ["z"]]}).json()[0]
    assert [p["label"] for p in listed] == [p["label"] for p in one]
    assert listed[0]["score"] == pytest.approx(one[0]["score"], abs=1e-5)
    pairs = {"inputs": [["x", "y"], ["y", "x"]], "task": "same"}
    assert {p["label"] for p in client.post("/predict", json=pairs).json()[1]} == {"n", "y"}


def test_generate_is_the_librarys(client):
    expected = served.model().generate(["N: x"], ratio=4, max_length=4)
    answer = client.post("/generate", json={"inputs": ["x"], "ratio": 4})
    assert [one["generated_text"] for one in answer.json()] == expected
    answer = client.post("/generate", json={"inputs": [["N: ", "x"]], "task": "both", "ratio": 4})
    assert [one["generated_text"] for one in answer.json()] == expected


def test_answers_that_nobody_reads_are_bounded():
    def becomes(status):
        ends, found = time.monotonic() + 30, 0
        while found != status and time.monotonic() < ends:
            found = httpx.post(f"{url}/embed", json={"inputs": "x"}, timeout=60).status_code
        return found == status

    limits = HttpLimits(answer_bytes=1 << 10)
    with http_server.running(http_server.service(), limits=limits) as url:
        assert becomes(200)
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as slow:
            slow.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
            assert becomes(429)
            assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert becomes(200)


def test_what_clients_send_and_expect_beside_the_letter_of_their_api(client):
    null = {"input": "x", "encoding_format": None}  # LiteLLM
    assert len(client.post("/v1/embeddings", json=null).json()["data"][0]["embedding"]) == 32
    one, listed = (client.post("/predict", json={"inputs": x}).json() for x in ("x", ["x"]))
    assert one == listed
    texts = {"query": "q", "texts": ["a", ""]}
    assert set(client.post("/rerank", json=texts).json()[0]) == {"index", "score"}
    documents = {"query": "q", "documents": ["a", ""], "return_documents": None}
    ranked = client.post("/v1/rerank", json=documents).json()["results"]
    assert set(ranked[0]) == {"index", "relevance_score"} and len(ranked) == 2
    assert client.post("/tokenize", json={"inputs": "x"}).json()[0][-1]["text"] == "</s>"
    bare = {"inputs": "<extra_id_0> x", "add_special_tokens": False}
    texts = [token["text"] for token in client.post("/tokenize", json=bare).json()[0]]
    assert texts[0] == "<extra_id_0>" and "</s>" not in texts
    for answer in (client.get("/info"), client.post("/nowhere")):
        assert answer.headers["x-variator-plugin"] == "none"


def test_what_is_not_finite_is_an_error_in_every_form(client, monkeypatch):
    dispatch = served.warm().dispatch

    def overflow(program, *args):
        rows = dispatch(program, *args)()
        if program == "embed":
            return lambda: [row._replace(pooled=row.pooled * np.inf) for row in rows]
        return lambda: [dict.fromkeys(row, np.nan) for row in rows]

    monkeypatch.setattr(served.warm(), "dispatch", overflow)
    body = {"inputs": "x", "input": "x", "query": "q", "texts": ["a", "b"], "documents": ["a"]}
    body["encoding_format"] = "base64"
    for path in ("/embed", "/embed_all", "/rerank", "/predict", "/v1/embeddings", "/v1/rerank"):
        answer = client.post(path, json=body)
        assert answer.status_code == (500 if path.startswith("/v1") else 424), path
        assert "not finite" in answer.text


BAD = [
    ("/v1/embeddings", {"input": ""}, 400, "input"),
    ("/v1/embeddings", {"input": "x", "plugin": "ffn_x5"}, 400, "ffn_x4"),
    ("/v1/embeddings", {"input": [[64, 1495]]}, 400, "check_embedding_ctx_length=False"),
    ("/v1/embeddings", {"input": "x", "dimensions": 10**6}, 400, "dimensions"),
    ("/embed", {"inputs": []}, 400, "inputs"),
    ("/embed", {"inputs": "x", "ratio": 3}, 422, "not loaded"),
    ("/embed", {"inputs": "x" * 5000}, 422, "truncate"),
    ("/embed", {"inputs": ["x" * 5000]}, 422, "truncate"),
    ("/predict", {"inputs": "x", "task": "lettre"}, 422, "Did you mean 'letter'?"),
    ("/predict", {"inputs": ["x", "y"], "task": "letter"}, 422, "letter"),
    ("/embed", {"inputs": ["x"] * 2049}, 413, "2048"),
    ("/embed_all", {"inputs": [[65, 1]] * 2049}, 413, "2048"),
    ("/embed", {"inputs": [1] * 40_000}, 413, "32768"),
    ("/predict", {"inputs": ["x", "y", "z"]}, 422, "inputs"),
    ("/embed", {"inputs": [{}] * 2000}, 422, "inputs"),
    ("/tokenize", {"inputs": "x" * 300_000}, 413, "262,144 bytes"),
    ("/embed", {"inputs": "x", "prompt_name": "querry"}, 422, "embed_auto"),
    ("/embed", {"inputs": [1]}, 422, "check_embedding_ctx_length=False"),
    ("/tokenize", {"inputs": "<extra_id_999>"}, 422, "extra_id"),
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 5}}, 422, "at most 4 tokens"),
    ("/v2/rerank", {"query": "x"}, 400, "documents"),
    ("/nowhere", {}, 404, "Not Found"),
]


@pytest.mark.parametrize("path, body, status, reason", BAD)
def test_bad_requests_have_the_form_of_their_api(client, path, body, status, reason):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    found = answer.json()
    if path.startswith("/v1"):
        message = found["error"].pop("message")
        assert set(found["error"]) == {"type", "param", "code"}
    elif path.startswith("/v2"):
        message = found.pop("message")
    else:
        message, kind = found["error"], found["error_type"]
        assert kind in ("Validation", "Empty")
    assert reason in message


def test_a_body_of_wrong_items_makes_few_errors():
    for model in (schemas.EmbedRequest, schemas.PredictRequest, schemas.DocumentsRequest):
        fields = {"query": "x", "documents": [{}] * 2000, "inputs": [[1, "x"]] * 2000}
        with pytest.raises(ValidationError) as refused:
            model.model_validate(fields)
        assert refused.value.error_count() < 12


def test_tokens_that_make_too_many_numbers_are_refused_before_they_are_computed(
    client, monkeypatch
):
    monkeypatch.setattr(service, "MOST_NUMBERS", 32 * 8)
    compute = served.warm().dispatch
    monkeypatch.setattr(served.warm(), "dispatch", None)
    refused = client.post("/embed_all", json={"inputs": ["1234567", "1"]})
    assert refused.status_code == 413 and "32 for each token" in refused.json()["error"]
    assert client.post("/embed_all", json={"inputs": ["x" * 99]}).status_code == 422
    monkeypatch.setattr(served.warm(), "dispatch", compute)
    assert client.post("/embed_all", json={"inputs": "1234567"}).status_code == 200


def test_large_answers_are_written_in_a_thread(client, monkeypatch):
    written, write = [], routes._json

    def observed(values):
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise AssertionError("the event loop waits for it")
        written.append(path)
        return write(values)

    monkeypatch.setattr(routes, "_json", observed)
    for path in ("/embed", "/embed_all", "/v1/embeddings"):
        assert client.post(path, json={"inputs": "x", "input": "x"}).status_code == 200
    assert {*written} == {"/embed", "/embed_all", "/v1/embeddings"}


def test_info_describes_the_model_as_tei_does(client):
    info = client.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["model_sha"] == served.BACKBONE.fingerprint
    assert info["max_concurrent_requests"] == Limits().requests
    assert info["tokenization_workers"] == Limits().tokenizers
    assert client.post("/embed", json={"inputs": "x", "prompt_name": "embed"}).status_code == 200


def test_a_failure_of_the_backend_has_each_apis_form_and_no_reason_in_it():
    failing = http_server.service()

    async def submit(*args, **options):
        raise RuntimeError("secret")

    failing.submit = submit
    body = {"inputs": "x", "input": "x", "query": "x", "documents": ["x"]}
    with http_server.running(failing) as url:
        statuses = {"/embed": 424, "/v1/embeddings": 500, "/v1/rerank": 500}
        answers = {path: httpx.post(url + path, json=body) for path in statuses}
        counted = httpx.get(f"{url}/metrics").text
    assert {path: answer.status_code for path, answer in answers.items()} == statuses
    assert not any("secret" in answer.text for answer in answers.values())
    assert answers["/embed"].json()["error_type"] == "Backend"
    assert answers["/v1/embeddings"].json()["error"]["type"] == "server_error"
    assert 'path="/embed",status="424"' in counted


def test_bodies_on_their_way_are_bounded_together():
    limits = HttpLimits(all_bytes=1000)
    with http_server.running(http_server.service(), limits=limits) as url:
        refused = httpx.post(f"{url}/embed", json={"inputs": "x" * 1000})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) == 1
        assert refused.json()["error_type"] == "Overloaded"
        for _ in range(3):  # what was refused or answered counts no more
            assert httpx.post(f"{url}/embed", json={"inputs": "x" * 20}).status_code == 200


def test_connections_are_bounded():
    limits = HttpLimits(connections=2)
    with http_server.running(http_server.service(), limits=limits) as url:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(base_url=url)) for _ in range(2)]
            assert [client.get("/live").status_code for client in clients] == [200, 503]


def test_a_long_text_is_cut_only_where_that_is_asked_for(client):
    body = {"input": "x" * 40 + "y" * 40, "truncate": True}
    right = client.post("/v1/embeddings", json=body).json()
    left = client.post("/v1/embeddings", json={**body, "truncation_direction": "Left"}).json()
    for cut, letter in ((right, "x"), (left, "y")):
        length = cut["usage"]["prompt_tokens"]
        assert length <= client.get("/info").json()["max_input_length"]
        whole = client.post("/v1/embeddings", json={"input": letter * (length - 1)}).json()
        assert cut["data"] == whole["data"]
    document = {"query": "q", "documents": ["x" * 80]}
    assert client.post("/v1/rerank", json=document).status_code == 200
    assert client.post("/rerank", json={"query": "q", "texts": ["x" * 80]}).status_code == 422


def test_metrics_count_requests_and_their_plugins(client):
    def value(name, **labels):
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    before = value("variator_texts_total", plugin="ffn_x4")
    client.post("/embed", json={"inputs": TEXTS, "ratio": 4})
    assert value("variator_texts_total", plugin="ffn_x4") == before + 2
    assert value("variator_requests_total", path="/embed", status="200") >= 1
    assert value("variator_request_seconds_count", path="/embed") >= 1
    assert value("process_resident_memory_bytes") > 0


def test_a_full_queue_is_429_with_seconds_in_each_form():
    slow = http_server.service(Limits(requests=1))
    with http_server.running(slow) as url:
        threads = concurrent.futures.ThreadPoolExecutor(32)
        with threads as pool, httpx.Client(base_url=url, timeout=60) as client:
            body = {"inputs": "x", "input": "x", "query": "x", "documents": ["x"]}
            paths = ("/embed", "/v1/embeddings", "/v1/rerank") * 40
            answers = list(pool.map(lambda path: client.post(path, json=body), paths))
    refused = {a.url.path: a for a in answers if a.status_code == 429}
    assert {a.status_code for a in answers} == {200, 429}
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused.values())
    assert refused["/embed"].json()["error_type"] == "Overloaded"
    assert refused["/v1/embeddings"].json()["error"]["code"] == "rate_limit_exceeded"
    assert "full" in refused["/v1/rerank"].json()["message"]


def test_what_a_client_asked_for_that_left_is_dropped():
    waiting = http_server.service()
    left = threading.Event()

    async def submit(*args, **options):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            left.set()
            raise

    waiting.submit = submit
    with http_server.running(waiting) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/embed", json={"inputs": "x"}, timeout=0.2)
        assert left.wait(10)
        while 'status="499"' not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)


def test_a_token_guards_all_but_health_and_the_page():
    with http_server.running(http_server.service(), token="secret") as url:
        sent = {"authorization": "Bearer secret"}
        assert httpx.get(f"{url}/info").status_code == 401
        assert httpx.get(f"{url}/info", headers={"authorization": "Bearer x"}).status_code == 401
        refused = httpx.post(f"{url}/v1/embeddings", json={"input": "x"})
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/info", headers=sent).status_code == 200
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/live").status_code == 200


def test_until_every_program_is_compiled_health_is_503(monkeypatch):
    cold, compiled = http_server.service(), threading.Event()

    def warm_up(progress, *_):
        progress(1, 2)
        compiled.wait()

    monkeypatch.setattr(cold.engine, "warm_up", warm_up)
    with http_server.running(cold, ready=False) as url:
        while (health := httpx.get(f"{url}/health")).json()["programs"] == 0:
            time.sleep(0.01)
        assert health.status_code == 503
        assert health.json() == {"ready": False, "compiled": 1, "programs": 2}
        refused = httpx.post(f"{url}/embed", json={"inputs": "x"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error_type"] == "Unhealthy"
        assert httpx.get(f"{url}/live").status_code == 200
        compiled.set()
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.01)
        assert httpx.post(f"{url}/embed", json={"inputs": "x"}).status_code == 200


def test_a_server_ends_if_its_programs_cannot_be_compiled(monkeypatch):
    broken = http_server.service()

    def warm_up(*_):
        raise ConfigError("no memory")

    monkeypatch.setattr(broken.engine, "warm_up", warm_up)
    with pytest.raises(ConfigError, match="no memory"):
        serve(create_app(broken), port=0)
