"""GEMM by torch's cuBLAS against the reference."""

from __future__ import annotations

import pytest
import torch

import jitgemm
from jitgemm.testing import calc_diff

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("d_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("m", [1, 96])
def test_against_the_reference(layout: str, dtype: torch.dtype, d_dtype: torch.dtype, accumulate: bool, m: int) -> None:
    if dtype == torch.float8_e4m3fn and layout != "nt":
        pytest.skip("cuBLAS wants FP8 operands contiguous along K")
    n, k = 160, 256
    function = getattr(jitgemm, f"cublaslt_gemm_{layout}")
    a = torch.randn((k, m) if layout[0] == "t" else (m, k)).to(dtype)
    b = torch.randn((n, k) if layout[1] == "t" else (k, n)).to(dtype)
    d = torch.randn(m, n).to(d_dtype)
    on_gpu = d.cuda()
    function(a, b, d, d if accumulate else None)
    function(a.cuda(), b.cuda(), on_gpu, on_gpu if accumulate else None)
    assert calc_diff(on_gpu.cpu(), d) < (1e-5 if d_dtype == torch.bfloat16 else 1e-6)
