"""Row-wise kernels: quantizers, SwiGLU, RMSNorm, head norm and rotary embedding, and these fused with a quantizer.

``RowwiseProblem`` is what is asked, ``RowwiseConfig`` how threads share a row; together they make the ``KernelSpec``.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jitgemm.errors import ProblemError
from jitgemm.families.base import KernelSpec, check_fields

CHUNK = 8
"""Neighbouring values that at least go together: what rows are multiples of, and squares are summed by."""

MAX_CHUNKS = 8
"""Chunks of a row that one thread may hold in registers."""

WARP, MAX_BLOCK = 32, 1024  # threads
MAX_NORM_COLUMNS = MAX_BLOCK * MAX_CHUNKS * CHUNK // 2
"""Columns of a row whose sums one block can form, whatever the type."""

OPS = ("cast", "swiglu", "rms_norm", "rope")
VALUE_TYPES = {"bf16": "Bf16", "fp16": "Fp16", "fp32": "float"}
VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SCALES = {
    "e4m3": ("fp32", "fp32_reciprocal", "pow2", "ue8m0"),
    "int8": ("fp32", "fp32_inverse"),
    "e2m1": ("ue8m0", "ue4m3"),
    "values": ("none",),
}
"""Kinds of scales by format; ``values`` stands for no quantization."""
GROUPS = (16, 32, 64, 128)
WHOLE_ROW = 0
"""The group of scales that whole rows share, ``fp32_inverse``."""
NORMS = ("none", "plain", "bf16", "fp16", "fp32")
TIES = ("even", "away", "zero")
INDEX_TYPES = {"none": "int", "int32": "int32_t", "int64": "int64_t"}


@dataclass(frozen=True)
class RowwiseProblem:
    """What is asked of a row-wise kernel; ``m`` is None where any number of rows is meant.

    Args:
        op: a name in ``OPS``.
        n: columns of the result; with ``rope``, of one head.
        m: rows; with ``rope``, tokens times heads.
        dtype: of what is read, and of values that are written: a name in ``VALUE_TYPES``.
        format: of the codes that are written: a name in ``SCALES``.
        scales: their kind, one that the format has.
        group: columns that share a scale, ``WHOLE_ROW`` with ``fp32_inverse``.
        ties: where a tie of E2M1 goes.
        round_trip: write what the codes stand for, as values, and no codes.
        values: write values as well as codes.
        round_first: round to ``dtype`` before quantizing.
        norm: type of the weight of the RMSNorm that comes first, ``plain`` without weight, ``none`` without norm.
        inverse: rotate back.
        index: type of positions, or of the experts' indices that are staged.
        stage: copy top-k indices and weights too.
        aligned: rows start and end on multiples of 16 bytes and of 8 elements.

    Raises:
        ProblemError: a field is not of these.
    """

    op: str
    n: int
    m: int | None = None
    dtype: str = "bf16"
    format: str = "values"
    scales: str = "none"
    group: int = 0
    ties: str = "even"
    round_trip: bool = False
    values: bool = False
    round_first: bool = False
    norm: str = "none"
    inverse: bool = False
    index: str = "none"
    stage: bool = False
    aligned: bool = True

    def __post_init__(self) -> None:
        for name, accepted in (
            ("op", OPS),
            ("dtype", tuple(VALUE_TYPES)),
            ("format", tuple(SCALES)),
            ("ties", TIES),
            ("norm", NORMS),
            ("index", tuple(INDEX_TYPES)),
        ):
            if getattr(self, name) not in accepted:
                raise ProblemError(f"{name} is {getattr(self, name)!r}; accepted are {', '.join(accepted)}")
        if self.scales not in SCALES[self.format]:
            raise ProblemError(f"scales is {self.scales!r}; {self.format} accepts {', '.join(SCALES[self.format])}")
        groups = (WHOLE_ROW,) if self.scales in ("none", "fp32_inverse") else GROUPS
        if self.group not in groups or isinstance(self.group, bool):
            kind = self.format if self.format == "values" else f"{self.format} {self.scales}"
            raise ProblemError(f"group is {self.group!r}; {kind} accepts {', '.join(map(str, groups))}")
        rounded = self.op == "cast" or (self.op == "rms_norm" and self.round_first)
        if self.scales == "fp32_inverse" and (not rounded or self.round_trip or self.stage):
            raise ProblemError(f"scales is {self.scales!r}; accepted with cast, and with rms_norm and round_first")
        for name in ("round_trip", "values", "round_first", "inverse", "stage", "aligned"):
            if not isinstance(getattr(self, name), bool):
                raise ProblemError(f"{name} is {getattr(self, name)!r}; accepted is a boolean")
        for name, low in (("n", 1), ("m", 0)):
            value = getattr(self, name)
            if name == "m" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise ProblemError(f"{name} is {value!r}; accepted is an integer from {low} to 2**31 - 1")
        if self.whole_rows and self.n > MAX_NORM_COLUMNS:
            raise ProblemError(f"n is {self.n}; {self.op} accepts at most {MAX_NORM_COLUMNS} columns")

    @property
    def whole_rows(self) -> bool:
        """Whether a result depends on all of its row, so that one block must hold that."""
        return self.norm != "none" or self.scales == "fp32_inverse"

    def without_m(self) -> RowwiseProblem:
        """The same problem for any number of rows."""
        return dataclasses.replace(self, m=None) if self.m is not None else self

    def to_dict(self) -> dict[str, Any]:
        """One line of a shapes file; ``from_dict`` reverses it."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {"kind": KIND, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RowwiseProblem:
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
        norm = "" if self.norm in ("none", "plain") or self.op == "rms_norm" else f"rms_norm {self.norm} + "
        op = f"{self.op} back" if self.inverse else self.op
        quant = f" {self.format} {self.group or 'row'} {self.scales}" if self.format != "values" else ""
        extras = "".join(
            f" {text}"
            for given, text in (
                (self.round_trip, "round trip"),
                (self.values, "and values"),
                (self.ties != "even", f"ties {self.ties}"),
                (self.stage, "staged"),
                (not self.aligned, "unaligned"),
            )
            if given
        )
        return f"{norm}{op} {self.dtype}{quant}{extras}"


