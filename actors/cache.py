"""Where this package keeps files of its own on the user's machine."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

ENVIRONMENT_VARIABLE = "S2D_CACHE_DIR"


def cache_dir() -> Path:
    """$S2D_CACHE_DIR, or the user's cache directory. Not created."""
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("s2d-serve"))
