"""What users bring along: other default dtypes, gradients, views of larger buffers, numbers that fp32 does not hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import Epilogue
from jitgemm.errors import ProblemError

BF16 = torch.bfloat16


@pytest.fixture
def bf16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    yield
    torch.set_default_dtype(before)


def packed(n: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)


@pytest.mark.usefixtures("bf16_by_default")
@pytest.mark.parametrize("global_scale", [None, 2, 2.5])
def test_units_are_fp32_whatever_the_default_dtype(global_scale: float | None) -> None:
    scales = torch.full((64, 8), 0.5, dtype=torch.float32).to(torch.float8_e4m3fn)
    prepared = jitgemm.prepare_fp4_weights(packed(64, 128), scales, global_scale)
    assert prepared.units.dtype == torch.float32
    assert bool((prepared.units.abs() == (global_scale or 1.0)).all())
    with pytest.raises(ProblemError, match="global_scale is bool"):
        jitgemm.prepare_fp4_weights(packed(64, 128), scales, True)


@pytest.mark.usefixtures("bf16_by_default")
def test_norms_and_rotations_are_fp32_whatever_the_default_dtype() -> None:
    x, weight = torch.randn(3, 5000, dtype=BF16), torch.ones(5000, dtype=BF16)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert ((jitgemm.rms_norm(x, weight).double() - exact).abs() <= exact.abs() * 2**-7.9).all()
    heads, positions = torch.randn(4, 2, 64, dtype=BF16), torch.tensor([0, 1, 7, -1])
    rotated = jitgemm.head_norm_rope(heads, positions, torch.rand(8, 32, dtype=torch.float32))
    assert bool(rotated[-1, :, 32:].isnan().all())
    assert bool(rotated[:-1].isfinite().all())


def test_results_need_no_gradient() -> None:
    x = torch.randn(4, 256, dtype=BF16)
    weight = torch.nn.Parameter(torch.ones(256, dtype=BF16))
    assert not jitgemm.rms_norm(x, weight).requires_grad
    assert not jitgemm.swiglu(x, torch.nn.Parameter(torch.ones(4))).requires_grad
    d = torch.empty(4, 8, dtype=BF16)
    jitgemm.bf16_gemm_nt(x, torch.nn.Parameter(torch.randn(8, 256, dtype=BF16)), d)
    assert not d.requires_grad


def test_results_are_contiguous() -> None:
    x = torch.randn(256, 6, dtype=BF16).t()
    assert jitgemm.rms_norm(x, torch.ones(256, dtype=BF16)).is_contiguous()
    assert jitgemm.swiglu(x).is_contiguous()


def test_a_block_size_is_an_integer() -> None:
    x = torch.randn(4, 256, dtype=BF16)
    assert jitgemm.act_quant(x, 64)[1].shape == (4, 4)
    with pytest.raises(ProblemError, match=r"block_size is 64\.0"):
        jitgemm.act_quant(x, 64.0)  # type: ignore[arg-type]


def test_outputs_that_overlap_something_are_refused_in_one_wording() -> None:
    x, y, fp32 = torch.randn(16, 16, dtype=BF16), torch.randn(16, 16, dtype=BF16), torch.randn(512)
    d, counts = torch.randn(4, 16, 16, dtype=BF16), torch.tensor([[16], [0]], dtype=torch.int32)
    shifted = fp32[1:257].view(16, 16)
    calls = {
        "d overlaps b": lambda: jitgemm.bf16_gemm_nt(x, d[0], d[0]),
        "d overlaps c": lambda: jitgemm.bf16_gemm_nt(x, y, fp32[:256].view(16, 16), shifted),
        "d overlaps bias": lambda: jitgemm.bf16_gemm_nt(x, y, d[0], epilogue=Epilogue(bias=d[0, 0])),
        "d overlaps masked_m": lambda: jitgemm.m_grouped_bf16_gemm_nt_masked(
            *(x[None, :1], y[None, :2], counts.view(BF16)[None, :1]), counts[0], 16
        ),
        "d overlaps a": lambda: jitgemm.einsum("bmk,bnk->mn", d, d.clone(), d[3]),
    }
    for start, call in calls.items():
        with pytest.raises(ProblemError) as caught:
            call()
        hint = "; c may be d itself, with the same strides" if start.endswith(" c") else ""
        assert str(caught.value) == f"{start}; accepted is an output apart from the other tensors{hint}"


def test_an_input_without_elements_overlaps_nothing() -> None:
    d = torch.full((16, 16), torch.nan, dtype=BF16)
    jitgemm.bf16_gemm_nt(d[:, 8:8], torch.empty(16, 0, dtype=BF16), d)
    assert bool((d == 0).all())


def test_rows_that_overlap_are_refused_as_outputs() -> None:
    x = torch.randn(256, dtype=BF16)
    with pytest.raises(ProblemError, match="overlap"):
        jitgemm.act_quant(x.as_strided((3, 128), (64, 1)), 128, inplace=True)
    m, n, k = 3, 128, 2
    arguments = torch.randn(m, n, dtype=BF16), torch.zeros(m, k, dtype=torch.int64), torch.rand(m, k)
    codes, sf = torch.zeros(m, n, dtype=torch.float8_e4m3fn), torch.zeros(m, 1, dtype=torch.int32)
    outputs = torch.zeros(m, k, dtype=torch.int64), torch.zeros(1, k).expand(m, k)
    with pytest.raises(ProblemError, match=r"topk_weights_out .* overlap"):
        jitgemm.stage_fp8(*arguments, codes, sf, *outputs)


@pytest.mark.parametrize(
    ("epilogue", "said"),
    [
        (Epilogue(alpha=1e39), "alpha is 1e"),
        (Epilogue(swiglu=True, limit=1e39), "limit is 1e"),
        (Epilogue(swiglu=True, limit=0.0), r"limit is 0\.0"),
    ],
)
def test_numbers_that_fp32_does_not_hold(epilogue: Epilogue, said: str) -> None:
    a, b = torch.randn(4, 64, dtype=BF16), torch.randn(32, 64, dtype=BF16)
    d = torch.empty(4, 16 if epilogue.swiglu else 32, dtype=BF16)
    with pytest.raises(ProblemError, match=said):
        jitgemm.bf16_gemm_nt(a, b, d, epilogue=epilogue)
    with pytest.raises(ProblemError, match="eps is"):
        jitgemm.rms_norm(a, torch.ones(64, dtype=BF16), 1e39)
    with pytest.raises(ProblemError, match="limit is"):
        jitgemm.swiglu(a, limit=1e39)


def test_swiglu_of_no_columns() -> None:
    a, b, d = torch.randn(4, 64, dtype=BF16), torch.empty(0, 64, dtype=BF16), torch.empty(4, 0, dtype=BF16)
    jitgemm.bf16_gemm_nt(a, b, d, epilogue=Epilogue(swiglu=True))


def test_sums_by_cublas_are_checked() -> None:
    a, b = torch.randn(2, 8, 16, dtype=BF16), torch.randn(2, 8, 16, dtype=BF16)
    with pytest.raises(ProblemError, match="d has dtype"):
        jitgemm.einsum("bmk,bnk->mn", a, b, torch.empty(8, 8, dtype=torch.float16), use_cublaslt=True)
    with pytest.raises(ProblemError, match="stride 1"):
        jitgemm.einsum("bmk,bnk->mn", a, b, torch.empty(8, 8, dtype=BF16).t(), use_cublaslt=True)


def test_positions_beyond_the_rows_are_left_out() -> None:
    y = torch.randn(4, 64, dtype=BF16)
    found = jitgemm.moe_combine(y, torch.tensor([[0, 9]], dtype=torch.int32))
    assert torch.equal(found, y[:1])


def test_copies_share_no_memory() -> None:
    weights, scales = torch.randn(256, 128, dtype=BF16).to(torch.float8_e4m3fn), torch.rand(2, 1)
    _, shard_scales, _ = jitgemm.shard_weights(weights, scales, -2, 128, 128)
    rows = torch.randn(16, 64, dtype=BF16)
    assert shard_scales.untyped_storage().data_ptr() != scales.untyped_storage().data_ptr()
    assert jitgemm.interleave_gate_up(rows).data_ptr() != rows.data_ptr()
