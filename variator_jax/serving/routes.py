"""The endpoints: each translates a request to `Service.submit` and the answer to its API's form."""

import base64
import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Response
from pydantic_core import to_json

from variator_jax.serving import schemas
from variator_jax.serving.call import Call
from variator_jax.serving.errors import ApiError, documented
from variator_jax.serving.service import Answer
from variator_jax.serving.tasks import normalized

Asked = Annotated[Call, Depends()]
routes = APIRouter()
_OPENAI: dict[str, Any] = {"tags": ["OpenAI"], "responses": documented("openai")}
_TEI: dict[str, Any] = {"tags": ["Text Embeddings Inference"], "responses": documented("tei")}
_COHERE: dict[str, Any] = {"tags": ["Cohere, Jina"], "responses": documented("cohere")}


def _large(api: dict[str, Any], model: Any) -> dict[str, Any]:
    """A route whose answer a thread writes: what it looks like, for the description."""
    return {**api, "responses": {**api["responses"], 200: {"model": model}}}


@routes.post("/embeddings", include_in_schema=False)
@routes.post("/v1/embeddings", **_large(_OPENAI, schemas.EmbeddingsResponse))
async def openai_embeddings(body: schemas.EmbeddingsRequest, call: Asked) -> Response:
    """Pooled vectors, as numbers or as base64 of float32."""
    answer = await call.run(call.task("embed", body.task), _listed(body.input), body)
    encode = _base64 if body.encoding_format == "base64" else _json

    def write() -> bytes:
        vectors = (encode(_resized(vector, body.dimensions)) for vector in answer.values)
        row = b'{"object":"embedding","index":%d,"embedding":%b}'
        data = b",".join(row % one for one in enumerate(vectors))
        rest = to_json({"model": call.model, "usage": _usage(answer.tokens)})
        return b'{"object":"list","data":[%b],%b' % (data, rest[1:])

    return await call.respond(write)


@routes.get("/v1/models", **_OPENAI)
async def openai_models(call: Asked) -> schemas.ModelList:
    """The one model that is served."""
    return schemas.ModelList(data=[schemas.Model(id=call.model, created=call.started)])


@routes.post("/embed", **_large(_TEI, list[list[float]]))
async def embed(body: schemas.EmbedRequest, call: Asked) -> Response:
    """Pooled vectors."""
    task = call.task("embed", body.task or body.prompt_name)
    answer = await call.run(task, _listed(body.inputs), body, normalize=body.normalize)
    size, unit = body.dimensions, body.normalize
    return await call.respond(lambda: _json([_resized(v, size, unit) for v in answer.values]))


@routes.post("/embed_all", **_large(_TEI, list[list[list[float]]]))
async def embed_all(body: schemas.TokensRequest, call: Asked) -> Response:
    """A vector for each token."""
    task, inputs = call.task("embed", body.task or body.prompt_name), _listed(body.inputs)
    answer = await call.run(task, inputs, body, per_token=True)
    return await call.respond(lambda: _json(answer.values))


@routes.post("/rerank", response_model_exclude_none=True, **_TEI)
async def rerank(
    body: schemas.RerankRequest | schemas.DocumentsRequest, call: Asked
) -> list[schemas.Rank] | schemas.RankedDocuments:
    """Scores of texts for a query, best first; with `documents` in place of `texts`, as Cohere."""
    if isinstance(body, schemas.DocumentsRequest):
        return await rerank_documents(body, call)
    scores, _ = await _scores(call, body, body.texts, body.raw_scores)
    texts: Sequence[str | None] = body.texts if body.return_text else [None] * len(scores)
    return [schemas.Rank(index=i, score=scores[i], text=texts[i]) for i in _best_first(scores)]


async def _scores(
    call: Call,
    body: schemas.RerankRequest | schemas.DocumentsRequest,
    texts: Sequence[str],
    raw: bool = False,
) -> tuple[list[float], Answer]:
    """The score of each text: a probability, or the cosine of a bi-encoder, as it is."""
    task = call.task("rerank", body.task)
    answer = await call.run(task, [(body.query, text) for text in texts], body)
    return answer.values if raw or task.embeds else list(map(_sigmoid, answer.values)), answer


