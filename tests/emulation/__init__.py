"""Kernels on the CPU: the rendered source, compiled by the host's C++ compiler, with fibers for threads.

Slow, but the kernel's own text: its indices, masks, shuffles and rounding are what they are on a GPU. What single
instructions do is written out in ``device.h``; the tests on a GPU say whether that is right.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from jitgemm.families import KernelSpec
from jitgemm.render import render

COMPILER = shutil.which("g++")

_MAIN = """
extern "C" void emulate(const void* params, int grid_x, int grid_y, int threads) {
  emulation::kernel = [](const void* p) { %s(*static_cast<const Params*>(p)); };
  emulation::params = params;
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) {
      blockIdx = {unsigned(x), unsigned(y), 0};
      run_block(threads);
    }
}
"""

Run = Callable[[int, tuple[int, int, int], int], None]


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulation-")  # gone at exit


@functools.cache
def emulate(spec: KernelSpec) -> Run:
    """A function that runs the kernel of ``spec``: address of its parameters, grid, threads of a block."""
    assert COMPILER is not None
    source = render(spec)
    folder = Path(tempfile.mkdtemp(dir=_directory().name))
    device = (Path(__file__).parent / "device.h").read_text()
    for name, text in {**source.headers, "common.cuh": device, "convert.cuh": '#include "common.cuh"\n'}.items():
        (folder / name).write_text(text)
    (folder / "kernel.cpp").write_text(source.text + _MAIN % source.name)
    # No fused multiply-add that the source does not ask for; numbers as they are.
    options = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", "-shared", "-fPIC", "-o", "kernel.so", "kernel.cpp"]
    done = subprocess.run([COMPILER, *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernel.so"))

    def run(params: int, grid: tuple[int, int, int], threads: int) -> None:
        library.emulate(ctypes.c_void_p(params), grid[0], grid[1], threads)

    return run
