"""FP4 weights on a GPU with what takes sums of parts of a k-block: activations with scales of 32, and NVFP4; and packed
scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from benchmarks.operands import Embedded, poisoned, random_matrix, same_bits
from jitgemm import settings
from jitgemm.families.gemm import FP4, GemmConfig, GemmProblem, recipe_traits
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics import gemm, grouped
from jitgemm.ops.fp4 import PreparedWeights, unpack_ue8m0
from jitgemm.plan import device_facts
from jitgemm.reference import fp4
from jitgemm.reference import gemm as reference
from jitgemm.reference import grouped as grouped_reference
from jitgemm.reference.gemm import check_close
from jitgemm.reference.layout import empty_mn_major, split_gate_up

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OF_32, NVFP4 = "fp8_1x32_fp4_1x32", "fp8_1x128_nvfp4_1x16"
NEAR, FAR = (96, 122), (90, 130)
"""Exponents of MXFP4's scales that are expanded with the codes, and of scales that are not."""


def weights(recipe: str, *shape: int, window: tuple[int, int] = NEAR, seed: int = 0) -> tuple[Tensor, ...]:
    """What ``prepare_fp4_weights`` takes for ``[..., n, k]``: all codes, of NVFP4 all scales but NaN."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    *lead, n, k = shape
    packed = torch.randint(-128, 128, (*lead, n, k // 2), generator=generator, dtype=torch.int8, device=DEVICE)
    group = recipe_traits(recipe).fp4_group
    low, high = (0, 0x7E) if recipe == NVFP4 else window
    scales = torch.randint(low, high + 1, (*lead, n, -(-k // group)), generator=generator, device=DEVICE)
    if recipe != NVFP4:
        return packed, scales.to(torch.uint8)
    of_rows = torch.rand((*lead, n), generator=generator, device=DEVICE) + 0.5
    return packed, scales.to(torch.uint8).view(torch.float8_e4m3fn), of_rows


def plain(operand: tuple[Tensor, ...]) -> Tensor:
    """The values of weights."""
    return fp4.dequantize_nvfp4(*operand) if len(operand) == 3 else fp4.dequantize_fp4(*operand)


def activations(recipe: str, m: int, k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """e4m3 and MN-major scales of the recipe's granularity."""
    x = random_matrix(m, k, torch.Generator(DEVICE).manual_seed(seed), spread=True)
    data, scales = jitgemm.per_token_cast_to_fp8(x, gran_k=recipe_traits(recipe).a_group)
    return data, jitgemm.get_mn_major_tma_aligned_tensor(scales)


def dense_configs(recipe: str, d_dtype: str) -> list[GemmConfig]:
    """All tiles that calls choose from, with and without split K."""
    device, problem = device_facts(0)[0], GemmProblem(4096, 4096, recipe, d_dtype=d_dtype)
    legal = [c for c in gemm.candidates(problem, ()) if gemm.illegal(problem, c, device) is None]
    return list({(c.tile_m, c.tile_n, c.split_k > 1): c for c in legal}.values())


