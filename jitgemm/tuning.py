"""Timing configs on the GPU at hand: random operands of a problem, and calls that use a given config."""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.families.gemm import SCALE_GROUP, GemmConfig, GemmProblem
from jitgemm.ops.gemm import _make_plan
from jitgemm.reference.layout import get_tma_aligned_size
from jitgemm.timing import Call

_D_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Workload:
    """Operands of one problem with its m: normally distributed, scales as kernels load them, D contiguous."""

    def __init__(self, problem: GemmProblem, device: str = "cuda", seed: int = 0) -> None:
        """Make the tensors.

        Args:
            problem: with its m.
            device: a CUDA device; on ``cpu`` calls go to the reference, whatever their config.
            seed: of the data.
        """
        assert problem.m is not None
        self._problem = problem
        self._random = torch.Generator(device).manual_seed(seed)
        traits, m = problem.traits, problem.m
        self._a = self._operand(m, problem.k, problem.a_major == "k")
        self._b = self._operand(problem.n, problem.k, problem.b_major == "k")
        self._a_scales = self._scales(traits.a_scales, m)
        self._b_scales = self._scales(traits.b_scales, problem.n)
        self.d = torch.empty((m, problem.n), dtype=_D_DTYPES[problem.d_dtype], device=device)

    def call(self, config: GemmConfig) -> Call:
        """A call that computes the problem with a config. Its kernel is loaded, and built before that if need be.

        Raises:
            JitGemmError: the config can't be built or launched.
        """
        tensors = self._a, self._a_scales, self._b, self._b_scales, self.d, None
        problem = self._problem
        plan = _make_plan(*tensors, problem.recipe, problem.layout, problem.fast_accum, config)
        return lambda: plan(*tensors)

    def _operand(self, mn: int, k: int, k_major: bool) -> Tensor:
        rows, columns = (mn, k) if k_major else (k, mn)
        size = self._problem.traits.operand_bytes
        width = get_tma_aligned_size(columns, size)  # TMA wants rows that start a multiple of 16 bytes apart
        values = torch.randn((rows, width), dtype=torch.bfloat16, device=self._random.device, generator=self._random)
        return (values if size == 2 else values.to(torch.float8_e4m3fn))[:, :columns]

    def _scales(self, granularity: str, mn: int) -> Tensor | None:
        groups = -(-self._problem.k // SCALE_GROUP)
        if granularity == "none":
            return None
        if granularity == "row_k":  # MN-major and aligned, which TMA reads in place
            return self._positive(groups, get_tma_aligned_size(mn, 4)).t()[:mn]
        shapes = {"block_k": (-(-mn // SCALE_GROUP), groups), "row": (mn, 1), "tensor": (1, 1)}
        return self._positive(*shapes[granularity])

    def _positive(self, rows: int, columns: int) -> Tensor:
        return torch.rand((rows, columns), device=self._random.device, generator=self._random) + 0.5
