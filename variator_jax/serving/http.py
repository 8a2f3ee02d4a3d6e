"""The HTTP server: the app, its guard against slow, large and foreign requests, and its end."""

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException as AnyHttpException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from variator_jax import __version__
from variator_jax.errors import ConfigError, VariatorError
from variator_jax.files import wrap_errors
from variator_jax.serving import errors
from variator_jax.serving.metrics import Metrics
from variator_jax.serving.routes import routes
from variator_jax.serving.service import Service

_LOG = logging.getLogger("uvicorn.error")
#: Paths that need no token and answer before the service is ready.
_OPEN = ("/", "/health", "/live", "/docs", "/openapi.json")
_PAGE_MAY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)
_LOOK_EVERY = 0.1  # seconds between two counts of unread answers
_READY_ANYWAY = (*_OPEN, "/metrics", "/info", "/stats", "/v1/models")


@dataclasses.dataclass(frozen=True)
class HttpLimits:
    """What a client may send.

    Attributes:
      body_bytes: of one request.
      all_bytes: of the bodies of all requests that have no answer yet; one more is refused.
      answer_bytes: of all answers that clients have not read yet; no request is taken while there
        are more.
      connections: at the same time, idle ones included; one more is answered with 503.
      seconds: to send a request's headers, then its body; and to read an answer.
      drain_seconds: to finish what was accepted after SIGTERM.
    """

    body_bytes: int = 8 << 20
    all_bytes: int = 128 << 20
    answer_bytes: int = 512 << 20
    connections: int = 4096
    seconds: float = 30.0
    drain_seconds: float = 60.0


def create_app(
    service: Service,
    model: str = "variator",
    token: str | None = None,
    limits: HttpLimits = HttpLimits(),
) -> FastAPI:
    """The app over a service, which it starts and drains.

    Args:
      service: not started yet.
      model: the name in answers.
      token: a bearer token that every request needs, but for the page, health and the description.
      limits: of requests.
    """

    def stop_after_failure(starting: asyncio.Future) -> None:
        """Ends a server whose programs cannot be compiled; `serve` then raises why."""
        if not starting.cancelled() and starting.exception() is not None:
            app.state.server.should_exit = True

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.starting = starting = asyncio.ensure_future(service.start())
        starting.add_done_callback(stop_after_failure)
        yield
        if service.ready:
            await service.drain()
        starting.cancel()

    about = "A frozen T5 encoder whose compression ratio follows the load."
    app = FastAPI(title="variator", version=__version__, description=about, lifespan=life)
    app.state.service, app.state.limits, app.state.model = service, limits, model
    app.state.metrics, app.state.started = Metrics(service.snapshot), int(time.time())
    app.exception_handler(VariatorError)(errors.on_variator_error)
    app.exception_handler(RequestValidationError)(errors.on_validation_error)
    app.exception_handler(AnyHttpException)(errors.on_http_error)
    app.include_router(routes)
    _add_state_routes(app)
    app.add_middleware(_Guard, state=app.state, token=token)
    return app


