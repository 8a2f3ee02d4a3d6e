"""One request on its way to the service: its task, its limits, its answer, a client that leaves."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response

from variator_jax import __version__
from variator_jax.errors import VariatorError, did_you_mean
from variator_jax.serving.batcher import Overloaded
from variator_jax.serving.errors import ApiError
from variator_jax.serving.schemas import Choice
from variator_jax.serving.service import Answer
from variator_jax.serving.tasks import TaskConfig
from variator_jax.texts import EOS, PAD


class Call:
    """What every endpoint shares; FastAPI makes one for each request."""

    def __init__(self, request: Request, response: Response) -> None:
        self._request, self._response = request, response
        state = request.app.state
        self.service, self.model, self.started = state.service, state.model, state.started
        self._limits, self._metrics = state.limits, state.metrics

    async def run(
        self, task: TaskConfig, inputs: Sequence[Any], choice: Choice, **options: Any
    ) -> Answer:
        """The service's answer to a request; its plugin goes into the headers.

        Raises:
          ApiError: for what the client can mend, or if the queue is full.
        """
        self._check_count(inputs)
        submitted = self.service.submit(
            task.name,
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
        self._response.headers["x-variator-ratio"] = str(self.service.ratios[answer.plugin])
        return answer

    def _check_count(self, inputs: Sequence[Any]) -> None:
        if len(inputs) > self._limits.texts:
            reason = f"at most {self._limits.texts} texts; found {len(inputs)}"
            raise ApiError("too_large", f"A request has {reason}.")

    def task(self, kind: str, name: str | None, pairs: bool = False) -> TaskConfig:
        """The task of that name, or the first of that kind; if there is one, that takes pairs."""
        tasks = self.service.tasks
        fitting = {task.name: task for task in tasks if task.kind == kind}
        if not fitting:
            have = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
            raise ApiError(
                "no_such_task", f"This server has no task of kind {kind!r}, only {have}."
            )
        if name is not None and name not in fitting:
            reason = f"{name!r} is not a task of kind {kind!r}: those are {', '.join(fitting)}"
            raise ApiError("invalid", f"task: {reason}.{did_you_mean(name, fitting)}", "task")
        if name is not None:
            return fitting[name]
        return max(
            fitting.values(), key=lambda task: task.takes_pairs == pairs
        )  # the first of them

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
        tokenizer = self.service.engine.model.tokenizer
        special = {PAD, EOS, *tokenizer.sentinels.values()}
        rows = await asyncio.to_thread(self.service.tokenize, texts)
        return [[(i, tokenizer.decode([i]), i in special) for i in row] for row in rows]

    def info(self) -> dict[str, Any]:
        """TEI's description of the model, with its tasks and plugins."""
        limits, ratios = self.service.engine.limits, self.service.ratios
        return {
            "model_id": self.model,
            "model_dtype": self.service.engine.model.backbone.config.dtype,
            "max_input_length": limits.max_length,
            "max_batch_tokens": limits.batch_tokens,
            "max_batch_requests": limits.most_rows,
            "max_client_batch_size": self._limits.texts,
            "auto_truncate": False,
            "plugins": [{"name": name, "ratio": ratio} for name, ratio in ratios.items()],
            "ratios": sorted({*ratios.values()}),
            "tasks": [
                {"name": task.name, "kind": task.kind, "pairs": task.takes_pairs}
                for task in self.service.tasks
            ],
            "version": __version__,
        }
