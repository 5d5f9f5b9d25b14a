"""Each small kernel at ragged sizes, for tools that watch memory. Not collected by pytest. ::

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/sanitize_small.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_small.py

As ``tests/gpu/sanitize.py``: operands are made, and results checked, on the CPU. Exit code 1 if a result is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import jitgemm

BF16 = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def staged(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    m, n = x.shape
    codes, scales = x.new_empty((m, n // 2), dtype=torch.uint8), x.new_empty((m, n // 64), dtype=torch.int32)
    ids_out, weights_out = ids.new_empty(ids.shape, dtype=torch.int64), torch.empty_like(weights)
    jitgemm.stage_nvfp4(x, ids, weights, codes, scales, ids_out, weights_out)
    return codes, scales, ids_out, weights_out


def prenorm(a: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    d, squares = fn.new_empty(3, len(a), len(fn)), fn.new_empty(3, len(a))
    jitgemm.tf32_hc_prenorm_gemm(a, fn, d, squares, 3, precision="fp32")
    return d, squares


def experts(x: Tensor, logits: Tensor, layout: str) -> tuple[Tensor, ...]:
    """Gate, permutation, copies and their sum; of what padding leaves open only the sum is returned."""
    indices, weights = jitgemm.topk_gate(logits, topk=3)
    more = {"max_m": 20} if layout == "masked" else {"alignment": 16}
    made = jitgemm.moe_permutation(indices, logits.shape[1], weights, layout=layout, **more)
    rows, _ = jitgemm.moe_permute(x, made, x[:, :8].float())
    return indices, *made[:3], jitgemm.moe_combine(rows, made.token_topk_to_pos, weights, x)


STREAMS, FN = normal(5, 4, 72), normal(24, 288, dtype=torch.float32) / 17
NUMBERS = torch.tensor([0.5, 1.0, 1.0]), torch.zeros(24)
GATE = normal(5, 264), normal(40, 264), normal(40, dtype=torch.float32)
TABLE, POSITIONS = jitgemm.rope_cos_sin(50), torch.tensor([0, 49, 7])
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "moe_gate": (jitgemm.moe_gate, GATE),
    "act_quant": (jitgemm.act_quant, (normal(7, 384), 128, "ue8m0")),
    "act_quant packed": (
        lambda x: jitgemm.act_quant(x, 32, "ue8m0", torch.int32, scale_layout="mn_major_tma_aligned"),
        (normal(7, 160),),
    ),
    "act_quant unaligned": (lambda x: jitgemm.act_quant(x[:, 3:131]), (normal(5, 133),)),
    "per_token_cast_to_fp8": (jitgemm.per_token_cast_to_fp8, (normal(3, 201),)),
    "per_block_cast_to_fp8": (jitgemm.per_block_cast_to_fp8, (normal(130, 201),)),
    "per_channel_cast_to_fp8": (jitgemm.per_channel_cast_to_fp8, (normal(130, 201),)),
    "int8_act_quant": (jitgemm.int8_act_quant, (normal(7, 384),)),
    "per_token_cast_to_int8": (jitgemm.per_token_cast_to_int8, (normal(3, 1001),)),
    "fp4_act_quant": (jitgemm.fp4_act_quant, (normal(7, 96),)),
    "nvfp4_act_quant": (jitgemm.nvfp4_act_quant, (normal(7, 48),)),
    "stage_nvfp4": (staged, (normal(5, 128), torch.arange(15).view(5, 3), normal(5, 3, dtype=torch.float32))),
    "swiglu": (jitgemm.swiglu, (normal(3, 402), torch.rand(3), 10.0)),
    "rms_norm": (jitgemm.rms_norm, (normal(3, 777), normal(777))),
    "rms_norm_act_quant": (jitgemm.rms_norm_act_quant, (normal(3, 7168), normal(7168))),
    "rms_norm_cast_to_int8": (jitgemm.rms_norm_cast_to_int8, (normal(3, 777), normal(777))),
    "head_norm_rope": (jitgemm.head_norm_rope, (normal(3, 5, 512), POSITIONS, TABLE)),
    "hc_split_sinkhorn": (jitgemm.hc_split_sinkhorn, (normal(37, 24, dtype=torch.float32), *NUMBERS)),
    "prenorm few rows": (prenorm, (normal(13, 1288), normal(24, 1288, dtype=torch.float32))),
    "prenorm some rows": (prenorm, (normal(140, 200), normal(4, 200, dtype=torch.float32))),
    "prenorm many rows": (prenorm, (normal(1100, 200), normal(24, 200, dtype=torch.float32))),
    "prenorm fp32": (prenorm, (normal(140, 200, dtype=torch.float32), normal(24, 200, dtype=torch.float32))),
    "hc_pre": (jitgemm.hc_pre, (STREAMS, FN, *NUMBERS)),
    "hc_pre fp32": (jitgemm.hc_pre, (STREAMS.float(), FN, *NUMBERS)),
    "hc_head": (jitgemm.hc_head, (STREAMS, FN[:4].contiguous(), NUMBERS[0][:1].clone(), NUMBERS[1][:4].clone())),
    "hc_post": (jitgemm.hc_post, (normal(5, 72), STREAMS, torch.rand(5, 4), torch.rand(5, 4, 4))),
    **{
        f"experts {layout}": (experts, (normal(21, 40), torch.rand(21, 33), layout))
        for layout in ("contiguous", "psum", "masked")
    },
    "experts, two kernels": (experts, (normal(1500, 8), torch.rand(1500, 33), "psum")),
}


def to_gpu(argument: Any) -> Any:
    return argument.cuda() if isinstance(argument, Tensor) else argument


def agrees(found: Any, expected: Any) -> bool:
    """Codes and numbers the same, values within a rounding of BF16."""

    def same(a: Tensor, b: Tensor) -> bool:
        if a.dtype in (BF16, torch.float32):
            return torch.allclose(a.cpu().double(), b.double(), rtol=2**-7, atol=1e-2)
        return torch.equal(*(t.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b)))

    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return all(same(a, b) for a, b in pairs)


def main() -> int:
    """Run all cases; the exit code."""
    if not torch.cuda.is_available():
        print("no GPU", file=sys.stderr)
        return 3
    wrong = []
    for name, (function, arguments) in CASES.items():
        begin = time.monotonic()
        right = agrees(function(*map(to_gpu, arguments)), function(*arguments))
        torch.cuda.synchronize()
        print(f"{name}: {'right' if right else 'WRONG'}, {time.monotonic() - begin:.1f} s", flush=True)
        wrong += [] if right else [name]
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
