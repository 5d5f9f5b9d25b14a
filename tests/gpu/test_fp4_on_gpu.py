"""GEMMs with FP4 weights on a GPU: bit for bit where sums have one term, else against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from benchmarks.operands import Embedded, poisoned, random_matrix, same_bits
from jitgemm import settings
from jitgemm.families.gemm import FP4, GemmConfig, GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics import gemm, grouped
from jitgemm.ops.fp4 import PreparedWeights
from jitgemm.plan import device_facts
from jitgemm.reference import fp4
from jitgemm.reference import gemm as reference
from jitgemm.reference import grouped as grouped_reference
from jitgemm.reference.gemm import check_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NEAR, FAR = (96, 122), (90, 130)
"""Exponents of scales that are expanded with the codes, and of scales that are not."""


def weights(*shape: int, window: tuple[int, int] = NEAR, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed codes, all of them, and exponents of ``[..., n, k]``."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    *lead, n, k = shape
    packed = torch.randint(-128, 128, (*lead, n, k // 2), generator=generator, dtype=torch.int8, device=DEVICE)
    exponents = torch.randint(window[0], window[1] + 1, (*lead, n, -(-k // 32)), generator=generator, device=DEVICE)
    return packed, exponents.to(torch.uint8)


def activations(m: int, k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """e4m3 and MN-major scales."""
    data, scales = jitgemm.per_token_cast_to_fp8(
        random_matrix(m, k, torch.Generator(DEVICE).manual_seed(seed), spread=True)
    )
    return data, jitgemm.get_mn_major_tma_aligned_tensor(scales)


def dense_configs() -> list[GemmConfig]:
    """All tiles that calls choose from, with and without split K."""
    device, problem = device_facts(0)[0], GemmProblem(4096, 4096, FP4)
    legal = [c for c in gemm.candidates(problem, ()) if gemm.illegal(problem, c, device) is None]
    return list({(c.tile_m, c.tile_n, c.swap_ab, c.split_k > 1): c for c in legal}.values())


def grouped_configs(kind: str, alignment: int = 128, d_dtype: str = "bf16") -> list[GemmConfig]:
    """All tiles that grouped calls choose from."""
    device = device_facts(0)[0]
    problem = GroupedProblem(4096, 4096, FP4, 8, kind, d_dtype=d_dtype, alignment=alignment)
    legal = [c for c in grouped.candidates(problem) if grouped.illegal(problem, c, device) is None]
    return list({(c.tile_m, c.tile_n, c.swap_ab): c for c in legal}.values())


def run(config: GemmConfig | None, *arguments: Any, **more: Any) -> None:
    if config is None:
        jitgemm.fp8_fp4_gemm_nt(*arguments, **more)
        return
    with settings.override(config=str(config)):
        jitgemm.fp8_fp4_gemm_nt(*arguments, **more)


IN_REGISTERS = ("8x64x128 s12 swap", "16x128x128 s12 swap", "128x128x128 s8 swap")
IN_SHARED_MEMORY = ("64x64x128 s12", "64x128x128 s8", "128x64x128 s8 k2", "128x128x128 s6", "256x128x128 s4")


@pytest.mark.parametrize("window", [NEAR, FAR, (0, 26), (10, 240), (228, 254)], ids=str)
@pytest.mark.parametrize("config", [*IN_REGISTERS, *IN_SHARED_MEMORY])
def test_rows_of_the_identity_pick_weights_bit_for_bit(config: str, window: tuple[int, int]) -> None:
    """Every element of D is one weight, wherever it is: a wrong place, code or scale shows."""
    n, k = 200, 416
    packed, exponents = weights(n, k, window=window)
    low = torch.arange(256, device=DEVICE).to(torch.uint8).view(torch.int8)
    packed[:2].view(-1)[:256] = low  # all pairs of codes
    a = torch.eye(k, device=DEVICE).to(torch.float8_e4m3fn)
    scales = jitgemm.get_mn_major_tma_aligned_tensor(torch.ones((k, -(-k // 128)), device=DEVICE))
    prepared, d = jitgemm.prepare_fp4_weights(packed, exponents), poisoned((k, n), torch.float32, DEVICE)
    assert bool((prepared.units < 0).any()) == (window in (FAR, (10, 240)))
    with settings.override(config=config):
        jitgemm.fp8_fp4_gemm_nt((a, scales), prepared, d)
    expected = fp4.dequantize_fp4(packed, exponents).float()
    assert torch.equal(d.mT, expected)


@pytest.mark.parametrize("d_dtype", DTYPES)
@pytest.mark.parametrize("window", [NEAR, FAR], ids=["near", "far"])
def test_every_tile(window: tuple[int, int], d_dtype: str) -> None:
    for m, n, k in ((67, 328, 1312), (131, 72, 160)):
        a, b = activations(m, k), weights(n, k, window=window)
        prepared, plain = jitgemm.prepare_fp4_weights(*b), fp4.dequantize_fp4(*b)
        c = torch.randn(m, n, device=DEVICE).to(DTYPES[d_dtype])
        products = {
            with_c: reference.gemm(a[0], plain, c if with_c else None, a_scales=a[1], recipe=FP4, d_dtype=d_dtype)
            for with_c in (False, True)
        }
        for index, config in enumerate(dense_configs()):
            if config.split_k > -(-k // 128):
                continue
            with_c = index % 2 == 1
            d = Embedded((m, n), DTYPES[d_dtype], DEVICE, (8, 8) if index % 3 else (3, 2))
            run(config, a, prepared, d.view, c if with_c else None)
            what = f"{config} of {m}x{n}x{k}"
            check_close(d.view, products[with_c], recipe=FP4, d_dtype=d_dtype, what=what)
            assert d.intact(), what


def test_choices_of_many_sizes() -> None:
    for m, n, k in (
        (1, 4096, 7168),
        (8, 576, 7168),
        (17, 2112, 7168),
        (64, 7168, 2048),
        (300, 1536, 1024),
        (7, 64, 32),
    ):
        for window in (NEAR, FAR):
            a, b = activations(m, k), weights(n, k, window=window)
            d = poisoned((m, n), torch.bfloat16, DEVICE)
            jitgemm.fp8_fp4_gemm_nt(a, jitgemm.prepare_fp4_weights(*b), d)
            expected = reference.gemm(a[0], fp4.dequantize_fp4(*b), a_scales=a[1], recipe=FP4)
            check_close(d, expected, recipe=FP4, d_dtype="bf16", what=f"{m}x{n}x{k}")


def test_preparing_on_the_gpu_and_on_the_cpu_is_the_same() -> None:
    packed, exponents = weights(3, 200, 416, window=FAR)
    exponents[1, 5, 3] = 255
    exponents[2, 70, 1] = 3
    here, there = (
        jitgemm.prepare_fp4_weights(packed, exponents),
        jitgemm.prepare_fp4_weights(packed.cpu(), exponents.cpu()),
    )
    assert torch.equal(here.data.cpu(), there.data) and same_bits(here.units.sign().cpu(), there.units.sign())
    assert torch.equal(here.units.cpu().view(torch.int32) & 1 << 31, there.units.view(torch.int32) & 1 << 31)
    codes, scales = jitgemm.restore_fp4_weights(here)
    again, scales_again = jitgemm.restore_fp4_weights(there)
    assert torch.equal(codes.cpu(), again) and torch.equal(scales.cpu(), scales_again)


def test_nan_scales_reach_their_columns_alone() -> None:
    for window in (NEAR, FAR):
        packed, exponents = weights(200, 256, window=window)
        exponents[64, 1], exponents[70, 7] = 255, 255
        a, d = activations(5, 256), poisoned((5, 200), torch.bfloat16, DEVICE)
        jitgemm.fp8_fp4_gemm_nt(a, (packed, exponents), d)
        nan = d.isnan().all(0).nonzero().flatten().tolist()
        assert nan == [64, 70] and int(d.isnan().sum()) == 10
        exponents[64, 1] = exponents[70, 7] = 120
        expected = reference.gemm(a[0], fp4.dequantize_fp4(packed, exponents), a_scales=a[1], recipe=FP4)
        kept = [column for column in range(200) if column not in nan]
        check_close(d[:, kept], expected[:, kept], recipe=FP4, d_dtype="bf16")


def test_captured_and_repeated() -> None:
    a, b = activations(20, 2048), weights(512, 2048)
    prepared = jitgemm.prepare_fp4_weights(*b)
    d = poisoned((20, 512), torch.bfloat16, DEVICE)
    jitgemm.fp8_fp4_gemm_nt(a, prepared, d)
    first = d.clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        jitgemm.fp8_fp4_gemm_nt(a, prepared, d)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            jitgemm.fp8_fp4_gemm_nt(a, prepared, d)
    for _ in range(100):
        d.fill_(float("nan"))
        graph.replay()
        assert same_bits(d, first)


def test_under_torch_compile() -> None:
    a, b = activations(20, 512), weights(256, 512)

    def call(data: Tensor, scales: Tensor, packed: Tensor, exponents: Tensor) -> Tensor:
        d = torch.empty((20, 256), dtype=torch.bfloat16, device=DEVICE)
        jitgemm.fp8_fp4_gemm_nt((data, scales), jitgemm.prepare_fp4_weights(packed, exponents), d)
        return d

    assert same_bits(torch.compile(call, fullgraph=True)(*a, *b), call(*a, *b))


# -- Groups.

RAGGED = (0, 1, 7, 8, 0, 64, 65, 127, 128, 129, 200, 3, 0, 17)


class Groups:
    """Operands of groups whose other rows are NaN, and what the groups' rows should be."""

    def __init__(
        self,
        kind: str,
        counts: Sequence[int],
        n: int,
        k: int,
        window: tuple[int, int],
        d_dtype: str = "bf16",
        alignment: int = 128,
    ) -> None:
        self.kind, self.n, self.alignment, self.d_dtype = kind, n, alignment, d_dtype
        groups = len(counts)
        shape: tuple[int, ...]
        if kind == "masked":
            rows = max(counts)
            self.layout = torch.tensor(list(counts), dtype=torch.int32, device=DEVICE)
            self.used, shape = torch.arange(rows, device=DEVICE)[None] < self.layout[:, None], (groups, rows)
        else:
            index: list[int] = []
            ends: list[int] = []
            for group, count in enumerate(counts):
                index += [-1] * (-len(index) % alignment) + [group] * count
                ends.append(len(index) if count else (ends[-1] if ends else 0))
            index += [-1] * (-len(index) % alignment)
            self.layout = torch.tensor(ends if kind == "psum" else index, dtype=torch.int32, device=DEVICE)
            self.used, shape = torch.tensor(index, device=DEVICE) >= 0, (len(index),)
        data, scales = jitgemm.per_token_cast_to_fp8(
            random_matrix(self.used.numel(), k, torch.Generator(DEVICE).manual_seed(3), spread=True)
        )
        self.a, self.scales = data.view(*shape, k), scales.reshape(*shape, -1).contiguous()
        self.a.view(torch.uint8)[~self.used] = 0x7F
        self.scales[~self.used] = float("nan")
        self.scales = jitgemm.get_mn_major_tma_aligned_tensor(self.scales)
        self.weights = weights(groups, n, k, window=window)
        self.prepared: PreparedWeights = jitgemm.prepare_fp4_weights(*self.weights)
        self.expected = self.output()
        arguments: Any = (self.a, fp4.dequantize_fp4(*self.weights), self.expected, self.layout)
        if kind == "masked":
            grouped_reference.m_grouped_masked(*arguments, a_scales=self.scales, recipe=FP4)
        else:
            grouped_reference.m_grouped_contiguous(
                *arguments, a_scales=self.scales, recipe=FP4, use_psum_layout=kind == "psum", alignment=alignment
            )

    def output(self) -> Tensor:
        return poisoned((*self.used.shape, self.n), DTYPES[self.d_dtype], DEVICE)

    def check(self, config: GemmConfig | None) -> None:
        """Compute with a config, or with that which is chosen."""
        d, a = self.output(), (self.a, self.scales)
        tuning = {} if config is None else {"config": str(config)}
        with settings.override(mk_alignment=self.alignment, **tuning):
            if self.kind == "masked":
                jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, self.prepared, d, self.layout, 16)
            else:
                psum = self.kind == "psum"
                jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(a, self.prepared, d, self.layout, use_psum_layout=psum)
        others = d[~self.used]
        nothing = torch.zeros_like(others) if self.kind != "masked" else self.output()[~self.used]
        assert same_bits(others, nothing), str(config)
        used = self.used
        check_close(d[used], self.expected[used], recipe=FP4, d_dtype=self.d_dtype, what=str(config))


@pytest.mark.parametrize("window", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("kind", ["masked", "contiguous", "psum"])
def test_every_tile_on_ragged_groups(kind: str, window: tuple[int, int]) -> None:
    case = Groups(kind, RAGGED, 200, 416, window, "fp32" if kind == "masked" else "bf16")
    for config in (None, *grouped_configs(kind, d_dtype=case.d_dtype)):
        case.check(config)


@pytest.mark.parametrize("kind", ["contiguous", "psum"])
def test_groups_that_start_at_any_row(kind: str) -> None:
    case = Groups(kind, RAGGED, 200, 416, NEAR, alignment=1)
    for config in grouped_configs(kind, 1)[::2]:
        case.check(config)


def test_many_groups_and_rows_of_the_decode_shapes() -> None:
    Groups("masked", [1, 0, 8, 64, 3, 17, 33, 5] * 4, 512, 1024, NEAR).check(None)
