"""What is asked of the kernels around hyper-connections, experts, packed scales and FP4 weights, as problems: what
prewarm and records hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jitgemm.errors import ProblemError
from jitgemm.families.base import KernelSpec, Scalar
from jitgemm.families.fp4 import FORMATS, PACK_FP4, UNPACK_SCALES
from jitgemm.families.hyper_connections import (
    HC_MIX,
    HC_POST,
    HC_PRENORM,
    HC_SINKHORN,
    MAX_N,
    MIX_TOKENS,
    MIX_WIDTH,
    PRENORM_CONFIGS,
    STREAMS,
)
from jitgemm.families.moe import (
    GATE_LOGITS,
    MAP_KERNELS,
    MAX_COMBINED,
    MAX_EXPERTS,
    MOE_COMBINE,
    MOE_MAP,
    MOE_PERMUTE,
    TOKEN_TILES,
    TOPK_GATE,
    gates_by_block,
)
from jitgemm.families.pack_scales import PACK_UE8M0

SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
LAYOUTS = ("contiguous", "psum", "masked")
INDEX_DTYPES = ("int32", "int64")
PRECISIONS = ("tf32", "fp32")
STREAM_DTYPES = ("bf16", "fp32")
_DEFAULTS: dict[str, Scalar] = {"dtype": "bf16"}
"""What fields are that a problem leaves out."""


def _prenorms(arch: str, n: int, precision: str, dtype: str = "bf16") -> list[KernelSpec]:
    return [HC_PRENORM.of(arch, n, config, precision == "fp32", dtype == "fp32") for config in PRENORM_CONFIGS]


def _mixing(arch: str, head: bool, precision: str, dtype: str = "bf16") -> list[KernelSpec]:
    prenorms = _prenorms(arch, STREAMS if head else MIX_WIDTH, precision, dtype)
    mixes = [HC_MIX.of(arch, head, dtype == "fp32", tokens) for tokens in MIX_TOKENS]
    return [*prenorms, *dict.fromkeys(mixes)]


def _maps(arch: str, layout: str, index_dtype: str) -> list[KernelSpec]:
    return [MOE_MAP.of(arch, layout, *kernel, index_dtype == "int64") for kernel in MAP_KERNELS]


def _gates(arch: str, **fields: Any) -> list[KernelSpec]:
    """Those of few tokens and of many."""
    return [*(GATE_LOGITS.of(arch, tiles) for tiles in TOKEN_TILES), *_topk_gates(arch, **fields)]


def _topk_gates(arch: str, experts: int, scores: str, hashed: bool, index_dtype: str) -> list[KernelSpec]:
    return [
        TOPK_GATE.of(arch, experts, scores, hashed, index_dtype == "int64", by_block)
        for by_block in ((True, False) if gates_by_block(1, experts, hashed) else (False,))
    ]


_Accepted = tuple[Scalar, ...] | range
_GATE_FIELDS: dict[str, _Accepted] = {
    "experts": range(1, MAX_EXPERTS + 1),
    "scores": SCORES,
    "hashed": (False, True),
    "index_dtype": INDEX_DTYPES,
}
_KINDS: dict[str, tuple[dict[str, _Accepted], Callable[..., list[KernelSpec]]]] = {
    "hc_split_sinkhorn": ({}, lambda arch: [HC_SINKHORN.spec(arch)]),
    "hc_prenorm_gemm": ({"n": range(1, MAX_N + 1), "precision": PRECISIONS, "dtype": STREAM_DTYPES}, _prenorms),
    "hc_pre": (
        {"precision": PRECISIONS, "dtype": STREAM_DTYPES},
        lambda arch, **fields: _mixing(arch, False, **fields),
    ),
    "hc_post": ({"dtype": STREAM_DTYPES}, lambda arch, dtype="bf16": [HC_POST.spec(arch, fp32=dtype == "fp32")]),
    "hc_head": (
        {"precision": PRECISIONS, "dtype": STREAM_DTYPES},
        lambda arch, **fields: _mixing(arch, True, **fields),
    ),
    "prepare_fp4_weights": (
        {"format": tuple(FORMATS)},
        lambda arch, format: [PACK_FP4.spec(arch, format=format)],
    ),
    "unpack_ue8m0": ({}, lambda arch: [UNPACK_SCALES.spec(arch)]),
    "topk_gate": (
        _GATE_FIELDS,
        _topk_gates,
    ),
    "moe_gate": (_GATE_FIELDS, _gates),
    "moe_permutation": ({"layout": LAYOUTS, "index_dtype": INDEX_DTYPES}, _maps),
    "moe_permute": (
        {"zero_padding": (False, True)},
        lambda arch, zero_padding: [MOE_PERMUTE.spec(arch, zero_padding=zero_padding)],
    ),
    "moe_combine": (
        {"topk": range(1, MAX_COMBINED + 1)},
        lambda arch, topk: [MOE_COMBINE.of(arch, topk)],
    ),
    "pack_ue8m0": ({"grouped": (False, True)}, lambda arch, grouped: [PACK_UE8M0.spec(arch, grouped=grouped)]),
}
"""Of each kind the fields beside it, what each accepts, and the kernels that calls can need, whatever their sizes."""

KINDS = tuple(_KINDS)


@dataclass(frozen=True)
class SmallProblem:
    """What decides a call's kernels.

    Args:
        kind: one of ``KINDS``.
        fields: the rest by name, sorted.
    """

    kind: str
    fields: tuple[tuple[str, Scalar], ...] = ()

    @classmethod
    def make(cls, kind: str, **fields: Scalar) -> SmallProblem:
        """A problem of fields in any order."""
        return cls(kind, tuple(sorted((name, value) for name, value in fields.items() if _DEFAULTS.get(name) != value)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SmallProblem:
        """The problem of a line of a shapes file.

        Raises:
            ProblemError: it is none; names the field, what it is and what is accepted.
        """
        kind = data["kind"]
        accepted = _KINDS[kind][0]
        given = {name: value for name, value in data.items() if name != "kind"}
        given |= {name: value for name, value in _DEFAULTS.items() if name in accepted and name not in given}
        if unknown := sorted(set(given) - set(accepted)):
            raise ProblemError(f"{unknown[0]!r} is no field of kind {kind}; accepted are {_listed(accepted)}")
        if missing := sorted(set(accepted) - set(given)):
            raise ProblemError(f"{missing[0]} is missing; kind {kind} needs {_listed(accepted)}")
        for name, values in accepted.items():
            if not any(type(given[name]) is type(value) for value in values[:1]) or given[name] not in values:
                raise ProblemError(f"{name} is {given[name]!r}; accepted is {_described(values)}")
        return cls.make(kind, **given)

    def to_dict(self) -> dict[str, Any]:
        """One line of a shapes file."""
        return {"kind": self.kind, **dict(self.fields)}

    def without_m(self) -> SmallProblem:
        """Itself: no number of rows decides which kernels there are."""
        return self

    def specs(self, arch: str) -> tuple[KernelSpec, ...]:
        """Every kernel that calls can need."""
        return tuple(_KINDS[self.kind][1](arch, **dict(self.fields)))

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.fields)])


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"


def _described(values: _Accepted) -> str:
    if isinstance(values, range):
        return f"an integer from {values[0]} to {values[-1]}"
    return " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
