"""Kernels with epilogues through NVRTC: no spills, no advisories, and shared memory within its limits."""

from __future__ import annotations

import pytest

from jitgemm.compiler import compile_source
from jitgemm.device import H200, SM90A
from jitgemm.families import gemm, grouped
from jitgemm.families.gemm import FP4, GemmConfig, GemmProblem, kernel_shape
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics import gemm as dense_heuristics
from jitgemm.heuristics import grouped as grouped_heuristics
from jitgemm.render import render

KINDS = [
    (recipe, d_dtype, epilogue)
    for recipe in ("fp8_1x128_128x128", "bf16")
    for d_dtype, epilogue in (("e4m3", "swiglu"), ("bf16", "swiglu"), ("e4m3_ue8m0", "linear"), ("fp32", "linear"))
]


def legal_configs(problem: GemmProblem | GroupedProblem) -> list[GemmConfig]:
    """One of each tile that calls choose from."""
    if isinstance(problem, GroupedProblem):
        offered = grouped_heuristics.candidates(problem)
        legal = [c for c in offered if grouped_heuristics.illegal(problem, c, H200) is None]
    else:
        offered = dense_heuristics.candidates(problem, ())
        legal = [c for c in offered if dense_heuristics.illegal(problem, c, H200) is None]
    return list({(c.tile_m, c.tile_n, c.swap_ab): c for c in legal}.values())


def faults(problem: GemmProblem | GroupedProblem, config: GemmConfig) -> list[str]:
    """What is wrong with a kernel's use of resources."""
    family = grouped.FAMILY if isinstance(problem, GroupedProblem) else gemm.FAMILY
    spec = family.spec(problem, config, SM90A.name)  # type: ignore[arg-type]
    metadata = compile_source(render(spec), spec, "0" * 64).metadata
    found = [f"{family.describe(spec)}: {warning}" for warning in metadata.warnings]
    if metadata.spill_bytes or metadata.stack_bytes:
        found.append(f"{family.describe(spec)}: {metadata.spill_bytes} bytes spilled, stack {metadata.stack_bytes}")
    if family.smem_bytes(spec) > SM90A.smem_per_block:
        found.append(f"{family.describe(spec)}: {family.smem_bytes(spec)} bytes of shared memory")
    return found


@pytest.mark.parametrize(("recipe", "d_dtype", "epilogue"), KINDS)
@pytest.mark.parametrize("is_grouped", [False, True])
def test_the_largest_kernels_fit(recipe: str, d_dtype: str, epilogue: str, is_grouped: bool) -> None:
    problem: GemmProblem | GroupedProblem
    if is_grouped:
        problem = GroupedProblem(4096, 4096, recipe, 8, "masked", d_dtype=d_dtype, epilogue=epilogue)
        dense = problem.dense
    else:
        problem = dense = GemmProblem(4096, 4096, recipe, d_dtype=d_dtype, epilogue=epilogue)

    def sums(config: GemmConfig) -> int:
        return kernel_shape(dense.without_sizes(), config).accumulator_registers

    by_shape: dict[tuple[int, bool], list[GemmConfig]] = {}
    for config in legal_configs(problem):
        by_shape.setdefault((kernel_shape(dense.without_sizes(), config).mma_m, config.swap_ab), []).append(config)
    largest = sorted((max(configs, key=lambda c: (sums(c), c)) for configs in by_shape.values()), key=sums)
    found = [fault for config in largest[-2:] for fault in faults(problem, config)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("d_dtype", "epilogue"), [("e4m3", "swiglu"), ("fp32", "linear")])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_the_largest_kernels_of_fp4_weights_fit(d_dtype: str, epilogue: str, is_grouped: bool) -> None:
    problem: GemmProblem | GroupedProblem
    if is_grouped:
        problem = GroupedProblem(4096, 4096, FP4, 8, "masked", d_dtype=d_dtype, epilogue=epilogue)
    else:
        problem = GemmProblem(4096, 4096, FP4, d_dtype=d_dtype, epilogue=epilogue)
    largest = {}  # of those that expand weights in registers, and of those that do so in shared memory
    for config in sorted(legal_configs(problem), key=lambda c: (c.tile_m * c.tile_n, c)):
        largest[config.swap_ab] = config
    assert (largest[True].tile_m, largest[True].tile_n) == (128, 128)
    assert (False in largest) == (not is_grouped)
    found = [fault for config in largest.values() for fault in faults(problem, config)]
    assert not found, "\n".join(found)


def test_every_expert_layer_s_kernel_is_on_the_menu_and_fits() -> None:
    problem = GroupedProblem(4096, 7168, "fp8_1x128_128x128", 8, "masked", d_dtype="e4m3", epilogue="swiglu")
    configs = grouped_heuristics.enumerate_configs(problem, H200)
    assert any(config.swap_ab for config in configs)
    assert any(not config.swap_ab for config in configs)
    found = [fault for config in configs for fault in faults(problem, config)]
    assert not found, "\n".join(found)
