"""One request on its way to the service: its task, its limits, its answer, a client that leaves."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response

from variator_jax import __version__
from variator_jax.errors import VariatorError, did_you_mean
from variator_jax.serving.errors import ApiError
from variator_jax.serving.schemas import Choice
from variator_jax.serving.service import Answer, Overloaded
from variator_jax.texts import EOS, PAD


class Call:
    """What every endpoint shares; FastAPI makes one for each request."""

    def __init__(self, request: Request, response: Response) -> None:
        self._request, self._response = request, response
        state = request.app.state
        self.service, self.model, self.started = state.service, state.model, state.started
        self._engine, self._limits, self._metrics = self.service.engine, state.limits, state.metrics

    async def run(self, kind: str, inputs: Sequence[Any], choice: Choice, **options: Any) -> Answer:
        """The service's answer to a request for a kind of task; its plugin goes into the headers.

        Raises:
          ApiError: for what the client can mend, or if the queue is full.
        """
        self._check_count(inputs)
        if not all(isinstance(one, str | tuple) for one in inputs):
            await asyncio.to_thread(self._check_ids, inputs)
        submitted = self.service.submit(
            self._task(kind, choice.task),
            inputs,
            plugin=choice.plugin,
            ratio=choice.ratio,
            max_ratio=choice.max_ratio,
            truncate=getattr(choice, "truncate", None),
            truncation_direction=getattr(choice, "truncation_direction", "Right"),
            **options,
        )
        answer = await self._until_client_leaves(submitted)
        self._metrics.texts.labels(answer.plugin).inc(len(inputs))
        self._metrics.tokens.labels(answer.plugin).inc(sum(answer.tokens))
        self._response.headers["x-variator-plugin"] = answer.plugin
        self._response.headers["x-variator-ratio"] = str(self._engine.plugins[answer.plugin])
        return answer

    def _check_count(self, inputs: Sequence[Any]) -> None:
        if len(inputs) > self._limits.texts:
            reason = f"at most {self._limits.texts} texts; found {len(inputs)}"
            raise ApiError("too_large", f"A request has {reason}.")

    def _check_ids(self, inputs: Sequence[Any]) -> None:
        """Refuses the ids of another vocabulary, whose numbers are words in this one, too.

        OpenAI's clients may send those of theirs. Ours end in EOS, and are what their text gives.
        """
        for i, ids in enumerate(inputs):
            if not isinstance(ids, list):
                continue
            tokenizer = self._engine.model.tokenizer
            if max(ids) < tokenizer.size and tokenizer.encode(tokenizer.decode(ids)) == ids:
                continue
            reason = (
                f"The ids of input {i} are not those that /tokenize gives for a text, with EOS."
            )
            hint = (
                "Those of another vocabulary mean other words here; langchain's OpenAIEmbeddings "
                "sends texts with check_embedding_ctx_length=False."
            )
            raise ApiError("invalid", f"{reason} {hint}", "input")

    def _task(self, kind: str, name: str | None) -> str:
        """The task of that name, or the first of that kind."""
        tasks = list(self._engine.tasks.values())
        fitting = [task.name for task in tasks if task.kind == kind]
        if not fitting:
            have = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
            raise ApiError(
                "no_such_task", f"This server has no task of kind {kind!r}, only {have}."
            )
        if name is not None and name not in fitting:
            reason = f"{name!r} is not a task of kind {kind!r}: those are {', '.join(fitting)}"
            raise ApiError("invalid", f"task: {reason}.{did_you_mean(name, fitting)}", "task")
        return name or fitting[0]

    async def _until_client_leaves(self, submitted: Any) -> Answer:
        """Cancels what was submitted when the client closes the connection."""
        work = asyncio.ensure_future(submitted)
        left = asyncio.ensure_future(self._client_left())
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError("left", "The client left.")
            return work.result()
        except Overloaded as error:
            raise ApiError("overloaded", str(error), retry_after=error.retry_after_s) from error
        except VariatorError as error:
            raise ApiError("invalid", str(error)) from error
        finally:
            work.cancel()
            left.cancel()

    async def _client_left(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def tokenize(self, texts: Sequence[str]) -> list[list[tuple[int, str, bool]]]:
        """For each text its ids, with the text of each and whether it is a special one."""
        self._check_count(texts)
        tokenizer = self._engine.model.tokenizer
        special = {PAD, EOS, *tokenizer.sentinels.values()}

        def rows() -> list[list[tuple[int, str, bool]]]:
            return [
                [(token, tokenizer.decode([token]), token in special) for token in ids]
                for ids in map(tokenizer.encode, texts)
            ]

        return await asyncio.to_thread(rows)

    def info(self) -> dict[str, Any]:
        """TEI's description of the model, with its tasks and plugins."""
        engine = self._engine
        return {
            "model_id": self.model,
            "max_input_length": engine.limits.max_length,
            "max_client_batch_size": self._limits.texts,
            "plugins": [{"name": name, "ratio": ratio} for name, ratio in engine.plugins.items()],
            "ratios": sorted({*engine.plugins.values()}),
            "tasks": [
                {"name": task.name, "kind": task.kind, "pair": task.prompt.count("{") > 1}
                for task in engine.tasks.values()
            ],
            "version": __version__,
        }
