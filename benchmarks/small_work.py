"""What the race of small kernels (``benchmarks.small``) is made of: cases, and the work of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Call

DEVICE = "cuda"

ROWS_US, PHASES_US, CHAINS_US = 0.6, 1.5, 2.5
"""What may come on top of the floor for 64 rows or fewer: row-wise kernels, those of two phases, sinkhorn and gate."""


@dataclass(frozen=True)
class Work:
    """A call of ours, and others that compute the same from the same tensors.

    Args:
        ours: the call.
        right: whether what it computes is right.
        in_torch: the function as one writes it in torch: a peer as it is, and compiled.
        arguments: its tensors.
        moved: bytes that must be read and written.
        others: more peers, by name.
    """

    ours: Call
    right: Callable[[], bool]
    in_torch: Callable[..., Any]
    arguments: tuple[Tensor, ...]
    moved: int
    others: Mapping[str, Call] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        name: the function's.
        m: tokens.
        n: columns of the result.
        k: columns of the input, where they are others.
        groups: experts, or 1.
        recipe: types.
        slack_us: what it may take beyond the floor for few rows.
        make: tensors and calls.
    """

    name: str
    m: int
    n: int
    k: int | None
    groups: int
    recipe: str
    slack_us: float
    make: Callable[[], Work]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """One tensor or several as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
