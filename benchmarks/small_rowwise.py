"""Cases of ``benchmarks.small``: quantizers, norms, SwiGLU and rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks import small_work
from benchmarks.small_work import ROWS_US, Case, Work, as_tuple, normal

CHECKED_ROWS = 16
HEAD, ROPE, POSITIONS = 512, 64, 4096


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
class Calls:
    """Ours and torch's way to compute the same from tensors whose first dimension is m, and others that rows share."""

    ours: Callable[..., Any]
    peer: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()

    def arguments(self) -> tuple[Tensor, ...]:
        return (*self.tensors, *self.shared)

    def bytes(self) -> int:
        """What must be read and written, but for what all rows share."""
        return sum(t.numel() * t.element_size() for t in (*self.tensors, *as_tuple(self.ours(*self.arguments()))))


def random(*shape: int) -> Tensor:
    return normal(*shape, dtype=torch.bfloat16)


def _cast(ours: Callable[..., Any], peer: Callable[..., Any]) -> Callable[[int, int], Calls]:
    return lambda m, n: Calls(ours, peer, (random(m, n),))


def _rope(**options: Any) -> Callable[[int, int], Calls]:
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

    def work(m: int, n: int) -> Calls:
        positions = torch.randint(0, POSITIONS, (m,), device=small_work.DEVICE)
        table = jitgemm.rope_cos_sin(POSITIONS, ROPE, device=small_work.DEVICE)
        return Calls(ours, peer, (random(m, n // HEAD, HEAD), positions), (table,))

    return work


def _swiglu(ours: Callable[..., Any], peer: Callable[..., Any]) -> Callable[[int, int], Calls]:
    return lambda m, n: Calls(ours, peer, (random(m, 2 * n), torch.rand(m, device=small_work.DEVICE)))


def _norm(ours: Callable[..., Any], peer: Callable[..., Any]) -> Callable[[int, int], Calls]:
    return lambda m, n: Calls(ours, peer, (random(m, n),), (random(n),))


def _norm_quant(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = torch_norm(x, weight)
    return y, *torch_quant(y, 128, True)


def _back(m: int, n: int) -> Calls:
    codes, scales = jitgemm.act_quant(random(m, n))
    return Calls(lambda c, s: jitgemm.cast_back_from_fp8(c, s), torch_back, (codes, scales))


TMA = {"scale_layout": "mn_major_tma_aligned"}


@dataclass(frozen=True)
class Kind:
    """What is made for m rows of each of the widths."""

    make: Callable[[int, int], Calls]
    recipe: str
    widths: Sequence[int] = (4096, 7168)
    whole_tiles: bool = False  # m must be a multiple of 128
    exact: bool = True  # the reference has the same bits


KINDS: dict[str, Kind] = {
    "act_quant": Kind(_cast(lambda x: jitgemm.act_quant(x, **TMA), lambda x: torch_quant(x, 128, False)), "e4m3 fp32"),
    "act_quant_pow2": Kind(
        _cast(lambda x: jitgemm.act_quant(x, 128, "ue8m0", **TMA), lambda x: torch_quant(x, 128, True)), "e4m3 pow2"
    ),
    "act_quant_packed32": Kind(
        _cast(lambda x: jitgemm.act_quant(x, 32, "ue8m0", torch.int32), lambda x: torch_quant(x, 32, True)),
        "e4m3 ue8m0 32",
    ),
    "per_token_cast_to_fp8": Kind(
        _cast(lambda x: jitgemm.per_token_cast_to_fp8(x), lambda x: torch_quant(x, 128, False)), "e4m3 fp32"
    ),
    "int8_act_quant": Kind(_cast(lambda x: jitgemm.int8_act_quant(x), lambda x: torch_int8(x, 128)), "int8"),
    "per_token_cast_to_int8": Kind(
        _cast(lambda x: jitgemm.per_token_cast_to_int8(x), lambda x: torch_int8(x, x.shape[1])), "int8 a row"
    ),
    "fp4_act_quant": Kind(_cast(lambda x: jitgemm.fp4_act_quant(x), lambda x: torch_fp4(x, 32, False)), "mxfp4"),
    "nvfp4_act_quant": Kind(_cast(lambda x: jitgemm.nvfp4_act_quant(x), lambda x: torch_fp4(x, 16, True)), "nvfp4"),
    "per_block_cast_to_fp8": Kind(
        _cast(lambda x: jitgemm.per_block_cast_to_fp8(x), torch_per_block), "e4m3 128x128", whole_tiles=True
    ),
    "per_channel_cast_to_fp8": Kind(
        _cast(lambda x: jitgemm.per_channel_cast_to_fp8(x), torch_per_channel), "e4m3 128x1", whole_tiles=True
    ),
    "cast_back_from_fp8": Kind(_back, "fp32"),
    "swiglu": Kind(
        _swiglu(lambda x, w: jitgemm.swiglu(x, w, 10.0), lambda x, w: torch_swiglu(x, w).to(x.dtype)),
        "bf16",
        (2048, 3072),
        exact=False,
    ),
    "swiglu_act_quant": Kind(
        _swiglu(
            lambda x, w: jitgemm.swiglu_act_quant(x, w, 10.0, **TMA),
            lambda x, w: torch_quant(torch_swiglu(x, w), 128, True),
        ),
        "e4m3 pow2",
        (2048, 3072),
        exact=False,
    ),
    "rms_norm": Kind(_norm(lambda x, w: jitgemm.rms_norm(x, w), torch_norm), "bf16", (512, 1536, 4096, 7168)),
    "rms_norm_act_quant": Kind(
        _norm(lambda x, w: jitgemm.rms_norm_act_quant(x, w, **TMA), _norm_quant), "bf16 and e4m3 pow2"
    ),
    "head_norm_rope": Kind(_rope(), "bf16", (64 * HEAD,)),
    "head_norm_rope_kv": Kind(_rope(nope_block_size=64), "bf16 of e4m3", (HEAD,)),
    "inverse_rope_act_quant": Kind(_rope(norm=False, inverse=True, block_size=128), "e4m3 pow2", (64 * HEAD,)),
}


def agrees(calls: Calls, exact: bool, whole: bool) -> bool:
    """Whether a few rows are what the reference says."""
    tensors = tuple(t[: 128 if whole else CHECKED_ROWS].clone() for t in calls.tensors)
    results = as_tuple(calls.ours(*tensors, *calls.shared))
    expected = as_tuple(calls.ours(*(t.cpu() for t in (*tensors, *calls.shared))))
    if exact:
        return all(_same_bits(a, b) for a, b in zip(results, expected, strict=True))
    pairs = ((a.cpu().float(), b.float()) for a, b in zip(results, expected, strict=True))
    return all(bool(((a - b).abs() <= b.abs() / 7 + 1e-3).all()) for a, b in pairs)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    x, y = (t.cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def work_of(kind: Kind, m: int, n: int) -> Work:
    """The race of a kind for m rows."""
    calls = kind.make(m, n)
    arguments = calls.arguments()
    return Work(
        ours=lambda: calls.ours(*arguments),
        right=lambda: agrees(calls, kind.exact, kind.whole_tiles),
        in_torch=calls.peer,
        arguments=arguments,
        moved=calls.bytes(),
    )


def cases(ms: Sequence[int]) -> Iterator[Case]:
    """All kinds at their widths for so many rows."""
    for name, kind in KINDS.items():
        for n in kind.widths:
            for m in sorted({max(m, 128) if kind.whole_tiles else m for m in ms}):
                yield Case(name, m, n, None, 1, kind.recipe, ROWS_US, partial(work_of, kind, m, n))
