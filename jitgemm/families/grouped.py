"""Grouped GEMM along m on SM90a: each group of A's rows with weights of its own, ``D[rows] = A[rows] @ B[group]^T``.

Which rows belong to which group only the device knows:

========== ============= ===========================================================================================
kind       A             layout tensor, int32
========== ============= ===========================================================================================
masked     [groups, m, k] rows of each group, ``[groups]``
contiguous [m_total, k]  group of each row, ``[m_total]``; -1 is padding; groups start at multiples of the alignment
psum       [m_total, k]  end of each group, ``[groups]``; each starts at the end before it, rounded up to the alignment
========== ============= ===========================================================================================

Tiles, shapes and templates are those of dense GEMM, without split K, and with clusters only where two CTAs make up the
columns of one scale of a quantized D; they share no operands.
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
from jitgemm.families.gemm import (
    FP4_RECIPES,
    GemmConfig,
    GemmProblem,
    KernelShape,
    kernel_shape,
    operands_name,
    problem_of_spec,
)

GROUPINGS = {"masked": "masked", "contiguous": "indexed", "psum": "psum"}
"""Kind -> the template's ``Grouping``."""

GROUPED_RECIPES = ("fp8_1x128_128x128", "bf16", *FP4_RECIPES)
MAX_GROUPS = 65536
QUEUE_BYTES = 128  # of shared memory: the template's TILE_QUEUE_BYTES
_SCALES_UNIT = 4  # fp32 scales in 16 bytes, at multiples of which TMA copies start
MAX_BOX = 256  # elements of one dimension that one TMA copy takes
MAX_PIECES = 5  # in which a tile of A is loaded where its group ends in it


