"""Where a measurement was made: machine, instruction sets, memory bandwidth, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from actors.models.threads import physical_cores

PACKAGES = (
    "s2d-serve",
    "torch",
    "transformers",
    "ray",
    "numpy",
    "httpx",
    "grpcio",
    "vllm",
    "llama-cpp-python",
)
ISA_FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""What decides how fast matrix products are, x86 and Arm."""
BANDWIDTH_BYTES = 256 * 2**20
GIT_TIMEOUT_S = 5.0


def environment(bandwidth: bool = True) -> dict[str, Any]:
    """Plain JSON values. Measuring the bandwidth takes about a second and 256 MiB."""
    import torch

    cpu = _cpu_info()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "physical_cores": physical_cores(),
        "isa_flags": [flag for flag in ISA_FLAGS if flag in cpu],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_core": _native_core(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(PACKAGES),
        "git_commit": git_commit(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    if bandwidth:
        seconds = read_floor_seconds(BANDWIDTH_BYTES)
        record["memory_bandwidth_gb_s"] = round(BANDWIDTH_BYTES / seconds / 1e9, 1)
    return record


def read_floor_seconds(num_bytes: int, repeats: int = 7) -> float:
    """Seconds to read so many bytes once at this machine's memory bandwidth, measured with every thread; the
    best of `repeats`."""
    import torch

    data = torch.ones(num_bytes // 4)
    data.sum()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return best


def cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu_info() -> frozenset[str]:
    """Instruction set flags: "flags" on x86, "Features" on Arm."""
    line = next((line for line in _cpu_lines() if line.startswith(("flags", "Features"))), ":")
    return frozenset(line.split(":", 1)[1].split())


def _native_core() -> str:
    """The instruction set that the compiled core takes here, or why there is none."""
    from actors.native.library import load_library, unavailable_reason

    reason = unavailable_reason()
    return load_library().isa if reason is None else f"none: {reason}"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Of the checkout this package runs from, with "-dirty" when tracked files differ; None outside one."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
