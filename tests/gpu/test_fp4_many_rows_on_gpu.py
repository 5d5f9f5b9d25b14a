"""FP4 weights that calls expand in memory first, on a GPU: bit for bit where sums have one term, or against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_epilogue_on_gpu import Case, full_epilogue
from test_fp4_on_gpu import DEVICE, DTYPES, FAR, NEAR, activations, weights
from torch import Tensor

import jitgemm
from benchmarks.operands import Embedded, poisoned, same_bits
from jitgemm import settings
from jitgemm.device import Device
from jitgemm.families.gemm import FP4, GemmConfig, GemmProblem
from jitgemm.heuristics import expansion, gemm
from jitgemm.ops import gemm as ops
from jitgemm.plan import device_facts
from jitgemm.reference import fp4
from jitgemm.reference import gemm as reference
from jitgemm.reference.gemm import check_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

FAR_CONFIG = "128x128x128 s8 swap"


def products(d_dtype: str) -> list[GemmConfig]:
    """All tiles that products of expanded weights choose from."""
    problem = expansion.expanded(GemmProblem(4096, 4096, FP4, None, "nt", d_dtype))
    return [c for c in gemm.candidates(problem, ()) if gemm.illegal(problem, c, device_facts(0)[0]) is None]


@pytest.mark.parametrize("window", [NEAR, FAR, (0, 26), (228, 254)], ids=str)
def test_rows_of_the_identity_pick_weights_bit_for_bit(window: tuple[int, int]) -> None:
    """Every element of D is one weight, wherever it is: a wrong place, code or scale shows."""
    n, k = 200, 416
    packed, exponents = weights(n, k, window=window)
    packed[:2].view(-1)[:256] = torch.arange(256, device=DEVICE).to(torch.uint8).view(torch.int8)  # all pairs of codes
    a = torch.eye(k, device=DEVICE).to(torch.float8_e4m3fn)
    scales = jitgemm.get_mn_major_tma_aligned_tensor(torch.ones((k, -(-k // 128)), device=DEVICE))
    prepared, d = jitgemm.prepare_fp4_weights(packed, exponents), poisoned((k, n), torch.float32, DEVICE)
    with settings.override(expand_fp4=True):
        jitgemm.fp8_fp4_gemm_nt((a, scales), prepared, d)
    assert torch.equal(d.mT, fp4.dequantize_fp4(packed, exponents).float())


@pytest.mark.parametrize("d_dtype", DTYPES)
def test_every_tile(d_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[GemmConfig] = []

    def forced(problem: GemmProblem, device: Device, in_force: settings.Settings) -> expansion.Expansion:
        return expansion.Expansion(chosen[-1], GemmConfig.from_text(FAR_CONFIG), 0.0, 0.0, 0)

    monkeypatch.setattr(ops, "expansion", forced)
    for m, n, k in ((300, 328, 1312), (131, 72, 160), (520, 776, 384)):
        a, b = activations(m, k), weights(n, k)
        prepared, plain = jitgemm.prepare_fp4_weights(*b), fp4.dequantize_fp4(*b)
        expected = reference.gemm(a[0], plain, a_scales=a[1], recipe=FP4, d_dtype=d_dtype)
        for index, config in enumerate(products(d_dtype)):
            chosen.append(config)
            ops.forget_plans()
            d = Embedded((m, n), DTYPES[d_dtype], DEVICE, (8, 8) if index % 3 else (3, 2))
            jitgemm.fp8_fp4_gemm_nt(a, prepared, d.view)
            check_close(d.view, expected, recipe=FP4, d_dtype=d_dtype, what=f"{config} of {m}x{n}x{k}")
            assert d.intact(), str(config)
    ops.forget_plans()


@pytest.mark.parametrize("far_row", [0, 127, 199], ids=str)
def test_one_row_that_cannot_be_expanded(far_row: int) -> None:
    """All is then computed by the kernel with packed weights: the same bits."""
    m, n, k = 200, 200, 1024
    packed, exponents = weights(n, k)
    packed[far_row] |= 1  # no groups of zeros
    exponents[far_row, 3], exponents[far_row, 5] = 90, 130
    prepared, a = jitgemm.prepare_fp4_weights(packed, exponents), activations(m, k)
    assert int((prepared.units < 0).sum()) == min(64, n - far_row // 64 * 64)
    found, alone = (poisoned((m, n), torch.bfloat16, DEVICE) for _ in range(2))
    with settings.override(expand_fp4=True):
        jitgemm.fp8_fp4_gemm_nt(a, prepared, found)
    with settings.override(config=FAR_CONFIG):
        jitgemm.fp8_fp4_gemm_nt(a, prepared, alone)
    assert same_bits(found, alone)
    expected = reference.gemm(a[0], fp4.dequantize_fp4(packed, exponents), a_scales=a[1], recipe=FP4)
    check_close(found, expected, recipe=FP4, d_dtype="bf16")


def test_nan_scales_reach_their_columns_alone() -> None:
    for window in (NEAR, FAR):
        packed, exponents = weights(200, 256, window=window)
        exponents[64, 1], exponents[70, 7] = 255, 255
        a, d = activations(5, 256), poisoned((5, 200), torch.bfloat16, DEVICE)
        with settings.override(expand_fp4=True):
            jitgemm.fp8_fp4_gemm_nt(a, (packed, exponents), d)
        assert d.isnan().all(0).nonzero().flatten().tolist() == [64, 70] and int(d.isnan().sum()) == 10


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32", "e4m3", "e4m3_ue8m0"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_epilogues(swiglu: bool, d_dtype: str) -> None:
    n = 720 if swiglu else 456
    case = Case(None, FP4, full_epilogue(None, n, swiglu), d_dtype, n, 400)
    with settings.override(expand_fp4=True):
        case.call()
    case.check()


def test_calls_choose_for_themselves() -> None:
    """Sizes that expand and sizes that don't, in turn, with the same weights; scales as they are loaded, and others."""
    n, k = 2112, 2048
    b = weights(n, k)
    prepared, plain = jitgemm.prepare_fp4_weights(*b), fp4.dequantize_fp4(*b)
    device = device_facts(0)[0]
    ms = (8, 3000, 8, 2777, 4096, 64, 3000)
    assert [expansion.expansion(GemmProblem(n, k, FP4, m), device) is not None for m in ms] == [m > 2000 for m in ms]
    for m in ms:
        a, d = activations(m, k), poisoned((m, n), torch.bfloat16, DEVICE)
        expected = reference.gemm(a[0], plain, a_scales=a[1], recipe=FP4)
        for scales in (a[1], a[1].contiguous()):
            d.fill_(float("nan"))
            jitgemm.fp8_fp4_gemm_nt((a[0], scales), prepared, d)
            check_close(d, expected, recipe=FP4, d_dtype="bf16", what=f"m = {m}")
    c = torch.randn(3000, n, device=DEVICE).bfloat16()
    a, d = activations(3000, k), c.clone()
    expected = reference.gemm(a[0], plain, c, a_scales=a[1], recipe=FP4)
    jitgemm.fp8_fp4_gemm_nt(a, prepared, d, d)
    check_close(d, expected, recipe=FP4, d_dtype="bf16", what="accumulated")


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("window", [NEAR, FAR], ids=["near", "far"])
def test_captured_and_repeated(window: tuple[int, int], pdl: bool) -> None:
    a, b = activations(600, 2048), weights(512, 2048, window=window)
    prepared, d = jitgemm.prepare_fp4_weights(*b), poisoned((600, 512), torch.bfloat16, DEVICE)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with settings.override(expand_fp4=True, pdl=pdl):
        jitgemm.fp8_fp4_gemm_nt(a, prepared, d)
        first = d.clone()
        with torch.cuda.stream(stream):
            jitgemm.fp8_fp4_gemm_nt(a, prepared, d)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                jitgemm.fp8_fp4_gemm_nt(a, prepared, d)
                jitgemm.fp8_fp4_gemm_nt(a, prepared, d)  # whose workspace may be that of the first
    for _ in range(50):
        d.fill_(float("nan"))
        graph.replay()
        assert same_bits(d, first)


