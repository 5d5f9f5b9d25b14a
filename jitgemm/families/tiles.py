"""Casts of tiles: matrices to E4M3, with a scale for each block or part of a column, and E4M3 back to values."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jitgemm.errors import ProblemError
from jitgemm.families.base import KernelSpec, check_fields
from jitgemm.families.rowwise import CHUNK, GROUPS, VALUE_BYTES, VALUE_TYPES, WARP

KIND = "tiles"
"""What shapes files call these problems."""

CAST_BACK_CHUNKS = 4
"""Chunks of a thread where codes are cast back."""

OPS = ("per_block", "per_channel", "cast_back")
SCALES = {
    "per_block": ("fp32_reciprocal", "pow2"),
    "per_channel": ("fp32_reciprocal", "pow2"),
    "cast_back": ("fp32", "packed"),
}


@dataclass(frozen=True)
class TileProblem:
    """What is asked of a cast of tiles; sizes do not matter.

    Args:
        op: ``per_block``, ``per_channel`` (both to E4M3) or ``cast_back``.
        scales: kind of the scales: ``fp32_reciprocal`` or ``pow2``; what is cast back has ``fp32`` ones, or exponents
            ``packed`` four to an int32.
        group_rows: rows that share a scale; when casting back any number, 0: all.
        group_columns: columns that do, likewise; 1 for ``per_channel``.
        dtype: of the values: a name in ``VALUE_TYPES``.
        aligned: rows start and end on multiples of 16 bytes and of 8 elements.

    Raises:
        ProblemError: a field is not of these.
    """

    op: str
    scales: str
    group_rows: int
    group_columns: int
    dtype: str = "bf16"
    aligned: bool = True

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ProblemError(f"op is {self.op!r}; accepted are {', '.join(OPS)}")
        if self.scales not in SCALES[self.op]:
            raise ProblemError(f"scales is {self.scales!r}; {self.op} accepts {', '.join(SCALES[self.op])}")
        if self.dtype not in VALUE_TYPES:
            raise ProblemError(f"dtype is {self.dtype!r}; accepted are {', '.join(VALUE_TYPES)}")
        if not isinstance(self.aligned, bool):
            raise ProblemError(f"aligned is {self.aligned!r}; accepted is a boolean")
        for name in ("group_rows", "group_columns"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise ProblemError(f"{name} is {value!r}; accepted is an integer from 0 to 2**31 - 1")
        columns = 1 if self.op == "per_channel" else self.group_rows
        if self.op != "cast_back" and (self.group_rows not in GROUPS or self.group_columns != columns):
            groups = ", ".join(f"{rows}x{1 if self.op == 'per_channel' else rows}" for rows in GROUPS)
            raise ProblemError(f"groups are {self.group_rows}x{self.group_columns}; {self.op} accepts {groups}")

    def without_m(self) -> TileProblem:
        """The same: there is no m."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """One line of a shapes file; ``from_dict`` reverses it."""
        return {"kind": KIND, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TileProblem:
        """Read one problem of a shapes file.

        Raises:
            ProblemError: an unknown or missing field, or a value that is not accepted.
        """
        values = dict(data)
        kind = values.pop("kind", None)
        if kind != KIND:
            raise ProblemError(f"kind is {kind!r}; accepted is {KIND}")
        check_fields(cls, values)
        return cls(**values)

    def __str__(self) -> str:
        group = "x".join(str(size or "all") for size in (self.group_rows, self.group_columns))
        unaligned = "" if self.aligned else " unaligned"
        return f"{self.op} {self.dtype} e4m3 {group} {self.scales}{unaligned}"


class Tiles:
    """All casts of tiles: one template."""

    name = "tiles"
    template = "tiles.cu.jinja"

    def spec(self, problem: TileProblem, arch: str) -> KernelSpec:
        """The spec of a problem's kernel."""
        return KernelSpec.make(self.name, arch, dataclasses.asdict(problem))

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry."""
        return f"jitgemm_{spec['op']}" + ("_from_e4m3" if spec["op"] == "cast_back" else "_cast_to_e4m3")

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        return {
            **dict(spec.constants),
            "kernel_name": self.kernel_name(spec),
            "description": self.describe(spec),
            "value_type": VALUE_TYPES[spec["dtype"]],
            "scale_type": "int32_t" if spec["scales"] == "packed" else "float",
            "chunks": self.chunks(spec),
            "chunk": self.chunk(spec),
            **dict(zip(("threads_x", "threads_y"), self.threads(spec), strict=True)),
        }

    def chunk(self, spec: KernelSpec) -> int:
        """Neighbouring columns of a thread: 16 bytes of values that are written, else 8 of them."""
        return 16 // VALUE_BYTES[spec["dtype"]] if spec["op"] == "cast_back" else CHUNK

    def threads(self, spec: KernelSpec) -> tuple[int, int]:
        """Threads of a block: along the columns, and along the rows."""
        if spec["op"] == "per_channel":  # columns of a line of 128 bytes: many blocks even where the matrix is small
            return CHUNK, min(WARP, int(spec["group_rows"]))
        return (WARP, 8) if spec["op"] == "cast_back" else (16, 16)

    def chunks(self, spec: KernelSpec) -> int:
        """Chunks of a thread: along the columns where codes are cast back, else along the rows of a group."""
        if spec["op"] == "cast_back":
            return CAST_BACK_CHUNKS
        return int(spec["group_rows"]) // self.threads(spec)[1]

    def tile_rows(self, spec: KernelSpec) -> int:
        """Rows of a block's tile."""
        return self.threads(spec)[1] * (1 if spec["op"] == "cast_back" else self.chunks(spec))

    def tile_columns(self, spec: KernelSpec) -> int:
        """Columns of a block's tile."""
        return self.threads(spec)[0] * self.chunk(spec) * (self.chunks(spec) if spec["op"] == "cast_back" else 1)

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        x, y = self.threads(spec)
        return x * y

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block: none, what maxima need is static."""
        return 0

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        fields: dict[str, Any] = dict(spec.constants)
        return str(TileProblem(**fields))


FAMILY = Tiles()

# The template's `Params`: values, codes, scales, values_row, codes_row, scale_row, scale_column, rows, columns.
PARAMS = struct.Struct("<3Q4q2i")
