"""Every feature of the kernels once, on small problems, for the tools that watch memory. Not collected by pytest. ::

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py

(Without that option memcheck also counts the entry points that cuda-bindings and torch ask older drivers for.)

Operands are made, and results checked, on the CPU, so that little else runs under the tool; kernels are compiled ahead,
in parallel; torch's allocator does not cache, so that what lies beside a tensor is nobody's. Exit code 1 if a result is
wrong or a kernel fails to compile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import jitgemm
from benchmarks.harness import build_all
from benchmarks.operands import quantize, random_matrix
from jitgemm import settings
from jitgemm.device import H200
from jitgemm.families import gemm, grouped
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
from jitgemm.heuristics import gemm as gemm_heuristics
from jitgemm.heuristics import grouped as grouped_heuristics
from jitgemm.reference import grouped as reference
from jitgemm.reference.gemm import D_DTYPES, check_close

DEEPSEEK, GROUPS, ROWWISE, TENSORWISE = "fp8_1x128_128x128", "fp8_1x128_1x128", "fp8_rowwise", "fp8_tensorwise"


@dataclass(frozen=True)
class Case:
    """One call; ``tile`` is tile_m x tile_n, the rest as the settings are called."""

    recipe: str
    tile: tuple[int, int]
    layout: str = "nt"
    d_dtype: str = "bf16"
    cluster: tuple[int, int] = (1, 1)
    split_k: int = 1
    swap_ab: bool = False
    fast_accum: bool = False
    c: str = "none"
    d_padding: int = 0  # elements after each row of D; odd ones keep TMA from storing it
    m: int = 200
    n: int = 232
    k: int = 400

    @property
    def problem(self) -> GemmProblem:
        """The problem that is asked."""
        return GemmProblem(self.n, self.k, self.recipe, self.m, self.layout, self.d_dtype, self.fast_accum)

    def config(self) -> GemmConfig:
        """The config that runs: the best of those with the case's values."""
        forced = {"tile_m": self.tile[0], "tile_n": self.tile[1], "cluster": self.cluster, "split_k": self.split_k}
        with settings.override(**forced, swap_ab=self.swap_ab):
            return gemm_heuristics.choose_config(self.problem, H200)


CASES = [
    Case(DEEPSEEK, (192, 128), m=300, n=264),  # three warpgroups
    Case(DEEPSEEK, (256, 128), m=300, k=1100),  # two waves; the main loop is unrolled
    Case(DEEPSEEK, (256, 64), d_dtype="fp32", c="in_place"),
    Case(DEEPSEEK, (128, 64), k=1100, m=100),  # MMAs overlap with promotion
    Case(DEEPSEEK, (128, 192), c="given"),  # they do not
    Case(DEEPSEEK, (128, 72), d_padding=1),  # columns straddle scale blocks
    Case(DEEPSEEK, (64, 32), split_k=5, m=60, k=1100),  # one math warpgroup
    Case(DEEPSEEK, (128, 64), split_k=2, c="given"),
    Case(DEEPSEEK, (64, 128), split_k=8, k=1024, m=64, n=128),
    Case(DEEPSEEK, (128, 64), cluster=(2, 1), m=256),
    Case(DEEPSEEK, (128, 64), cluster=(1, 2), n=120),  # a block without a tile
    Case(DEEPSEEK, (32, 64), swap_ab=True, m=33),
    Case(DEEPSEEK, (16, 64), swap_ab=True, split_k=3, m=13, k=1100, d_dtype="fp32"),
    Case(DEEPSEEK, (16, 128), swap_ab=True, cluster=(1, 2), m=30, d_padding=3, c="given"),
    Case(DEEPSEEK, (32, 64), swap_ab=True, cluster=(2, 1), m=60),
    Case(GROUPS, (128, 64), k=1100),
    Case(GROUPS, (64, 128), swap_ab=True, n=130, k=130),
    Case(ROWWISE, (128, 64), c="in_place"),
    Case(ROWWISE, (128, 128), fast_accum=True, n=201),
    Case(TENSORWISE, (16, 64), swap_ab=True, m=5),
    Case("bf16", (256, 192)),
    Case("bf16", (192, 64), d_dtype="fp32"),
    Case("bf16", (128, 128), c="given"),
    Case("bf16", (128, 64), layout="nn", cluster=(1, 2)),
    Case("bf16", (128, 64), layout="tn", cluster=(2, 1), d_padding=1),
    Case("bf16", (64, 40), layout="tt", split_k=2),
    Case("bf16", (32, 64), layout="tt", swap_ab=True),
]


