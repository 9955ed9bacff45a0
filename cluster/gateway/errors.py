"""Everything that can be wrong with a request, and how HTTP and gRPC say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from pydantic import ValidationError

from actors.sampling.params import ParameterError
from actors.target_worker.messages import RequestError

DEFAULT_RETRY_AFTER_S = 1.0

REFUSED_FIELDS: Mapping[str, str] = {
    "tools": "tool calling is not supported",
    "tool_choice": "tool calling is not supported",
    "parallel_tool_calls": "tool calling is not supported",
    "functions": "function calling is not supported",
    "function_call": "function calling is not supported",
    "best_of": "is not supported; use n",
    "suffix": "insertion is not supported",
    "audio": "audio output is not supported",
    "prediction": "predicted outputs are not supported; see `speculation`",
    "reasoning_effort": "is not supported",
    "verbosity": "is not supported",
    "web_search_options": "web search is not supported",
}
"""Fields of OpenAI's API that are refused by name; an explicit null counts as absent."""

_GRPC_BY_STATUS: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(eq=False)
class ApiError(Exception):
    """One refused or failed request. `status` is the HTTP status, `param` the dotted public field."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.param}: {self.message}" if self.param else self.message

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error shape."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    @property
    def grpc_code(self) -> grpc.StatusCode:
        return _GRPC_BY_STATUS.get(self.status, grpc.StatusCode.INTERNAL)


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


def model_not_found(model: str) -> ApiError:
    message = f"`{model}` is not served here"
    return ApiError(404, message, type="not_found_error", param="model", code="model_not_found")


def not_ready(message: str, retry_after_s: float = DEFAULT_RETRY_AFTER_S) -> ApiError:
    return ApiError(503, message, type="service_unavailable", code="not_ready", retry_after_s=retry_after_s)


def overloaded(message: str, retry_after_s: float = DEFAULT_RETRY_AFTER_S) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code="overloaded", retry_after_s=retry_after_s)


def internal(message: str) -> ApiError:
    return ApiError(500, message, type="server_error", code="internal_error")


def from_parameter_error(error: ParameterError, names: Mapping[str, str] | None = None) -> ApiError:
    """`names` maps internal field names to the ones the client used."""
    return invalid((names or {}).get(error.param, error.param), error.message)


def from_request_error(error: RequestError, names: Mapping[str, str] | None = None) -> ApiError:
    """What a target worker answered instead of tokens."""
    match error.kind:
        case "invalid":
            param = (names or {}).get(error.param, error.param) if error.param else None
            message = error.message.removeprefix(f"{error.param}: ") if error.param else error.message
            return invalid(param, message)
        case "not_found":
            return ApiError(
                404, error.message, type="not_found_error", param=error.param, code="model_not_found"
            )
        case "overloaded":
            return overloaded(error.message, error.retry_after_s or DEFAULT_RETRY_AFTER_S)
        case "unavailable":
            return not_ready(error.message, error.retry_after_s or DEFAULT_RETRY_AFTER_S)
        case "internal":
            return internal(error.message)


def from_validation_error(error: ValidationError) -> ApiError:
    """The first problem pydantic found, with its dotted path."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = REFUSED_FIELDS.get(path, "is not a known parameter")
        kind = "unsupported_parameter" if path in REFUSED_FIELDS else "unknown_parameter"
        return invalid(path, message, code=kind)
    message = first["msg"].removeprefix("Value error, ")
    return invalid(path or None, message[:1].lower() + message[1:])
