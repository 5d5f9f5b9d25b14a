"""Kernels of ``PlainFamily`` on the CPU, compiled by g++: a stand-in for the GPU that operations launch on.

Slow, and no judge of races between blocks or of the memory model; but every index, barrier and shuffle is the kernel's
own.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import ROOT

from jitgemm.families import KernelSpec, family_of
from jitgemm.families.plain import PlainFamily
from jitgemm.ops import fp4, hyper_connections, moe, plain
from jitgemm.render import render

COMPILER = shutil.which("g++")
ARCH = "sm_90a"
_NUM_SMS = 6
_ASSEMBLY = r"^__device__ __forceinline__ [^\n]*\{(?: [^\n]*\basm\b[^\n]*|\n(?:(?!^\}).*\n)*?.*\basm\b(?:.*\n)*?\})$"
_folder = tempfile.TemporaryDirectory(prefix="jitgemm-emulator-")


@functools.cache
def compiled(spec: KernelSpec) -> Any:
    """A kernel's ``run``."""
    source = render(spec)
    text = source.text
    for name in ("sinkhorn.cuh", "warp.cuh"):
        text = text.replace(f'#include "{name}"', source.headers[name], 1)
    text = re.sub(r'^#(include "|pragma once|pragma unroll).*$', "", text, flags=re.MULTILINE)
    # The functions that are assembly: defined by the harness.
    text = re.sub(
        r"^__device__ __forceinline__ [^\n]*\{\n(?:(?!^\}).*\n)*?.*\basm\b(?:.*\n)*?\}$", "", text, flags=re.M
    )
    text = re.sub(r"^__device__ __forceinline__ [^\n]*\basm\b.*$", "", text, flags=re.MULTILINE)
    text = text.replace("extern __shared__ float4 shared[];", "float4* shared = dynamic_shared;")
    text = text.replace('extern "C" __global__', "__global__")
    harness = (ROOT / "tests/unit/block_threads.cpp").read_text()
    program = harness.replace("@CODE@", text).replace("@KERNEL@", source.name)
    base = Path(_folder.name) / f"{source.name}-{abs(hash(spec)):x}"
    base.with_suffix(".cpp").write_text(program)
    library = base.with_suffix(".so")
    command = [str(COMPILER), "-std=c++20", "-O0", "-w", "-shared", "-fPIC", "-o", str(library), str(base) + ".cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library)).run


class EmulatedGpu:
    """Takes the place of ``jitgemm.ops.plain.Gpu``."""

    arch, num_sms, ordinal = ARCH, _NUM_SMS, 0
    launches: ClassVar[list[KernelSpec]] = []

    def __init__(self, *_: object) -> None:
        pass

    def launch(self, family: PlainFamily, spec: KernelSpec, grid: tuple[int, ...], **numbers: float) -> Any:
        """A callable as ``PlainLaunch`` is one."""
        assert family_of(spec) is family
        run = compiled(spec)
        x, y = (*grid, 1)[:2]
        values = [numbers[field.name] for field in family.fields if not field.is_pointer]
        assert len(values) == len(numbers)

        def launch(_: int, *addresses: int) -> None:
            self.launches.append(spec)
            assert len(addresses) == len(family.pointers)
            params = family.params.pack(*addresses, *values).ljust(family.params_bytes, b"\0")
            assert run(params, x, y, family.num_threads(spec), family.smem_bytes(spec)) == 0, "a deadlock"

        return launch

    def here(self, call: Any) -> Any:
        """The plan itself."""
        return call


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Operations on CPU tensors launch emulated kernels; yields the specs that are launched."""
    if COMPILER is None:
        pytest.skip("g++ is not installed")
    plain.forget_plans()
    EmulatedGpu.launches.clear()
    for module in (fp4, hyper_connections, moe):
        monkeypatch.setattr(module, "Gpu", EmulatedGpu)
        monkeypatch.setattr(module, "on_gpu", lambda _: True)
        monkeypatch.setattr(module, "raw_stream", lambda _: 0)
    yield EmulatedGpu.launches
    plain.forget_plans()