EXPECTED_M = 20


@dataclass(frozen=True)
class GroupedCase:
    """One call of a grouped GEMM; ``counts`` are the groups' rows, masked ones of at most ``max_m``."""

    kind: str  # of families.grouped.GROUPINGS
    recipe: str
    tile: tuple[int, int]
    counts: tuple[int, ...] = (3, 0, 70, 130, 64)
    swap_ab: bool = False
    alignment: int = 128
    layout: str = "nt"
    d_dtype: str = "bf16"
    d_padding: int = 0  # elements after each row of D; odd ones keep TMA from storing it
    zero_padding: bool = True
    max_m: int = 130
    n: int = 232
    k: int = 400

    @property
    def problem(self) -> GroupedProblem:
        """The problem that is asked."""
        groups, layout = len(self.counts), (self.layout, self.d_dtype, self.alignment)
        return GroupedProblem(self.n, self.k, self.recipe, groups, self.kind, EXPECTED_M, *layout)

    def config(self) -> GemmConfig:
        """The config that runs: the best of those with the case's values."""
        with settings.override(tile_m=self.tile[0], tile_n=self.tile[1], swap_ab=self.swap_ab):
            return grouped_heuristics.choose_config(self.problem, H200)


GROUPED_CASES = [
    GroupedCase("masked", DEEPSEEK, (8, 64), swap_ab=True),
    GroupedCase("masked", DEEPSEEK, (160, 128), swap_ab=True, counts=(3, 0, 170), max_m=200),
    GroupedCase("masked", DEEPSEEK, (64, 128), counts=(0, 1, 130, 1000, -5), n=264),
    GroupedCase("masked", DEEPSEEK, (128, 64), d_padding=1, k=1104),  # a warpgroup without rows
    GroupedCase("masked", DEEPSEEK, (192, 128), d_dtype="fp32", counts=(3, 0, 130, 200), max_m=200),  # three warpgroups
    GroupedCase("masked", "bf16", (32, 128), swap_ab=True, d_dtype="fp32"),
    GroupedCase("masked", "bf16", (64, 64), counts=(0,) * 32 + (9, 50), max_m=50),  # more groups than a window has
    GroupedCase("psum", DEEPSEEK, (128, 128)),
    GroupedCase("psum", DEEPSEEK, (64, 64), alignment=1, d_padding=3),  # scales that start within 16 bytes
    GroupedCase("psum", DEEPSEEK, (24, 64), alignment=2, swap_ab=True, zero_padding=False),
    GroupedCase("psum", "bf16", (256, 64), alignment=8, counts=(3, 0, 300, 0, 64), layout="nn"),
    GroupedCase("contiguous", DEEPSEEK, (256, 64), alignment=256, counts=(3, 0, 300, 64)),
    GroupedCase("contiguous", DEEPSEEK, (16, 64), alignment=1, swap_ab=True),
    GroupedCase("contiguous", "bf16", (64, 128), layout="nn", swap_ab=True, alignment=16, d_padding=1),
    GroupedCase("contiguous", "bf16", (64, 128), counts=(0, 0, 0)),  # nothing but padding
]


