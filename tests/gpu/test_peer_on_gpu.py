"""What code written for DeepGEMM meets on a GPU: kernels' names in profiles, sizes of zero, packed scales.

The names are parts of kernels' names; where one is to be timed alone, it must be in one kernel's only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import settings
from jitgemm.reference import layout as reference
from jitgemm.testing import bench_kineto

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

M, N, K, GROUPS = 256, 256, 512, 4
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def default_settings() -> Iterator[None]:
    yield
    settings.reload()


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(BF16)


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    """E4M3, with a scale for 128 of K in row-major order: kernels load a copy in another."""
    values, scales = jitgemm.per_token_cast_to_fp8(bf16(*shape).flatten(0, -2))
    return values.view(shape), scales.view(*shape[:-1], -1)


def blocks(*shape: int) -> tuple[Tensor, Tensor]:
    values, scales = jitgemm.per_block_cast_to_fp8(bf16(*shape).flatten(0, -2))
    leading = shape[:-2]
    return values.view(shape), scales.view(*leading, -1, scales.shape[1])


def out(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


Calls = dict[str, tuple[tuple[str, ...], Callable[[], Callable[[], object]]]]
CALLS: Calls = {}
"""What is searched for, and what makes the call's operands and returns it."""


def call(*searched: str) -> Callable[[Callable[[], Callable[[], object]]], None]:
    def register(make: Callable[[], Callable[[], object]]) -> None:
        CALLS[make.__name__] = searched, make

    return register


@call("fp8_gemm", "gemm_")
def fp8() -> Callable[[], object]:
    a, b, d = rows(M, K), blocks(N, K), out(M, N)
    return lambda: jitgemm.fp8_fp4_gemm_nt(a, b, d, disable_ue8m0_cast=True)


@call("fp8_gemm", "gemm_")
def fp8_gradient_of_weights() -> Callable[[], object]:
    a, b, d = rows(M, K), rows(N, K), out(M, N, dtype=torch.float32)
    return lambda: jitgemm.fp8_gemm_nt(a, b, d, c=d, recipe=(1, 1, 128))


@call("bf16_gemm")
def bf16_rows_and_columns() -> Callable[[], object]:
    a, b, d = bf16(K, M).T, bf16(K, N).T, out(M, N, dtype=torch.float32)
    return lambda: jitgemm.bf16_gemm_nt(a, b, d, c=d)


@call("fp8_gemm", "gemm_")
def fp8_contiguous() -> Callable[[], object]:
    a, b, d = rows(M, K), blocks(GROUPS, N, K), out(M, N)
    index = torch.arange(M, device="cuda", dtype=torch.int32) // (M // 2)
    return lambda: jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(a, b, d, index, ensure_zero_padding=False)


@call("bf16_gemm")
def bf16_psum() -> Callable[[], object]:
    a, b, d, ends = bf16(1024, K), bf16(GROUPS, N, K), out(1024, N), ints(100, 128, 300, 512)
    return lambda: jitgemm.m_grouped_bf16_gemm_nt_contiguous(
        a, b, d, ends, use_psum_layout=True, expected_m_for_psum_layout=100
    )


@call("fp8_gemm", "gemm_")
def fp8_masked() -> Callable[[], object]:
    a, b, d, counts = rows(GROUPS, M, K), blocks(GROUPS, N, K), out(GROUPS, M, N), ints(0, 20, 200, 256)
    return lambda: jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, b, d, counts, 120)


@call("bf16_gemm")
def bf16_along_k() -> Callable[[], object]:
    ks = [128, 0, 384]
    a, b, d = bf16(sum(ks), M), bf16(sum(ks), N), out(3, M, N, dtype=torch.float32)
    return lambda: jitgemm.k_grouped_bf16_gemm_tn_contiguous(a, b, d, ks, ints(*ks), d)


@call("fp8_gemm", "gemm_")
def fp8_along_k() -> Callable[[], object]:
    ks = [128, 0, 384]
    a, b, d = rows(M, sum(ks)), rows(N, sum(ks)), out(3, M, N, dtype=torch.float32)
    return lambda: jitgemm.k_grouped_fp8_gemm_nt_contiguous(
        *((x.flatten(), scales) for x, scales in (a, b)), d, ks, ints(*ks), d, recipe=(1, 1, 128)
    )


@call("gemm")
def heads() -> Callable[[], object]:
    x, y, z = bf16(32, 8, K), bf16(8, N, K + 128)[:, :, :K], out(32, 8, N)
    return lambda: jitgemm.einsum("bhr,hdr->bhd", x, y, z)


@call("gemm_")
def fp8_heads() -> Callable[[], object]:
    x, y, z = rows(32, 8, K), blocks(8, N, K), out(32, 8, N)
    return lambda: jitgemm.fp8_einsum("bhr,hdr->bhd", x, y, z)


@call("bmn_bnk_mn_gemm_impl")
def sum_of_batches() -> Callable[[], object]:
    a, b, d = bf16(129, 128, 128), bf16(129, 384, 128), out(128, 384, dtype=torch.float32)
    return lambda: jitgemm.einsum("bmk,bnk->mn", a, b, d, c=d)


