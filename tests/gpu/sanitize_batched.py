"""As ``sanitize.py``, for several GEMMs in one launch: heads, sums of batches, holes and groups along K. ::

compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/sanitize_batched.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_batched.py
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import jitgemm
from jitgemm import settings
from jitgemm.reference.gemm import check_close

Scaled = tuple[Tensor, Tensor]


def bf16(*shape: int, seed: int = 0) -> Tensor:
    """Random operands."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def of_rows(x: Tensor) -> Scaled:
    """FP8 with a scale for 128 of the last dimension."""
    data, scales = jitgemm.per_token_cast_to_fp8(x.reshape(-1, x.shape[-1]))
    return data.view(x.shape), scales.view(*x.shape[:-1], -1)


def of_blocks(x: Tensor) -> Scaled:
    """FP8 [groups, n, k] with a scale for 128 x 128."""
    cast = [jitgemm.per_block_cast_to_fp8(part) for part in x]
    data = torch.stack([data.view(torch.uint8) for data, _ in cast]).view(torch.float8_e4m3fn)
    return data, torch.stack([scales for _, scales in cast])


def on_gpu(value: Any) -> Any:
    """Tensors, and pairs of them, copied to the GPU."""
    if isinstance(value, Tensor):
        return value.cuda()
    return tuple(map(on_gpu, value)) if isinstance(value, tuple) else value


def compare(call: Callable[..., None], arguments: Sequence[Any], d: Tensor, recipe: str, adds: bool = False) -> None:
    """Run on the GPU and, by the reference, on the CPU; ``adds``: C is D.

    Raises:
        AssertionError: the results differ.
    """
    expected, found = d.clone(), d.cuda()
    call(*arguments, expected, **({"c": expected} if adds else {}))
    call(*map(on_gpu, arguments), found, **({"c": found} if adds else {}))
    torch.cuda.synchronize()
    flat = expected.reshape(-1, expected.shape[-1]), found.cpu().reshape(-1, expected.shape[-1])
    check_close(flat[1], flat[0], recipe=recipe, d_dtype="fp32" if d.dtype == torch.float32 else "bf16")


def heads(
    expr: str,
    recipe: str,
    config: dict[str, Any],
    d_dtype: torch.dtype = torch.bfloat16,
    adds: bool = False,
    d: int = 136,
) -> None:
    """One expression, with one tile."""
    b, h, r = 70, 3, 272
    sizes = {"b": b, "h": h, "r": r, "d": d}
    left, right, out = (tuple(sizes[letter] for letter in part) for part in expr.replace("->", ",").split(","))
    output = torch.ones(out, dtype=d_dtype)
    with settings.override(**config):
        if recipe == "bf16":
            call: Callable[..., None] = jitgemm.einsum
            arguments: tuple[Any, ...] = (bf16(*left), bf16(*right, seed=1))
        else:
            call = jitgemm.fp8_einsum
            arguments = (of_rows(bf16(*left)), of_blocks(bf16(*right, seed=1)))
        compare(lambda a, b, d, **c: call(expr, a, b, d, **c), arguments, output, recipe, adds)


def sums(config: dict[str, Any], d_dtype: torch.dtype = torch.float32, adds: bool = False, n: int = 136) -> None:
    """Batches that are summed up, in several parts."""
    with settings.override(**config):
        arguments, d = (bf16(50, 72, 40), bf16(50, n, 40, seed=1)), torch.ones(72, n, dtype=d_dtype)
        compare(lambda a, b, d, **c: jitgemm.einsum("bmk,bnk->mn", a, b, d, **c), arguments, d, "bf16", adds)


def holes(splits: tuple[int, int, int], config: dict[str, Any]) -> None:
    """Heads with holes."""
    left, _, right = splits
    a = of_rows(bf16(70, 272))
    b, scales = of_blocks(bf16(1, 3 * (left + right), 272, seed=1))
    with settings.override(**config):
        compare(
            lambda a, b, d: jitgemm.fp8_gemm_nt_skip_head_mid(a, b, d, splits),
            (a, (b[0], scales[0])),
            torch.ones((70, 3 * sum(splits)), dtype=torch.bfloat16),
            "fp8_1x128_128x128",
        )


