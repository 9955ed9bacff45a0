"""What row-invariance costs: all matrix products of a step, on the native core and with torch's own linear.

The core sums every output in one order, whatever else is in the batch; torch's libraries choose the order by
the shape of the batch. Both compute the same products of the model's own weights with the same inputs and as
many threads; a pass goes through all layers and the head, so that weights come from memory as in a step.
Passes of the two alternate, with a pause between them, because threads that one has left spinning would
disturb the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from actors.models.convert import model_folder
from actors.models.llama_load import load_llama_weights
from actors.models.source import resolve_source
from actors.models.threads import physical_cores
from actors.native.linear import NativeLinear

ROWS = (1, 8)
PAUSE_S = 0.02
Pass = Callable[[int], list[Tensor]]
"""All products over so many rows."""


@dataclass(slots=True)
class ProductTimes:
    """Seconds of a pass by rows, then by repeat. `changed`: products of `products` whose first output row has
    other bits in a batch of the most rows than alone."""

    dtype: str
    products: int
    threads: int
    native_s: dict[int, list[float]] = field(default_factory=dict)
    torch_s: dict[int, list[float]] = field(default_factory=dict)
    native_changed: int = 0
    torch_changed: int = 0


def measure_products(
    source: str, dtype: torch.dtype, threads: int, repeats: int, rows: Sequence[int] = ROWS
) -> ProductTimes:
    """Leaves torch with another number of threads only while it runs. Raises UnsupportedModelError outside
    the Llama family and NativeUnavailableError without the core."""
    threads = threads or physical_cores()
    matrices = _matrices(source, dtype)
    generator = torch.Generator().manual_seed(0)
    drawn = {m.shape[1]: torch.randn(max(rows), m.shape[1], generator=generator) for m in matrices}
    inputs = {(count, width): x[:count].to(dtype) for width, x in drawn.items() for count in rows}
    wide = {key: x.float() for key, x in inputs.items()}
    ours = [NativeLinear(matrix, threads=threads) for matrix in matrices]

    def native(count: int) -> list[Tensor]:
        return [product(wide[count, m.shape[1]]) for product, m in zip(ours, matrices, strict=True)]

    def theirs(count: int) -> list[Tensor]:
        return [functional.linear(inputs[count, m.shape[1]], m) for m in matrices]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        name = str(dtype).removeprefix("torch.")
        times = ProductTimes(name, len(matrices), threads)
        times.native_changed, times.torch_changed = _changed(native, rows), _changed(theirs, rows)
        for _ in range(repeats):
            for count in rows:
                for run, seconds in ((native, times.native_s), (theirs, times.torch_s)):
                    time.sleep(PAUSE_S)
                    started = time.perf_counter()
                    run(count)
                    seconds.setdefault(count, []).append(time.perf_counter() - started)
        return times
    finally:
        torch.set_num_threads(before)


def _changed(run: Pass, rows: Sequence[int]) -> int:
    """Also the warm-up."""
    alone, among = run(min(rows)), run(max(rows))
    return sum(not torch.equal(a[0], b[0]) for a, b in zip(alone, among, strict=True))


def _matrices(source: str, dtype: torch.dtype) -> list[Tensor]:
    """In the order of a step: each [outputs, inputs]."""
    folder = model_folder(resolve_source(source))
    weights, _ = load_llama_weights(folder, dtype, torch.device("cpu"))
    layers = [m for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [*layers, weights.head]