@routes.post("/v2/rerank", response_model_exclude_none=True, **_COHERE)
@routes.post("/v1/rerank", response_model_exclude_none=True, **_COHERE)
async def rerank_documents(body: schemas.DocumentsRequest, call: Asked) -> schemas.RankedDocuments:
    """Relevance of documents for a query, best first."""
    texts = [d if isinstance(d, str) else d.text for d in body.documents]
    if body.truncate is None:
        body = body.model_copy(update={"truncate": True})
    scores, answer = await _scores(call, body, texts)
    best = _best_first(scores)[: body.top_n]
    results = [schemas.RankedDocument(index=i, relevance_score=scores[i]) for i in best]
    if body.return_documents:
        for result in results:
            result.document = schemas.Document(text=texts[result.index])
    usage = _usage(answer.tokens)
    billed = {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": usage.total_tokens}}
    return schemas.RankedDocuments(
        id=str(uuid.uuid4()), model=call.model, results=results, usage=usage, meta=billed
    )


@routes.post("/predict", **_TEI)
async def predict(
    body: schemas.PredictRequest, call: Asked
) -> list[schemas.Prediction] | list[list[schemas.Prediction]]:
    """Labels with their probabilities, most probable first."""
    inputs: list[Any] = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    single = all(isinstance(item, str) for item in inputs)
    if single:
        inputs = [inputs]
    rows = [tuple(row) if len(row) == 2 else row[0] for row in inputs]
    task = call.task("classify", body.task, pairs=isinstance(rows[0], tuple))
    answer = await call.run(task, rows, body, raw_scores=body.raw_scores)
    labelled = [
        [schemas.Prediction(label=name, score=score) for name, score in value.items()]
        for value in answer.values
    ]
    ranked = [sorted(row, key=lambda one: -one.score) for row in labelled]
    return ranked[0] if single else ranked


@routes.post("/generate", **_TEI)
async def generate(
    body: schemas.GenerateRequest, call: Asked
) -> schemas.Generated | list[schemas.Generated]:
    """Short texts: greedy, or the best of several beams, as the task is configured."""
    inputs, limit = _listed(body.inputs), body.parameters.max_new_tokens
    task = call.task("generate", body.task, pairs=isinstance(inputs[0], list))
    if limit is not None and limit > task.max_length:
        reason = f"task {task.name!r} generates at most {task.max_length} tokens; found {limit}"
        raise ApiError("invalid", f"parameters.max_new_tokens: {reason}.")
    answer = await call.run(task, inputs, body, max_new_tokens=limit)
    texts = [schemas.Generated(generated_text=text) for text in answer.values]
    return texts[0] if isinstance(body.inputs, str) else texts


@routes.post("/tokenize", **_large(_TEI, list[list[schemas.Token]]))
async def tokenize(body: schemas.TokenizeRequest, call: Asked) -> Response:
    """The ids of texts, without the prompt of a task."""
    texts = _listed(body.inputs)
    kept = None if body.add_special_tokens else -1  # the last is EOS
    return await call.respond(lambda: to_json([row[:kept] for row in call.tokenize(texts)]))


@routes.get("/info", **_TEI)
async def info(call: Asked) -> dict[str, Any]:
    """The model, its tasks, its plugins and the limits of a request."""
    return call.info()


@routes.get("/stats", tags=["state"])
async def stats(call: Asked) -> dict[str, Any]:
    """Load, gear and latencies at this moment: what the page at / draws."""
    return {"time": time.time(), "progress": call.service.progress, **call.service.snapshot()}


def _listed(inputs: Any) -> list[Any]:
    """One input as a list of one."""
    one = isinstance(inputs, str) or isinstance(inputs[0], int)
    return [inputs] if one else list(inputs)


def _resized(vector: np.ndarray, size: int | None, normalize: bool = True) -> np.ndarray:
    """The first `size` numbers of a vector `[embed]`, of unit length again."""
    if size is None or size == len(vector):
        return vector
    if size > len(vector):
        reason = f"the vectors have {len(vector)} dimensions; found {size}"
        raise ApiError("invalid", f"dimensions: {reason}.", "dimensions")
    return normalized(vector[:size]) if normalize else vector[:size]


def _json(values: np.ndarray | Sequence[np.ndarray]) -> bytes:
    """Numbers as JSON; a vector at a time, because other threads wait for each."""
    if not isinstance(values, np.ndarray) or values.ndim > 1:
        return b"[" + b",".join(map(_json, values)) + b"]"
    return to_json(values.tolist())


def _base64(vector: np.ndarray) -> bytes:
    return b'"%b"' % base64.b64encode(np.asarray(vector, "<f4").tobytes())


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0


def _best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def _usage(tokens: Sequence[int]) -> schemas.Usage:
    return schemas.Usage(prompt_tokens=sum(tokens), total_tokens=sum(tokens))
