"""The comparison with cuBLAS: its arguments, and what CPU tensors get."""

from __future__ import annotations

import pytest
import torch

import jitgemm
from jitgemm.errors import ProblemError

LAYOUTS = {
    "nt": jitgemm.cublaslt_gemm_nt,
    "nn": jitgemm.cublaslt_gemm_nn,
    "tn": jitgemm.cublaslt_gemm_tn,
    "tt": jitgemm.cublaslt_gemm_tt,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("d_dtype", [torch.bfloat16, torch.float32])
def test_products_of_integers_are_exact(
    layout: str, dtype: torch.dtype, accumulate: bool, d_dtype: torch.dtype
) -> None:
    m, n, k = 3, 5, 7
    a, b, d = torch.randint(-3, 4, (m, k)), torch.randint(-3, 4, (n, k)), torch.randint(-9, 9, (m, n)).to(d_dtype)
    expected = (a[:, None] * b[None]).sum(2) + (d.long() if accumulate else 0)
    a = a.T if layout[0] == "t" else a
    b = b if layout[1] == "t" else b.T
    LAYOUTS[layout](a.contiguous().to(dtype), b.contiguous().to(dtype), d, d if accumulate else None)
    assert d.dtype == d_dtype and torch.equal(d.long(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_sizes_of_zero(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b, d = torch.ones(m, k).to(dtype), torch.ones(n, k).to(dtype), torch.randn(m, n)
    c = d.clone()
    jitgemm.cublaslt_gemm_nt(a, b, d, d)
    assert torch.equal(d, c)
    jitgemm.cublaslt_gemm_nt(a, b, d)
    assert torch.equal(d, torch.zeros(m, n))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.ones(2, 4)}, "a has dtype torch.float32 and b torch.bfloat16; accepted is torch.bfloat16 or"),
        ({"b": torch.ones(3, 4, dtype=torch.float8_e4m3fn)}, "and b torch.float8_e4m3fn"),
        ({"a": None}, "a is NoneType; accepted is a matrix"),
        ({"d": torch.ones(2, 3, 1)}, r"d is torch.float32 \(2, 3, 1\); accepted is a matrix"),
        ({"d": torch.ones(2, 3).half()}, "d has dtype torch.float16; accepted is"),
        ({"c": torch.ones(2, 3).bfloat16()}, "d has dtype torch.float32 and c torch.bfloat16"),
        ({"c": torch.ones(3, 2)}, r"a, b, d and c have shapes \[\(2, 4\), \(3, 4\), \(2, 3\), \(3, 2\)\]; accepted is"),
        ({"b": torch.ones(3, 5).bfloat16()}, r"have shapes \[\(2, 4\), \(3, 5\), \(2, 3\)\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    call: dict[str, object] = {"a": torch.ones(2, 4).bfloat16(), "b": torch.ones(3, 4).bfloat16()}
    call["d"] = torch.ones(2, 3)
    with pytest.raises(ProblemError, match=message):
        jitgemm.cublaslt_gemm_nt(**(call | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["nn", "tn", "tt"])
def test_what_cannot_be_transposed_is_refused(layout: str) -> None:
    with pytest.raises(ProblemError, match="is float; accepted is a matrix"):
        LAYOUTS[layout](1.0, 2.0, torch.ones(2, 3))  # type: ignore[arg-type]
