"""The HTTP API over the real service: answers equal the library's, errors have each API's form."""

import base64

import http_server
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

TEXTS = ["one text", "another one, which is longer"]


@pytest.fixture(scope="module")
def client():
    with http_server.running(http_server.service()) as url, httpx.Client(base_url=url) as client:
        yield client


def pooled(texts, ratio=1):
    rows = []
    for text in texts:
        hidden = np.asarray(http_server.model().encode([text], ratio=ratio))[0]
        rows.append(hidden.mean(0) / np.linalg.norm(hidden.mean(0)))
    return np.array(rows)


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
    assert ids == http_server.model().tokenizer.encode(TEXTS[0])
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
        hidden = np.asarray(http_server.model().encode([text]))[0]
        np.testing.assert_allclose(vectors, hidden, atol=1e-5)


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
    pair = client.post("/predict", json={"inputs": ["x", "y"], "task": "same"}).json()
    assert {p["label"] for p in pair} == {"n", "y"}
    assert client.post("/predict", json={"inputs": [["x"], ["z"]]}).json()[0] == one
    pairs = {"inputs": [["x", "y"], ["y", "x"]], "task": "same"}
    assert client.post("/predict", json=pairs).json()[0] == pair


def test_generate_is_the_librarys(client):
    expected = http_server.model().generate(["Name: x"], ratio=2, max_length=4)
    answer = client.post("/generate", json={"inputs": ["x"], "ratio": 2})
    assert [one["generated_text"] for one in answer.json()] == expected


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


def test_a_long_text_is_cut_only_where_that_is_asked_for(client):
    longest = client.get("/info").json()["max_input_length"]
    text = "x" * (longest - 1) + "y" * 9
    body = {"inputs": text, "truncate": True}
    kept = client.post("/embed", json={"inputs": "x" * (longest - 1)}).json()
    assert client.post("/embed", json=body).json() == kept
    assert client.post("/embed", json={**body, "truncation_direction": "Left"}).json() != kept
    assert client.post("/v1/rerank", json={"query": "q", "documents": [text]}).status_code == 200


def test_metrics_count_requests_and_their_plugins(client):
    def value(name, **labels):
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
        )

    before = value("variator_texts_total", plugin="ffn_x2")
    client.post("/embed", json={"inputs": TEXTS, "ratio": 2})
    assert value("variator_texts_total", plugin="ffn_x2") == before + 2
    assert value("variator_requests_total", path="/embed", status="200") >= 1
    assert value("variator_request_seconds_count", path="/embed") >= 1
    assert value("process_resident_memory_bytes") > 0


def test_a_token_guards_all_but_health_and_the_page():
    with http_server.running(http_server.service(), token="secret", ready=False) as url:
        sent = {"authorization": "Bearer secret"}
        assert httpx.get(f"{url}/info").status_code == 401
        assert httpx.get(f"{url}/info", headers={"authorization": "Bearer x"}).status_code == 401
        refused = httpx.post(f"{url}/v1/embeddings", json={"input": "x"})
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/info", headers=sent).status_code == 200
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/live").status_code == 200


def test_until_every_program_is_compiled_health_is_503():
    with http_server.running(http_server.service(), ready=False) as url:
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and health.json()["programs"] > health.json()["compiled"]
        refused = httpx.post(f"{url}/embed", json={"inputs": "x"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error_type"] == "Unhealthy"
        assert httpx.get(f"{url}/live").status_code == 200
