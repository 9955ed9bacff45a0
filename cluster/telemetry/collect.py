"""Prometheus text of a whole cluster: what every Ray node's metrics agent exposes, joined."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import httpx
import ray

SCRAPE_TIMEOUT_S = 3.0
MAX_NODE_BYTES = 32 * 1024 * 1024


def node_urls() -> list[str]:
    """One metrics URL for each living node."""
    return [
        f"http://{_bracket(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node.get("Alive") and node.get("MetricsExportPort")
    ]


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _scrape(client: httpx.AsyncClient, url: str) -> str:
    """Empty when the node does not answer: its metrics are missing, not everybody's."""
    try:
        response = await client.get(url)
        response.raise_for_status()
    except httpx.HTTPError:
        return ""
    return response.text if len(response.content) <= MAX_NODE_BYTES else ""


def merge(texts: Iterable[str]) -> str:
    """Join expositions, keeping the samples of a metric together and its HELP and TYPE lines once."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                lines = headers.setdefault(family, [])
                if not any(known.startswith(line[:6]) for known in lines):
                    lines.append(line)
                samples.setdefault(family, [])
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(line)
    out: list[str] = []
    for family, lines in samples.items():
        out += headers.get(family, [])
        out += lines
    return "\n".join(out) + "\n" if out else ""


async def collect(urls: Sequence[str] | None = None, timeout_s: float = SCRAPE_TIMEOUT_S) -> str:
    """Never raises for a node that is down, and is empty while Ray does not say which nodes there are. Values
    lag by Ray's report interval (10 s by default)."""
    if urls is None:
        try:
            async with asyncio.timeout(timeout_s):
                urls = await asyncio.to_thread(node_urls)
        except TimeoutError:
            return ""
    async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as client:
        return merge(await asyncio.gather(*(_scrape(client, url) for url in urls)))
