"""Several GEMMs of one shape in one launch on SM90a, of sizes that the host knows.

========== ========================= ====================================================================
kind       A                         what is computed
========== ========================= ====================================================================
batched    [groups, m, k]            ``D[group] = A[group] @ B[group]^T (+ C[group])``
batch_sum  [batches, m, k]           sums of ``A[batch] @ B[batch]^T`` over runs of batches, one for each group
k_grouped  [m, k] of each group      as batched, but each group has a k of its own: gradients of weights
========== ========================= ====================================================================

Tiles, shapes and templates are those of dense GEMM; the groups' tiles follow one another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jitgemm.errors import ProblemError
from jitgemm.families import gemm
from jitgemm.families.base import KernelSpec, check_fields
from jitgemm.families.gemm import GemmConfig, GemmProblem, KernelShape, kernel_shape

KINDS = {
    "batched": ("fp8_1x128_128x128", "fp8_1x128_1x128", "bf16"),
    "batch_sum": ("bf16",),
    "k_grouped": ("fp8_1x128_1x128", "bf16"),
}
"""Kind -> its recipes."""

MAX_GROUPS = 65536
MOST_GROUPS_OF_K = 32
"""Groups of one launch along k, whose tensor maps are parameters of the kernel; more take several launches."""

EXPECTED_K = 4096
"""Of a group along k where a config is chosen: it changes from call to call, and the choice hardly depends on it."""


@dataclass(frozen=True)
class BatchedProblem:
    """What is asked of several GEMMs at once; ``m`` is None where any m is meant.

    Args:
        n: columns of D.
        k: length of the contraction; of ``batch_sum`` that of all batches of a group. Along K kernels are chosen for
            ``EXPECTED_K``, whatever it is.
        recipe: one of ``KINDS[kind]``.
        groups: how many GEMMs.
        kind: a key of ``KINDS``.
        m: rows of D.
        layout: BLAS letters of A and B; FP8 has ``nt`` only.
        d_dtype: ``bf16`` or ``fp32``.

    Raises:
        ProblemError: a field is not of these.
    """

    n: int
    k: int
    recipe: str
    groups: int
    kind: str = "batched"
    m: int | None = None
    layout: str = "nt"
    d_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ProblemError(f"kind is {self.kind!r}; accepted are {', '.join(KINDS)}")
        if self.recipe not in KINDS[self.kind]:
            raise ProblemError(f"recipe is {self.recipe!r}; {self.kind} GEMMs accept {', '.join(KINDS[self.kind])}")
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or not 1 <= self.groups <= MAX_GROUPS:
            raise ProblemError(f"groups is {self.groups!r}; accepted is an integer from 1 to {MAX_GROUPS}")
        _ = self.dense

    @functools.cached_property
    def dense(self) -> GemmProblem:
        """The GEMM of one group."""
        return GemmProblem(self.n, self.k, self.recipe, self.m, self.layout, self.d_dtype)

    def without_m(self) -> BatchedProblem:
        """The same problem for any m."""
        return dataclasses.replace(self, m=None) if self.m is not None else self

    def with_m(self, m: int) -> BatchedProblem:
        """The same problem for one m."""
        return dataclasses.replace(self, m=m)

    def to_dict(self) -> dict[str, Any]:
        """One line of a shapes file; ``from_dict`` reverses it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"kind": f"{values.pop('kind')}_gemm", **{f: v for f, v in values.items() if v is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BatchedProblem:
        """Read one problem of a shapes file.

        Raises:
            ProblemError: an unknown or missing field, or a value that is not accepted.
        """
        values = dict(data)
        kind = values.pop("kind", None)
        if kind not in SHAPES_FILE_KINDS:
            raise ProblemError(f"kind is {kind!r}; accepted are {', '.join(SHAPES_FILE_KINDS)}")
        if SHAPES_FILE_KINDS[kind] == "k_grouped":
            values.setdefault("k", EXPECTED_K)
        check_fields(cls, values)
        return cls(kind=SHAPES_FILE_KINDS[kind], **values)


SHAPES_FILE_KINDS = {f"{kind}_gemm": kind for kind in KINDS}
"""A problem's ``kind`` in a shapes file -> its kind."""


def producer_stores(kind: str, shape: KernelShape) -> bool:
    """Whether a tile is stored while the next one is computed: along K where all of it can be staged at once."""
    return kind == "k_grouped" and shape.store_columns == shape.mma_n


STORE_BARRIERS_BYTES = 16
"""Of shared memory, behind those of the ring: the template's ``StagedTile``."""


class BatchedGemm:
    """The kernels of several GEMMs at once."""

    name = "batched_gemm"
    template = gemm.FAMILY.template

    def spec(self, problem: BatchedProblem, config: GemmConfig, arch: str) -> KernelSpec:
        """The kernel that computes ``problem`` (of any size and number of groups) with ``config``."""
        constants: dict[str, Any] = {
            "kind": problem.kind,
            "recipe": problem.recipe,
            "layout": problem.layout,
            "d_dtype": problem.d_dtype,
            **config.to_dict(),
        }
        return KernelSpec.make(self.name, arch, constants)

    def shape(self, spec: KernelSpec) -> KernelShape:
        """What follows from a spec."""
        constants = dict(spec.constants)
        config = GemmConfig(**{field.name: constants[field.name] for field in dataclasses.fields(GemmConfig)})  # type: ignore[arg-type]
        recipe, layout, d_dtype = (str(constants[name]) for name in ("recipe", "layout", "d_dtype"))
        return kernel_shape(GemmProblem(1, 1, recipe, None, layout, d_dtype), config)

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry, such as ``jitgemm_batched_fp8_gemm_nt``."""
        problem = self.shape(spec).problem
        operands = "fp8" if problem.traits.is_fp8 else "bf16"
        if spec["kind"] == "batch_sum":
            return f"jitgemm_{operands}_bmn_bnk_mn_gemm_impl"  # so DeepGEMM's tests find it in a profile
        return f"jitgemm_{spec['kind']}_{operands}_gemm_{problem.layout}"

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        return {
            **gemm.FAMILY.context_of(self.shape(spec)),
            "kernel_name": self.kernel_name(spec),
            "description": self.describe(spec),
            "grouping": "",
            "stack": "k_grouped" if spec["kind"] == "k_grouped" else "batched",
            "most_groups": MOST_GROUPS_OF_K,
            "producer_stores": producer_stores(spec["kind"], self.shape(spec)),
        }

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        return self.shape(spec).num_threads

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block, in bytes."""
        shape = self.shape(spec)
        return shape.smem_bytes + STORE_BARRIERS_BYTES * producer_stores(spec["kind"], shape)

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        shape = self.shape(spec)
        problem = shape.problem
        return f"{spec['kind']} {problem.recipe} {problem.layout} {problem.d_dtype} {shape.config}"


FAMILY = BatchedGemm()
