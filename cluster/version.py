"""The version of S2D Serve that is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("s2d-serve")
except PackageNotFoundError:  # run from a source tree
    VERSION = "unknown"
