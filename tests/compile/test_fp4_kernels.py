"""GEMM kernels with FP4 weights through NVRTC: no spills, no advisories, and MMAs that are not serialized."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jitgemm import builder, settings
from jitgemm.device import H200, SM90A
from jitgemm.families import family_of
from jitgemm.families.base import KernelSpec
from jitgemm.families.fp4 import EXPAND_FP4, FORMATS, helper_specs
from jitgemm.families.gemm import FAMILY, FP4, GemmConfig, GemmProblem, KernelShape
from jitgemm.families.grouped import FAMILY as GROUPED
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics import expansion, gemm, grouped


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that the processes of one test run share."""
    directory = tmp_path_factory.getbasetemp()
    if directory.name.startswith("popen-"):
        directory = directory.parent
    with settings.override(cache_dir=directory / "fp4-kernels"):
        yield


def faults(spec: KernelSpec, shape: KernelShape) -> list[str]:
    """What is wrong with a kernel's use of resources."""
    name, metadata = family_of(spec).describe(spec), builder.build(spec).cubin.metadata
    blocks, smem = shape.blocks_per_sm, family_of(spec).smem_bytes(spec)
    found = [f"{name}: {warning}" for warning in metadata.warnings]
    if metadata.spill_bytes or metadata.stack_bytes:
        found.append(f"{name}: {metadata.spill_bytes} bytes spilled, stack {metadata.stack_bytes}")
    if metadata.registers > SM90A.registers_per_sm // (shape.num_threads * blocks) // 8 * 8:
        found.append(f"{name}: {metadata.registers} registers")
    if smem > SM90A.smem_per_block or blocks * (smem + SM90A.smem_reserved) > SM90A.smem_per_sm:
        found.append(f"{name}: {blocks} blocks of {smem} bytes of shared memory")
    return found


def largest(shapes: dict[GemmConfig, KernelShape]) -> list[GemmConfig]:
    """Of each way to expand weights, number of their rows, with and without chains and split K, the config with most
    sums.
    """
    kinds: dict[tuple[bool, int, bool, bool, int], GemmConfig] = {}
    for config, shape in sorted(shapes.items(), key=lambda item: (item[1].accumulator_registers, item[0])):
        kinds[config.swap_ab, config.tile_n, shape.chain > 1, config.split_k > 1, shape.blocks_per_sm] = config
    return list(kinds.values())


def test_dense_kernels_fit(cache: None) -> None:
    problem = GemmProblem(4096, 7168, FP4, None, "nt", "fp32")
    legal = [c for c in gemm.candidates(problem, ()) if gemm.illegal(problem, c, H200) is None]
    assert legal == list(gemm.candidates(problem, ()))
    shapes = {config: KernelShape(problem, config) for config in legal}
    assert {shape.chain > 1 for shape in shapes.values()} == {True, False}
    found = []
    for config in largest(shapes):
        found += faults(FAMILY.spec(problem, config, SM90A.name), shapes[config])
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("recipe", "at_once", "of_groups"),
    [
        ("fp8_1x32_fp4_1x32", {1, 2, 4}, ("32x128x128 s8 swap", "128x128x128 s7 swap")),
        ("fp8_1x128_nvfp4_1x16", {2, 4, 8}, ("16x64x128 s8 swap", "64x128x128 s8 swap")),
    ],
)
def test_kernels_that_sum_parts_fit(cache: None, recipe: str, at_once: set[int], of_groups: tuple[str, ...]) -> None:
    """Of each number of parts that are waited for together, the widest."""
    problem = GemmProblem(4096, 7168, recipe, None, "nt", "fp32")
    legal = [c for c in gemm.candidates(problem, ()) if gemm.illegal(problem, c, H200) is None]
    kinds: dict[tuple[int, int, bool], GemmConfig] = {}
    for config in sorted(legal):
        shape = KernelShape(problem, config)
        kinds[shape.parts_at_once, config.tile_n, config.split_k > 1] = config
    assert {together for together, *_ in kinds} == at_once
    found = []
    for config in kinds.values():
        found += faults(FAMILY.spec(problem, config, SM90A.name), KernelShape(problem, config))
    grouped_problem = GroupedProblem(4096, 7168, problem.recipe, 8, "psum", d_dtype="fp32", alignment=1)
    for text in of_groups:
        config = GemmConfig.from_text(text)
        assert grouped.illegal(grouped_problem, config, H200) is None
        found += faults(GROUPED.spec(grouped_problem, config, SM90A.name), grouped_problem.shape(config))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("epilogue", "d_dtype"),
    [(None, "bf16"), (None, "fp32"), ("linear", "fp32"), ("swiglu", "bf16"), ("swiglu", "e4m3")],
)
def test_kernels_for_many_rows_fit(cache: None, epilogue: str | None, d_dtype: str) -> None:
    """All: there are few."""
    asked = GemmProblem(4096, 7168, FP4, None, "nt", d_dtype, epilogue=epilogue)
    found = []
    for problem, fewest in ((expansion.expanded(asked), 2), (expansion.far(asked), 1)):
        legal = [c for c in gemm.candidates(problem, ()) if gemm.illegal(problem, c, H200) is None]
        assert len(legal) >= fewest
        for config in legal:
            found += faults(FAMILY.spec(problem, config, SM90A.name), KernelShape(problem, config))
    assert not found, "\n".join(found)


def test_the_kernel_that_expands_weights_fits(cache: None) -> None:
    metadata = builder.build(EXPAND_FP4.spec(SM90A.name)).cubin.metadata
    assert (metadata.spill_bytes, metadata.stack_bytes, metadata.warnings) == (0, 0, ())
    assert 2048 * metadata.registers <= SM90A.registers_per_sm  # as many threads as an SM has


@pytest.mark.parametrize("fp4_group", FORMATS.values())
def test_the_kernels_beside_gemms_fit(cache: None, fp4_group: int) -> None:
    for spec in helper_specs(fp4_group, SM90A.name):
        metadata = builder.build(spec).cubin.metadata
        assert (metadata.spill_bytes, metadata.stack_bytes, metadata.warnings) == (0, 0, ())


@pytest.mark.parametrize(("kind", "alignment", "d_dtype"), [("masked", 128, "fp32"), ("psum", 1, "bf16")])
def test_grouped_kernels_fit(cache: None, kind: str, alignment: int, d_dtype: str) -> None:
    problem = GroupedProblem(4096, 7168, FP4, 8, kind, None, d_dtype=d_dtype, alignment=alignment)
    legal = [c for c in grouped.candidates(problem) if grouped.illegal(problem, c, H200) is None]
    assert max(config.tile_m for config in legal) == 128
    shapes = {config: problem.shape(config) for config in legal}
    found = []
    for config in largest(shapes):
        found += faults(GROUPED.spec(problem, config, SM90A.name), shapes[config])
    assert not found, "\n".join(found)


def test_the_source_names_its_kernel(cache: None) -> None:
    spec = FAMILY.spec(GemmProblem(1, 1, FP4), GemmConfig.from_text("8x64x128 s12 swap"), SM90A.name)
    assert builder.build(spec).cubin.metadata.kernel_name == "jitgemm_fp8_fp4_gemm_nt"
