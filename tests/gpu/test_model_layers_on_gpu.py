"""What prewarm builds for a model's experts is enough for the fused calls, in every layout of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import Epilogue, settings
from jitgemm.cache_tools.models import derive

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HIDDEN, INNER, EXPERTS, ROWS = 512, 256, 4, 640
CONFIG = {
    "model_type": "deepseek_v4",
    "hidden_size": HIDDEN,
    "num_attention_heads": 8,
    "head_dim": 128,
    "q_lora_rank": 256,
    "o_lora_rank": 128,
    "o_groups": 2,
    "compress_ratios": [0],
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "vocab_size": 1024,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def fp8_weights(*size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, device=DEVICE) / size[-1] ** 0.5
    values, scales = jitgemm.per_block_cast_to_fp8(x.bfloat16().flatten(0, -2))
    return values.view(size), scales.view(*size[:-2], size[-2] // 128, -1)


def fp4_weights(*size: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (*size[:-1], size[-1] // 2), dtype=torch.uint8, device=DEVICE)
    return codes, torch.full((*size[:-1], size[-1] // 32), 121, dtype=torch.uint8, device=DEVICE)


def experts_of(dtype: str) -> tuple[Any, Any, Callable[..., None], Callable[..., None]]:
    """Weights of gate and up and of down, and the masked and the contiguous function."""
    make = fp4_weights if dtype == "fp4" else fp8_weights
    gate_up, down = make(EXPERTS, 2 * INNER, HIDDEN), make(EXPERTS, HIDDEN, INNER)
    if dtype == "fp8":
        return (
            jitgemm.interleave_gate_up(*gate_up),
            down,
            jitgemm.m_grouped_fp8_gemm_nt_masked,
            jitgemm.m_grouped_fp8_gemm_nt_contiguous,
        )
    interleaved = [jitgemm.interleave_gate_up(part) for part in gate_up]
    return (
        jitgemm.prepare_fp4_weights(*interleaved),
        jitgemm.prepare_fp4_weights(*down),
        jitgemm.m_grouped_fp8_fp4_gemm_nt_masked,
        jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous,
    )


def problems(prefix: str, dtype: str) -> list[Any]:
    layers = derive({**CONFIG, "expert_dtype": dtype}, "here")
    return [named.problem for named in layers.problems if named.layer.startswith(prefix)]


@pytest.mark.parametrize("dtype", ["fp4", "fp8"])
def test_routed_experts(dtype: str) -> None:
    torch.manual_seed(0)
    assert jitgemm.prewarm(problems("experts.", dtype)).kernels > 30
    gate_up, down, masked, contiguous = experts_of(dtype)
    a, a_scales = jitgemm.per_token_cast_to_fp8(torch.randn(EXPERTS * ROWS, HIDDEN, device=DEVICE).bfloat16())
    a_scales = jitgemm.get_mn_major_tma_aligned_tensor(a_scales)
    of_groups = jitgemm.get_mn_major_tma_aligned_tensor(a_scales.view(EXPERTS, ROWS, -1))
    row_weights = torch.rand(EXPERTS * ROWS, device=DEVICE)
    starts = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE) * ROWS
    for m in (1, 7, 20, 64, 130, ROWS):
        counts = torch.full((EXPERTS,), m, dtype=torch.int32, device=DEVICE)
        used = (torch.arange(EXPERTS * ROWS, device=DEVICE) % ROWS) < m
        index = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE).repeat_interleave(ROWS)
        index[~used] = -1
        by_psum = {"use_psum_layout": True, "expected_m_for_psum_layout": m}
        results = []
        with settings.override(jit="forbid"):
            for kind in ("masked", "contiguous", "psum"):
                shape = (EXPERTS, ROWS) if kind == "masked" else (EXPERTS * ROWS,)
                steps = Epilogue(swiglu=True, limit=7.0, row_weights=row_weights.view(shape))
                inner = jitgemm.empty_quantized((*shape, INNER), device=DEVICE)
                d = torch.full((*shape, HIDDEN), torch.nan, dtype=torch.bfloat16, device=DEVICE)
                if kind == "masked":
                    masked((a.view(*shape, HIDDEN), of_groups), gate_up, inner, counts, m, epilogue=steps)
                    masked(inner, down, d, counts, m)
                else:
                    layout, more = (starts + m, by_psum) if kind == "psum" else (index, {})
                    contiguous((a, a_scales), gate_up, inner, layout, **more, epilogue=steps)
                    contiguous(inner, down, d, layout, **more)
                results.append(d.view(-1, HIDDEN)[used].double())
        assert bool(results[0].isfinite().all()) and float(results[0].abs().max()) > 0
        for other in results[1:]:  # a code may be another where sums of other tiles are rounded
            assert float((other - results[0]).norm() / results[0].norm()) < 1e-2


def test_the_shared_expert() -> None:
    torch.manual_seed(0)
    jitgemm.prewarm(problems("shared_expert.", "fp4"))
    gate_up, down = jitgemm.interleave_gate_up(*fp8_weights(2 * INNER, HIDDEN)), fp8_weights(HIDDEN, INNER)
    a, a_scales = jitgemm.per_token_cast_to_fp8(torch.randn(2000, HIDDEN, device=DEVICE).bfloat16())
    for m in (1, 16, 100, 600, 2000):
        operand = a[:m], jitgemm.get_mn_major_tma_aligned_tensor(a_scales[:m])
        inner = jitgemm.empty_quantized((m, INNER), device=DEVICE)
        d = torch.full((m, HIDDEN), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        with settings.override(jit="forbid"):
            jitgemm.fp8_gemm_nt(operand, gate_up, inner, epilogue=Epilogue(swiglu=True, limit=7.0))
            jitgemm.fp8_gemm_nt(inner, down, d)
        assert bool(d.isfinite().all())