@pytest.mark.parametrize("window", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("config", ["8x64x128 s8 swap", "32x128x128 s8 swap", "128x128x128 s4 swap"])
def test_scales_of_32_bit_for_bit(config: str, window: tuple[int, int]) -> None:
    """Rows of the identity, each k with a scale of its own: a wrong place, code or scale shows."""
    n, k = 200, 416
    operand = weights(OF_32, n, k, window=window)
    a = torch.eye(k, device=DEVICE).to(torch.float8_e4m3fn)
    place = torch.arange(k, device=DEVICE)[:, None] * 7 + torch.arange(k // 32, device=DEVICE) * 3
    powers = 2.0 ** (place % 23 - 11).float()
    prepared, d = jitgemm.prepare_fp4_weights(*operand), poisoned((k, n), torch.float32, DEVICE)
    assert bool((prepared.units < 0).any()) == (window == FAR)
    with settings.override(config=config):
        jitgemm.fp8_fp4_gemm_nt((a, powers), prepared, d, recipe_a=(1, 32))
    own = powers[torch.arange(k, device=DEVICE), torch.arange(k, device=DEVICE) // 32]
    assert torch.equal(d, (plain(operand).mT * own[:, None].double()).float())


@pytest.mark.parametrize(
    "config", ["8x64x128 s8 swap", "16x128x128 s8 swap", "32x64x128 s8 swap", "64x128x128 s4 swap"]
)
def test_nvfp4_bit_for_bit(config: str) -> None:
    n, k = 200, 416
    packed, scales, of_rows = weights(NVFP4, n, k)
    packed[:2].view(-1)[:256] = torch.arange(256, device=DEVICE).to(torch.uint8).view(torch.int8)  # all pairs of codes
    scales.view(torch.uint8).view(-1)[:127] = torch.arange(127, device=DEVICE).to(torch.uint8)
    a = torch.eye(k, device=DEVICE).to(torch.float8_e4m3fn)
    ones = jitgemm.get_mn_major_tma_aligned_tensor(torch.ones((k, -(-k // 128)), device=DEVICE))
    d = poisoned((k, n), torch.float32, DEVICE)
    with settings.override(config=config):
        jitgemm.fp8_fp4_gemm_nt((a, ones), jitgemm.prepare_fp4_weights(packed, scales, of_rows), d)
    assert torch.equal(d.mT, plain((packed, scales, of_rows)).float())


@pytest.mark.parametrize(("recipe", "window"), [(OF_32, NEAR), (OF_32, FAR), (NVFP4, NEAR)], ids=str)
def test_every_tile(recipe: str, window: tuple[int, int]) -> None:
    for (m, n, k), d_dtype in (((67, 328, 1312), "fp32"), ((131, 72, 160), "bf16")):
        a, operand = activations(recipe, m, k), weights(recipe, n, k, window=window)
        prepared = jitgemm.prepare_fp4_weights(*operand)
        c = torch.randn(m, n, device=DEVICE).to(DTYPES[d_dtype])
        products = [
            reference.gemm(a[0], plain(operand), added, a_scales=a[1], recipe=recipe, d_dtype=d_dtype)
            for added in (None, c)
        ]
        for index, config in enumerate(dense_configs(recipe, d_dtype)):
            if config.split_k > -(-k // 128):
                continue
            d = Embedded((m, n), DTYPES[d_dtype], DEVICE, (8, 8) if index % 3 else (3, 2))
            with settings.override(config=str(config)):
                jitgemm.fp8_fp4_gemm_nt(a, prepared, d.view, c if index % 2 else None)
            what = f"{config} of {m}x{n}x{k}"
            check_close(d.view, products[index % 2], recipe=recipe, d_dtype=d_dtype, what=what)
            assert d.intact(), what


@pytest.mark.parametrize("recipe", [OF_32, NVFP4])
def test_choices_of_many_sizes(recipe: str) -> None:
    for m, n, k in (
        (1, 4096, 7168),
        (8, 576, 7168),
        (17, 2112, 7168),
        (64, 7168, 2048),
        (300, 1536, 1024),
        (7, 64, 32),
    ):
        a, operand = activations(recipe, m, k), weights(recipe, n, k)
        d = poisoned((m, n), torch.bfloat16, DEVICE)
        jitgemm.fp8_fp4_gemm_nt(a, jitgemm.prepare_fp4_weights(*operand), d)
        expected = reference.gemm(a[0], plain(operand), a_scales=a[1], recipe=recipe)
        check_close(d, expected, recipe=recipe, d_dtype="bf16", what=f"{m}x{n}x{k}")


# -- Groups.

RAGGED = (0, 1, 7, 8, 0, 64, 65, 127, 128, 129, 200, 3, 0, 17)


def grouped_configs(recipe: str, kind: str, alignment: int) -> list[GemmConfig]:
    """All tiles that grouped calls choose from."""
    device = device_facts(0)[0]
    problem = GroupedProblem(4096, 4096, recipe, 8, kind, alignment=alignment)
    legal = [c for c in grouped.candidates(problem) if grouped.illegal(problem, c, device) is None]
    return list({(c.tile_m, c.tile_n): c for c in legal}.values())


@pytest.mark.parametrize(("kind", "alignment"), [("masked", 128), ("contiguous", 128), ("psum", 1)])
@pytest.mark.parametrize(("recipe", "window"), [(OF_32, NEAR), (OF_32, FAR), (NVFP4, NEAR)], ids=str)
def test_ragged_groups(recipe: str, window: tuple[int, int], kind: str, alignment: int) -> None:
    """Other rows of A and its scales are NaN."""
    n, k, groups = 200, 416, len(RAGGED)
    layout, used = _layout(kind, RAGGED, alignment)
    data, scales = activations(recipe, used.numel(), k, seed=3)
    a, scales = data.view(*used.shape, k), scales.reshape(*used.shape, -1).contiguous()
    a.view(torch.uint8)[~used] = 0x7F
    scales[~used] = float("nan")
    scales = jitgemm.get_mn_major_tma_aligned_tensor(scales)
    operand = weights(recipe, groups, n, k, window=window)
    prepared: PreparedWeights = jitgemm.prepare_fp4_weights(*operand)
    expected = poisoned((*used.shape, n), torch.bfloat16, DEVICE)
    if kind == "masked":
        grouped_reference.m_grouped_masked(a, plain(operand), expected, layout, a_scales=scales, recipe=recipe)
    else:
        grouped_reference.m_grouped_contiguous(
            *(a, plain(operand), expected, layout),
            a_scales=scales,
            recipe=recipe,
            use_psum_layout=kind == "psum",
            alignment=alignment,
        )
    for config in (None, *grouped_configs(recipe, kind, alignment)[::2]):
        d = poisoned((*used.shape, n), torch.bfloat16, DEVICE)
        with settings.override(mk_alignment=alignment, **({} if config is None else {"config": str(config)})):
            if kind == "masked":
                jitgemm.m_grouped_fp8_fp4_gemm_nt_masked((a, scales), prepared, d, layout, 16)
            else:
                jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(
                    (a, scales), prepared, d, layout, use_psum_layout=kind == "psum"
                )
        check_close(d[used], expected[used], recipe=recipe, d_dtype="bf16", what=str(config))
        others = d[~used]
        nothing = (
            poisoned(tuple(others.shape), torch.bfloat16, DEVICE) if kind == "masked" else torch.zeros_like(others)
        )
        assert same_bits(others, nothing), str(config)


def _layout(kind: str, counts: Sequence[int], alignment: int) -> tuple[Tensor, Tensor]:
    """The layout of groups of so many rows, and which rows of A they use."""
    if kind == "masked":
        layout = torch.tensor(list(counts), dtype=torch.int32, device=DEVICE)
        return layout, torch.arange(max(counts), device=DEVICE)[None] < layout[:, None]
    index: list[int] = []
    ends: list[int] = []
    for group, count in enumerate(counts):
        index += [-1] * (-len(index) % alignment) + [group] * count
        ends.append(len(index) if count else (ends[-1] if ends else 0))
    index += [-1] * (-len(index) % alignment)
    layout = torch.tensor(ends if kind == "psum" else index, dtype=torch.int32, device=DEVICE)
    return layout, torch.tensor(index, device=DEVICE) >= 0


# -- Epilogues.


@pytest.mark.parametrize("recipe", [OF_32, NVFP4])
@pytest.mark.parametrize("config", ["8x64x128 s6 swap", "32x128x128 s6 swap", "64x128x128 s4 swap"])
def test_swiglu_that_quantizes(recipe: str, config: str) -> None:
    m, n, k = 45, 512, 416
    a, operand = activations(recipe, m, k), weights(recipe, n, k, window=(112, 118))
    prepared = jitgemm.prepare_fp4_weights(*operand)
    alpha = 1e-4 if recipe == NVFP4 else 3.0
    gate, up = split_gate_up(
        alpha * reference.gemm(a[0], plain(operand), a_scales=a[1], recipe=recipe, d_dtype="fp32").double(), 1
    )
    expected = gate * torch.sigmoid(gate) * up
    d: Any = jitgemm.empty_quantized((m, n // 2), ue8m0=True, device=DEVICE)
    with settings.override(config=config):
        jitgemm.fp8_fp4_gemm_nt(a, prepared, d, epilogue=jitgemm.Epilogue(alpha=alpha, swiglu=True))
    found = jitgemm.cast_back_from_fp8(d[0], d[1], (1, 32), True)
    difference = (found.double() - expected).norm() / expected.norm()
    assert difference < 0.04  # of e4m3's rounding: 2^-4 at most, a third of that on average
    # The pair is the next GEMM's a.
    second = weights(OF_32, 72, n // 2)
    last = poisoned((m, 72), torch.bfloat16, DEVICE)
    jitgemm.fp8_fp4_gemm_nt(d, second, last, recipe_a=(1, 32))
    scales = unpack_ue8m0(d[1], n // 2 // 32)
    product = reference.gemm(d[0], plain(second), a_scales=scales, recipe=OF_32)
    check_close(last, product, recipe=OF_32, d_dtype="bf16")


# -- Packed scales.


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (1000, 14), (3, 130, 7), (2, 1, 56)])
@pytest.mark.parametrize("is_mn_major", [False, True])
def test_unpacking(shape: tuple[int, ...], is_mn_major: bool) -> None:
    exponents = torch.arange(4 * torch.Size(shape).numel(), device=DEVICE).remainder(256).to(torch.uint8)
    words = exponents.view(torch.int32).view(shape)
    if is_mn_major:
        words = empty_mn_major(shape, torch.int32, DEVICE).copy_(words)
    for k_blocks in (4 * shape[-1], 4 * shape[-1] - 3):
        found = unpack_ue8m0(words, k_blocks)
        assert same_bits(found.cpu(), unpack_ue8m0(words.cpu(), k_blocks))
        assert found.stride()[-2] == 1 and (k_blocks == 1 or found.stride()[-1] % 4 == 0)


@pytest.mark.parametrize("group", [128, 32])
def test_packed_scales_are_those_that_are_floats(group: int) -> None:
    m, n, k = 37, 328, 1312
    x = random_matrix(m, k, torch.Generator(DEVICE).manual_seed(1), spread=True)
    data, words = jitgemm.per_token_cast_to_fp8(x, True, group, use_packed_ue8m0=True)
    _, floats = jitgemm.per_token_cast_to_fp8(x, True, group)
    prepared = jitgemm.prepare_fp4_weights(*weights(FP4, n, k))
    results = []
    for scales in (
        floats,
        words,
        empty_mn_major(words.shape, torch.int32, DEVICE).copy_(words),
    ):
        results.append(poisoned((m, n), torch.bfloat16, DEVICE))
        jitgemm.fp8_fp4_gemm_nt((data, scales), prepared, results[-1], recipe_a=(1, group))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
    graph, d = torch.cuda.CUDAGraph(), poisoned((m, n), torch.bfloat16, DEVICE)
    with torch.cuda.graph(graph):
        jitgemm.fp8_fp4_gemm_nt((data, words), prepared, d, recipe_a=(1, group))
    for _ in range(3):
        d.fill_(float("nan"))
        graph.replay()
        assert same_bits(d, results[0])


@pytest.mark.parametrize("recipe", [FP4, NVFP4])
@pytest.mark.parametrize("shape", [(1, 2), (64, 128), (200, 7168), (130, 434), (5, 65, 1312)])
def test_packing_is_the_reference_s(recipe: str, shape: tuple[int, ...]) -> None:
    """Bit for bit, groups of zeros, NaN scales and far scales included; also of rows that lie elsewhere."""
    packed, scales, *of_rows = weights(recipe, *shape, window=(0, 255))
    generator = torch.Generator(DEVICE).manual_seed(7)
    group = recipe_traits(recipe).fp4_group
    zeros = torch.rand(scales.shape, generator=generator, device=DEVICE) < 0.3
    packed[zeros.repeat_interleave(group // 2, -1)[..., : packed.shape[-1]]] &= -0x78  # signs stay
    wide = torch.full((*packed.shape[:-1], packed.shape[-1] + 5), 0x11, dtype=torch.int8, device=DEVICE)
    wide[..., 1:-4] = packed
    columns = scales.view(torch.uint8).mT.contiguous().mT.view(scales.dtype)
    units = [unit.cpu() for unit in of_rows]
    reference_of = fp4.pack_nvfp4 if recipe == NVFP4 else fp4.pack
    expected = reference_of(packed.cpu().view(torch.uint8), scales.cpu(), *units)
    for one, other in ((packed, scales), (wide[..., 1:-4], columns)):
        found = jitgemm.prepare_fp4_weights(one, other, *of_rows)
        assert torch.equal(found.data.cpu(), expected[0])
        assert torch.equal(found.units.cpu().view(torch.int32), expected[1].view(torch.int32))
    codes = jitgemm.restore_fp4_weights(found)[0]
    assert codes.shape == packed.shape


@pytest.mark.parametrize("recipe", [FP4, NVFP4])
def test_raw_weights_in_a_graph(recipe: str) -> None:
    m, n, k = 20, 512, 2048
    a, operand = activations(recipe, m, k), weights(recipe, n, k)
    expected, d = poisoned((m, n), torch.bfloat16, DEVICE), poisoned((m, n), torch.bfloat16, DEVICE)
    jitgemm.fp8_fp4_gemm_nt(a, jitgemm.prepare_fp4_weights(*operand), expected)
    jitgemm.fp8_fp4_gemm_nt(a, operand, d)
    assert same_bits(d, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jitgemm.fp8_fp4_gemm_nt(a, operand, d)
    for _ in range(3):
        d.fill_(float("nan"))
        graph.replay()
        assert same_bits(d, expected)


def test_nvfp4_on_the_gpu_and_on_the_cpu_is_packed_the_same() -> None:
    operand = weights(NVFP4, 3, 200, 416)
    operand[1].view(torch.uint8)[1, 5, 3] = 0x7F
    here = jitgemm.prepare_fp4_weights(*operand)
    there = jitgemm.prepare_fp4_weights(*(tensor.cpu() for tensor in operand))
    assert torch.equal(here.data.cpu(), there.data) and same_bits(here.units.isnan().cpu(), there.units.isnan())
    d = poisoned((3, 4, 200), torch.bfloat16, DEVICE)
    data, scales = activations(NVFP4, 12, 416)
    counts = torch.full((3,), 4, dtype=torch.int32, device=DEVICE)
    a = data.view(3, 4, 416), scales.contiguous().view(3, 4, -1)
    jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, here, d, counts, 4)
    assert d.isnan().nonzero().tolist() == [[1, row, 5] for row in range(4)]
