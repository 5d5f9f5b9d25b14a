"""The GEMM kernels on a GPU: numbers against float64, and everything that a launch depends on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import environment
from torch import Tensor

import jitgemm
from benchmarks import numerics
from benchmarks.operands import Operands, lay_out_scales, poisoned, quantize, random_matrix, same_bits
from benchmarks.shapes import Case, Shape
from jitgemm import builder, driver, settings
from jitgemm.cache_key import cache_key
from jitgemm.errors import CacheMissError, ProblemError
from jitgemm.families import KernelSpec
from jitgemm.families.gemm import FAMILY, LAYOUTS, RECIPES, GemmProblem, KernelShape
from jitgemm.heuristics import choose_config, enumerate_specs
from jitgemm.kernel import load
from jitgemm.plan import device_facts
from jitgemm.reference.gemm import check_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# recipe, layout, fast_accum
KINDS = [
    ("fp8_1x128_128x128", "nt", False),
    ("fp8_1x128_1x128", "nt", False),
    *[(recipe, "nt", fast) for recipe in ("fp8_rowwise", "fp8_tensorwise") for fast in (False, True)],
    *[("bf16", layout, False) for layout in LAYOUTS],
]
Kind = tuple[str, str, bool]


def kind_name(kind: Kind) -> str:
    return "-".join(kind[:2]) + "-fast" * kind[2]


def check(case: Case) -> None:
    """Poisoned D within the bounds, nothing around it touched, the same bits twice."""
    outcome = numerics.check(case, DEVICE)
    assert not outcome.failures, f"{case}: {outcome.failures}"


def operands(recipe: str, m: int, n: int, k: int, seed: int = 0, device: torch.device = DEVICE) -> Operands:
    generator = torch.Generator(device).manual_seed(seed)
    return quantize(recipe, random_matrix(m, k, generator, spread=True), random_matrix(n, k, generator, spread=True))


def call(x: Operands, d: Tensor, c: Tensor | None = None) -> None:
    if x.recipe == "bf16":
        jitgemm.bf16_gemm_nt(x.a, x.b, d, c)
    else:
        jitgemm.fp8_gemm_nt((x.a, x.a_scales), (x.b, x.b_scales), d, c, recipe=x.recipe)


def output(x: Operands, d_dtype: str = "bf16") -> Tensor:
    return poisoned((x.a.shape[0], x.b.shape[0]), DTYPES[d_dtype], x.a.device)


def right(x: Operands, d: Tensor, d_dtype: str = "bf16", c: Tensor | None = None) -> None:
    check_close(d, x.product(d_dtype, c=c), recipe=x.recipe, d_dtype=d_dtype)


def spec_of(problem: GemmProblem) -> KernelSpec:
    """Of the kernel that a call gets, under the settings in force."""
    device = device_facts(0)[0]
    return FAMILY.spec(problem, choose_config(problem, device), device.arch.name)


def untouched(d: Tensor) -> bool:
    return same_bits(d, poisoned(d.shape, d.dtype, d.device))


@pytest.fixture(scope="module", autouse=True)
def prewarmed(shared_cache: None) -> None:
    """Compile most kernels at once, on all cores."""
    cases = [kind_case(kind, d_dtype) for kind, d_dtype in itertools.product(KINDS, DTYPES)]
    cases += [case for kind, shape in itertools.product(KINDS, RAGGED) for case in ragged_cases(kind, shape)]
    specs = {spec_of(case.problem) for case in cases}
    for kind, d_dtype, name in FEATURES:
        with settings.override(**forced(name)):
            specs |= {spec_of(case.problem) for case in feature_cases(kind, d_dtype)}
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(builder.build, sorted(specs, key=str), chunksize=4):
            pass


# -- Numbers.


def kind_case(kind: Kind, d_dtype: str, c: str = "none", strided: bool = False) -> Case:
    recipe, layout, fast_accum = kind
    margin = (3, 2) if strided else (0, 0)
    unit = 16 // RECIPES[recipe].operand_bytes
    inside = (unit, 2 * unit) if strided else (0, 0)
    return Case(Shape(200, 264, 400), recipe, layout, d_dtype, fast_accum, c, inside, inside, margin, margin, seed=1)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("c", ["none", "given", "in_place"])
@pytest.mark.parametrize("d_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_every_kind(kind: Kind, d_dtype: str, c: str, strided: bool) -> None:
    check(kind_case(kind, d_dtype, c, strided))


RAGGED = [
    Shape(1, 257, 129),
    Shape(1, 2112, 1024),
    Shape(7, 100, 1000),
    Shape(129, 1, 300),
    Shape(64, 9, 8),
    Shape(640, 128, 1),
    Shape(333, 130, 127),
    Shape(777, 1001, 777),
    Shape(2, 4097, 2049),
]


def ragged_cases(kind: Kind, shape: Shape) -> list[Case]:
    recipe, layout, fast_accum = kind
    return [
        Case(shape, recipe, layout, "bf16", fast_accum, d_margin=(0, 5), scales="row_major", seed=2),
        Case(shape, recipe, layout, "fp32", fast_accum, "in_place", seed=3),
    ]


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_ragged_sizes(kind: Kind, shape: Shape) -> None:
    for case in ragged_cases(kind, shape):
        check(case)


# tile_m, tile_n, cluster, split_k, swap_ab, and stages where they matter
FORCED: dict[str, tuple[int, int, tuple[int, int], int, bool, int | None]] = {
    "64 rows": (64, 64, (1, 1), 1, False, None),
    "64 rows cluster 2x1": (64, 64, (2, 1), 1, False, None),
    "64 rows cluster 1x2": (64, 64, (1, 2), 1, False, None),
    "64 rows, narrow": (64, 24, (1, 1), 1, False, None),
    "two blocks an SM": (64, 40, (1, 1), 4, False, 6),
    "chain": (128, 64, (1, 1), 1, False, None),
    "chain 2x1": (128, 128, (2, 1), 1, False, None),
    "chain 1x2": (128, 128, (1, 2), 1, False, None),
    "straddling scale blocks": (128, 72, (1, 1), 1, False, None),
    "no chain": (128, 192, (1, 1), 1, False, None),
    "no chain 2x1": (128, 192, (2, 1), 1, False, None),
    "two waves": (256, 64, (1, 1), 1, False, None),
    "two waves 1x2": (256, 128, (1, 2), 1, False, None),
    "two waves 2x1": (256, 64, (2, 1), 1, False, None),
    "two stages": (128, 128, (1, 1), 1, False, 2),
    "split 2": (128, 64, (1, 1), 2, False, None),
    "split 4": (128, 64, (1, 1), 4, False, None),
    "split 8": (64, 128, (1, 1), 8, False, None),
    "split 2 straddling": (128, 40, (1, 1), 2, False, None),
    "swap": (64, 128, (1, 1), 1, True, None),
    "swap least": (8, 64, (1, 1), 1, True, None),
    "swap 2x1": (32, 64, (2, 1), 1, True, None),
    "swap 1x2": (16, 128, (1, 2), 1, True, None),
    "swap split 2": (16, 128, (1, 1), 2, True, None),
    "swap split 8": (8, 64, (1, 1), 8, True, None),
    "swap, many rows": (128, 128, (1, 1), 1, True, None),
}
FORCED_KINDS: list[Kind] = [
    ("fp8_1x128_128x128", "nt", False),
    ("fp8_1x128_1x128", "nt", False),
    ("fp8_rowwise", "nt", False),
    ("fp8_tensorwise", "nt", True),
    ("bf16", "nt", False),
    ("bf16", "tn", False),
]


def forced(name: str) -> dict[str, Any]:
    tile_m, tile_n, cluster, split_k, swap_ab, stages = FORCED[name]
    values = {"tile_m": tile_m, "tile_n": tile_n, "cluster": cluster, "split_k": split_k, "swap_ab": swap_ab}
    return values if stages is None else {**values, "stages": stages}


def feature_cases(kind: Kind, d_dtype: str) -> list[Case]:
    """More tiles than one, with tails in each dimension; then fewer rows than a tile. A TMA store, and a plain one."""
    recipe, layout, fast_accum = kind
    return [
        Case(Shape(333, 424, 1160), recipe, layout, d_dtype, fast_accum, "given", seed=4),
        Case(Shape(33, 1032, 4240), recipe, layout, d_dtype, fast_accum, d_margin=(1, 0), seed=5),
    ]


FEATURES = [
    (kind, d_dtype, name)
    for kind, d_dtype, name in itertools.product(FORCED_KINDS, DTYPES, FORCED)
    # MN-major operands on the MMA's N side come in slabs of 64.
    if kind[1] != "tn" or (columns := FORCED[name][0 if FORCED[name][4] else 1]) <= 64 or columns % 64 == 0
]


@pytest.mark.parametrize(("kind", "d_dtype", "name"), FEATURES, ids=lambda part: str(part).replace(" ", "_"))
def test_every_feature_of_the_kernels(kind: Kind, d_dtype: str, name: str) -> None:
    with settings.override(**forced(name)):
        for case in feature_cases(kind, d_dtype):
            check(case)


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
@pytest.mark.parametrize("name", ["64 rows cluster 2x1", "64 rows cluster 1x2", "swap 2x1", "swap 1x2"])
@pytest.mark.parametrize("left", [1, 9, 17, 33, 56, 63])
def test_shared_tiles_that_an_end_cuts(recipe: str, name: str, left: int) -> None:
    """Parts of them are whole swizzle atoms, and may come to the whole tile."""
    with settings.override(**forced(name)):
        check(Case(Shape(128 + left, 384 + left, 320), recipe, d_margin=(1, 0), seed=left))


@pytest.mark.parametrize("name", ["chain", "no chain", "two waves 1x2", "chain 2x1", "swap 2x1"])
def test_many_tiles_for_each_block(name: str) -> None:
    """The ring, its phases and the staging area live on from tile to tile."""
    with settings.override(**forced(name)):
        check(Case(Shape(2050, 2072, 640), "fp8_1x128_128x128", sampled=True, seed=8))
        jitgemm.set_num_sms(6)
        try:
            check(Case(Shape(1030, 1048, 384), "fp8_1x128_128x128", seed=9))
        finally:
            jitgemm.set_num_sms(0)


@pytest.mark.parametrize("d_margin", [(0, 0), (0, 1)], ids=["tma store", "plain store"])
def test_more_elements_of_d_than_an_int_counts(d_margin: tuple[int, int]) -> None:
    check(Case(Shape(70_001, 32_768, 128), "fp8_rowwise", d_margin=d_margin, sampled=True, seed=10))


def test_more_elements_of_a_than_an_int_counts() -> None:
    check(Case(Shape(1_100_001, 64, 2048), "fp8_1x128_128x128", sampled=True, seed=11))


# -- The same bits.


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "fp8_rowwise", "bf16"])
@pytest.mark.parametrize("name", [None, "chain 2x1", "two waves 1x2", "split 8", "swap 2x1", "swap split 8"])
def test_repeated_launches_agree(recipe: str, name: str | None) -> None:
    x = operands(recipe, 200, 520, 2048)
    results = poisoned((100, 200, 520), torch.bfloat16, DEVICE)
    with settings.override(**(forced(name) if name else {})):
        for d in results:
            call(x, d)
    right(x, results[0])
    assert same_bits(results, results[:1].expand(100, -1, -1))


def test_shapes_that_alternate() -> None:
    both = [operands("fp8_1x128_128x128", 128, 512, 1024), operands("fp8_1x128_128x128", 77, 264, 2000, seed=1)]
    firsts = [output(x) for x in both]
    for x, first in zip(both, firsts, strict=True):
        call(x, first)
        right(x, first)
    for _ in range(50):
        for x, first in zip(both, firsts, strict=True):
            d = output(x)
            call(x, d)
            assert same_bits(d, first)


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "fp8_1x128_1x128"])
@pytest.mark.parametrize("m", [1, 3, 130])
def test_scales_in_every_layout_give_the_same_bits(recipe: str, m: int) -> None:
    x = operands(recipe, m, 264, 1008)
    assert x.a_scales is not None and x.b_scales is not None
    first = output(x)
    call(x, first)
    right(x, first)
    for how in ("row_major", "mn_major", "mn_major_shifted", "strided"):
        d = output(x)
        scales = [lay_out_scales(s, how) for s in (x.a_scales, x.b_scales)]
        jitgemm.fp8_gemm_nt((x.a, scales[0]), (x.b, scales[1]), d, recipe=recipe)
        assert same_bits(d, first), how
    d = output(x)
    prepared = [jitgemm.get_mn_major_tma_aligned_tensor(s) for s in (x.a_scales, x.b_scales)]
    jitgemm.fp8_gemm_nt((x.a, prepared[0]), (x.b, prepared[1]), d, recipe=recipe)
    assert same_bits(d, first)


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "fp8_1x128_1x128"])
@pytest.mark.parametrize(
    ("layout", "k_major", "k"),
    [*itertools.product(LAYOUTS, (True, False), (400,)), ("tn", False, 404)],  # copies have rows of whole 16 bytes
)
def test_fp8_operands_with_k_first(recipe: str, layout: str, k_major: bool, k: int) -> None:
    x = operands(recipe, 128, 256, k)
    assert x.a_scales is not None and x.b_scales is not None

    def stored(data: Tensor, scales: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        if not transposed:
            return data, scales
        data = data.t()
        return (data if k_major else data.view(torch.uint8).contiguous().view(data.dtype)), scales.t().contiguous()

    a, b = stored(x.a, x.a_scales, layout[0] == "t"), stored(x.b, x.b_scales, layout[1] == "n")
    d = output(x)
    getattr(jitgemm, f"fp8_gemm_{layout}")(a, b, d, recipe=recipe)
    right(x, d)


@pytest.mark.parametrize("first_row", [0, 1, 4])
@pytest.mark.parametrize("m", [1, 40, 130])
def test_rows_of_longer_prepared_scales(m: int, first_row: int) -> None:
    """A slice of MN-major scales keeps its step along K, whether it starts at an aligned address or not."""
    x = operands("fp8_1x128_1x128", 200, 264, 1008)
    assert x.a_scales is not None and x.b_scales is not None
    rows = slice(first_row, first_row + m)
    part = Operands(x.recipe, x.a[rows].clone(), x.a_scales[rows].clone(), x.b, x.b_scales)
    a_scales, b_scales = (jitgemm.get_mn_major_tma_aligned_tensor(s) for s in (x.a_scales, x.b_scales))
    wide = torch.full((8, 300), float("nan"), device=DEVICE).t()[first_row : first_row + 264].copy_(b_scales)
    for _ in range(2):
        d = output(part)
        jitgemm.fp8_gemm_nt((part.a, a_scales[rows]), (x.b, wide), d, recipe=x.recipe)
        right(part, d)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_row_of_c_for_all(recipe: str) -> None:
    x = operands(recipe, 100, 264, 512)
    bias, d = torch.randn(1, 264, device=DEVICE).bfloat16() * 20, output(x)
    call(x, d, bias.expand(100, -1))
    right(x, d, c=bias.expand(100, -1))


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "fp8_rowwise", "bf16"])
def test_new_data_at_the_same_addresses(recipe: str) -> None:
    """Nothing of the data is remembered with the launch."""
    x, y = operands(recipe, 100, 264, 512), operands(recipe, 100, 264, 512, seed=1)
    d = output(x)
    call(x, d)
    for old, new in ((x.a, y.a), (x.b, y.b), (x.a_scales, y.a_scales), (x.b_scales, y.b_scales)):
        if old is not None and new is not None:
            old.copy_(new)
    d.copy_(output(x))
    call(x, d)
    right(y, d)


# -- NaN and Inf.


def bad_value(x: Tensor, row: int, column: int, value: float) -> None:
    if x.element_size() == 1:
        x.view(torch.uint8)[row, column] = 0x7F  # E4M3 has a NaN and no Inf
    else:
        x[row, column] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["a", "b", "c", "a_scales", "b_scales"])
@pytest.mark.parametrize("name", [None, "chain", "split 4", "swap", "two waves", "swap split 8"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_and_inf_reach_what_depends_on_them(recipe: str, name: str | None, place: str, value: float) -> None:
    m, n, k = 150, 300, 1104
    x = operands(recipe, m, n, k)
    c = torch.randn(m, n, device=DEVICE).bfloat16()
    expected = torch.ones(m, n, dtype=torch.bool)
    row, column, at = 70, 133, k - 1
    if place == "c":
        c[row, column] = value
        expected[row, column] = False
    elif place in ("a", "b"):
        bad_value(x.a if place == "a" else x.b, row if place == "a" else column, at, value)
        if place == "a":
            expected[row] = False
        else:
            expected[:, column] = False
    else:
        scales = x.a_scales if place == "a_scales" else x.b_scales
        if scales is None:
            pytest.skip("bf16 operands have no scales")
        if scales.numel() == 1:
            scales.fill_(value)
            expected[:] = False
        elif place == "a_scales":
            scales[row, -1] = value
            expected[row] = False
        elif recipe == "fp8_1x128_128x128":
            scales[column // 128, -1] = value
            expected[:, 128:256] = False
        else:
            scales[column, -1] = value
            expected[:, column] = False
    d = output(x)
    with settings.override(**(forced(name) if name else {})):
        call(x, d, c)
    assert torch.equal(d.isfinite().cpu(), expected)
    if value != value:
        assert torch.equal(d.isnan().cpu(), ~expected)


# -- Views, empty operands and refusals.


@pytest.mark.parametrize("recipe", RECIPES)
def test_slices_without_copies(recipe: str) -> None:
    m, n, k = 65, 136, 384
    x = operands(recipe, m, n, k)
    rows = poisoned((2 * m, k), x.a.dtype, DEVICE)[::2]
    columns = poisoned((m, k + 96), x.a.dtype, DEVICE)[:, 32 : 32 + k]
    first = output(x)
    call(x, first)
    right(x, first)
    for view in (rows, columns):
        view.view(torch.uint8).copy_(x.a.view(torch.uint8))
        d = output(x)
        call(Operands(recipe, view, x.a_scales, x.b, x.b_scales), d)
        assert same_bits(d, first)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["a", "b"])
def test_misaligned_operands_launch_nothing(recipe: str, name: str) -> None:
    x = operands(recipe, 64, 128, 256)
    old = getattr(x, name)
    storage = torch.zeros(300 * 257 * old.element_size(), dtype=torch.uint8, device=DEVICE).view(old.dtype)
    shifted = storage[1 : 1 + old.numel()].view(old.shape)
    d = output(x)
    call(x, d)  # the plan is made, and the addresses are still checked
    d = output(x)
    for _ in range(2):
        with pytest.raises(ProblemError, match=f"{name} starts at address .* multiple of 16 bytes"):
            call(Operands(recipe, **{**vars_of(x), name: shifted}), d)
    bad = storage.as_strided(old.shape, (257, 1))
    with pytest.raises(ProblemError, match=f"{name} has shape .* multiple of 16 bytes"):
        call(Operands(recipe, **{**vars_of(x), name: bad}), d)
    torch.cuda.synchronize()
    assert untouched(d)


def vars_of(x: Operands) -> dict[str, Any]:
    return {"a": x.a, "a_scales": x.a_scales, "b": x.b, "b_scales": x.b_scales}


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_output_over_an_input_launches_nothing(name: str) -> None:
    m, n, k = 64, 64, 128
    x = operands("bf16", m, n, k)
    storage = poisoned((64 * 1024,), torch.bfloat16, DEVICE)
    length = {"a": m * k, "b": n * k, "c": m * n}[name]
    inside = storage[8:][:length].view(-1, n if name == "c" else k)
    d = storage[length : length + m * n].view(m, n)  # begins in its last elements
    arguments = {"a": x.a, "b": x.b, "c": None, name: inside}
    with pytest.raises(ProblemError, match=f"d overlaps {name}"):
        jitgemm.bf16_gemm_nt(arguments["a"], arguments["b"], d, arguments["c"])  # type: ignore[arg-type]
    torch.cuda.synchronize()
    assert untouched(storage)


def test_operands_on_several_devices_are_refused() -> None:
    x, d = operands("fp8_rowwise", 8, 64, 128), torch.empty(8, 64)
    with pytest.raises(ProblemError, match=r"a is on cuda:0 and d on cpu"):
        call(x, d)
    d = d.to(DEVICE)
    assert x.b_scales is not None
    with pytest.raises(ProblemError, match=r"b_scales is on cpu and d on cuda:0"):
        call(Operands(x.recipe, x.a, x.a_scales, x.b, x.b_scales.cpu()), d)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rows(recipe: str) -> None:
    x = operands(recipe, 4, 64, 256)
    a_scales = x.a_scales if x.a_scales is None or x.a_scales.numel() == 1 else x.a_scales[:0]
    d = torch.empty(0, 64, device=DEVICE)
    call(Operands(recipe, x.a[:0], a_scales, x.b, x.b_scales), d)
    call(Operands(recipe, x.a[:0], a_scales, x.b, x.b_scales), d, d)
    torch.cuda.synchronize()


def test_one_row_in_place_whatever_its_stride() -> None:
    x = operands("bf16", 1, 64, 256)
    storage = torch.randn(64, 1, device=DEVICE).bfloat16()
    d, before = storage.t(), storage.t().clone()
    assert d.stride() == (1, 1)
    call(x, d, d)
    right(x, d, c=before)


# -- Multiprocessors.


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
@pytest.mark.parametrize("num_sms", [1, 2, 13, 77])
def test_fewer_multiprocessors(recipe: str, num_sms: int) -> None:
    x, d = operands(recipe, 500, 1032, 512), None
    assert jitgemm.get_num_sms() == torch.cuda.get_device_properties(0).multi_processor_count
    jitgemm.set_num_sms(num_sms)
    try:
        assert jitgemm.get_num_sms() == num_sms
        d = output(x)
        call(x, d)
    finally:
        jitgemm.set_num_sms(0)
    right(x, d)


def test_more_multiprocessors_than_there_are() -> None:
    with pytest.raises(ProblemError, match=r"num_sms is 100000; accepted is an integer from 0 \(all\) to"):
        jitgemm.set_num_sms(100_000)


# -- Streams, graphs, threads, devices.


def late_inputs(x: Operands, y: Operands) -> None:
    """Long after this returns, the current stream writes ``y`` into the operands of ``x``."""
    torch.cuda._sleep(100_000_000)
    for old, new in ((x.a, y.a), (x.b, y.b), (x.a_scales, y.a_scales), (x.b_scales, y.b_scales)):
        if old is not None and new is not None:
            old.copy_(new)


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
def test_the_current_stream_is_used(recipe: str) -> None:
    x, y = operands(recipe, 64, 264, 512), operands(recipe, 64, 264, 512, seed=1)
    d = output(x)
    call(x, d)  # loaded; bound for another stream
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late_inputs(x, y)
        call(x, d)
        result = d.clone()
    stream.synchronize()
    right(y, result)


@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs(recipe: str) -> None:
    """Row-major scales: the transform is captured too, with its memory."""
    x, y = operands(recipe, 130, 264, 1024), operands(recipe, 130, 264, 1024, seed=1)
    d = output(x)
    call(x, d)
    graph = torch.cuda.CUDAGraph()
    d.copy_(output(x))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call(x, d)
        call(x, d, d)
    torch.cuda.synchronize()
    assert untouched(d)
    for z in (x, y, x):
        copy = Operands(recipe, *(None if t is None else t.clone() for t in vars_of(z).values()))  # type: ignore[arg-type]
        late_inputs(x, copy)
        graph.replay()
        expected = z.product("bf16")
        check_close(d, z.product("bf16", c=expected), recipe=recipe, d_dtype="bf16")


ROWWISE = GemmProblem(264, 512, "fp8_rowwise", 70)


def test_the_first_call_may_be_captured(cache_dir: Path) -> None:
    """A kernel that the cache has on disk is loaded during the capture."""
    x = operands("fp8_rowwise", 70, 264, 512)
    d = output(x)
    with settings.override(tile_m=64, tile_n=56, cluster=(1, 1), split_k=1, swap_ab=False, stages=3):
        builder.build(spec_of(ROWWISE))
        builder.forget()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with settings.override(jit="forbid"), torch.cuda.graph(graph):
            call(x, d)
    torch.cuda.synchronize()
    assert untouched(d)
    graph.replay()
    right(x, d)


CAPTURED_FIRST = """
import torch
import jitgemm
from benchmarks.operands import Operands, random_matrix
from jitgemm.reference.gemm import check_close
from jitgemm.reference.quantize import per_block_cast_to_fp8, per_token_cast_to_fp8