def run_grouped(case: GroupedCase) -> None:
    """Call and compare.

    Raises:
        AssertionError: the result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    groups, n, k, masked = len(case.counts), case.n, case.k, case.kind == "masked"
    ends, index = [], []
    for group, count in enumerate(case.counts):
        index += [] if masked else [-1] * (-len(index) % case.alignment) + [group] * count
        ends.append(len(index) if count else (ends or [0])[-1])
    index += [-1] * (-len(index) % case.alignment + 40)
    rows = groups * case.max_m if masked else len(index)
    values = {"masked": list(case.counts), "psum": ends, "contiguous": index}[case.kind]
    grouped_layout = torch.tensor(values, dtype=torch.int32)

    parts = [
        quantize(case.recipe, random_matrix(1 if group else rows, k, generator), random_matrix(n, k, generator))
        for group in range(groups)
    ]
    stacked = (groups, case.max_m) if masked else (rows,)
    a, b = parts[0].a.view(*stacked, k), _stack([part.b for part in parts])
    fp8 = parts[0].a_scales is not None
    a_scales = parts[0].a_scales.view(*stacked, -1) if parts[0].a_scales is not None else None
    b_scales = torch.stack([part.b_scales for part in parts if part.b_scales is not None]) if fp8 else None

    dtype = D_DTYPES[case.d_dtype]
    before = torch.full((*stacked, n), 7.0, dtype=dtype)
    expected = before.clone()
    scales = {"a_scales": a_scales, "b_scales": b_scales, "recipe": case.recipe}
    if masked:
        reference.m_grouped_masked(a, b, expected, grouped_layout, **scales)
    else:
        layouts = {
            "use_psum_layout": case.kind == "psum",
            "alignment": case.alignment,
            "zero_padding": case.zero_padding,
        }
        reference.m_grouped_contiguous(a, b, expected, grouped_layout, **scales, **layouts)

    d = torch.full((*stacked, n + case.d_padding), 7.0, dtype=dtype).cuda()[..., :n]
    a_given: Any = a.cuda() if a_scales is None else (a.cuda(), a_scales.cuda())
    weights = (b.transpose(1, 2).contiguous() if case.layout == "nn" else b).cuda()
    b_given: Any = weights if b_scales is None else (weights, b_scales.cuda())
    name = f"m_grouped_{'fp8' if fp8 else 'bf16'}_gemm_{case.layout}_{'masked' if masked else 'contiguous'}"
    with settings.override(config=str(case.config()), mk_alignment=case.alignment):
        if masked:
            getattr(jitgemm, name)(a_given, b_given, d, grouped_layout.cuda(), EXPECTED_M)
        else:
            more = {"use_psum_layout": case.kind == "psum", "ensure_zero_padding": case.zero_padding}
            getattr(jitgemm, name)(a_given, b_given, d, grouped_layout.cuda(), **more)
    torch.cuda.synchronize()
    check_close(d.cpu().reshape(-1, n), expected.reshape(-1, n), recipe=case.recipe, d_dtype=case.d_dtype)


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)


def run(case: Case) -> None:
    """Call and compare.

    Raises:
        AssertionError: the result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    m, n, k = case.m, case.n, case.k
    x = quantize(case.recipe, random_matrix(m, k, generator), random_matrix(n, k, generator))
    dtype = D_DTYPES[case.d_dtype]
    c = None if case.c == "none" else torch.randn((m, n), generator=generator).to(dtype)
    expected = x.product(case.d_dtype, c=c)

    d = torch.full((m, n + case.d_padding), float("nan"), dtype=dtype).cuda()[:, :n]
    c_on_gpu = None if c is None else c.cuda()
    if case.c == "in_place":
        d, c_on_gpu = c_on_gpu, c_on_gpu
    assert d is not None
    a, b = stored(x.a, case.layout[0] == "t"), stored(x.b, case.layout[1] == "n")
    with settings.override(config=str(case.config())):
        if x.a_scales is None or x.b_scales is None:
            getattr(jitgemm, f"bf16_gemm_{case.layout}")(a, b, d, c_on_gpu)
        else:
            scaled = (a, x.a_scales.cuda()), (b, x.b_scales.cuda())
            jitgemm.fp8_gemm_nt(*scaled, d, c_on_gpu, recipe=case.recipe, fast_accum=case.fast_accum)
    torch.cuda.synchronize()
    check_close(d.cpu(), expected, recipe=case.recipe, d_dtype=case.d_dtype, fast_accum=case.fast_accum)


