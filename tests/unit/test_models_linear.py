"""The matrix products: right, never rounded where promised, row-invariant where declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from actors.models import linear
from actors.models.linear import ProductKind, can_prepack, choose_kind, pack

CPU = torch.device("cpu")
SHAPES = [(96, 64), (960, 576), (576, 1536), (4099, 48)]
KINDS: list[ProductKind] = ["plain", "prepacked", "prepacked_float32", "chunked_float32", "native", "auto"]


def available(kind: ProductKind, dtype: torch.dtype) -> bool:
    if kind == "native":
        return linear.native_available()
    needs: dict[str, torch.dtype] = {"prepacked": dtype, "prepacked_float32": torch.float32}
    return kind not in needs or can_prepack(needs[kind])


def operands(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    return (
        weight,
        torch.randn(shape[0], generator=generator).to(dtype),
        torch.randn(rows, shape[1], generator=generator),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_definition(shape: tuple[int, int], kind: ProductKind, dtype: torch.dtype) -> None:
    if not available(kind, dtype):
        pytest.skip("this CPU has no such product")
    weight, bias, x = operands(shape, 5, dtype)
    rounded = dtype == torch.bfloat16
    for b in (None, bias):
        product = pack(weight, b, kind)
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        for rows in (1, 2, 5):
            tolerance = 2e-2 if rounded else 1e-5
            torch.testing.assert_close(
                product(x[:rows]).double(), expected[:rows], atol=tolerance, rtol=tolerance
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_output_was_never_rounded(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, _, x = operands(shape, 3, dtype)
    out = pack(weight, float32_output=True)(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), F.linear(x.double(), weight.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["prepacked", "prepacked_float32", "native", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_declared_row_invariance_holds(shape: tuple[int, int], kind: ProductKind, dtype: torch.dtype) -> None:
    if not available(kind, dtype):
        pytest.skip("this CPU has no such product")
    weight, _, x = operands(shape, 64, dtype)
    product = pack(weight, None, kind)
    if kind == "prepacked" and dtype == torch.bfloat16 and not product.row_invariant:
        pytest.skip("oneDNN on AMX tiles makes no such promise")
    assert product.row_invariant
    whole = product(x)
    for rows in (1, 2, 3, 5, 8, 16, 32):
        assert torch.equal(product(x[:rows]), whole[:rows]), rows
        assert torch.equal(product(x[64 - rows :]), whole[64 - rows :]), rows


@pytest.mark.parametrize("compiled", [True, False])
def test_int8_is_near_the_definition_and_the_same_without_the_core(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias, x = operands((67, 150), 5, torch.bfloat16)
    known = pack(weight, bias, "int8")(x)
    if not compiled:
        monkeypatch.setattr(linear, "native_available", lambda: False)
    product = pack(weight, bias, "int8")
    assert isinstance(product, linear.NativeLinear) == (compiled and linear.native_available())
    out = product(x)
    assert torch.equal(out, known)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert float((out - expected).std() / expected.std()) < 0.02


def test_a_single_row_is_doubled_where_its_kernel_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_prepack(torch.float32):
        pytest.skip("this CPU has no such product")
    original = linear.PrepackedProduct._run
    seen: list[int] = []

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return original(self, x) + (1e-6 if x.shape[0] == 1 else 0.0)

    monkeypatch.setattr(linear.PrepackedProduct, "_run", run)
    product = pack(torch.rand(8, 8), None, "prepacked")
    seen.clear()
    assert product(torch.rand(1, 8)).shape == (1, 8)
    assert seen == [2]


class TestChoice:
    def test_without_bfloat16_arithmetic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(linear, "can_prepack", lambda dtype: dtype == torch.float32)
        small, large = linear.UPCAST_LIMIT, linear.UPCAST_LIMIT + 1
        assert choose_kind(torch.bfloat16, CPU, parameters=small) == "prepacked_float32"
        assert choose_kind(torch.bfloat16, CPU, parameters=large) == "plain"
        assert choose_kind(torch.bfloat16, CPU, parameters=small, float32_output=True) == "prepacked_float32"
        assert choose_kind(torch.bfloat16, CPU, parameters=large, float32_output=True) == "chunked_float32"

    def test_with_bfloat16_arithmetic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(linear, "can_prepack", lambda dtype: True)
        assert choose_kind(torch.bfloat16, CPU, parameters=1) == "prepacked"
        assert choose_kind(torch.bfloat16, CPU, parameters=1, float32_output=True) == "prepacked_float32"

    def test_without_onednn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(linear, "can_prepack", lambda dtype: False)
        assert choose_kind(torch.float32, CPU, parameters=1) == "plain"
        assert choose_kind(torch.bfloat16, CPU, parameters=1) == "plain"
        assert choose_kind(torch.bfloat16, CPU, parameters=1, float32_output=True) == "chunked_float32"

    def test_on_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = torch.device("cuda")
        assert choose_kind(torch.bfloat16, cuda, parameters=1) == "plain"
        for can, kind in ((True, "cuda_float32"), (False, "chunked_float32")):
            monkeypatch.setattr(linear, "can_return_float32", lambda device, can=can: can)
            assert choose_kind(torch.bfloat16, cuda, parameters=1, float32_output=True) == kind

    def test_unknown_kind(self) -> None:
        with pytest.raises(ValueError, match="sparse"):
            pack(torch.zeros(2, 2), None, "sparse")  # type: ignore[arg-type]
