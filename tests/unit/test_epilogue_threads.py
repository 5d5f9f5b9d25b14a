"""The kernels' own epilogue, run on the CPU: a thread for each of theirs, in two CTAs that send each other magnitudes.

Fragments go in as the MMA leaves them; what is staged, and the scales, must be the reference's.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from support import ROOT

from jitgemm.families.gemm import GemmConfig, GemmProblem, kernel_shape
from jitgemm.reference.epilogue import swiglu
from jitgemm.reference.quantize import per_token_cast_to_fp8

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

# d_dtype, epilogue and config; tiles of BF16, but for what they say of FP8 too.
CASES = (
    ("e4m3", "swiglu", "64x128x64 s2 c1x2"),
    ("e4m3", "swiglu", "128x128x64 s2 c1x2"),
    ("e4m3", "swiglu", "256x128x64 s2 c1x2"),
    ("e4m3", "swiglu", "64x256x64 s2"),
    ("e4m3", "swiglu", "16x128x64 s2 c1x2 swap"),
    ("e4m3", "swiglu", "24x256x64 s2 swap"),
    ("e4m3", "linear", "128x128x64 s2"),
    ("e4m3", "linear", "64x64x64 s2 c1x2"),
    ("e4m3", "linear", "8x128x64 s2 swap"),
    ("e4m3", "linear", "16x64x64 s2 c1x2 swap"),
    ("e4m3", "linear", "8x256x64 s2 swap"),
    ("e4m3_ue8m0", "swiglu", "64x128x64 s2"),
    ("e4m3_ue8m0", "swiglu", "16x128x64 s2 swap"),
    ("e4m3_ue8m0", "swiglu", "8x256x64 s2 swap"),
    ("e4m3_ue8m0", "linear", "64x96x64 s2"),
    ("e4m3_ue8m0", "linear", "16x64x64 s2 swap"),
)
TILES = 5  # that each CTA computes one after another

SOURCE = ROOT / "tests/unit/epilogue_threads.cpp"

# The header's assembly, as C++.
_ASSEMBLY = (
    (r'asm volatile\("ld\.global\.\w+ %0, \[%1\];" : "=\w"\((\w+)\) : "l"\((.*)\)\);', r"\1 = *(\2);"),
    (r'asm\("cvt\.rn[^;]*;[^;]*;', "packed = e4m3(low) | e4m3(high) << 8;"),
    (r'asm\("max\.NaN[^;]*;[^;]*;', "x = fabsf(x), y = fabsf(y), larger = x > y || std::isnan(x) ? x : y;"),
    (r'asm volatile\(\s*"\{\\n \.reg \.b32 there.*?: "memory"\);', "send(address, barrier, cta, x, y);"),
    (r'asm volatile\(\s*"\{\\n \.reg \.pred done.*?: "memory"\);', "wait_for(barrier, parity);"),
    (r'asm volatile\("ld\.shared\.b32 %0, \[%1\];" : "=r"\((\w+)\) : "r"\((.*?)\) : "memory"\);', r"\1 = shared<int>(\2);"),  # noqa: E501
    (r'asm volatile\("st\.shared\.v2\.f32 [^\n]*"f"\(x\), "f"\(y\) : "memory"\);', "shared<float>(address) = x, shared<float>(address + 4) = y;"),  # noqa: E501
    (r'asm volatile\("st\.shared\.v2\.f32 .*?"memory"\);', "abort();"),
    (r'asm volatile\("st\.shared\.f32 .*?"memory"\);', "abort();"),
    (r'asm volatile\("st\.shared\.b32 \[%0\], %1;" ::"r"\((.*?)\), "r"\((.*)\) : "memory"\);', r"shared<int>(\1) = (\2);"),  # noqa: E501
    (r'asm volatile\("st\.shared\.b16 \[%0\], %1;" ::"r"\((.*)\), "h"\((.*)\) : "memory"\);', r"shared<uint16_t>(\1) = (\2);"),  # noqa: E501
    (r'asm volatile\("st\.shared\.b8 \[%0\], %1;" ::"r"\((.*)\), "r"\((.*)\) : "memory"\);', r"shared<uint8_t>(\1) = (\2);"),  # noqa: E501
)  # fmt: skip


class Steps(ctypes.Structure):
    """The template's ``EpilogueSteps``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("alpha", "bias", "row_weights", "scales")),
        *((name, ctypes.c_int64) for name in ("scales_stride", "scales_plane_stride")),
        *(
            (name, ctypes.c_int32)
            for name in ("alpha_group_stride", "bias_group_stride", "weights_plane_stride", "bias_is_bf16")
        ),
        *((name, ctypes.c_float) for name in ("alpha_value", "limit")),
    )