KIND = "rowwise"
"""What shapes files call these problems."""


@dataclass(frozen=True, order=True)
class RowwiseConfig:
    """How threads share a row: so many threads, so many rows of a block, so many chunks of a thread, how wide."""

    threads_per_row: int
    rows: int
    chunks: int
    width: int = CHUNK

    @property
    def columns(self) -> int:
        """Columns of a block's tile."""
        return self.threads_per_row * self.chunks * self.width


def scale_columns(problem: RowwiseProblem) -> int:
    """Columns up to the end of the last word of scales, which threads write."""
    unit = 4 * problem.group if problem.scales == "ue8m0" else max(problem.group, CHUNK)
    return -(-problem.n // unit) * unit


class Rowwise:
    """All row-wise kernels: one template, whose parts the problem picks."""

    name = "rowwise"
    template = "rowwise.cu.jinja"

    def spec(self, problem: RowwiseProblem, config: RowwiseConfig, arch: str) -> KernelSpec:
        """The spec of a problem's kernel: all but the sizes."""
        fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem) if f.name not in ("n", "m")}
        return KernelSpec.make(self.name, arch, {**fields, **dataclasses.asdict(config)})

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry."""
        parts = [spec["op"]]
        if spec["norm"] != "none" and spec["op"] != "rms_norm":
            parts.insert(0, "norm")
        if spec["format"] != "values":
            parts.append(spec["format"])
        return "_".join(["jitgemm", *parts])

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        constants = dict(spec.constants)
        return {
            **constants,
            "kernel_name": self.kernel_name(spec),
            "description": self._problem_text(spec),
            "value_type": VALUE_TYPES[spec["dtype"]],
            "weight_types": VALUE_TYPES,
            "index_type": INDEX_TYPES[spec["index"]],
            "whole_row": spec["scales"] == "fp32_inverse",
            "stored": spec["op"] == "cast" or spec["round_first"],  # what is quantized has the type of the values
            "values": spec["values"] or spec["round_trip"] or spec["format"] == "values",
        }

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        return int(spec["threads_per_row"] * spec["rows"])

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block: none, what sums need is static."""
        return 0

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        return f"{self._problem_text(spec)} {spec['threads_per_row']}x{spec['rows']} c{spec['chunks']}x{spec['width']}"

    def _problem_text(self, spec: KernelSpec) -> str:
        names = {field.name for field in dataclasses.fields(RowwiseProblem)}
        fields: dict[str, Any] = {name: value for name, value in spec.constants if name in names}
        return str(RowwiseProblem(n=CHUNK, **fields))


FAMILY = Rowwise()

# The template's `Params`.
POINTERS = (
    *("x", "values", "codes", "scales", "weight", "positions", "cos_sin"),
    *("topk_ids", "topk_weights", "topk_ids_out", "topk_weights_out"),
)
STRIDES = (
    *("x_row", "x_head", "values_row", "values_head", "codes_row", "codes_head"),
    *("scale_row", "scale_word", "scale_group"),
    *("ids_row", "ids_column", "weights_row", "weights_column"),
    *("ids_out_row", "ids_out_column", "weights_out_row", "weights_out_column"),
    "num_positions",
)
SIZES = ("m", "n", "heads", "scale_columns", "padding", "rope_dim", "topk")
REALS = ("eps", "limit")
PARAMS = struct.Struct(f"<{len(POINTERS)}Q{len(STRIDES)}q{len(SIZES)}i{len(REALS)}f4x")
