"""One request on its way to the service: its task, its limits, its answer, a client that leaves."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastapi import Request, Response

from variator_jax import __version__
from variator_jax.errors import did_you_mean
from variator_jax.serving.errors import ApiError
from variator_jax.serving.schemas import MOST_TEXTS, Choice, Token
from variator_jax.serving.service import Answer
from variator_jax.serving.tasks import TaskConfig
from variator_jax.texts import EOS, PAD

#: Bytes of the texts of /tokenize, each of which can be a token: 70 bytes each, 18 MB together.
MOST_BYTES = 1 << 18


class Call:
    """What every endpoint shares; FastAPI makes one for each request."""

    def __init__(self, request: Request, response: Response) -> None:
        self._request, self._response = request, response
        state = request.app.state
        self.service, self.model, self.started = state.service, state.model, state.started
        self.engine = self.service.engine
        self._metrics = state.metrics

    async def run(
        self, task: TaskConfig, inputs: Sequence[Any], choice: Choice, **options: Any
    ) -> Answer:
        """The service's answer to a request; its plugin goes into the headers.

        Raises:
          VariatorError: as `Service.submit`.
          ApiError: if the client leaves.
        """
        named = {"plugin": choice.plugin, "ratio": choice.ratio, "max_ratio": choice.max_ratio}
        cut = choice.cut(self.engine.limits.max_length)
        submitted = self.service.submit(task.name, inputs, cut=cut, **named, **options)
        answer = await self._until_client_leaves(submitted)
        self._metrics.texts.labels(answer.plugin).inc(len(inputs))
        self._metrics.tokens.labels(answer.plugin).inc(sum(answer.tokens))
        self._response.headers["x-variator-plugin"] = answer.plugin
        self._response.headers["x-variator-ratio"] = str(self.engine.ratios[answer.plugin])
        return answer

    async def respond(self, write: Callable[[], bytes]) -> Response:
        """A large answer, which a thread writes as JSON: it would hold up all other requests."""
        content, headers = await asyncio.to_thread(write), dict(self._response.headers)
        return Response(content, media_type="application/json", headers=headers)

    def task(self, kind: str, name: str | None, pairs: bool = False) -> TaskConfig:
        """The task of that name, or the first of that kind; if there is one, that takes pairs."""
        tasks = self.engine.tasks.values()
        fitting = {task.name: task for task in tasks if task.kind == kind}
        if not fitting:
            have = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
            reason = f"This server has no task of kind {kind!r}, only {have}."
            raise ApiError("no_such_task", reason)
        if name is not None and name not in fitting:
            reason = f"{name!r} is not a task of kind {kind!r}: those are {', '.join(fitting)}"
            raise ApiError("invalid", f"task: {reason}.{did_you_mean(name, fitting)}", "task")
        if name is not None:
            return fitting[name]
        # The first of them.
        return max(fitting.values(), key=lambda task: task.takes_pairs == pairs)

    async def _until_client_leaves(self, submitted: Any) -> Answer:
        """Cancels what was submitted when the client closes the connection."""
        work = asyncio.ensure_future(submitted)
        left = asyncio.ensure_future(self._client_left())
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError("left", "The client left.")
            return work.result()
        finally:
            work.cancel()
            left.cancel()

    async def _client_left(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    def tokenize(self, texts: Sequence[str]) -> list[list[Token]]:
        """For each text its ids, with the text of each and whether it is a special one.

        Raises:
          ApiError: for more text than `MOST_BYTES`.
          ConfigError: for a text that the tokenizer refuses.
        """
        if (found := sum(len(text.encode()) for text in texts)) > MOST_BYTES:
            reason = f"at most {MOST_BYTES:,} bytes of text; found {found:,}"
            raise ApiError("too_large", f"inputs: {reason}.")
        tokenizer = self.engine.model.tokenizer
        special = {PAD: "<pad>", EOS: "</s>"} | {i: name for name, i in tokenizer.sentinels.items()}

        def token(i: int) -> Token:
            return Token(id=i, text=special.get(i) or tokenizer.decode([i]), special=i in special)

        return [[token(i) for i in tokenizer.encode(text)] for text in texts]

    def info(self) -> dict[str, Any]:
        """TEI's description of the model, with its tasks and plugins."""
        limits, ratios = self.engine.limits, self.engine.ratios
        tasks = self.engine.tasks.values()
        backbone, of_service = self.engine.model.backbone, self.service.limits
        return {
            "model_id": self.model,
            "served_model_name": self.model,
            "model_sha": backbone.fingerprint,
            "model_dtype": backbone.config.dtype,
            "model_type": _model_type(tasks),
            "max_concurrent_requests": of_service.requests,
            "tokenization_workers": of_service.tokenizers,
            "max_input_length": limits.max_length,
            "max_batch_tokens": limits.batch_tokens,
            "max_batch_requests": limits.most_rows,
            "max_client_batch_size": MOST_TEXTS,
            "auto_truncate": False,
            "plugins": [{"name": name, "ratio": ratio} for name, ratio in ratios.items()],
            "tasks": [
                {"name": task.name, "kind": task.kind, "pairs": task.takes_pairs} for task in tasks
            ],
            "version": __version__,
        }


def _model_type(tasks: Iterable[TaskConfig]) -> dict[str, Any]:
    """TEI's name for what the first task does that it has one for; empty for texts alone."""
    for task in tasks:
        labels = {str(i): label for i, label in enumerate(task.labels)}
        names = {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
        if task.kind == "embed":
            return {"embedding": {"pooling": "mean"}}
        if task.kind in ("rerank", "classify"):
            return {"reranker" if task.kind == "rerank" else "classifier": names}
    return {}
