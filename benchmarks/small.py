"""Quantizers, norms, SwiGLU and rotary embedding raced against torch, eager and compiled, and a copy of their bytes. ::

    python -m benchmarks.small --out small.csv
    python -m benchmarks.small --cases act_quant,rms_norm --ms 1,64,4096

``copy`` moves as many bytes as the kernel reads and writes, half in and half out: what memory allows here.
``ratio`` is the best of the torch peers' times over ours; ``of_copy`` the copy's time over ours, a share of the
bandwidth; ``floor_us`` 4.8 us and the bytes at 4.3 TB/s. Each result is compared with the reference first, on a few
rows. Exit codes: 0 done, 1 something of ours is missing or wrong, 3 no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks import harness
from benchmarks.harness import EMPTY, CsvLog, CudaTimer, race, say

OURS, EAGER, COMPILED, COPY = "jitgemm", "torch", "torch.compile", "copy"
MS = (1, 8, 64, 512, 4096, 16384)
COLUMNS = (
    *("case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"),
    *("over_floor", "of_copy", "megabytes", "copy_us", "torch_us", "compiled_us", "empty_us", "samples", "errors"),
)
CHECKED_ROWS = 16
HEAD, ROPE, POSITIONS = 512, 64, 4096
DEVICE = "cuda"


# -- The peers: the same functions as one writes them in torch.


def torch_quant(x: Tensor, group: int, pow2: bool) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (groups / scale).to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1)


def torch_int8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return (groups / scale).round().clamp(-127, 127).to(torch.int8).flatten(-2), scale.squeeze(-1)


def torch_fp4(x: Tensor, group: int, nvfp4: bool) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 6
    scale = scale.clamp(2**-9, 448).to(torch.float8_e4m3fn).float() if nvfp4 else torch.exp2(scale.log2().ceil())
    y = (groups / scale).clamp(-6, 6)
    t = y.abs()
    code = torch.where(t < 2, (2 * t).round(), torch.where(t < 4, t.round() + 2, (t / 2).round() + 4))
    code = (code.to(torch.uint8) | (y < 0).to(torch.uint8) << 3).flatten(-2)
    return code[..., ::2] | code[..., 1::2] << 4, scale.squeeze(-1)


def torch_per_block(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.float().unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448
    return (blocks / scale).to(torch.float8_e4m3fn).view(x.shape), scale[:, 0, :, 0]


def torch_per_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(0, (-1, 128))
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
    return (groups / scale).to(torch.float8_e4m3fn).view(x.shape), scale[:, 0]


def torch_back(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2)


def torch_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10) * weights[:, None]


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def torch_rope(x: Tensor, positions: Tensor, table: Tensor, norm: bool, inverse: bool) -> Tensor:
    y = x.float()
    if norm:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    cos, sin = table[positions][:, None].chunk(2, -1)
    sin = -sin if inverse else sin
    even, odd = y[..., -ROPE:].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([y[..., :-ROPE], turned], -1).to(x.dtype)


# -- Cases.


@dataclass(frozen=True)
class Work:
    """Two ways to compute the same from tensors whose first dimension is m, and from others that all rows share."""

    ours: Callable[..., Any]
    peer: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()

    def arguments(self) -> tuple[Tensor, ...]:
        return (*self.tensors, *self.shared)

    def bytes(self) -> int:
        """What must be read and written, but for what all rows share."""
        return sum(t.numel() * t.element_size() for t in (*self.tensors, *as_tuple(self.ours(*self.arguments()))))


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def _cast(ours: Callable[..., Any], peer: Callable[..., Any]) -> Callable[[int, int], Work]:
    return lambda m, n: Work(ours, peer, (random(m, n),))


def _rope(**options: Any) -> Callable[[int, int], Work]:
    norm, inverse = options.get("norm", True), options.get("inverse", False)

    def ours(x: Tensor, positions: Tensor, table: Tensor) -> Any:
        if "block_size" in options:
            return jitgemm.head_norm_rope_act_quant(x, positions, table, **options)
        return jitgemm.head_norm_rope(x, positions, table, **options)

    def peer(x: Tensor, positions: Tensor, table: Tensor) -> Any:
        y = torch_rope(x, positions, table, norm, inverse)
        if "block_size" in options:
            return torch_quant(y.flatten(1), options["block_size"], True)
        if "nope_block_size" in options:
            codes, scales = torch_quant(y[..., :-ROPE], options["nope_block_size"], True)
            nope = (codes.float().unflatten(-1, (-1, options["nope_block_size"])) * scales[..., None]).flatten(-2)
            return torch.cat([nope.to(y.dtype), y[..., -ROPE:]], -1)
        return y

    def work(m: int, n: int) -> Work:
        positions = torch.randint(0, POSITIONS, (m,), device=DEVICE)
        table = jitgemm.rope_cos_sin(POSITIONS, ROPE, device=DEVICE)
        return Work(ours, peer, (random(m, n // HEAD, HEAD), positions), (table,))

    return work


def _swiglu(ours: Callable[..., Any], peer: Callable[..., Any]) -> Callable[[int, int], Work]:
    return lambda m, n: Work(ours, peer, (random(m, 2 * n), torch.rand(m, device=DEVICE)))


def _norm(ours: Callable[..., Any], peer: Callable[..., Any]) -> Callable[[int, int], Work]:
    return lambda m, n: Work(ours, peer, (random(m, n),), (random(n),))


def _norm_quant(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = torch_norm(x, weight)
    return y, *torch_quant(y, 128, True)


def _back(m: int, n: int) -> Work:
    codes, scales = jitgemm.act_quant(random(m, n))
    return Work(lambda c, s: jitgemm.cast_back_from_fp8(c, s), torch_back, (codes, scales))


TMA = {"scale_layout": "mn_major_tma_aligned"}


@dataclass(frozen=True)
class Case:
    """What is made for m rows of each of the widths."""

    make: Callable[[int, int], Work]
    recipe: str
    widths: Sequence[int] = (4096, 7168)
    whole_tiles: bool = False  # m must be a multiple of 128
    exact: bool = True  # the reference has the same bits


CASES: dict[str, Case] = {
    "act_quant": Case(_cast(lambda x: jitgemm.act_quant(x, **TMA), lambda x: torch_quant(x, 128, False)), "e4m3 fp32"),
    "act_quant_pow2": Case(
        _cast(lambda x: jitgemm.act_quant(x, 128, "ue8m0", **TMA), lambda x: torch_quant(x, 128, True)), "e4m3 pow2"
    ),
    "act_quant_packed32": Case(
        _cast(lambda x: jitgemm.act_quant(x, 32, "ue8m0", torch.int32), lambda x: torch_quant(x, 32, True)),
        "e4m3 ue8m0 32",
    ),
    "per_token_cast_to_fp8": Case(
        _cast(lambda x: jitgemm.per_token_cast_to_fp8(x), lambda x: torch_quant(x, 128, False)), "e4m3 fp32"
    ),
    "int8_act_quant": Case(_cast(lambda x: jitgemm.int8_act_quant(x), lambda x: torch_int8(x, 128)), "int8"),
    "fp4_act_quant": Case(_cast(lambda x: jitgemm.fp4_act_quant(x), lambda x: torch_fp4(x, 32, False)), "mxfp4"),
    "nvfp4_act_quant": Case(_cast(lambda x: jitgemm.nvfp4_act_quant(x), lambda x: torch_fp4(x, 16, True)), "nvfp4"),
    "per_block_cast_to_fp8": Case(
        _cast(lambda x: jitgemm.per_block_cast_to_fp8(x), torch_per_block), "e4m3 128x128", whole_tiles=True
    ),
    "per_channel_cast_to_fp8": Case(
        _cast(lambda x: jitgemm.per_channel_cast_to_fp8(x), torch_per_channel), "e4m3 128x1", whole_tiles=True
    ),
    "cast_back_from_fp8": Case(_back, "fp32"),
    "swiglu": Case(
        _swiglu(lambda x, w: jitgemm.swiglu(x, w, 10.0), lambda x, w: torch_swiglu(x, w).to(x.dtype)),
        "bf16",
        (2048, 3072),
        exact=False,
    ),
    "swiglu_act_quant": Case(
        _swiglu(
            lambda x, w: jitgemm.swiglu_act_quant(x, w, 10.0, **TMA),
            lambda x, w: torch_quant(torch_swiglu(x, w), 128, True),
        ),
        "e4m3 pow2",
        (2048, 3072),
        exact=False,
    ),
    "rms_norm": Case(_norm(lambda x, w: jitgemm.rms_norm(x, w), torch_norm), "bf16", (512, 1536, 4096, 7168)),
    "rms_norm_act_quant": Case(
        _norm(lambda x, w: jitgemm.rms_norm_act_quant(x, w, **TMA), _norm_quant), "bf16 and e4m3 pow2"
    ),
    "head_norm_rope": Case(_rope(), "bf16", (64 * HEAD,)),
    "head_norm_rope_kv": Case(_rope(nope_block_size=64), "bf16 of e4m3", (HEAD,)),
    "inverse_rope_act_quant": Case(_rope(norm=False, inverse=True, block_size=128), "e4m3 pow2", (64 * HEAD,)),
}


def agrees(work: Work, exact: bool, whole: bool) -> bool:
    """Whether a few rows are what the reference says."""
    tensors = tuple(t[: 128 if whole else CHECKED_ROWS].clone() for t in work.tensors)
    results = as_tuple(work.ours(*tensors, *work.shared))
    expected = as_tuple(work.ours(*(t.cpu() for t in (*tensors, *work.shared))))
    if exact:
        return all(_same_bits(a, b) for a, b in zip(results, expected, strict=True))
    pairs = ((a.cpu().float(), b.float()) for a, b in zip(results, expected, strict=True))
    return all(bool(((a - b).abs() <= b.abs() / 7 + 1e-3).all()) for a, b in pairs)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    x, y = (t.cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def measure(name: str, case: Case, m: int, n: int, timer: CudaTimer, compiled: bool) -> dict[str, Any]:
    """One row of the table."""
    work = case.make(m, n)
    right = agrees(work, case.exact, case.whole_tiles)
    size = work.bytes()
    source = torch.empty(max(size // 2, 16), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: work.ours(*work.arguments()),
        EAGER: lambda: work.peer(*work.arguments()),
        COPY: lambda: target.copy_(source),
    }
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(work.peer, fullgraph=True, dynamic=False)
        contenders[COMPILED] = lambda: function(*work.arguments())
    timings = race(contenders, timer=timer)
    times = {name: timing.median_us for name, timing in timings.items()}
    ours, copy = times[OURS], times[COPY]
    peers = {peer: times[peer] for peer in (EAGER, COMPILED) if times.get(peer) is not None}
    best = min(peers, key=lambda peer: peers[peer] or 0.0, default=None)
    floor = 4.8 + size / 4.3e6
    errors = [f"{who}: {timing.error}" for who, timing in timings.items() if timing.error]
    return {
        "case": name,
        "m": m,
        "n": n,
        "k": None,
        "groups": None,
        "recipe": case.recipe,
        "ours_us": ours,
        "best_peer_us": peers.get(best) if best else None,
        "best_peer": best,
        "ratio": peers[best] / ours if best and ours else None,
        "floor_us": floor,
        "over_floor": ours / floor if ours else None,
        "of_copy": copy / ours if ours and copy else None,
        "megabytes": size / 1e6,
        "copy_us": copy,
        "torch_us": times[EAGER],
        "compiled_us": times.get(COMPILED),
        "empty_us": times[EMPTY],
        "samples": timings[OURS].samples,
        "errors": " | ".join([*errors, *([] if right else ["wrong result"])]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the race; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("::")[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--ms", default=",".join(map(str, MS)), help="rows (default %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes seconds a row")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    names = options.cases.split(",")
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"--cases: there is no {unknown[0]}; there are {', '.join(CASES)}")
    ms = [harness.positive(text) for text in options.ms.split(",")]
    harness.require_gpu()
    say(harness.machine())
    timer, rows = CudaTimer(), []
    with CsvLog(options.out, COLUMNS) as log:
        for name in names:
            case = CASES[name]
            for n in case.widths:
                for m in sorted({max(m, 128) if case.whole_tiles else m for m in ms}):
                    row = measure(name, case, m, n, timer, not options.no_compile)
                    log.write(row)
                    rows.append(row)
                    say(_line(row))
    shown = ("case", "m", "n", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us", "over_floor", "of_copy")
    say(harness.table(shown, ([row[column] for column in shown] for row in rows)))
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    large = [row["of_copy"] for row in rows if row["of_copy"] and row["megabytes"] >= 16 and row["m"] >= 4096]
    say(f"ratio to the best torch peer: geomean {harness.fixed(harness.geomean(ratios))}")
    if large:
        say(f"share of the copy's bandwidth from 16 MB: least {min(large):.2f}, geomean {harness.geomean(large):.2f}")
    if ratios:
        worst = min((row for row in rows if row["ratio"]), key=lambda row: row["ratio"])
        say(f"worst: {worst['case']} m={worst['m']} n={worst['n']}: {worst['ratio']:.2f}")
    return int(any(row["ours_us"] is None or "wrong" in row["errors"] for row in rows))


def _line(row: dict[str, Any]) -> str:
    parts = (
        f"{label} {harness.fixed(row[c])}"
        for label, c in (("ours", "ours_us"), ("ratio", "ratio"), ("of copy", "of_copy"))
    )
    return f"{row['case']} m={row['m']} n={row['n']}: {', '.join(parts)} {row['errors']}".rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