generator = torch.Generator("cuda").manual_seed(0)
a, b = (random_matrix(rows, 512, generator) for rows in (70, 264))
x = Operands({recipe!r}, a, None, b, None)
if x.recipe != "bf16":  # cast without a kernel
    x = Operands(x.recipe, *per_token_cast_to_fp8(a), *per_block_cast_to_fp8(b))
d = torch.zeros(70, 264, dtype=torch.bfloat16, device="cuda")
a, b = (x.a, x.b) if x.a_scales is None else ((x.a, x.a_scales), (x.b, x.b_scales))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    (jitgemm.bf16_gemm_nt if x.a_scales is None else jitgemm.fp8_gemm_nt)(a, b, d)
torch.cuda.synchronize()
assert not d.any()
graph.replay()
check_close(d, x.product("bf16"), recipe={recipe!r}, d_dtype="bf16")
print("right")
"""


@pytest.mark.parametrize("pdl", ["0", "1"])
@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
def test_the_first_call_of_a_process_may_be_captured(recipe: str, pdl: str, tmp_path: Path) -> None:
    """With nothing loaded, and with row-major scales: their transform is captured too."""
    device = device_facts(0)[0]
    with settings.override(cache_dir=tmp_path):
        for spec in enumerate_specs(GemmProblem(264, 512, recipe), device):
            builder.build(spec)
    variables = environment(JITGEMM_CACHE_DIR=str(tmp_path), JITGEMM_JIT="forbid", JITGEMM_PDL=pdl)
    command = (sys.executable, "-c", CAPTURED_FIRST.format(recipe=recipe))
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.parametrize("captured", [False, True])
def test_a_kernel_that_is_not_cached_may_not_be_compiled(cache_dir: Path, captured: bool) -> None:
    x = operands("fp8_rowwise", 70, 264, 512)
    d = output(x)
    values = {"tile_m": 64, "tile_n": 56, "cluster": (1, 1), "split_k": 1, "swap_ab": False, "jit": "forbid"}
    with settings.override(**values, stages=4 + captured):
        key = cache_key(spec_of(ROWWISE))
        with pytest.raises(CacheMissError, match=f"{key}.*jitgemm prewarm"):
            if captured:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    call(x, d)
            else:
                call(x, d)
    torch.cuda.synchronize()
    assert untouched(d)
    call(x, d)  # and without the settings, all is well
    right(x, d)


def test_nothing_is_compiled_during_a_capture(cache_dir: Path) -> None:
    x = operands("fp8_rowwise", 70, 264, 512)
    d = output(x)
    with settings.override(tile_m=64, tile_n=56, cluster=(1, 1), split_k=1, swap_ab=False, stages=6):
        key = cache_key(spec_of(ROWWISE))
        with (
            pytest.raises(CacheMissError, match=f"{key}.*a CUDA graph is being captured; .*jitgemm prewarm"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            call(x, d)
        torch.cuda.synchronize()
        assert untouched(d)
        call(x, d)
        right(x, d)
        graph = torch.cuda.CUDAGraph()
        d.copy_(output(x))
        with torch.cuda.graph(graph):
            call(x, d)
        graph.replay()
        right(x, d)


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
def test_a_captured_chain_with_programmatic_launch(recipe: str) -> None:
    """Each call reads what the kernel before it wrote: its own D, as C."""
    x = operands(recipe, 130, 264, 1024)
    d, expected = output(x), None
    assert not jitgemm.get_pdl()
    jitgemm.set_pdl(True)
    try:
        assert jitgemm.get_pdl()
        for _ in range(2):
            call(x, d)
            for _ in range(7):
                call(x, d, d)
            graph = torch.cuda.CUDAGraph()
            expected = d.clone()
            d.copy_(output(x))
            with torch.cuda.graph(graph):
                call(x, d)
                for _ in range(7):
                    call(x, d, d)
            graph.replay()
            assert same_bits(d, expected)
    finally:
        jitgemm.set_pdl(False)
    once = output(x)
    call(x, once)
    for _ in range(7):
        call(x, once, once)
    assert same_bits(d, once)


@pytest.mark.parametrize("scales", ["as they are", "transposed"])
def test_weights_written_by_the_kernel_before(scales: str) -> None:
    """A captured call waits for the kernel that writes them, and for the transform of b's scales."""
    x, y = (operands("fp8_1x128_1x128", 64, 264, 1024, seed=seed) for seed in (0, 1))
    assert x.a_scales is not None and x.b_scales is not None
    a_scales = jitgemm.get_mn_major_tma_aligned_tensor(x.a_scales)
    b_scales = x.b_scales if scales == "transposed" else jitgemm.get_mn_major_tma_aligned_tensor(x.b_scales)
    z, d = Operands(x.recipe, x.a, a_scales, x.b, b_scales), output(x)
    call(z, d)
    with settings.override(pdl=True):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            if scales != "transposed":
                x.b.copy_(y.b)
                b_scales.copy_(y.b_scales)
            call(z, d)
        graph.replay()
    right(x if scales == "transposed" else Operands(x.recipe, x.a, x.a_scales, y.b, y.b_scales), d)


