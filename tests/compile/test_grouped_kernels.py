"""Grouped GEMM kernels through NVRTC: no spills, no advisories, and shared memory within its limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jitgemm import builder, settings
from jitgemm.compiler import CubinMetadata
from jitgemm.device import H200, PRESETS, SM90A
from jitgemm.families.gemm import GemmConfig
from jitgemm.families.grouped import FAMILY, GROUPINGS, GroupedProblem
from jitgemm.heuristics.grouped import candidates, enumerate_configs, enumerate_specs, illegal

KINDS = [("fp8_1x128_128x128", "nt"), ("bf16", "nt"), ("bf16", "nn")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that the processes of one test run share."""
    directory = tmp_path_factory.getbasetemp()
    if directory.name.startswith("popen-"):
        directory = directory.parent
    with settings.override(cache_dir=directory / "grouped-kernels"):
        yield


def compiled(problem: GroupedProblem, config: GemmConfig) -> CubinMetadata:
    return builder.build(FAMILY.spec(problem, config, SM90A.name)).cubin.metadata


def faults(problem: GroupedProblem, config: GemmConfig) -> list[str]:
    """What is wrong with a kernel's use of resources."""
    spec, shape = FAMILY.spec(problem, config, SM90A.name), problem.shape(config)
    metadata = compiled(problem, config)
    found = [f"{FAMILY.describe(spec)}: {warning}" for warning in metadata.warnings]
    if metadata.spill_bytes or metadata.stack_bytes:
        found.append(f"{FAMILY.describe(spec)}: {metadata.spill_bytes} bytes spilled, stack {metadata.stack_bytes}")
    blocks, smem = shape.blocks_per_sm, FAMILY.smem_bytes(spec)
    if metadata.registers > SM90A.registers_per_sm // (shape.num_threads * blocks) // 8 * 8:
        found.append(f"{FAMILY.describe(spec)}: {metadata.registers} registers")
    if smem > SM90A.smem_per_block or blocks * (smem + SM90A.smem_reserved) > SM90A.smem_per_sm:
        found.append(f"{FAMILY.describe(spec)}: {blocks} blocks of {smem} bytes of shared memory")
    return found


@pytest.mark.parametrize("kind", GROUPINGS)
@pytest.mark.parametrize(("recipe", "layout"), KINDS)
def test_the_largest_kernels_of_every_kind_fit(cache: None, kind: str, recipe: str, layout: str) -> None:
    problem = GroupedProblem(4096, 4096, recipe, 8, kind, None, layout)
    legal = [c for c in candidates(problem) if illegal(problem, c, H200) is None]

    def sums(config: GemmConfig) -> int:
        return problem.shape(config).accumulator_registers

    shapes: dict[tuple[int, bool], list[GemmConfig]] = {}
    for config in legal:
        shapes.setdefault((config.tile_n if config.swap_ab else config.tile_m, config.swap_ab), []).append(config)
    largest = sorted((max(configs, key=lambda c: (sums(c), c)) for configs in shapes.values()), key=sums)
    chosen = largest if kind == "masked" else largest[-2:]  # the kinds differ in the producer alone
    found = []
    for config in sorted(chosen):
        found += faults(problem, config)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
def test_kernels_that_are_chosen_fit(cache: None, d_dtype: str) -> None:
    problem = GroupedProblem(7168, 2048, "fp8_1x128_128x128", 32, "masked", None, "nt", d_dtype)
    found = []
    for config in enumerate_configs(problem, H200):
        found += faults(problem, config)
    assert not found, "\n".join(found)


def test_shared_memory_has_room_for_the_queue_whatever_the_config() -> None:
    for recipe, layout in KINDS:
        for d_dtype in ("bf16", "fp32"):
            for kind, alignment in (("masked", 128), ("psum", 1)):
                problem = GroupedProblem(4096, 4096, recipe, 8, kind, None, layout, d_dtype, alignment)
                check_room(problem)


def check_room(problem: GroupedProblem) -> None:
    for config in candidates(problem):
        if illegal(problem, config, H200) is not None:
            continue
        smem = FAMILY.smem_bytes(FAMILY.spec(problem, config, SM90A.name))
        blocks = problem.shape(config).blocks_per_sm
        assert smem <= SM90A.smem_per_block
        assert blocks * (smem + SM90A.smem_reserved) <= SM90A.smem_per_sm


def test_kernels_for_scales_that_start_anywhere_fit(cache: None) -> None:
    problem = GroupedProblem(4096, 4096, "fp8_1x128_128x128", 8, "psum", None, alignment=1)
    legal = [config for config in candidates(problem) if illegal(problem, config, H200) is None]
    assert max(config.tile_m for config in legal) == 192
    shapes = {(config.tile_n if config.swap_ab else config.tile_m, config.swap_ab) for config in legal}
    found = []
    for mma_m, swap_ab in shapes:
        of_shape = [c for c in legal if (c.tile_n if swap_ab else c.tile_m, c.swap_ab) == (mma_m, swap_ab)]
        found += faults(problem, max(of_shape, key=lambda c: (problem.shape(c).accumulator_registers, c)))
    assert not found, "\n".join(found)
    assert problem.scale_slack == 4
    for alignment in (4, 8, 48):
        assert GroupedProblem(4096, 4096, "fp8_1x128_128x128", 8, "psum", None, alignment=alignment).scale_slack == 0


def test_enumeration_covers_every_choice() -> None:
    from jitgemm.heuristics.grouped import chooser

    for kind in GROUPINGS:
        for device in PRESETS.values():
            problem = GroupedProblem(4096, 7168, "fp8_1x128_128x128", 8, kind)
            specs = set(enumerate_specs(problem, device))
            for m in (1, 7, 100, 192, 333, 5000, 10**6):
                config = chooser(problem, device)(m)
                assert illegal(problem, config, device) is None
                assert FAMILY.spec(problem.with_m(m), config, device.arch.name) in specs


def test_the_source_names_its_kernel(cache: None) -> None:
    problem = GroupedProblem(4096, 4096, "fp8_1x128_128x128", 8, "masked")
    metadata = compiled(problem, GemmConfig.from_text("8x64x128 s12 swap"))
    assert metadata.kernel_name == "jitgemm_m_grouped_fp8_gemm_nt_masked"