def test_streams_have_workspaces_of_their_own() -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    cases = []
    for seed in range(3):
        a, b = activations(1024, 2048, seed), weights(1024, 2048, seed=seed)
        d = poisoned((1024, 1024), torch.bfloat16, DEVICE)
        cases.append((a, jitgemm.prepare_fp4_weights(*b), d, torch.empty_like(d)))
    with settings.override(expand_fp4=True):
        for a, prepared, _, alone in cases:
            jitgemm.fp8_fp4_gemm_nt(a, prepared, alone)
        torch.cuda.synchronize()
        for _ in range(20):
            for stream, (a, prepared, d, _) in zip(streams, cases, strict=True):
                with torch.cuda.stream(stream):
                    jitgemm.fp8_fp4_gemm_nt(a, prepared, d)
    torch.cuda.synchronize()
    for _, _, d, alone in cases:
        assert same_bits(d, alone)


def test_under_torch_compile() -> None:
    a, b = activations(300, 512), weights(256, 512)

    def call(data: Tensor, scales: Tensor, packed: Tensor, exponents: Tensor) -> Any:
        d = torch.empty((300, 256), dtype=torch.bfloat16, device=DEVICE)
        jitgemm.fp8_fp4_gemm_nt((data, scales), jitgemm.prepare_fp4_weights(packed, exponents), d)
        return d

    with settings.override(expand_fp4=True):
        assert same_bits(torch.compile(call, fullgraph=True)(*a, *b), call(*a, *b))
