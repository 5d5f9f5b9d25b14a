"""Loaded kernels: a cubin in the driver, one for each spec and device."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from jitgemm import driver, hooks
from jitgemm.builder import build
from jitgemm.compiler import Cubin, driver_version, version_text
from jitgemm.errors import DriverError
from jitgemm.families import KernelSpec, family_of
from jitgemm.nvtx import range_if_asked
from jitgemm.problem import Problem


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be launched on one device."""

    spec: KernelSpec
    device: int
    handle: int
    num_threads: int
    smem_bytes: int
    library: Any = field(repr=False, compare=False)  # keeps the module loaded


_lock = threading.Lock()
_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
_forked_from_user = False
"""Whether this process is a fork of one that had loaded kernels, or was about to."""


def _note_fork() -> None:
    global _forked_from_user
    _forked_from_user = _forked_from_user or bool(_kernels) or _lock.locked()


os.register_at_fork(after_in_child=_note_fork)


def load(spec: KernelSpec, device: int, problem: Problem | None = None) -> Kernel:
    """The kernel of ``spec`` on a device: loaded once, built or read from the cache before that.

    ``problem`` is what it is needed for, so that messages can give the command that prewarms it.

    Raises:
        CacheMissError: it would have to be compiled, and that is forbidden or the current stream is being captured.
        CompileError: it could not be compiled.
        DriverError: the driver refused it, or this process is a fork of one that used CUDA.
    """
    if _forked_from_user:  # CUDA does not survive a fork
        raise DriverError(
            "this process is a fork of one that used CUDA, which no fork survives: start processes by 'spawn'"
        )
    known = _kernels.get((spec, device))
    if known is not None:
        return known
    start = time.perf_counter()
    family = family_of(spec)
    with range_if_asked(f"jitgemm load {family.describe(spec)}"):
        built = build(spec, torch.cuda.is_current_stream_capturing(), problem)
        with _lock:
            known = _kernels.get((spec, device))
            if known is not None:
                return known
            kernel = _kernels[spec, device] = _load(spec, device, built.cubin)
    hooks.emit("load", spec, time.perf_counter() - start, source=built.source, device=device)
    return kernel


def _load(spec: KernelSpec, device: int, cubin: Cubin) -> Kernel:
    family = family_of(spec)
    smem_bytes = family.smem_bytes(spec)
    try:
        library, handle = driver.load_kernel(cubin.image, cubin.metadata.kernel_name, smem_bytes, device)
    except DriverError as error:
        version = driver_version()
        raise DriverError(
            f"kernel {family.describe(spec)}, compiled by NVRTC {cubin.metadata.nvrtc_version}, was refused by the "
            f"CUDA {version_text(version) if version else '(unknown)'} driver: {error}"
        ) from None
    return Kernel(spec, device, handle, family.num_threads(spec), smem_bytes, library)