def small_kernels() -> int:
    """Row-wise kernels, casts, packed scales, on sizes that end within chunks, groups or tiles; how many are wrong."""
    table, failed = jitgemm.rope_cos_sin(8), 0
    calls: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "act_quant": (lambda x: jitgemm.act_quant(x, 64, "ue8m0", torch.int32), (torch.randn(7, 448),)),
        "per_token": (lambda x: jitgemm.per_token_cast_to_fp8(x, True, 128, True), (torch.randn(3, 203),)),
        "per_block": (jitgemm.per_block_cast_to_fp8, (torch.randn(131, 203),)),
        "per_channel": (jitgemm.per_channel_cast_to_fp8, (torch.randn(131, 203),)),
        "fp4": (jitgemm.fp4_act_quant, (torch.randn(5, 96),)),
        "nvfp4": (jitgemm.nvfp4_act_quant, (torch.randn(5, 80),)),
        "rms_norm": (jitgemm.rms_norm, (torch.randn(3, 777), torch.randn(777))),
        "wide rms_norm": (jitgemm.rms_norm_act_quant, (torch.randn(3, 7168), torch.randn(7168))),
        "packed scales": (jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor, (torch.rand(2, 131, 9),)),
        "packed scales of groups": (
            lambda sf, ks: jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ks, [128, 0, 1152], 128),
            (torch.rand(10, 131), torch.tensor([128, 0, 1152], dtype=torch.int32)),
        ),
        "rope": (jitgemm.head_norm_rope, (torch.randn(3, 5, 136), torch.tensor([0, 7, 8]), table)),
    }
    for name, (call, tensors) in calls.items():
        results, expected = call(*(t.cuda() for t in tensors)), call(*tensors)
        pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (results, expected)), strict=True)
        same = all(torch.equal(a.cpu().float().nan_to_num(7), b.float().nan_to_num(7)) for a, b in pairs)
        failed += not same
        print(f"{name}  {'ok' if same else 'FAILED'}", flush=True)
    return failed


def stored(x: Tensor, transposed: bool) -> Tensor:
    """A matrix on the GPU, its rows padded to 16 bytes and no further."""
    x = x.t() if transposed else x
    unit = 16 // x.element_size()
    width = -(-x.shape[1] // unit) * unit
    padded = torch.zeros((x.shape[0], width * x.element_size()), dtype=torch.uint8).view(x.dtype)
    padded[:, : x.shape[1]].view(torch.uint8).copy_(x.contiguous().view(torch.uint8))
    return padded.cuda()[:, : x.shape[1]]


def main() -> int:
    """Run all cases; the exit code."""
    if not torch.cuda.is_available():
        print("no GPU", file=sys.stderr)
        return 3
    dense = [gemm.FAMILY.spec(case.problem, case.config(), H200.arch.name) for case in CASES]
    groups = [grouped.FAMILY.spec(case.problem, case.config(), H200.arch.name) for case in GROUPED_CASES]
    failed = len(build_all([*dense, *groups, TRANSPOSE_SCALES.spec(H200.arch.name)], min(16, os.cpu_count() or 1)))
    cases: list[Case | GroupedCase] = [*CASES, *GROUPED_CASES]
    for index, case in enumerate(cases):
        start = time.perf_counter()
        try:
            if isinstance(case, GroupedCase):
                run_grouped(case)
            else:
                run(case)
            outcome = "ok"
        except Exception as error:
            outcome, failed = f"FAILED: {error}", failed + 1
        print(f"{index + 1:2d}/{len(cases)} {time.perf_counter() - start:6.2f} s  {case}  {outcome}", flush=True)
    for shape in ((1, 1), (33, 31), (3, 65, 5)):
        sf = torch.randn(shape)
        same = torch.equal(jitgemm.get_mn_major_tma_aligned_tensor(sf.cuda()).cpu(), sf)
        failed += not same
        print(f"transpose_scales {shape}  {'ok' if same else 'FAILED'}", flush=True)
    failed += small_kernels()
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
