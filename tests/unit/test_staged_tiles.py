"""How tiles along K get to D, by the kernel's own functions on the CPU: every thread stages its sums, the producer's
boxes are copied as TMA copies them, and D must have each sum once.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from support import ROOT

from jitgemm.device import H200
from jitgemm.families.batched import BatchedProblem, producer_stores
from jitgemm.families.gemm import MMA_M, GemmConfig, KernelShape, kernel_shape
from jitgemm.heuristics.batched import candidates, illegal

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

GROUPS, M, N = 2, 200, 268  # which no tile divides

_ASSEMBLY = (
    (r'asm volatile\("st\.shared\.v2\.f32 \[%0\], \{%1, %2\};" ::"r"\((.*?)\), "f"\((.*?)\), "f"\((.*?)\) : "memory"\);', r"shared<float>(\1) = \2, shared<float>((\1) + 4) = \3;"),  # noqa: E501
    (r'asm volatile\("st\.shared\.f32 \[%0\], %1;" ::"r"\((.*)\), "f"\((.*?)\) : "memory"\);', r"shared<float>(\1) = \2;"),  # noqa: E501
)  # fmt: skip

KIND = """
namespace {name} {{
constexpr bool SWAP_AB = {swap};
constexpr int TILE_ROWS = {mma_m}, TILE_COLUMNS = {mma_n}, STORE_COLUMNS = {mma_n}, STORE_ROW_BYTES = {row_bytes}, STORE_ROW_ELEMENTS = {row_bytes} / 4;
constexpr int STAGING_PER_WAVE = {wave_bytes}, WAVES = {waves}, MATH_WARPGROUPS = {warpgroups};
using Element = Float32;
{struct}
#include "run_tiles"
}}
"""  # noqa: E501


def problem_of(recipe: str) -> BatchedProblem:
    """Groups along K with an FP32 D."""
    layout = "tn" if recipe == "bf16" else "nt"
    return BatchedProblem(N, 4096, recipe, GROUPS, "k_grouped", M, layout, "fp32")


def stored_by_producers() -> dict[str, tuple[GemmConfig, KernelShape]]:
    """Of the tiles that calls choose from, those that the producer stores."""
    found = {}
    for recipe in ("fp8_1x128_1x128", "bf16"):
        problem = problem_of(recipe)
        for config in candidates(problem, ()):
            shape = kernel_shape(problem.dense.without_sizes(), config)
            if illegal(problem, config, H200) is None and producer_stores(problem.kind, shape):
                key = (shape.mma_m, shape.mma_n, shape.math_warpgroups, config.swap_ab)
                found.setdefault("_".join(map(str, key)), (config, shape))
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' code, compiled for the CPU."""
    template = (ROOT / "templates/sm90_gemm.cu.jinja").read_text()
    struct = template[template.index("struct StagedTile {") :]
    struct = struct[: struct.index("\n};") + 3]
    header = (ROOT / "templates/include/epilogue.cuh").read_text()
    swizzle = header[header.index("template <int ROW_BYTES>") : header.index("template <bool TRANSPOSED>")]
    staging = header[header.index("// Writes one warpgroup's 64 x COLUMNS") : header.index("// D and C as plain")]
    bf16 = staging[
        staging.index("if constexpr (sizeof(Element) == 2) {") : staging.index("  } else {\n    const uint32_t row")
    ]
    staging = staging.replace(bf16, "if constexpr (sizeof(Element) == 2) {\n    abort();\n")
    for pattern, replacement in _ASSEMBLY:
        staging, replaced = re.subn(pattern, replacement, staging)
        assert replaced, pattern
    assert "asm" not in staging
    source = (ROOT / "tests/unit/staged_tiles.cpp").read_text()
    common, run = source.split("// -- Of each kind of tile.\n")
    kinds = []
    for name, (config, shape) in stored_by_producers().items():
        text = KIND.format(
            name=f"kind_{name}",
            swap=int(config.swap_ab),
            mma_m=shape.mma_m,
            mma_n=shape.mma_n,
            row_bytes=shape.store_row_bytes,
            wave_bytes=shape.staging_wave_bytes,
            waves=shape.waves,
            warpgroups=shape.math_warpgroups,
            struct=struct,
        )
        kinds.append(text.replace('#include "run_tiles"', run.replace("@NAME@", name)))
    folder = tmp_path_factory.mktemp("staged")
    path = folder / "staged.cpp"
    path.write_text(common.replace("@STAGING@", swizzle + staging) + "\n".join(kinds))
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", str(path), "-o", str(folder / "staged.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "staged.so"))


@pytest.mark.parametrize("name", stored_by_producers())
def test_every_sum_gets_to_its_place_once(library: ctypes.CDLL, name: str) -> None:
    config, shape = stored_by_producers()[name]
    d = torch.zeros(GROUPS, M, N)
    height = shape.store_columns if config.swap_ab else MMA_M  # as BatchedGeometry makes the map
    getattr(library, f"run_{name}")(ctypes.c_void_p(d.data_ptr()), GROUPS, M, N, height)
    group, row, column = torch.meshgrid(*map(torch.arange, d.shape), indexing="ij")
    assert torch.equal(d, 1.0 + column + 512 * row + 2**18 * group)