@dataclass(frozen=True)
class GroupedProblem:
    """What is asked of a grouped GEMM; ``m`` is None where any number of rows is meant.

    Args:
        n: columns of D.
        k: length of the contraction.
        recipe: one of ``GROUPED_RECIPES``.
        groups: number of experts.
        kind: ``masked``, ``contiguous`` or ``psum``.
        m: rows of a group that are expected; choices are made for it, results don't depend on it.
        layout: ``nt`` is B ``[groups, n, k]``, ``nn`` B ``[groups, k, n]``; FP8 has ``nt`` only.
        d_dtype: as of ``GemmProblem``.
        alignment: rows at multiples of which groups start.
        epilogue: as of ``GemmProblem``.

    Raises:
        ProblemError: a field is not of these.
    """

    n: int
    k: int
    recipe: str
    groups: int
    kind: str
    m: int | None = None
    layout: str = "nt"
    d_dtype: str = "bf16"
    alignment: int = 128
    epilogue: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in GROUPINGS:
            raise ProblemError(f"kind is {self.kind!r}; accepted are {', '.join(GROUPINGS)}")
        if self.recipe not in GROUPED_RECIPES:
            raise ProblemError(f"recipe is {self.recipe!r}; grouped GEMMs accept {', '.join(GROUPED_RECIPES)}")
        if self.layout not in ("nt", "nn"):
            raise ProblemError(f"layout is {self.layout!r}; grouped GEMMs accept nt and nn")
        for name, high in (("groups", MAX_GROUPS), ("alignment", 2**20)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
                raise ProblemError(f"{name} is {value!r}; accepted is an integer from 1 to {high}")
        _ = self.dense

    @functools.cached_property
    def dense(self) -> GemmProblem:
        """The GEMM of one group."""
        return GemmProblem(self.n, self.k, self.recipe, self.m, self.layout, self.d_dtype, epilogue=self.epilogue)

    @property
    def scale_slack(self) -> int:
        """``KernelShape.scale_slack``: rows of a TMA unit where groups may start within one, else 0."""
        anywhere = self.kind != "masked" and self.alignment % _SCALES_UNIT != 0
        return _SCALES_UNIT if anywhere and self.dense.traits.is_fp8 else 0

    def shape(self, config: GemmConfig) -> KernelShape:
        """What follows for the kernel that computes this with a config."""
        return kernel_shape(self.dense.without_sizes(), config, self.scale_slack)

    def without_m(self) -> GroupedProblem:
        """The same problem for any number of rows."""
        return dataclasses.replace(self, m=None) if self.m is not None else self

    def with_m(self, m: int) -> GroupedProblem:
        """The same problem for so many rows a group."""
        return dataclasses.replace(self, m=m)

    def to_dict(self) -> dict[str, Any]:
        """One line of a shapes file; ``from_dict`` reverses it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"kind": f"m_grouped_{values.pop('kind')}", **{f: v for f, v in values.items() if v is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupedProblem:
        """Read one problem of a shapes file.

        Raises:
            ProblemError: an unknown or missing field, or a value that is not accepted.
        """
        values = dict(data)
        kind = values.pop("kind", None)
        kinds = {f"m_grouped_{kind}": kind for kind in GROUPINGS}
        if kind not in kinds:
            raise ProblemError(f"kind is {kind!r}; accepted are {', '.join(kinds)}")
        check_fields(cls, values)
        return cls(kind=kinds[kind], **values)


def token_tile(config: GemmConfig) -> int:
    """Rows of A in a tile."""
    return config.tile_m


def token_piece(config: GemmConfig) -> int:
    """Rows of A that are loaded at a time where a group ends in the tile: at most ``MAX_PIECES`` make it up."""
    tile = token_tile(config)
    return min(piece for piece in range(8, tile + 1, 8) if tile % piece == 0 and tile // piece <= MAX_PIECES)


def smem_bytes(shape: KernelShape) -> int:
    """Dynamic shared memory of a block, in bytes."""
    return shape.smem_bytes + QUEUE_BYTES


class GroupedGemm:
    """The grouped GEMM kernels."""

    name = "m_grouped_gemm"
    template = gemm.FAMILY.template

    def spec(self, problem: GroupedProblem, config: GemmConfig, arch: str) -> KernelSpec:
        """The kernel that computes ``problem`` (of any size, number of groups and alignment) with ``config``.

        FP8 groups that start at any row, not at multiples of 4, have kernels of their own.
        """
        constants: dict[str, Any] = {
            "kind": problem.kind,
            "recipe": problem.recipe,
            "layout": problem.layout,
            "d_dtype": problem.d_dtype,
            "scale_slack": problem.scale_slack,
            **({} if problem.epilogue is None else {"epilogue": problem.epilogue}),
            **config.to_dict(),
        }
        return KernelSpec.make(self.name, arch, constants)

    def shape(self, spec: KernelSpec) -> KernelShape:
        """What follows from a spec."""
        constants = dict(spec.constants)
        config = GemmConfig(**{field.name: constants[field.name] for field in dataclasses.fields(GemmConfig)})  # type: ignore[arg-type]
        return kernel_shape(problem_of_spec(spec), config, int(constants["scale_slack"]))

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry, such as ``jitgemm_m_grouped_fp8_gemm_nt_masked``."""
        problem = self.shape(spec).problem
        return f"jitgemm_m_grouped_{operands_name(problem)}_gemm_{problem.layout}_{spec['kind']}"

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        shape = self.shape(spec)
        return {
            **gemm.FAMILY.context_of(shape),
            "kernel_name": self.kernel_name(spec),
            "description": self.describe(spec),
            "grouping": GROUPINGS[spec["kind"]],
            "token_piece": token_piece(shape.config),
            "queue_bytes": QUEUE_BYTES,
        }

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        return self.shape(spec).num_threads

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block, in bytes."""
        return smem_bytes(self.shape(spec))

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        shape = self.shape(spec)
        problem = shape.problem
        anywhere = " any-row" if shape.scale_slack else ""
        epilogue = f" {problem.epilogue}" if problem.epilogue else ""
        return (
            f"m_grouped_{spec['kind']}{anywhere} {problem.recipe} {problem.layout} {problem.d_dtype}{epilogue}"
            f" {shape.config}"
        )


FAMILY = GroupedGemm()