def _add_state_routes(app: FastAPI) -> None:
    """What operators and browsers ask for."""
    service, state = app.state.service, dict[str, Any](tags=["state"])
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_MAY})

    @app.get("/health", responses={503: {"description": "Not every program is compiled."}}, **state)
    async def health() -> JSONResponse:
        """200 when every program is compiled, 503 with the progress before."""
        done, total = service.progress
        content = {"ready": service.ready, "compiled": done, "programs": total}
        return JSONResponse(content, 200 if service.ready else 503)

    @app.get("/live", responses={503: {"description": "Batches have ended by an error."}}, **state)
    async def live() -> JSONResponse:
        """200 while the process can answer; 503 asks for a restart."""
        return JSONResponse({"live": not service.broken}, 503 if service.broken else 200)

    @app.get("/metrics", response_class=Response, **state)
    async def metrics() -> Response:
        """Prometheus's text format."""
        return Response(generate_latest(app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class _Guard:
    """Refuses requests without the token or before the service is ready; bounds reading; counts."""

    def __init__(self, app: ASGIApp, state: Any, token: str | None) -> None:
        self._app, self._state, self._token = app, state, token
        self._bytes = 0  # of the bodies of all requests that have no answer yet
        self._unread, self._looked = 0, 0.0  # bytes of answers, and when they were counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, body = time.perf_counter(), 499, _Body()  # 499: the client left

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault("x-variator-plugin", "none")
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = errors.error_response(scope["path"], refusal) if refusal else self._app
            await app(scope, self._bounded(receive, body), counted)
        except Exception:
            _LOG.exception("%s failed", scope["path"])
            if status != 499:  # an answer has begun: its end is missing, which the client sees
                raise
            failed = errors.ApiError("backend", "The server failed; its log has the reason.")
            await errors.error_response(scope["path"], failed)(scope, receive, counted)
        finally:
            self._bytes -= body.size
            path = getattr(scope.get("route"), "path", "other")
            self._state.metrics.requests.labels(path, status).inc()
            self._state.metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> errors.ApiError | None:
        path = scope["path"]
        if self._token is not None and path not in _OPEN:
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, f"Bearer {self._token}".encode()):
                return errors.ApiError("unauthorized", "Expected the server's bearer token.")
        if not self._state.service.ready and path not in _READY_ANYWAY:
            done, total = self._state.service.progress
            reason = f"Not ready: {done} of {total} programs are compiled."
            return errors.ApiError("unhealthy", reason, retry_after=1.0)
        if path not in _READY_ANYWAY and self._count_unread() > self._state.limits.answer_bytes:
            reason = f"Answers of over {self._state.limits.answer_bytes:,} bytes wait to be read."
            return errors.ApiError("overloaded", reason, retry_after=1.0)
        return None

    def _count_unread(self) -> int:
        """Bytes of answers that wait in this process for their clients, a moment ago."""
        server = getattr(self._state, "server", None)  # none where another server runs the app
        if server and time.monotonic() - self._looked > _LOOK_EVERY:
            open_now = server.server_state.connections
            self._unread = sum(one.transport.get_write_buffer_size() for one in open_now)
            self._looked = time.monotonic()
        return self._unread

    def _bounded(self, receive: Receive, body: "_Body") -> Receive:
        """`receive`, which raises when a body, or all of them, are too large or take too long."""
        limits: HttpLimits = self._state.limits
        ends = time.monotonic() + limits.seconds

        async def bounded() -> Message:
            if body.complete:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"No body within {limits.seconds:g} s.") from None
            body.size += (size := len(message.get("body", b"")))
            self._bytes += size
            if body.size > limits.body_bytes:
                raise HTTPException(413, f"A body has at most {limits.body_bytes:,} bytes.")
            if self._bytes > limits.all_bytes:
                reason = f"The requests on their way hold over {limits.all_bytes:,} bytes."
                raise HTTPException(429, reason, {"Retry-After": "1"})
            body.complete = not message.get("more_body", False)
            return message

        return bounded


@dataclasses.dataclass
class _Body:
    """What has come of the body of one request."""

    size: int = 0
    complete: bool = False


class _Connection(H11Protocol):
    """A connection that ends when nothing moves on it: half a request, an answer nobody reads."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to watch."""
        super().connection_made(transport)
        self._seen: tuple[object, int] | None = None
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the watch."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        found = None if busy else (self.cycle, self.transport.get_write_buffer_size())
        if found is not None and found == self._seen:
            self.transport.abort()
            return
        self._seen = found
        app: Any = self.config.app
        self._timer = self.loop.call_later(app.state.limits.seconds, self._watch)


def make_server(app: FastAPI) -> uvicorn.Server:
    """The server of an app that `create_app` made; its `run` takes a bound socket."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=app.state.limits.connections,
        timeout_graceful_shutdown=round(app.state.limits.drain_seconds),
    )
    app.state.server = uvicorn.Server(config)
    return app.state.server


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serves until SIGTERM or Ctrl-C; then answers what was accepted, and exits with 0.

    Raises:
      ConfigError: if the address cannot be bound.
      Exception: what ended the compilation of the programs.
    """
    bound = bind(host, port, app.state.limits.seconds)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn raises them again behind its own handler.
        signal.signal(number, lambda *_: sys.exit(0))
    address = f"[{host}]" if ":" in host else host
    print(f"Serving {app.state.model} at http://{address}:{bound.getsockname()[1]}", flush=True)
    make_server(app).run([bound])
    app.state.starting.result()


def bind(host: str, port: int, seconds: float = 30.0) -> socket.socket:
    """A bound socket, whose connections end when what is sent is not read for that long.

    Raises:
      ConfigError: if the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    with wrap_errors(f"{host}:{port} cannot be bound", ConfigError):
        # Who comes before the loop runs waits for it.
        bound = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    if sys.platform == "linux":  # What is sent and not acknowledged is given up.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * seconds))
    return bound
