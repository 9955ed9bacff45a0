"""Other engines by name: Hugging Face, llama.cpp and vLLM in their configurations, in `PEERS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.models.convert import model_folder
from actors.models.source import ResolvedSource
from actors.models.threads import cpus_of_cores, physical_cores
from cluster.bench.engines.interface import BenchEngine
from cluster.bench.engines.peer_engine import Launch, PeerEngine, PeerOptions, Progress
from cluster.bench.peers.first_layers import first_layers, num_layers
from cluster.bench.peers.gguf_files import PRECISIONS, Precision, gguf_file

__all__ = ["PEERS", "PeerOptions"]

VLLM_DRAFT_TOKENS = {"ngram": 4, "draft_model": 3}
"""A round. vLLM has no default for these, and one of its own for suffix decoding."""


def _flags(**values: object) -> tuple[str, ...]:
    """Command-line options; None and False are left out, True has no value."""
    found: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(str(value))
    return tuple(found)


def _threads(options: PeerOptions) -> int:
    return options.threads or physical_cores()


def _binding(threads: int) -> str:
    """The CPUs for so many threads, as vLLM reads them: one of each core that this process may use, siblings
    only where there are more threads than cores."""
    cores = cpus_of_cores()
    cpus = [core[0] for core in cores] + [cpu for core in cores for cpu in core[1:]]
    return ",".join(map(str, sorted(cpus[:threads])))


def _omp(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def _hugging_face(name: str, options: PeerOptions, mode: str = "plain") -> BenchEngine:
    def plan(source: ResolvedSource, python: Path, progress: Progress) -> Launch:
        folder, threads = model_folder(source, progress), _threads(options)
        early_exit = None
        if mode == "assisted" and options.assistant is None:
            early_exit = _draft_layers(options, folder)
        lookup = mode == "prompt-lookup"
        arguments = _flags(
            model=folder,
            dtype=options.dtype,
            threads=threads,
            slots=options.max_concurrency,
            max_model_len=options.max_model_len,
            # The documentation's own choice; generate has no default.
            prompt_lookup=(options.lookup_tokens or 10) if lookup else None,
            ngram=(options.lookup_ngram or 2) if lookup else None,
            early_exit=early_exit,
            assistant=options.assistant if mode == "assisted" else None,
        )
        return Launch("hugging_face_host.py", arguments, _omp(threads), folder)

    return PeerEngine(name, "hf", options, plan)


def _draft_layers(options: PeerOptions, folder: Path) -> int:
    return options.assistant_layers or num_layers(folder) * 4 // 5


def _llama_cpp(name: str, options: PeerOptions, precision: Precision, lookup: bool = False) -> BenchEngine:
    def plan(source: ResolvedSource, python: Path, progress: Progress) -> Launch:
        threads = _threads(options)
        file = gguf_file(source, precision, python, threads, progress)
        arguments = _flags(
            model=file,
            threads=threads,
            slots=options.max_concurrency,
            max_model_len=options.max_model_len,
            # Defaults of the package's LlamaPromptLookupDecoding.
            prompt_lookup=(options.lookup_tokens or 10) if lookup else None,
            ngram=(options.lookup_ngram or 2) if lookup else None,
        )
        return Launch("llama_cpp_host.py", arguments, _omp(threads), file)

    return PeerEngine(name, "llama.cpp", options, plan)


def _vllm(name: str, options: PeerOptions, method: str | None = None) -> BenchEngine:
    def plan(source: ResolvedSource, python: Path, progress: Progress) -> Launch:
        folder, threads = model_folder(source, progress), _threads(options)
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # "auto" would leave a core idle.
            "VLLM_CPU_OMP_THREADS_BIND": _binding(threads),
        }
        draft_model = options.assistant
        if method == "draft_model" and draft_model is None:
            progress("writing the draft model")
            draft_model = first_layers(folder, _draft_layers(options, folder), source.content_hash)
        arguments = _flags(
            model=folder,
            dtype="bfloat16",
            slots=options.max_concurrency,
            max_model_len=options.max_model_len,
            kv_cache_bytes=int(options.kv_cache_gib * 2**30),
            compiled=options.compiled,
            method=method,
            draft_tokens=(options.lookup_tokens or VLLM_DRAFT_TOKENS.get(method)) if method else None,
            ngram=(options.lookup_ngram or 4) if method == "ngram" else None,
            draft_model=draft_model if method == "draft_model" else None,
        )
        return Launch("vllm_host.py", arguments, environment, folder)

    return PeerEngine(name, "vllm", options, plan)


def _factories() -> dict[str, Callable[[PeerOptions], BenchEngine]]:
    def bind(
        build: Callable[..., BenchEngine], name: str, *args: Any
    ) -> Callable[[PeerOptions], BenchEngine]:
        return lambda options: build(name, options, *args)

    found = {
        "hf": bind(_hugging_face, "hf"),
        "hf-prompt-lookup": bind(_hugging_face, "hf-prompt-lookup", "prompt-lookup"),
        "hf-assisted": bind(_hugging_face, "hf-assisted", "assisted"),
        "vllm-bf16": bind(_vllm, "vllm-bf16"),
        "vllm-bf16-ngram": bind(_vllm, "vllm-bf16-ngram", "ngram"),
        "vllm-bf16-suffix": bind(_vllm, "vllm-bf16-suffix", "suffix"),
        "vllm-bf16-draft-model": bind(_vllm, "vllm-bf16-draft-model", "draft_model"),
    }
    for precision in PRECISIONS:
        plain, lookup = f"llama.cpp-{precision}", f"llama.cpp-{precision}-prompt-lookup"
        found[plain] = bind(_llama_cpp, plain, precision)
        found[lookup] = bind(_llama_cpp, lookup, precision, True)
    return found


PEERS: dict[str, Callable[[PeerOptions], BenchEngine]] = _factories()
