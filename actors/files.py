"""Files and folders that are complete or absent, whenever the writer is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_or_absent(target: Path) -> Iterator[Path]:
    """A name to write to; the file takes the place of `target` when the block has ended well."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_native_id()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def complete_or_absent_folder(target: Path) -> Iterator[Path]:
    """As `complete_or_absent`: an empty folder to fill, beside `target`, which must not exist yet. A killed
    process leaves it behind as `NAME.*.partial`."""
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
