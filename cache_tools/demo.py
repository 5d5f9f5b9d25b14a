"""The check at the end of ``jitgemm demo``: GEMMs through the public API, compared with float64."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jitgemm import settings
from jitgemm.cache_tools.console import EXIT_FAILED, EnvironmentFaultError, print_table
from jitgemm.cache_tools.problems import NamedProblem
from jitgemm.families.gemm import GemmProblem

if TYPE_CHECKING:
    from jitgemm.reference.gemm import Errors

GPU_ROWS = (1, 16, 64, 128, 512, 2048, 4096, 8192)
"""Values of m for each layer on a GPU."""

MAX_OUTPUT = 2**28
"""Elements of D beyond which a case is left out: the reference holds D in float64."""

SMALL = [NamedProblem("small", GemmProblem(n=320, k=1024, recipe="fp8_1x128_128x128", m=48))]
"""What the reference computes where there is no GPU."""


def require_torch() -> None:
    """Say before the long part of the demo that its end could not run.

    Raises:
        EnvironmentFaultError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise EnvironmentFaultError("demo: torch is not installed; pip install torch")


def check(problems: Sequence[NamedProblem]) -> int:
    """Compute and check ``problems`` on the GPU, or a small one on the CPU; returns the exit code.

    Compiling is forbidden meanwhile: the prewarmed set must be enough.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch works without, and so does jitgemm
    import torch

    if torch.cuda.is_available():
        device = "cuda"
        print(f"\nchecking on {torch.cuda.get_device_name()}, with compiling forbidden")
        cases = [
            NamedProblem(p.layer, p.dense.with_m(m)) for p in problems for m in GPU_ROWS if m * p.dense.n <= MAX_OUTPUT
        ]
    else:
        device = "cpu"
        print("\nno GPU here: the CPU reference computes a small problem instead")
        cases = SMALL
    torch.manual_seed(0)
    rows = []
    with settings.override(jit="forbid"):
        for named in cases:
            problem = named.dense
            errors, bounds = _errors(problem, device)
            right = errors.within(bounds)
            shape = (problem.m, problem.n, problem.k, problem.recipe, problem.d_dtype)
            rows.append((named.layer, *shape, f"{errors.frobenius:.1e}", "ok" if right else "WRONG"))
    print_table(["layer", ">m", ">n", ">k", "recipe", "D", ">relative error", "result"], rows)
    wrong = sum(row[-1] != "ok" for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} right")
    return EXIT_FAILED if wrong else 0


def _errors(problem: GemmProblem, device: str) -> tuple[Errors, Errors]:
    """How far the public API's D is from the float64 product of the same operands, and how far it may be."""
    import torch

    import jitgemm
    from jitgemm.reference import gemm as reference

    m = problem.m or 0
    a = torch.randn(m, problem.k, dtype=torch.bfloat16, device=device)
    b = torch.randn(problem.n, problem.k, dtype=torch.bfloat16, device=device)
    d = torch.empty(m, problem.n, dtype=reference.D_DTYPES[problem.d_dtype], device=device)
    if problem.traits.is_fp8:
        a, a_scales = jitgemm.per_token_cast_to_fp8(a)
        b, b_scales = jitgemm.per_block_cast_to_fp8(b)
        jitgemm.fp8_gemm_nt((a, a_scales), (b, b_scales), d)
    else:
        a_scales = b_scales = None
        jitgemm.bf16_gemm_nt(a, b, d)
    expected = reference.gemm(
        a, b, a_scales=a_scales, b_scales=b_scales, recipe=problem.recipe, d_dtype=problem.d_dtype
    )
    return reference.error_measures(d, expected), reference.tolerance(problem.recipe, problem.d_dtype)
