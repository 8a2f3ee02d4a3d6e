"""Errors of the HTTP API: one kind of error, in the form and with the status of each API."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from variator_jax.errors import VariatorError
from variator_jax.serving import schemas
from variator_jax.serving.batcher import BackendError, Overloaded, TooLarge


class _Kind(NamedTuple):
    """Status and name of an error in OpenAI's and TEI's API; Cohere's has OpenAI's statuses."""

    openai: tuple[int, str]
    tei: tuple[int, str]

    def of(self, family: str) -> tuple[int, str]:
        """Those of one API."""
        return self.tei if family == "tei" else self.openai


_REQUEST = "invalid_request_error"
KINDS: Mapping[str, _Kind] = {
    "malformed": _Kind((400, _REQUEST), (400, "Validation")),
    "empty": _Kind((400, _REQUEST), (400, "Empty")),
    "unauthorized": _Kind((401, _REQUEST), (401, "Unauthorized")),
    "not_found": _Kind((404, _REQUEST), (404, "Validation")),
    "method": _Kind((405, _REQUEST), (405, "Validation")),
    "slow": _Kind((408, "timeout_error"), (408, "Validation")),
    "too_large": _Kind((413, _REQUEST), (413, "Validation")),
    "left": _Kind((499, _REQUEST), (499, "Validation")),  # nobody reads it, metrics count it
    "invalid": _Kind((400, _REQUEST), (422, "Validation")),
    "no_such_task": _Kind((404, _REQUEST), (424, "Backend")),
    "overloaded": _Kind((429, "rate_limit_error"), (429, "Overloaded")),
    "backend": _Kind((500, "server_error"), (424, "Backend")),
    "unhealthy": _Kind((503, "server_error"), (503, "Unhealthy")),
}
_CODES = {
    "unauthorized": "invalid_api_key",
    "no_such_task": "model_not_found",
    "overloaded": "rate_limit_exceeded",
}
_OF_STATUS = {404: "not_found", 405: "method", 408: "slow", 413: "too_large", 429: "overloaded"}
_EMPTY = {"string_too_short", "too_short"}
_MOST_ERRORS = 32  # of one body, of which three are answered


class ApiError(VariatorError):
    """A request that is refused.

    Args:
      kind: one of `KINDS`.
      message: for people.
      param: the field of the request, in OpenAI's form of errors.
      retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self, kind: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.param, self.retry_after = kind, param, retry_after


def family(path: str) -> str:
    """Whose API a path belongs to: 'openai', 'cohere' or 'tei'."""
    if path in ("/v1/rerank", "/v2/rerank"):
        return "cohere"
    return "openai" if path.startswith("/v1/") or path == "/embeddings" else "tei"


def documented(of: str) -> dict[int | str, dict[str, Any]]:
    """The errors of an API's routes, for its OpenAPI description."""
    models = {"openai": schemas.OpenAiError, "tei": schemas.TeiError, "cohere": schemas.CohereError}
    left_out = {405, 499} if of != "tei" else {404, 405, 499}
    statuses = {kind.of(of)[0] for kind in KINDS.values()} - left_out
    return {status: {"model": models[of]} for status in sorted(statuses)}


def error_response(path: str, error: ApiError) -> JSONResponse:
    """The error in the form of the API that the path belongs to."""
    of, message = family(path), str(error)
    status, name = KINDS[error.kind].of(of)
    if of == "openai":
        code = _CODES.get(error.kind)
        body = schemas.OpenAiErrorBody(message=message, type=name, param=error.param, code=code)
        content: Any = schemas.OpenAiError(error=body)
    elif of == "tei":
        content = schemas.TeiError(error=message, error_type=name)
    else:
        content = schemas.CohereError(message=message)
    headers = {"WWW-Authenticate": "Bearer"} if error.kind == "unauthorized" else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after + 0.5)))
    return JSONResponse(content.model_dump(), status, headers)


async def on_variator_error(request: Request, error: VariatorError) -> JSONResponse:
    """Answers a full queue, a failed batch, or what the client can mend."""
    kinds = {Overloaded: "overloaded", BackendError: "backend", TooLarge: "too_large"}
    if not isinstance(error, ApiError):
        wait = error.retry_after_s if isinstance(error, Overloaded) else None
        error = ApiError(kinds.get(type(error), "invalid"), str(error), retry_after=wait)
    return error_response(request.url.path, error)


async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answers a body that does not fit the schema, without repeating the body."""
    found = list(islice(error.errors(), _MOST_ERRORS))
    reasons = dict.fromkeys(map(_reason, found))  # without repetitions, in order
    param = _place(found[0]).partition(".")[0]
    reason = "; ".join(islice(reasons, 3))
    return error_response(request.url.path, ApiError(_kind(found), reason, param))


def _kind(found: Sequence[Mapping[str, Any]]) -> str:
    kinds = {one["type"] for one in found}
    longest = [one["ctx"]["max_length"] for one in found if one["type"] == "too_long"]
    if max(longest, default=0) >= schemas.MOST_TEXTS:
        return "too_large"  # a shorter one has a fixed length: a pair
    return "malformed" if "json_invalid" in kinds else "empty" if kinds & _EMPTY else "invalid"


def _reason(found: Mapping[str, Any]) -> str:
    """One error of pydantic in words."""
    if found["type"] == "json_invalid":
        return f"not JSON: {found['ctx']['error']} at character {found['loc'][1]}"
    if found["type"] == "model_attributes_type":
        return "the body is not a JSON object with the header Content-Type: application/json"
    return f"{_place(found)}: {found['msg']}"


def _place(found: Mapping[str, Any]) -> str:
    """The field, without the names of the types that pydantic tried in it."""
    parts = map(str, found["loc"][1:])
    fields = [p for p in parts if p.isdigit() or (p.isidentifier() and p.islower() and p != "str")]
    return ".".join(fields) or "body"


async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Answers what FastAPI itself refuses: paths, methods, the size of the body, broken JSON."""
    kind = _OF_STATUS.get(error.status_code, "malformed")
    response = error_response(request.url.path, ApiError(kind, error.detail))
    response.headers.update(error.headers or {})
    return response
