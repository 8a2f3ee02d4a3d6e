"""Clients that others wrote, unchanged; those that are heavy are skipped where they are absent."""

import re
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ["one text", "another one"]


@pytest.fixture(scope="module")
def expected(url):
    return httpx.post(f"{url}/embed", json={"inputs": TEXTS}).json()


def test_openai_asks_for_base64_and_reads_errors(url, expected):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=1e-6)
    assert [model.id for model in client.models.list()] == ["tiny"]
    raw = client.embeddings.with_raw_response
    chosen = raw.create(model="tiny", input="x", extra_body={"plugin": "ffn_x4"})
    assert chosen.headers["x-variator-plugin"] == "ffn_x4"
    with pytest.raises(openai.BadRequestError, match="not loaded"):
        client.embeddings.create(model="tiny", input="x", extra_body={"ratio": 3})


def test_llama_indexs_client_of_tei(url, expected):
    name = "llama_index.embeddings.text_embeddings_inference"
    llama = pytest.importorskip(name)
    client = llama.TextEmbeddingsInference(model_name="tiny", base_url=url)
    np.testing.assert_allclose(client.get_text_embedding_batch(TEXTS), expected, atol=1e-6)
    assert len(client.get_query_embedding("x")) == len(expected[0])


def test_langchains_openai_embeddings(url, expected):
    langchain = pytest.importorskip("langchain_openai")
    client = langchain.OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="unused", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(client.embed_documents(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_curl_lines_of_the_documentation_work(url, page):
    lines = re.findall(r"^curl .*(?:\\\n.*)*", (ROOT / page).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        command = f"set -o pipefail; {line.replace('localhost:8080', url.removeprefix('http://'))}"
        command = command.replace("curl -s", "curl -sS --fail-with-body")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout[:1] in "[{", f"{line}\n{done.stdout}"
