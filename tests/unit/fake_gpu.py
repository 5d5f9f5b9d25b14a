"""A driver that launches nothing: the calls' whole way to the GPU, with CPU tensors, and what reached the launch."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from jitgemm import driver, kernel, plan, tensor_map
from jitgemm.cache import Cubin
from jitgemm.device import H200
from jitgemm.families import KernelSpec
from jitgemm.families.gemm_launch import PARAMS_BYTES, _TAIL_OFFSET, Addresses
from jitgemm.ops import gemm, layout
from jitgemm.tensor_map import BYTES


@dataclass
class Launched:
    """One launch: its configuration and parameter block."""

    grid: tuple[int, ...]
    stream: int
    pdl: bool
    params: bytes

    def _unpack(self, form: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(form, self.params, _TAIL_OFFSET + offset)
