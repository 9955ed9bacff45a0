"""Secrets of the configuration, as they can be sent: in a header of HTTP or in gRPC's metadata."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _printable(secret: str) -> str:
    """Without white space around it, such as the line end of a file. An empty one would be none at all."""
    secret = secret.strip()
    if not secret or not secret.isprintable():
        raise ValueError("must have printable characters, and no others")
    return secret


def _ascii(secret: str) -> str:
    if not secret.isascii():
        raise ValueError("must be ASCII")
    return secret


Secret = Annotated[str, AfterValidator(_printable)]
AsciiSecret = Annotated[Secret, AfterValidator(_ascii)]
"""Of gRPC: its metadata takes nothing else."""
