"""NVTX ranges, where ``JITGEMM_NVTX`` asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from jitgemm import settings

_nvtx: Any = torch.cuda.nvtx  # which has no types


@contextlib.contextmanager
def range_if_asked(name: str) -> Iterator[None]:
    """A range around a block of code, or nothing."""
    if not settings.current().nvtx:
        yield
        return
    _nvtx.range_push(name)
    try:
        yield
    finally:
        _nvtx.range_pop()


def in_range(name: str, run: Callable[[], int]) -> Callable[[], int]:
    """``run`` within a range of its own."""
    push, pop = _nvtx.range_push, _nvtx.range_pop

    def ranged() -> int:
        push(name)
        try:
            return run()
        finally:
            pop()

    return ranged
