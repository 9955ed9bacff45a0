"""Changes that an operator asks a running server for."""

from __future__ import annotations

from typing import Any

import httpx

from cluster.cli.common import fail

CHANGE_TIMEOUT_S = 35.0
"""Above what the server waits for Ray Serve in one change."""


def change(
    method: str, url: str, path: str, api_key: str | None, body: dict[str, Any] | None
) -> dict[str, Any]:
    """The answer of a guarded endpoint; ends the program with one line when it refuses."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    address = url.rstrip("/") + path
    try:
        response = httpx.request(
            method, address, headers=headers, json=body, timeout=CHANGE_TIMEOUT_S, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise fail(f"no server at {url}; start one with `s2d serve` ({error})") from error
    if response.is_success:
        return dict(response.json())
    try:
        refusal = response.json()["error"]
    except (ValueError, KeyError) as problem:
        raise fail(f"{address} answered {response.status_code}, not JSON") from problem
    if response.status_code in (404, 405) and refusal.get("param") is None:
        raise fail("changes are guarded: the server must run with gateway.admin_endpoints: true")
    raise fail(str(refusal["message"]))
