"""Why a call for generation ended without its answer, as the metrics name it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal

from starlette.requests import ClientDisconnect

from cluster.gateway.errors import ApiError
from cluster.gateway.sse import ClientGoneError

FailureReason = Literal[
    "invalid", "not_found", "overloaded", "unavailable", "timeout", "internal", "cancelled"
]
"""cancelled: the client went away."""

_BY_STATUS: Mapping[int, FailureReason] = {
    400: "invalid",
    404: "not_found",
    413: "invalid",
    429: "overloaded",
    503: "unavailable",
    504: "timeout",
}
_CLIENT_GONE = (asyncio.CancelledError, GeneratorExit, ClientGoneError, ClientDisconnect)


def failure_reason(error: BaseException) -> FailureReason | None:
    """None for what is no request: a call without a valid key."""
    if isinstance(error, ApiError):
        return None if error.status == 401 else _BY_STATUS.get(error.status, "internal")
    return "cancelled" if isinstance(error, _CLIENT_GONE) else "internal"