class Problem(ctypes.Structure):
    """What the threads compute."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("product", "d")),
        *((name, ctypes.c_int32) for name in ("tokens", "n", "ctas")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' code, compiled for the CPU."""
    swizzle = (ROOT / "templates/include/epilogue.cuh").read_text()
    swizzle = swizzle[swizzle.index("template <int ROW_BYTES>") : swizzle.index("template <bool TRANSPOSED>")]
    code = (ROOT / "templates/include/fused_epilogue.cuh").read_text()
    code = code[code.index("struct EpilogueSteps") :]
    for pattern, replacement in _ASSEMBLY:
        code, replaced = re.subn(pattern, replacement, code, flags=re.DOTALL if "reg" in pattern else 0)
        assert replaced, pattern
    assert "asm" not in code
    kinds, warpgroups = [], []
    for d_dtype, epilogue, text in CASES:
        config = GemmConfig.from_text(text)
        shape = kernel_shape(GemmProblem(256, 64, "bf16", d_dtype=d_dtype, epilogue=epilogue).without_sizes(), config)
        numbers = (
            *(shape.mma_m, shape.mma_n, shape.math_warpgroups, shape.scale_parts, shape.d_scale_columns),
            *(int(shape.d_scales_ue8m0), shape.exchange_bytes, shape.store_row_bytes),
        )
        kinds.append(f"thread_of<{int(config.swap_ab)}, {int(shape.swiglu)}, {', '.join(map(str, numbers))}>")
        warpgroups.append(str(shape.math_warpgroups))
    folder = tmp_path_factory.mktemp("epilogue")
    source = folder / "epilogue.cpp"
    text = SOURCE.read_text().replace("@TILES@", str(TILES)).replace("@KINDS@", ", ".join(kinds))
    source.write_text(text.replace("@WARPGROUPS@", ", ".join(warpgroups)).replace("@CODE@", swizzle + code))
    assert COMPILER is not None
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-pthread", str(source)]
    done = subprocess.run([*command, "-o", str(folder / "epilogue.so")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "epilogue.so"))


@pytest.mark.parametrize("which", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_threads_agree_with_the_reference(library: ctypes.CDLL, which: int) -> None:
    d_dtype, epilogue, text = CASES[which]
    config, is_swiglu, packed = GemmConfig.from_text(text), epilogue == "swiglu", d_dtype == "e4m3_ue8m0"
    ctas, gated, gran = config.cluster_n, 2 if is_swiglu else 1, 32 if packed else 128
    tokens = config.tile_m * TILES - 3
    n = config.tile_n * ctas - (16 if is_swiglu else 5)
    columns = n // gated
    generator = torch.Generator().manual_seed(which)
    product = torch.randn((tokens, n), generator=generator) * 10 ** torch.randn((tokens, 1), generator=generator)
    alpha, bias = torch.rand(1, generator=generator), torch.randn(n, generator=generator).bfloat16()
    weights = torch.rand(tokens, generator=generator)
    x = product * alpha + bias.float()
    if is_swiglu:
        runs = x.view(tokens, columns // 8, 2, 8)
        x = swiglu(runs[:, :, 0].reshape(tokens, -1), runs[:, :, 1].reshape(tokens, -1), 20.0)
    x = x * weights[:, None]
    expected, expected_scales = per_token_cast_to_fp8(x, packed, gran, packed)

    d = torch.full((tokens, columns), 0x7F, dtype=torch.uint8)
    scales = torch.full((expected_scales.shape[1], tokens + 1), -1, dtype=torch.int32)
    steps = Steps(
        *(alpha.data_ptr(), bias.data_ptr(), weights.data_ptr(), scales.data_ptr()),
        *(tokens + 1, 0, 0, 0, 0, 1, 1.0, 20.0),
    )
    library.run(which, ctypes.byref(steps), ctypes.byref(Problem(product.data_ptr(), d.data_ptr(), tokens, n, ctas)))

    assert (scales[:, -1] == -1).all()
    found = scales[:, :-1].T.contiguous()
    if packed:
        assert torch.equal(found, expected_scales)
    else:
        assert torch.allclose(found.view(torch.float32), expected_scales, rtol=1e-5, atol=0)
    same = d == expected.view(torch.uint8)
    assert same.float().mean() > 0.995  # expf is not torch's
    difference = (d.view(torch.float8_e4m3fn).float() - expected.float()).abs()
    assert (difference <= expected.float().abs() / 7 + 2.0**-9).all()
