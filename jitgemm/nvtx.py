"""NVTX ranges, where ``JITGEMM_NVTX`` asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from jitgemm import settings


def range_if_asked(name: str) -> contextlib.AbstractContextManager[object]:
    """A range around a block of code, or nothing."""
    if not settings.current().nvtx:
        return contextlib.nullcontext()
    return torch.cuda.nvtx.range(name)


def in_range(name: str, run: Callable[[], int]) -> Callable[[], int]:
    """``run`` within a range of its own."""
    push, pop = torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop

    def ranged() -> int:
        push(name)
        try:
            return run()
        finally:
            pop()

    return ranged
