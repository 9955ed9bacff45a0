"""A model as GGUF in the precisions that llama.cpp is compared at, written once to the user's cache.

The weights are those of the model's own GGUF file, dequantised, so that every engine runs the same numbers
up to its precision; metadata and tokenizer are copied. Q8_0 and Q4_0 are made from the F16 file by llama.cpp
itself.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np

from actors.cache import cache_dir
from actors.files import complete_or_absent
from actors.models.source import ResolvedSource
from cluster.bench.engines.interface import EngineUnavailableError

Precision = Literal["bf16", "f16", "q8_0", "q4_0"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LAYOUT_VERSION = 1
"""Raised when what is written changes, so that older files are left aside."""
QUANTIZE_TIMEOUT_S = 1800.0
QUANTIZE_SCRIPT = Path(__file__).with_name("llama_cpp_quantize.py")
_STORED = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
_FILE_TYPE = gguf.Keys.General.FILE_TYPE
_REPLACED = (gguf.Keys.General.ARCHITECTURE, _FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION)

Progress = Callable[[str], None]


def gguf_file(
    source: ResolvedSource, precision: Precision, python: Path, threads: int, progress: Progress
) -> Path:
    """The file for `source` at `precision`, written now if it is not there (seconds for 100M weights).

    python: the interpreter of llama.cpp's environment, for Q8_0 and Q4_0. Raises EngineUnavailableError.
    """
    if source.kind != "gguf":
        raise EngineUnavailableError(
            f"llama.cpp needs a GGUF file of the model, and {source.source} is a folder: "
            "give the path of a .gguf file, or a package that ships one, as the model's source"
        )
    folder = cache_dir() / "gguf"
    target = folder / f"{source.content_hash[:32]}-{precision}-v{LAYOUT_VERSION}.gguf"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    progress(f"writing {source.name} as {precision}")
    if precision in _STORED:
        with complete_or_absent(target) as partial:
            write_dequantised(source.path, partial, precision)
    else:
        half = gguf_file(source, "f16", python, threads, progress)
        with complete_or_absent(target) as partial:
            _quantize(half, partial, precision, python, threads)
    return target


def write_dequantised(source: Path, target: Path, precision: str) -> None:
    """Copy a GGUF file with its matrices at `precision` ("bf16" or "f16") and its vectors in float32."""
    tensor_type, file_type = _STORED[precision]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, _value(reader.fields[gguf.Keys.General.ARCHITECTURE]))
    for field in reader.fields.values():
        if field.name in _REPLACED or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, _value(field), field.types[0], sub_type=sub_type)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if values.ndim > 1:
            stored = gguf.quants.quantize(values, tensor_type)
            writer.add_tensor(tensor.name, stored, raw_dtype=tensor_type)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value(field: Any) -> Any:
    return field.contents()


def _quantize(source: Path, target: Path, precision: str, python: Path, threads: int) -> None:
    command = [str(python), str(QUANTIZE_SCRIPT), str(source), str(target), precision, str(threads)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=QUANTIZE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise EngineUnavailableError(f"quantising to {precision} took over {error.timeout:.0f} s") from error
    if done.returncode != 0:
        raise EngineUnavailableError(f"quantising to {precision} failed: {done.stderr[-1000:]}")
