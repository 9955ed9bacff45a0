"""Quantise a GGUF file with llama.cpp itself: INPUT OUTPUT TYPE THREADS. Runs in its environment.

The library's defaults decide which tensors get which type, as in its own quantising tool (in Q4_0 the output
matrix is kept in a better type).
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    source, target, kind, threads = sys.argv[1:]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.nthread = int(threads)
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    main()