@call("gemm_")
def around_a_hole() -> Callable[[], object]:
    a, b, d = rows(M, K), blocks(N, K), out(M, N + 64)
    return lambda: jitgemm.fp8_gemm_nt_skip_head_mid(a, b, d, (128, 64, 128))


@call("transpose")
def scales() -> Callable[[], object]:
    sf = torch.rand(4097, 56, device="cuda")
    return lambda: jitgemm.get_mn_major_tma_aligned_tensor(sf)


@call("pack_fp32_into_ue8m0")
def packed_scales() -> Callable[[], object]:
    sf = torch.rand(2, 4097, 57, device="cuda")
    return lambda: jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)


@call("pack_fp32_into_ue8m0")
def packed_scales_of_groups() -> Callable[[], object]:
    ks = [1280, 256, 128]
    sf, layout = torch.rand(13, 4096, device="cuda"), ints(*ks)
    return lambda: jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, layout, ks, 128, 128)


@call("tf32_hc_prenorm_gemm")
def prenorm() -> Callable[[], object]:
    a, fn, d, squares = bf16(137, 7168), torch.randn(24, 7168, device="cuda"), out(16, 137, 24).float(), out(16, 137)
    squares = squares.float()
    return lambda: jitgemm.tf32_hc_prenorm_gemm(a, fn, d, squares, num_splits=16)


@pytest.mark.parametrize("name", CALLS)
def test_one_kernel_has_the_name(name: str) -> None:
    searched, make = CALLS[name]
    times = bench_kineto(make(), searched, num_tests=2, suppress_kineto_output=True)  # two kernels: an AssertionError
    assert isinstance(times, tuple) and all(0 < time < 1 for time in times)


@pytest.mark.parametrize("m", [1, 128])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_kernels_of_cublas_are_found(m: int, dtype: torch.dtype) -> None:
    a, b, d = bf16(m, 7168), bf16(2112, 7168), out(m, 2112, dtype=dtype)
    times = bench_kineto(
        lambda: jitgemm.cublaslt_gemm_nt(a, b, d), ("nvjet", "gemv", "gemm"), num_tests=2, suppress_kineto_output=True
    )
    assert isinstance(times, tuple) and sum(times) > 0


@pytest.mark.parametrize("with_c", ["no c", "c", "c is d"])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 40, 64), (5, 0, 64), (5, 40, 0), (0, 0, 0)])
def test_sizes_of_zero(m: int, n: int, k: int, with_c: str) -> None:
    a_scales = torch.ones(m, -(-k // 128), device="cuda")
    b_scales = torch.ones(-(-n // 128), -(-k // 128), device="cuda")
    a, b = out(m, k), out(n, k)
    for fp8 in (False, True):
        d = torch.randn(m, n, device="cuda")
        c = {"no c": None, "c": torch.randn_like(d), "c is d": d}[with_c]
        expected = torch.zeros_like(d) if c is None else c.clone()
        if fp8:
            e4m3 = torch.float8_e4m3fn
            jitgemm.fp8_gemm_nt((a.to(e4m3), a_scales), (b.to(e4m3), b_scales), d, c)
        else:
            jitgemm.bf16_gemm_nt(a, b, d, c)
        assert torch.equal(d, expected)


def bits(*shape: int) -> Tensor:
    """fp32 of any bits."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device="cuda").int().view(torch.float32)


@pytest.mark.parametrize("shape", [(4097, 57), (4, 4096, 1), (3, 129, 6), (1, 1)])
@pytest.mark.parametrize("k_major", [True, False])
@pytest.mark.parametrize("pdl", [False, True])
def test_packed_planes(shape: tuple[int, ...], k_major: bool, pdl: bool) -> None:
    sf = bits(*shape) if k_major else bits(*shape[:-2], shape[-1], shape[-2]).mT
    with settings.override(pdl=pdl):
        packed = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    expected = reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf.cpu())
    assert torch.equal(packed.cpu(), expected) and packed.stride() == expected.stride()


@pytest.mark.parametrize("groups", [1, 128])
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("use_psum_layout", [False, True])
def test_packed_groups_also_in_a_graph(groups: int, gran_k: int, use_psum_layout: bool) -> None:
    generator = torch.Generator().manual_seed(groups)
    ks = (torch.randint(0, 9, (groups,), generator=generator) * 128).tolist()
    ends = torch.tensor(ks).cumsum(0).tolist()
    blocks = [-(-k // gran_k) for k in ks]
    sf, layout = bits(sum(blocks), 4095), ints(*(ends if use_psum_layout else ks))

    def pack() -> Tensor:
        return jitgemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
            sf, layout, ks, gran_k, 128, use_psum_layout
        )

    packed = pack()
    expected = reference.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf.cpu(), blocks)
    assert torch.equal(packed.cpu(), expected) and packed.stride() == expected.stride()
    if not use_psum_layout:  # which is read on the host
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = pack()
        sf.copy_(bits(*sf.shape))
        graph.replay()
        expected = reference.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf.cpu(), blocks)
        assert torch.equal(captured.cpu(), expected)
