"""Dense GEMM problems, configs, and the kernels and launches that follow from them; no driver is needed."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jitgemm.device import H200, SM90A
from jitgemm.errors import ProblemError
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.gemm import (
    D_DTYPES,
    FAMILY,
    LAYOUTS,
    RECIPES,
    SCALE_GROUP,
    GemmConfig,
    GemmProblem,
    KernelShape,
)
from jitgemm.families.gemm_launch import GemmGeometry, Matrix, ScaleStrides, raster_group
from jitgemm.heuristics.gemm import candidates, illegal
from jitgemm.kernel import Kernel
from jitgemm.reference import gemm as reference
from jitgemm.render import render

SIZE = st.one_of(st.integers(1, 300), st.integers(1, 2**31 - 1))


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, Any]:
    recipe = draw(st.sampled_from(sorted(RECIPES)))
    fast = RECIPES[recipe].a_scales in ("row", "tensor") and draw(st.booleans())
    layout = "nt" if RECIPES[recipe].is_fp8 else draw(st.sampled_from(LAYOUTS))
    d_dtype = draw(st.sampled_from(sorted(D_DTYPES)))
    return {"recipe": recipe, "layout": layout, "d_dtype": d_dtype, "fast_accum": fast}


@st.composite
def problems(draw: st.DrawFn, size: st.SearchStrategy[int] = SIZE) -> GemmProblem:
    return GemmProblem(n=draw(size), k=draw(size), m=draw(size), **draw(kinds()))


@st.composite
def kernels(draw: st.DrawFn) -> tuple[GemmProblem, GemmConfig]:
    """A problem of moderate size and any config that is legal for it."""
    problem = draw(problems(st.integers(1, 5000)))
    tiles = st.tuples(st.sampled_from((8, 16, 40, 64, 128, 256)), st.sampled_from((16, 48, 64, 72, 128, 144, 256)))
    forced = tiles.map(lambda tile: (("tile_m", tile[0]), ("tile_n", tile[1])))
    overrides = draw(st.one_of(st.just(()), forced))
    legal = [config for config in candidates(problem, overrides) if illegal(problem, config, H200) is None]
    assume(legal)
    return problem, draw(st.sampled_from(legal))


# -- Problems.


@given(problems())
def test_problems_survive_json(problem: GemmProblem) -> None:
    assert GemmProblem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem
    without = problem.without_m()
    assert without.m is None
    assert "m" not in without.to_dict()
    assert GemmProblem.from_dict(without.to_dict()) == without
    assert without.with_m(problem.m or 0) == problem
    assert hash(without.with_m(problem.m or 0)) == hash(problem)


def test_kind_and_defaults_may_be_left_out() -> None:
    assert GemmProblem.from_dict({"n": 8, "k": 16, "recipe": "bf16"}) == GemmProblem(8, 16, "bf16")


def test_empty_m_is_a_problem() -> None:
    assert GemmProblem(8, 16, "bf16", m=0).m == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "fp4"}, "recipe is 'fp4'; accepted are .*fp8_rowwise.*bf16"),
        ({"recipe": None}, "recipe is None"),
        ({"n": 0}, r"n is 0; accepted is an integer from 1 to 2\*\*31 - 1"),
        ({"n": -3}, "n is -3"),
        ({"n": 2**31}, "n is 2147483648"),
        ({"n": 8.0}, "n is 8.0; accepted is an integer"),
        ({"n": True}, "n is True; accepted is an integer"),
        ({"n": "8"}, "n is '8'; accepted is an integer"),
        ({"n": None}, "n is None"),
        ({"k": 0}, "k is 0; accepted is an integer from 1"),
        ({"k": 2**31}, "k is 2147483648"),
        ({"m": -1}, "m is -1; accepted is an integer from 0"),
        ({"m": 1.5}, "m is 1.5"),
        ({"m": 2**31}, "m is 2147483648"),
        ({"layout": "xx"}, "layout is 'xx'; accepted are nt, nn, tn, tt"),
        ({"layout": None}, "layout is None"),
        ({"recipe": "fp8_rowwise", "layout": "nn"}, "layout is 'nn'; FP8 operands must be nt"),
        ({"d_dtype": "fp16"}, "d_dtype is 'fp16'; accepted are bf16, fp32"),
        ({"fast_accum": 1}, "fast_accum is 1; accepted is a boolean"),
        ({"fast_accum": True}, "fast_accum is True; recipe bf16 does not allow it"),
        ({"recipe": "fp8_1x128_128x128", "fast_accum": True}, "recipe fp8_1x128_128x128 does not allow it"),
        ({"kind": "grouped"}, "kind is 'grouped'; accepted is gemm"),
        ({"transposed": 1}, "unknown field 'transposed'; known are d_dtype, epilogue, fast_accum"),
    ],
)
def test_bad_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message) as caught:
        GemmProblem.from_dict({"kind": "gemm", "n": 8, "k": 16, "recipe": "bf16", **change})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["n", "k", "recipe"])
def test_missing_fields(name: str) -> None:
    data = {"n": 8, "k": 16, "recipe": "bf16"}
    del data[name]
    with pytest.raises(ProblemError, match=f"field '{name}' is missing"):
        GemmProblem.from_dict(data)


@pytest.mark.parametrize("data", [[], "gemm", None, 3])
def test_what_is_no_object(data: Any) -> None:
    with pytest.raises(ProblemError, match="accepted is a JSON object"):
        GemmProblem.from_dict(data)


def test_the_reference_knows_the_same_kinds() -> None:
    assert set(RECIPES) == set(reference.SCALE_GROUPS)
    assert set(LAYOUTS) == set(reference.LAYOUTS)
    assert set(D_DTYPES) == set(reference.D_DTYPES)
    granularity = {"none": None, "row_k": (1, 128), "block_k": (128, 128), "row": (1, None), "tensor": (None, None)}
    for name, recipe in RECIPES.items():
        expected = reference.SCALE_GROUPS[name] or (None, None)
        assert (granularity[recipe.a_scales], granularity[recipe.b_scales]) == expected


# -- Kernels.


@given(kernels())
@settings(deadline=None, max_examples=60)
def test_a_spec_holds_all_that_decides_a_kernel(kernel: tuple[GemmProblem, GemmConfig]) -> None:
    problem, config = kernel
    spec = FAMILY.spec(problem, config, "sm_90a")
    again = KernelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert family_of(spec) is FAMILY
    shape, of_spec = KernelShape(problem, config), FAMILY.shape(again)
    assert of_spec.config == config
    for name in ("recipe", "layout", "d_dtype", "fast_accum", "promotes"):
        assert getattr(of_spec.problem, name) == getattr(problem, name)
    assert FAMILY.smem_bytes(spec) == shape.smem_bytes
    assert FAMILY.num_threads(spec) == shape.num_threads
    assert problem.recipe in FAMILY.describe(spec)
    assert str(config) in FAMILY.describe(spec)
    sizes = {name: value % 97 + 1 for name, value in (("m", problem.m or 0), ("n", problem.n), ("k", problem.k))}
    assert FAMILY.spec(dataclasses.replace(problem, **sizes), config, "sm_90a") == spec  # type: ignore[arg-type]


@given(kernels(), kernels())
@settings(deadline=None, max_examples=50)
def test_kernels_that_differ_have_specs_that_differ(
    one: tuple[GemmProblem, GemmConfig], other: tuple[GemmProblem, GemmConfig]
) -> None:
    def kind(problem: GemmProblem) -> GemmProblem:
        return dataclasses.replace(problem, m=None, n=1, k=1)

    same = (kind(one[0]), one[1]) == (kind(other[0]), other[1])
    assert (FAMILY.spec(*one, "sm_90a") == FAMILY.spec(*other, "sm_90a")) == same


@given(kernels())
@settings(deadline=None, max_examples=60)
def test_shared_memory_adds_up(kernel: tuple[GemmProblem, GemmConfig]) -> None:
    problem, config = kernel
    shape = KernelShape(problem, config)
    rows, columns = (config.tile_n, config.tile_m) if config.swap_ab else (config.tile_m, config.tile_n)
    assert (shape.mma_m, shape.mma_n) == (rows, columns)
    assert config.tile_k * problem.traits.operand_bytes == 128
    assert shape.waves * shape.math_warpgroups * 64 == rows
    assert shape.num_threads == 128 * (shape.math_warpgroups + 1)
    # Slots of the ring start swizzle repeats and hold what a stage loads.
    assert shape.m_side_bytes % 1024 == shape.n_side_bytes % 1024 == 0
    assert shape.m_side_bytes == rows * 128
    assert shape.n_side_bytes >= shape.n_side_rows * 128 >= columns * 128
    per_row = {"row_k": 4}
    scales = rows * per_row.get(shape.m_side_scales, 0) + columns * per_row.get(shape.n_side_scales, 0)
    assert scales <= shape.scale_bytes <= scales + 2 * 127
    # The staging area lies behind the ring; slack for alignment and the barriers come on top.
    assert shape.staging_offset % 1024 == 0
    assert shape.staging_offset >= config.stages * shape.stage_bytes
    assert shape.staging_offset >= shape.partial_bytes
    assert shape.partial_bytes == (rows * columns * 4 if config.split_k > 1 else 0)
    assert columns % shape.store_columns == 0
    assert shape.staging_wave_bytes >= 64 * shape.store_columns * shape.d_bytes
    assert shape.staging_wave_bytes % 1024 == 0
    assert shape.staging_bytes == shape.staging_wave_bytes * shape.waves * shape.math_warpgroups
    assert shape.smem_bytes == 1024 + shape.staging_offset + shape.staging_bytes + 16 * config.stages
    used = shape.blocks_per_sm * (shape.smem_bytes + SM90A.smem_reserved)
    assert used <= SM90A.smem_per_sm
    assert shape.num_threads * shape.blocks_per_sm <= 2048


@given(kernels())
@settings(deadline=None, max_examples=30)
def test_every_kernel_renders(kernel: tuple[GemmProblem, GemmConfig]) -> None:
    spec = FAMILY.spec(*kernel, "sm_90a")
    source = render(spec)
    assert source == render(spec)
    assert source.name == FAMILY.kernel_name(spec) in source.text
    assert "{{" not in source.text


@pytest.mark.parametrize("tile_n", range(8, 257, 8))
def test_scale_blocks_that_a_tile_can_touch(tile_n: int) -> None:
    shape = KernelShape(GemmProblem(1, 1, "fp8_1x128_128x128"), GemmConfig(128, tile_n, 128, 4))
    starts = range(0, tile_n * 128, tile_n)
    touched = [(start + tile_n - 1) // SCALE_GROUP - start // SCALE_GROUP + 1 for start in starts]
    assert shape.column_scale_blocks == max(touched)


@given(kernels())
@settings(deadline=None)
def test_configs_are_read_as_they_are_shown(kernel: tuple[GemmProblem, GemmConfig]) -> None:
    assert GemmConfig.from_text(str(kernel[1])) == kernel[1]


@pytest.mark.parametrize(
    "text", ["", "64x64", "64x64x128", "64x64x128 s0", "64x64x128 s4 swap k2", " 64x64x128 s4", "64x64x128 s4\n"]
)
def test_what_is_no_config(text: str) -> None:
    with pytest.raises(ValueError, match="accepted is text such as '64x48x128 s12"):
        GemmConfig.from_text(text)


def test_configs_are_shown_and_stored_in_full() -> None:
    config = GemmConfig(64, 128, 128, 6, 2, 1, 1, True)
    assert str(config) == "64x128x128 s6 c2x1 swap"
    assert str(GemmConfig(64, 32, 64, 8, split_k=4)) == "64x32x64 s8 k4"
    assert GemmConfig(**json.loads(json.dumps(config.to_dict()))) == config


# -- Launches.


def geometry_of(
    problem: GemmProblem, config: GemmConfig, num_sms: int = 132, d_stride: int | None = None
) -> GemmGeometry:
    """Of contiguous operands, for a kernel that is not loaded."""
    assert problem.m is not None
    spec = FAMILY.spec(problem, config, "sm_90a")
    kernel = Kernel(spec, 0, 0, FAMILY.num_threads(spec), FAMILY.smem_bytes(spec), library=None)
    m, n, k = problem.m, problem.n, problem.k
    a, b = ((rows, k) if major == "k" else (k, rows) for rows, major in ((m, problem.a_major), (n, problem.b_major)))
    unit = 16 // problem.traits.operand_bytes
    return GemmGeometry(
        problem,
        config,
        kernel,
        *(Matrix(rows, columns, -(-columns // unit) * unit) for rows, columns in (a, b)),
        Matrix(m, n, d_stride or n),
        0,
        *(ScaleStrides(1, -(-rows // 4) * 4) for rows in (m, n)),
        num_sms=num_sms,
    )


def locate(index: int, clusters_m: int, clusters_n: int, group: int) -> tuple[int, int]:
    """``TileRaster.locate`` of templates/include/scheduler.cuh."""
    first_m = index // (group * clusters_n) * group
    rows = min(group, clusters_m - first_m)
    in_group = index % (group * clusters_n)
    return first_m + in_group % rows, in_group // rows


@given(kernels(), st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_every_tile_is_computed_once(kernel: tuple[GemmProblem, GemmConfig], num_sms: int) -> None:
    problem, config = kernel
    assert problem.m is not None
    geometry = geometry_of(problem, config, num_sms)
    blocks, y, z = geometry.grid
    size = config.cluster_m * config.cluster_n * config.split_k
    assert (y, z) == (1, 1)
    assert blocks > 0
    assert blocks % size == 0
    clusters_m = -(-problem.m // (config.tile_m * config.cluster_m))
    clusters_n = -(-problem.n // (config.tile_n * config.cluster_n))
    count = clusters_m * clusters_n
    assume(count <= 20_000)
    group = raster_group(problem.m, config, num_sms)
    assert 1 <= group <= clusters_m
    if config.split_k > 1:
        assert blocks == count * size  # such a cluster computes one tile
    else:
        shape = KernelShape(problem, config)
        assert blocks <= max(size, num_sms * shape.blocks_per_sm)
        assert blocks // size <= count  # no cluster is without a tile
    visits = Counter(
        locate(index, clusters_m, clusters_n, group)
        for first in range(blocks // size)
        for index in range(first, count, blocks // size)
    )
    assert set(visits) == {(m, n) for m in range(clusters_m) for n in range(clusters_n)}
    assert set(visits.values()) == {1}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 64))
def test_the_raster_walks_a_group_before_n_advances(clusters_m: int, clusters_n: int, group: int) -> None:
    order = [locate(index, clusters_m, clusters_n, group) for index in range(clusters_m * clusters_n)]
    assert len(set(order)) == len(order)
    assert sorted(order, key=lambda tile: (tile[0] // group, tile[1], tile[0])) == order


def test_a_single_block_still_covers_everything() -> None:
    problem, config = GemmProblem(576, 512, "bf16", m=300), GemmConfig(128, 64, 64, 4, 2, 1)
    assert geometry_of(problem, config, num_sms=1).grid == (2, 1, 1)  # a whole cluster


@pytest.mark.parametrize("num_sms", [1, 2, 7, 64, 131, 132])
def test_blocks_share_tiles_evenly(num_sms: int) -> None:
    problem, config = GemmProblem(4096, 512, "bf16", m=4096), GemmConfig(128, 128, 64, 5)
    blocks = geometry_of(problem, config, num_sms).grid[0]
    tiles = 32 * 32
    assert blocks <= num_sms
    assert -(-tiles // blocks) == -(-tiles // num_sms)  # no more than with every multiprocessor
