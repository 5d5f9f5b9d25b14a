"""As ``sanitize.py``, for epilogues: each step once, dense and grouped, with clusters and swapped operands. ::

compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/sanitize_epilogue.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_epilogue.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import jitgemm
from jitgemm import Epilogue, settings
from jitgemm.reference.gemm import check_close
from tests.gpu.sanitize_batched import bf16, of_blocks, of_rows, on_gpu, run_all, tile

FP8, BF16 = "fp8_1x128_128x128", "bf16"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
K = 400


def poisoned(shape: tuple[int, ...], d_dtype: str, padding: int) -> Any:
    """D of bytes that no kernel writes; of so many columns more."""
    wide = (*shape[:-1], shape[-1] + padding)
    if d_dtype in DTYPES:
        return torch.full(wide, 7.0, dtype=DTYPES[d_dtype])[..., : shape[-1]]
    values, scales = jitgemm.empty_quantized(shape, ue8m0=d_dtype == "e4m3_ue8m0", device="cpu")
    scales.view(torch.int32).fill_(0x7FA5A5A5)
    return torch.full(wide, 0x7F, dtype=torch.uint8).view(values.dtype)[..., : shape[-1]], scales


def copied(d: Any) -> Any:
    """D on the GPU, with its strides."""
    if isinstance(d, tuple):
        return tuple(map(copied, d))
    there = torch.empty_strided(d.shape, d.stride(), dtype=d.dtype, device="cuda")
    return there.copy_(d)


def check(found: Any, expected: Any, used: Tensor, recipe: str, d_dtype: str) -> None:
    """Rows that are computed are close, others have the same bits.

    Raises:
        AssertionError: they are not.
    """
    parts = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for got, wanted in parts:
        as_bytes = [x[~used].contiguous().view(torch.uint8) for x in (got, wanted)]
        assert torch.equal(*as_bytes), "a row that is not computed has been written, or is no zero"
    if d_dtype in DTYPES:
        check_close(found[used], expected[used], recipe=recipe, d_dtype=d_dtype)
        return
    packed = d_dtype == "e4m3_ue8m0"
    back = [
        jitgemm.cast_back_from_fp8(values[used], scales[used].contiguous(), 32 if packed else 128, packed).double()
        for values, scales in (found, expected)
    ]
    # A step of E4M3, twice that where a power of two is another.
    error = (back[0] - back[1]).norm() / back[1].norm()
    assert error < (0.03 if packed else 0.01), f"Frobenius {float(error):.3g}"


def run(
    kind: str | None,
    recipe: str,
    config: dict[str, Any],
    d_dtype: str = "bf16",
    steps: Sequence[str] = (),
    *,
    counts: Sequence[int] = (3, 0, 70, 64),
    alignment: int = 16,
    n: int = 256,
    padding: int = 0,
) -> None:
    """One call; steps are names of fields of an epilogue, or ``c``."""
    groups, max_m = len(counts), 70
    index: list[int] = []
    ends: list[int] = []
    for group, count in enumerate(counts):
        index += [-1] * (-len(index) % alignment) + [group] * count
        ends.append(len(index) if count else (ends or [0])[-1])
    index += [-1] * 40
    if kind is None:
        rows, used = (max_m,), torch.ones(max_m, dtype=torch.bool)
    elif kind == "masked":
        rows = groups, max_m
        used = torch.arange(max_m)[None, :] < torch.tensor(counts)[:, None]
    else:
        rows, used = (len(index),), torch.tensor(index) >= 0
    of_groups = () if kind is None else (groups,)
    weights, tokens = bf16(groups, n, K, seed=1) / 8, bf16(*rows, K) / 8
    a: Any = of_rows(tokens) if recipe == FP8 else tokens
    b: Any = of_blocks(weights) if recipe == FP8 else weights
    if kind is None:
        b = (b[0][0], b[1][0]) if recipe == FP8 else b[0]
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "alpha": torch.rand(of_groups or (1,), generator=generator) + 0.5,
        "bias": torch.rand((*of_groups, n), generator=generator) - 0.5,
        "row_weights": torch.rand(rows, generator=generator),
    }
    numbers = {"swiglu": True, "limit": 0.75, "number": -1.5, "bias in bf16": tensors["bias"].to(torch.bfloat16)}
    fields = {name: {**tensors, **numbers}[name] for name in steps if name != "c"}
    for name, field in (("number", "alpha"), ("bias in bf16", "bias")):
        if name in fields:
            fields[field] = fields.pop(name)
    columns = n // 2 if "swiglu" in steps else n
    layout = torch.tensor({None: [], "masked": counts, "psum": ends, "contiguous": index}[kind], dtype=torch.int32)
    c = torch.randn((*rows, columns), generator=generator).to(DTYPES.get(d_dtype, torch.float32))
    d = poisoned((*rows, columns), d_dtype, padding)
    operand = "fp8" if recipe == FP8 else "bf16"

    def call(move: Callable[[Any], Any], d: Any) -> Any:
        given = Epilogue(**{name: move(value) for name, value in fields.items()})
        if kind is None:
            getattr(jitgemm, f"{operand}_gemm_nt")(
                move(a), move(b), d, move(c) if "c" in steps else None, epilogue=given
            )
        elif kind == "masked":
            masked = getattr(jitgemm, f"m_grouped_{operand}_gemm_nt_masked")
            masked(move(a), move(b), d, move(layout), 16, epilogue=given)
        else:
            contiguous = getattr(jitgemm, f"m_grouped_{operand}_gemm_nt_contiguous")
            contiguous(move(a), move(b), d, move(layout), use_psum_layout=kind == "psum", epilogue=given)
        return d

    with settings.override(**config, mk_alignment=alignment):
        found = call(on_gpu, copied(d))
        expected = call(lambda value: value, d)
    torch.cuda.synchronize()
    found = tuple(part.cpu() for part in found) if isinstance(found, tuple) else found.cpu()
    check(found, expected, used, recipe, d_dtype)


PAIR, SWAP = {"cluster": (1, 2)}, {"swap_ab": True}
EVERY = ("alpha", "bias", "swiglu", "limit", "row_weights")
CASES: dict[str, Callable[[], None]] = {
    "alpha": lambda: run(None, FP8, tile(64, 64), steps=("alpha",)),
    "a number, c and bias": lambda: run(None, FP8, tile(128, 64), "fp32", ("number", "c", "bias in bf16")),
    "bias, split K": lambda: run(None, BF16, tile(64, 64, split_k=2), steps=("bias",), n=232),
    "row weights, cluster": lambda: run(None, FP8, tile(128, 64, **PAIR), steps=("row_weights",)),
    "row weights, swapped": lambda: run(None, BF16, tile(32, 64, **SWAP), steps=("row_weights", "bias"), n=232),
    "SwiGLU": lambda: run(None, FP8, tile(128, 64), steps=("swiglu",)),
    "SwiGLU, plain stores": lambda: run(None, BF16, tile(64, 80), steps=("swiglu",), n=240, padding=1),
    "SwiGLU, limit, swapped": lambda: run(None, FP8, tile(16, 128, **SWAP), "fp32", ("swiglu", "limit")),
    "quantized": lambda: run(None, FP8, tile(64, 128), "e4m3"),
    "quantized, ragged": lambda: run(None, BF16, tile(64, 128), "e4m3", n=200, padding=3),
    "quantized, cluster": lambda: run(None, BF16, tile(128, 64, **PAIR), "e4m3", n=456),
    "quantized, swapped": lambda: run(None, FP8, tile(16, 128, **SWAP), "e4m3", n=456),
    "UE8M0": lambda: run(None, FP8, tile(128, 64), "e4m3_ue8m0", n=456),
    "UE8M0, swapped": lambda: run(None, BF16, tile(32, 64, **SWAP), "e4m3_ue8m0", n=456),
    "every step, cluster": lambda: run(
        None, FP8, tile(128, 128, **PAIR), "e4m3", EVERY, n=720
    ),  # ends in blocks of scales
    "every step, swapped cluster": lambda: run(None, FP8, tile(16, 128, **SWAP, **PAIR), "e4m3", EVERY, n=768),
    "every step, swapped alone": lambda: run(None, FP8, tile(16, 256, **SWAP), "e4m3", EVERY, n=768),
    "masked, linear": lambda: run("masked", FP8, tile(64, 64), "fp32", ("alpha", "bias", "row_weights"), padding=1),
    "masked, SwiGLU": lambda: run("masked", BF16, tile(128, 64), steps=("swiglu",), n=240),
    "masked, UE8M0": lambda: run("masked", FP8, tile(64, 128), "e4m3_ue8m0", EVERY),
    "masked, cluster": lambda: run("masked", FP8, tile(128, 128, **PAIR), "e4m3", EVERY, n=768),
    "masked, swapped cluster": lambda: run("masked", FP8, tile(16, 128, **SWAP, **PAIR), "e4m3", EVERY, n=720),
    "masked, swapped alone": lambda: run("masked", FP8, tile(32, 256, **SWAP), "e4m3", EVERY, n=768),
    "psum": lambda: run("psum", FP8, tile(64, 128, **PAIR), "e4m3", ("swiglu",)),
    "psum, any row": lambda: run("psum", FP8, tile(64, 128, **PAIR), "e4m3", EVERY, alignment=1, padding=1),
    "index": lambda: run("contiguous", BF16, tile(64, 128), "e4m3", ("alpha", "row_weights"), n=200),
    "index, swapped": lambda: run("contiguous", FP8, tile(16, 256, **SWAP), "e4m3", EVERY, alignment=16),
}

if __name__ == "__main__":
    raise SystemExit(run_all(CASES))