def in_thread(function: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
@pytest.mark.parametrize("known", [False, True], ids=["new plan", "known plan"])
def test_a_threads_first_cuda_call(recipe: str, known: bool) -> None:
    """Scales are prepared, so that the launch is the first that the thread asks of CUDA."""
    x = operands(recipe, 61 + known, 200, 640)
    if x.a_scales is not None:
        scales = jitgemm.get_mn_major_tma_aligned_tensor(x.a_scales)
        x = Operands(recipe, x.a, scales, x.b, x.b_scales)
    d = output(x)
    if known:
        call(x, d)
        d.copy_(output(x))
    torch.cuda.synchronize()
    in_thread(lambda: call(x, d))
    torch.cuda.synchronize()
    right(x, d)


def test_threads_with_their_own_streams() -> None:
    recipes = sorted(RECIPES)
    failures: list[str] = []
    barrier = threading.Barrier(8)

    def work(index: int) -> None:
        recipe = recipes[index % len(recipes)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = operands(recipe, 40 + 50 * (index // 3), 264, 1024, seed=index)
            first = None
            barrier.wait(60)
            for _ in range(30):
                d = output(x)
                call(x, d)
                first = d if first is None else first
                if not same_bits(d, first):
                    failures.append(f"thread {index}: another result")
            assert first is not None
            right(x, first)

    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert not failures, failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensors_of_another_device(recipe: str) -> None:
    other = torch.device("cuda", 1)
    for device in (other, DEVICE, other):
        x = operands(recipe, 100, 264, 1024, device=device)
        with torch.cuda.device(0):
            d = output(x)
            call(x, d)
            assert torch.cuda.current_device() == 0
        right(x, d)
    with pytest.raises(ProblemError, match="accepted is one device for all"):
        call(x, output(operands(recipe, 100, 264, 1024)))


# -- Torch.


def two_layers(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, w: Tensor) -> Tensor:
    hidden = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    jitgemm.fp8_gemm_nt((a, a_scales), (b, b_scales), hidden)
    out = torch.ones(a.shape[0], w.shape[1], device=a.device)
    jitgemm.bf16_gemm_nn(torch.relu(hidden), w, out, out)
    return out * 2


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="inductor needs a C compiler")
def test_calls_compile_without_graph_breaks() -> None:
    pytest.importorskip("triton")
    compiled = torch.compile(two_layers, fullgraph=True)
    generator = torch.Generator(DEVICE).manual_seed(0)
    w = random_matrix(264, 120, generator)
    for m in (64, 33, 100):
        x = operands("fp8_1x128_128x128", m, 264, 1024)
        arguments = (x.a, x.a_scales, x.b, x.b_scales, w)
        assert torch.equal(compiled(*arguments), two_layers(*arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_operator_passes_opcheck(recipe: str, accumulate: bool) -> None:
    x = operands(recipe, 40, 64, 256)
    d = torch.randn(40, 64, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.jitgemm.gemm.default,
        (x.a, x.a_scales, x.b, x.b_scales, d, None, accumulate, recipe, "nt", False),
        test_utils=checks if recipe == "bf16" else checks[1:],  # torch can't compare FP8 tensors
    )


# -- The loaded kernels.


@pytest.mark.parametrize("m", [1, 100, 8192])
@pytest.mark.parametrize("d_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_loaded_kernels_use_no_local_memory(kind: Kind, d_dtype: str, m: int) -> None:
    recipe, layout, fast_accum = kind
    problem = GemmProblem(2112, 7168, recipe, m, layout, d_dtype, fast_accum)
    device = device_facts(0)[0]
    config = choose_config(problem, device)
    kernel = load(FAMILY.spec(problem, config, device.arch.name), 0)
    attributes = {
        name: driver.function_attribute(kernel.handle, name, 0)
        for name in ("LOCAL_SIZE_BYTES", "NUM_REGS", "MAX_THREADS_PER_BLOCK", "MAX_DYNAMIC_SHARED_SIZE_BYTES")
    }
    assert attributes["LOCAL_SIZE_BYTES"] == 0, config
    assert 0 < attributes["NUM_REGS"] <= 255
    assert attributes["MAX_THREADS_PER_BLOCK"] >= kernel.num_threads == KernelShape(problem, config).num_threads
    assert attributes["MAX_DYNAMIC_SHARED_SIZE_BYTES"] >= kernel.smem_bytes