def along_k(
    recipe: str, ks: Sequence[int], config: dict[str, Any], m: int = 136, n: int = 72, adds: bool = True
) -> None:
    """Groups along K."""
    fp8 = recipe != "bf16"
    operands: list[Any] = []
    for seed, extent in enumerate((m, n)):
        if not fp8:
            operands.append(bf16(sum(ks), extent, seed=seed))
            continue
        cast = [of_rows(bf16(extent, k, seed=seed)) for k in ks if k]
        data = torch.cat([data.view(torch.uint8).flatten() for data, _ in cast]).view(torch.float8_e4m3fn)
        operands.append((data, torch.cat([scales.T for _, scales in cast]).contiguous().T))
    name = f"k_grouped_{'fp8_gemm_nt' if fp8 else 'bf16_gemm_tn'}_contiguous"
    counts = torch.tensor(list(ks), dtype=torch.int32)
    with settings.override(**config):
        compare(
            lambda a, b, counts, d, **c: getattr(jitgemm, name)(a, b, d, list(ks), counts, **c),
            (*operands, counts),
            torch.ones(len(ks), m, n),
            recipe,
            adds,
        )


def tile(m: int, n: int, **more: Any) -> dict[str, Any]:
    """Settings that force a tile."""
    return {"tile_m": m, "tile_n": n, "swap_ab": False, "cluster": (1, 1), "split_k": 1, **more}


BLOCKS, ROWS = "fp8_1x128_128x128", "fp8_1x128_1x128"
CASES: dict[str, Callable[[], None]] = {
    "heads": lambda: heads("bhr,hdr->bhd", BLOCKS, tile(64, 128)),
    "heads, swapped": lambda: heads("bhr,hdr->bhd", BLOCKS, tile(16, 64, swap_ab=True)),
    "heads, split": lambda: heads("bhr,hdr->bhd", BLOCKS, tile(64, 64, split_k=3)),
    "heads, cluster": lambda: heads("bhr,hdr->bhd", BLOCKS, tile(64, 128, cluster=(2, 1))),
    "heads, added to": lambda: heads("bhr,hdr->bhd", BLOCKS, tile(128, 64), torch.float32, adds=True),
    "heads, plain stores": lambda: heads("bhr,hdr->bhd", BLOCKS, tile(128, 64), torch.float32, adds=True, d=133),
    "heads in bf16": lambda: heads("bhr,hdr->bhd", "bf16", tile(128, 64, cluster=(1, 2)), adds=True),
    "weights along r": lambda: heads("bhd,hdr->bhr", "bf16", tile(32, 64, swap_ab=True)),
    "weights along r, cluster": lambda: heads("bhd,hdr->bhr", "bf16", tile(128, 64, cluster=(2, 1))),
    "both along rows": lambda: heads("bhd,bhr->hdr", "bf16", tile(128, 128), torch.float32),
    "sums": lambda: sums(tile(64, 128)),
    "sums, added to": lambda: sums(tile(64, 128), adds=True, n=133),
    "sums in bf16": lambda: sums(tile(64, 128), torch.bfloat16, adds=True, n=134),
    "sums, swapped": lambda: sums(tile(64, 64, swap_ab=True)),
    "holes": lambda: holes((128, 64, 128), tile(64, 128)),
    "holes, swapped": lambda: holes((128, 64, 128), tile(32, 64, swap_ab=True)),
    "holes anywhere": lambda: holes((24, 3, 40), tile(64, 64)),
    "along K": lambda: along_k(ROWS, (16, 0, 400, 128), tile(128, 64)),
    "along K, swapped": lambda: along_k(ROWS, (16, 0, 400, 128), tile(64, 64, swap_ab=True)),
    "along K, cluster": lambda: along_k(ROWS, (16, 0, 400, 128), tile(64, 64, cluster=(2, 1)), adds=False),
    "along K, many groups": lambda: along_k(ROWS, (16,) * 40, tile(64, 64)),
    "along K in bf16": lambda: along_k("bf16", (1, 65, 0, 130), tile(128, 64)),
    "along K in bf16, swapped": lambda: along_k("bf16", (1, 65, 0, 130), tile(64, 128, swap_ab=True)),
    "along K in bf16, cluster": lambda: along_k("bf16", (1, 65, 0, 130), tile(128, 64, cluster=(1, 2))),
}


def run_all(cases: Mapping[str, Callable[[], None]]) -> int:
    """Run cases; the exit code."""
    if not torch.cuda.is_available():
        print("no GPU", file=sys.stderr)
        return 3
    failed = 0
    for name, case in cases.items():
        start = time.perf_counter()
        try:
            case()
            outcome = "ok"
        except Exception as error:
            outcome, failed = f"FAILED: {error}", failed + 1
        print(f"{time.perf_counter() - start:6.2f} s  {name}  {outcome}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(run_all(CASES))
