"""What kernels with FP4 weights do beside others, once each, for tools that watch memory. Not collected by pytest. ::

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/sanitize_fp4.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_fp4.py

As ``tests/gpu/sanitize.py``: operands are made, and results checked, on the CPU. Exit code 1 if a result is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import jitgemm
from jitgemm import settings
from jitgemm.families.gemm import FP4, recipe_traits
from jitgemm.reference.fp4 import dequantize_fp4, dequantize_nvfp4
from jitgemm.reference.gemm import check_close, gemm


@dataclass(frozen=True)
class Case:
    """One call; ``spread`` is by how many powers of two scales differ, above 26 those of a row are not expanded.

    Without a config weights are expanded in memory.
    """

    config: str
    spread: int = 20
    m: int = 20
    n: int = 200
    k: int = 416
    d_dtype: str = "bf16"
    kind: str = "dense"
    recipe: str = FP4
    packs_scales: bool = False


OF_32, NVFP4 = "fp8_1x32_fp4_1x32", "fp8_1x128_nvfp4_1x16"
CASES = [
    Case("8x64x128 s4 swap", m=5),
    Case("8x64x128 s4 swap", spread=40, m=5, n=72),  # rows of the last tile that do not exist
    Case("16x128x128 s3 swap", d_dtype="fp32"),  # the second warpgroup of the last tile has no rows
    Case("16x64x128 s12 k4 swap", k=1104),
    Case("128x128x128 s4 swap", m=140),  # no chains
    Case("128x128x128 s4 swap", spread=40, m=140),
    Case("64x64x128 s4 k2", m=70),  # in shared memory
    Case("128x128x128 s4", m=140, n=328),  # the last tile has one packed tile of two
    Case("128x64x128 s4", spread=40, m=140),
    Case("256x128x128 s3", m=300, d_dtype="fp32"),
    Case("", m=300),
    Case("", m=300, n=328, d_dtype="fp32"),
    Case("", spread=40, m=140),
    Case("16x128x128 s4 swap", kind="masked"),
    Case("128x128x128 s4 swap", spread=40, kind="psum"),
    Case("8x64x128 s4 swap", m=5, recipe=OF_32),
    Case("64x128x128 s4 swap", m=70, recipe=OF_32, packs_scales=True),
    Case("32x128x128 s4 swap", spread=40, kind="psum", recipe=OF_32),
    Case("16x64x128 s4 swap", k=432, recipe=NVFP4),  # rows of codes that start at odd multiples of 8 bytes
    Case("64x128x128 s4 swap", kind="masked", recipe=NVFP4),
    Case("16x128x128 s4 swap", kind="psum", recipe=NVFP4),
]


def run(case: Case) -> None:
    """Call it and compare with the reference.

    Raises:
        AssertionError: the result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    groups = 1 if case.kind == "dense" else 3
    packed = torch.randint(-128, 128, (groups, case.n, case.k // 2), generator=generator, dtype=torch.int8)
    traits = recipe_traits(case.recipe)
    exponents = torch.randint(
        100, 101 + case.spread, (groups, case.n, -(-case.k // traits.fp4_group)), generator=generator
    ).to(torch.uint8)
    weights: tuple[torch.Tensor, ...] = packed, exponents
    if case.recipe == NVFP4:
        weights = packed, exponents.view(torch.float8_e4m3fn), torch.rand((groups, case.n), generator=generator)
    x = torch.randn(groups * case.m, case.k, generator=generator)
    a, scales = jitgemm.per_token_cast_to_fp8(x, case.packs_scales, traits.a_group)
    given = jitgemm.per_token_cast_to_fp8(x, True, traits.a_group, True)[1] if case.packs_scales else scales
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.d_dtype]
    d = torch.full((groups * case.m, case.n), float("nan"), dtype=dtype, device="cuda")
    prepared = jitgemm.prepare_fp4_weights(*(part.cuda() for part in weights))
    operands: Any = ((a.cuda(), given.cuda()), prepared)
    chosen: dict[str, Any] = {"config": case.config} if case.config else {"expand_fp4": True}
    with settings.override(**chosen, mk_alignment=4):
        if case.kind == "dense":
            one = operands[1]._replace(data=operands[1].data[0], units=operands[1].units[0])
            jitgemm.fp8_fp4_gemm_nt(operands[0], one, d)
        elif case.kind == "masked":
            stacked = (operands[0][0].view(groups, case.m, -1), operands[0][1].view(groups, case.m, -1))
            counts = torch.full((groups,), case.m, dtype=torch.int32, device="cuda")
            jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(stacked, operands[1], d.view(groups, case.m, -1), counts, case.m)
        else:
            ends = torch.arange(1, groups + 1, dtype=torch.int32, device="cuda") * case.m
            jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(*operands, d, ends, use_psum_layout=True)
    torch.cuda.synchronize()
    for group in range(groups):
        rows = slice(group * case.m, (group + 1) * case.m)
        of_group = [part[group] for part in weights]
        plain = dequantize_nvfp4(*of_group) if case.recipe == NVFP4 else dequantize_fp4(*of_group)
        expected = gemm(a[rows], plain, a_scales=scales[rows], recipe=case.recipe, d_dtype=case.d_dtype)
        check_close(d[rows].cpu(), expected, recipe=case.recipe, d_dtype=case.d_dtype)


def main() -> int:
    """Run all cases; the exit code."""
    if not torch.cuda.is_available():
        print("no GPU", file=sys.stderr)
        return 3
    failed = 0
    for index, case in enumerate(CASES):
        start = time.perf_counter()
        try:
            run(case)
            outcome = "ok"
        except Exception as error:
            outcome, failed = f"FAILED: {error}", failed + 1
        print(f"{index + 1:2d}/{len(CASES)} {time.perf_counter() - start:6.2f} s  {case}  {outcome}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
