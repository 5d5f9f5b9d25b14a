"""Kernels on the CPU: the rendered source, compiled by the host's C++ compiler, a fiber for each thread of a block.

Slow, and no judge of races between blocks or of the memory model, but the kernel's own text: its indices, masks,
barriers, shuffles and rounding are what they are on a GPU. What single instructions do is written out in ``device.h``;
the tests on a GPU say whether that is right.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from jitgemm.families import KernelSpec, family_of
from jitgemm.render import render

COMPILER = shutil.which("g++")

_MAIN = """
extern "C" int emulate(const void* params, int grid_x, int grid_y, int threads, int smem_bytes) {
  const auto entry = [](const void* p) { %s(*static_cast<const Params*>(p)); };
  return emulation::run(entry, params, grid_x, grid_y, threads, smem_bytes);
}
"""
_ASSEMBLY = re.compile(
    r"^(?:template <[^\n]*>\n)?__device__ __forceinline__ [^\n]*"
    r"(?:\basm\b[^\n]*$|\{\n(?:(?!^\}).*\n)*?.*\basm\b(?:.*\n)*?\}$)",
    re.MULTILINE,
)
"""A function that is assembly: ``device.h`` says what it does."""

Run = Callable[[bytes | int, tuple[int, ...], int], None]
"""Runs a kernel: its parameters or their address, the grid, threads of a block."""


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulation-")  # gone at exit


@functools.cache
def emulate(spec: KernelSpec) -> Run:
    """A function that runs the kernel of ``spec``.

    It raises an AssertionError where threads wait for each other for ever, or for threads that have ended.
    """
    assert COMPILER is not None
    source, smem_bytes = render(spec), family_of(spec).smem_bytes(spec)
    folder = Path(tempfile.mkdtemp(dir=_directory().name))
    device = (Path(__file__).parent / "device.h").read_text()
    headers = {name: _ASSEMBLY.sub("", text) for name, text in source.headers.items()}
    for name, text in {**headers, "common.cuh": device, "convert.cuh": '#include "common.cuh"\n'}.items():
        (folder / name).write_text(text)
    kernel = source.text.replace("extern __shared__ float4 shared[];", "float4* shared = emulation::dynamic_shared;")
    (folder / "kernel.cpp").write_text(kernel + _MAIN % source.name)
    # No fused multiply-add that the source does not ask for; numbers as they are.
    options = ["-std=c++20", "-O0", "-w", "-ffp-contract=off"]
    # Nothing is shared between kernels, not even by name.
    options += ["-fno-gnu-unique", "-shared", "-fPIC", "-o", "kernel.so", "kernel.cpp"]
    done = subprocess.run([COMPILER, *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    library = ctypes.CDLL(str(folder / "kernel.so"))

    def run(params: bytes | int, grid: tuple[int, ...], threads: int) -> None:
        x, y = (*grid, 1)[:2]
        address = params if isinstance(params, bytes) else ctypes.c_void_p(params)
        assert library.emulate(address, x, y, threads, smem_bytes) == 0, "a barrier that not all threads reach"

    return run
