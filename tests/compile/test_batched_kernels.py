"""Kernels of batches and of groups along K through NVRTC: no spills, no advisories, shared memory within its limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jitgemm import builder, settings
from jitgemm.device import H200, PRESETS, SM90A
from jitgemm.families.batched import FAMILY, KINDS, BatchedProblem
from jitgemm.families.gemm import GemmConfig, kernel_shape
from jitgemm.heuristics.batched import candidates, chooser, enumerate_configs, enumerate_specs, illegal

ROWS, BLOCKS = "fp8_1x128_1x128", "fp8_1x128_128x128"
PROBLEMS = {
    "heads fp8": BatchedProblem(1024, 4096, BLOCKS, 8),
    "heads fp8 rows": BatchedProblem(4096, 4096, ROWS, 8, d_dtype="fp32"),
    "heads nt": BatchedProblem(1024, 4096, "bf16", 8),
    "heads nn": BatchedProblem(512, 128, "bf16", 128, layout="nn"),
    "sum": BatchedProblem(384, 128 * 94, "bf16", 44, "batch_sum", d_dtype="fp32"),
    "k fp8": BatchedProblem(7168, 4096, ROWS, 8, "k_grouped", d_dtype="fp32"),
    "k bf16": BatchedProblem(2048, 4096, "bf16", 8, "k_grouped", layout="tn", d_dtype="fp32"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that the processes of one test run share."""
    directory = tmp_path_factory.getbasetemp()
    if directory.name.startswith("popen-"):
        directory = directory.parent
    with settings.override(cache_dir=directory / "batched-kernels"):
        yield


def faults(problem: BatchedProblem, config: GemmConfig) -> list[str]:
    """What is wrong with a kernel's use of resources."""
    spec, shape = FAMILY.spec(problem, config, SM90A.name), kernel_shape(problem.dense.without_sizes(), config)
    metadata = builder.build(spec).cubin.metadata
    found = [f"{FAMILY.describe(spec)}: {warning}" for warning in metadata.warnings]
    if metadata.spill_bytes or metadata.stack_bytes:
        found.append(f"{FAMILY.describe(spec)}: {metadata.spill_bytes} bytes spilled, stack {metadata.stack_bytes}")
    if metadata.registers > SM90A.registers_per_sm // (shape.num_threads * shape.blocks_per_sm) // 8 * 8:
        found.append(f"{FAMILY.describe(spec)}: {metadata.registers} registers")
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_largest_kernels_that_are_chosen_fit(cache: None, name: str) -> None:
    problem = PROBLEMS[name]

    def sums(config: GemmConfig) -> int:
        return kernel_shape(problem.dense.without_sizes(), config).accumulator_registers

    chosen = sorted(enumerate_configs(problem, H200), key=lambda config: (sums(config), config))
    found = []
    for config in (chosen[0], *chosen[-3:]):
        found += faults(problem, config)
    assert not found, "\n".join(found)


def test_every_legal_config_fits_into_shared_memory() -> None:
    for problem in PROBLEMS.values():
        for config in candidates(problem, ()):
            if illegal(problem, config, H200) is None:
                shape = kernel_shape(problem.dense.without_sizes(), config)
                smem = FAMILY.smem_bytes(FAMILY.spec(problem, config, SM90A.name))
                assert smem <= SM90A.smem_per_block
                assert shape.blocks_per_sm * (smem + SM90A.smem_reserved) <= SM90A.smem_per_sm


def test_enumeration_covers_every_choice() -> None:
    for problem in PROBLEMS.values():
        for device in PRESETS.values():
            specs = set(enumerate_specs(problem, device))
            for m in (1, 7, 100, 192, 333, 5000, 10**6):
                config = chooser(problem, device)(m)
                assert illegal(problem, config, device) is None
                assert FAMILY.spec(problem.with_m(m), config, device.arch.name) in specs


def test_names_say_what_the_kernels_do() -> None:
    config = GemmConfig.from_text("64x64x128 s4")
    names = {FAMILY.kernel_name(FAMILY.spec(problem, config, SM90A.name)) for problem in PROBLEMS.values()}
    assert "jitgemm_batched_fp8_gemm_nt" in names
    assert "jitgemm_k_grouped_bf16_gemm_tn" in names
    assert all("gemm_" in name for name in names)
    assert {problem.kind for problem in PROBLEMS.values()} == set(KINDS)
