"""The kernels around hyper-connections and experts raced against torch and DeepGEMM. ::

    python -m benchmarks.small_moe --out small_moe.csv
    python -m benchmarks.small_moe --cases hc_prenorm --num-splits 1 2 4 8 16 32

Peers: ``eager`` and ``compile`` (``torch.compile``) of the same function written in torch as one would in a model,
and for the prenorm GEMM ``deepgemm`` without splits and ``deepgemm_16`` with 16 (sgl-deep-gemm, where it is
installed). ``copy_us`` is a copy that moves as many bytes, in the same harness; ``bandwidth`` is its time over ours.
``floor_us`` is 4.8 us and the bytes at 4.3 TB/s. In the CSV m is tokens, n and k what the case says, groups experts;
``ratio`` is the best peer's time over ours. Each result is compared with the reference first. Exit codes: 0 done, 1
something of ours is wrong or slower than every peer, 3 no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import jitgemm
from benchmarks import harness
from benchmarks.harness import EMPTY, Call, CsvLog, CudaTimer, race, say
from jitgemm.reference import hyper_connections as hc
from jitgemm.reference import moe

TOKENS = (1, 8, 64, 512, 4096)
MODELS = ((4096, 256), (7168, 384))  # width, experts
PRENORM_SHAPES = [(m, k) for k in (28672, 7680, 7168, 16384) for m in (13, 137, 4096, 8192)]
TOPK = 6
FIXED_US, BYTES_PER_US = 4.8, 4.3e6
COLUMNS = (
    *("case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"),
    *("copy_us", "bandwidth", "eager_us", "compile_us", "deepgemm_us", "deepgemm_16_us", "empty_us", "errors"),
)


@dataclass
class Case:
    """One race.

    Args:
        name: of the function.
        m: tokens.
        n: columns of the result.
        k: width of the input.
        groups: experts, or 1.
        moved: bytes that must be read and written.
        ours: the call.
        peers: others.
        right: whether ours is right.
        recipe: types.
    """

    name: str
    m: int
    n: int
    k: int
    groups: int
    moved: float
    ours: Call
    right: Callable[[], bool]
    peers: dict[str, Call] = field(default_factory=dict)
    recipe: str = "bf16"


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def in_torch(function: Callable[..., Any], *arguments: Any) -> dict[str, Call]:
    """The peers of a function in torch."""
    compiled = torch.compile(function, dynamic=False)
    return {"eager": lambda: function(*arguments), "compile": lambda: compiled(*arguments)}


def close(found: Any, expected: Any, rtol: float = 2e-3) -> bool:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    scale = 2**-7 if not isinstance(found, tuple) and found.dtype == torch.bfloat16 else rtol
    return all(
        torch.allclose(a.double(), b.double(), rtol=max(scale, 2**-7 if a.dtype == torch.bfloat16 else 0), atol=2e-2)
        for a, b in pairs
    )


# -- What one would write in torch.


def torch_split(mixes: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pre = torch.sigmoid(mixes[:, :4] * scale[0] + base[:4]) + 1e-6
    post = 2 * torch.sigmoid(mixes[:, 4:8] * scale[1] + base[4:8])
    comb = (mixes[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(-1) + 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    return pre, post, comb


def torch_prenorm(a: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    a = a.float()
    return a @ fn.T, a.square().sum(-1)


def torch_pre(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    product, squares = torch_prenorm(x.flatten(1), fn)
    mixes = product * torch.rsqrt(squares / fn.shape[1] + 1e-6).unsqueeze(1)
    pre, post, comb = torch_split(mixes, scale, base)
    return (pre.unsqueeze(-1) * x.float()).sum(1).bfloat16(), post, comb


def torch_head(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    product, squares = torch_prenorm(x.flatten(1), fn)
    pre = torch.sigmoid(product * torch.rsqrt(squares / fn.shape[1] + 1e-6).unsqueeze(1) * scale + base) + 1e-6
    return (pre.unsqueeze(-1) * x.float()).sum(1).bfloat16()


def torch_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (comb.unsqueeze(-1) * residual.float().unsqueeze(2)).sum(1)
    return (post.unsqueeze(-1) * x.float().unsqueeze(1) + mixed).bfloat16()


def torch_topk(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = functional.softplus(logits).sqrt()
    indices = (scores + bias).topk(TOPK, -1).indices
    weights = scores.gather(1, indices)
    return indices.int(), weights / weights.sum(-1, keepdim=True).clamp(min=1e-20) * 1.5


def torch_gate(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch_topk(x.float() @ weight.float().T, bias)


def torch_combine(y: Tensor, pos: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    rows = y[pos.clamp(min=0)].float() * (weights * (pos >= 0)).unsqueeze(-1)
    return (rows.sum(1) + shared.float()).bfloat16()


def torch_permute(x: Tensor, to_item: Tensor) -> Tensor:
    return x[(to_item // TOPK).clamp(min=0)]


def torch_permutation(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sorting, as one would: without padding, which needs the counts."""
    order = indices.flatten().sort(stable=True).indices
    return order, torch.bincount(indices.flatten(), minlength=experts)


# -- Cases.


def hc_inputs(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fn = normal(24, 4 * width) / math.sqrt(4 * width)
    return normal(tokens, 4, width, dtype=torch.bfloat16), fn, normal(3), normal(24)


def prenorm_cases(num_splits: Sequence[int]) -> Iterator[Case]:
    for m, k in PRENORM_SHAPES:
        a, fn = normal(m, k, dtype=torch.bfloat16), normal(24, k)
        expected = hc.hc_prenorm_gemm(a, fn)
        moved = 2 * a.numel() + 4 * fn.numel() + 100 * m
        peers = in_torch(torch_prenorm, a, fn) | deepgemm(a, fn)
        for splits in num_splits or (jitgemm.get_hc_prenorm_num_splits(m, k),):
            d, squares = normal(splits, m, 24), normal(splits, m)

            def ours(a: Tensor = a, fn: Tensor = fn, d: Tensor = d, s: Tensor = squares, n: int = splits) -> None:
                jitgemm.tf32_hc_prenorm_gemm(a, fn, d, s, n)

            def right(d: Tensor = d, s: Tensor = squares, expected: Any = expected) -> bool:
                return close((d.sum(0), s.sum(0)), expected) and close(s.sum(0).log(), expected[1].log(), 1e-5)

            yield Case("hc_prenorm", m, 24, k, 1, moved, ours, right, peers, f"tf32 splits {splits}")


def deepgemm(a: Tensor, fn: Tensor) -> dict[str, Call]:
    if importlib.util.find_spec("deep_gemm") is None:
        return {}
    import deep_gemm

    def call(splits: int | None) -> Call:
        leading = () if splits is None else (splits,)
        d, squares = normal(*leading, a.shape[0], 24), normal(*leading, a.shape[0])
        return lambda: deep_gemm.tf32_hc_prenorm_gemm(a, fn, d, squares, splits)

    return {"deepgemm": call(None), "deepgemm_16": call(16)}


def layer_cases(tokens: int, width: int, experts: int) -> Iterator[Case]:
    x, fn, scale, base = hc_inputs(tokens, width)
    row = 2 * width
    mixes = normal(tokens, 24)
    split = (mixes, scale, base)
    expected = hc.hc_split_sinkhorn(*split, 20, 1e-6, 2.0)
    yield Case(
        *("hc_split_sinkhorn", tokens, 24, 24, 1, tokens * 192),
        lambda: jitgemm.hc_split_sinkhorn(*split),
        lambda: close(jitgemm.hc_split_sinkhorn(*split), expected),
        in_torch(torch_split, *split),
        "fp32",
    )
    pre = (x, fn, scale, base)
    yield Case(
        *("hc_pre", tokens, width, 4 * width, 1, tokens * (5 * row + 80) + 4 * fn.numel()),
        lambda: jitgemm.hc_pre(*pre),
        lambda: close(jitgemm.hc_pre(*pre), hc.hc_pre(*pre, 1e-6, 1e-6, 20, 2.0)),
        in_torch(torch_pre, *pre),
    )
    head = (x, fn[:4], scale[:1], base[:4])
    yield Case(
        *("hc_head", tokens, width, 4 * width, 1, tokens * 5 * row + 16 * 4 * width),
        lambda: jitgemm.hc_head(*head),
        lambda: close(jitgemm.hc_head(*head), hc.hc_head(*head, 1e-6, 1e-6)),
        in_torch(torch_head, *head),
    )
    post = (normal(tokens, width, dtype=torch.bfloat16), x, *jitgemm.hc_pre(*pre)[1:])
    yield Case(
        *("hc_post", tokens, 4 * width, width, 1, tokens * (9 * row + 80)),
        lambda: jitgemm.hc_post(*post),
        lambda: close(jitgemm.hc_post(*post), hc.hc_post(*post)),
        in_torch(torch_post, *post),
    )
    hidden, weight = post[0], normal(experts, width, dtype=torch.bfloat16) / math.sqrt(width)
    logits, bias = hidden.float() @ weight.float().T, normal(experts)
    indices, weights = jitgemm.topk_gate(logits, bias, TOPK, route_scale=1.5)
    of_logits = moe.topk_gate(logits, bias, TOPK, "sqrtsoftplus", 1.5, None, None, None, torch.int32)
    yield Case(
        *("topk_gate", tokens, TOPK, experts, experts, tokens * (4 * experts + 8 * TOPK)),
        lambda: jitgemm.topk_gate(logits, bias, TOPK, route_scale=1.5),
        lambda: close(weights, of_logits[1]),
        in_torch(torch_topk, logits, bias),
        "fp32",
    )
    yield Case(
        *("moe_gate", tokens, TOPK, width, experts, tokens * (row + 8 * TOPK) + experts * row),
        lambda: jitgemm.moe_gate(hidden, weight, bias, TOPK, route_scale=1.5),
        lambda: close(jitgemm.moe_gate(hidden, weight, bias, TOPK, route_scale=1.5)[1], of_logits[1], 1e-2),
        in_torch(torch_gate, hidden, weight, bias),
    )
    made = jitgemm.moe_permutation(indices, experts, weights, layout="psum")
    rows = made.pos_to_token_topk.shape[0]
    truth = moe.moe_permutation(indices, weights, experts, "psum", 128, 0, 0)
    yield Case(
        *("moe_permutation", tokens, TOPK, rows, experts, tokens * TOPK * 12 + rows * 8),
        lambda: jitgemm.moe_permutation(indices, experts, weights, layout="psum"),
        lambda: all(torch.equal(a, b) for a, b in zip(made[:4], truth, strict=True)),
        in_torch(torch_permutation, indices, experts),
        "int32",
    )
    copied, _ = jitgemm.moe_permute(hidden, made)
    exists = made.pos_to_token_topk >= 0
    item = made.pos_to_token_topk[exists]
    yield Case(
        *("moe_permute", tokens, width, width, experts, tokens * row * (1 + TOPK)),
        lambda: jitgemm.moe_permute(hidden, made),
        lambda: torch.equal(copied[exists], hidden[item // TOPK]),
        in_torch(torch_permute, hidden, item),
    )
    combine = (copied, made.token_topk_to_pos, weights, hidden)
    yield Case(
        *("moe_combine", tokens, width, width, experts, tokens * row * (TOPK + 2)),
        lambda: jitgemm.moe_combine(*combine),
        lambda: close(jitgemm.moe_combine(*combine), moe.moe_combine(*combine)),
        in_torch(torch_combine, *combine),
    )


def cases(names: Sequence[str], tokens: Sequence[int], num_splits: Sequence[int]) -> Iterator[Case]:
    if not names or "hc_prenorm" in names:
        yield from prenorm_cases(num_splits)
    if names and set(names) == {"hc_prenorm"}:
        return
    for width, experts in MODELS:
        for m in tokens:
            for case in layer_cases(m, width, experts):
                if not names or case.name in names:
                    yield case


def copy_of(moved: float) -> Call:
    """A copy that reads and writes so many bytes in all."""
    size = max(1, int(moved / 2) // 16)
    source, target = (torch.empty((size, 4), dtype=torch.int32, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)


def measured(case: Case, timer: CudaTimer) -> dict[str, Any]:
    """A row of the CSV."""
    case.ours()
    right = case.right()
    timings = race({"ours": case.ours, "copy": copy_of(case.moved), **case.peers}, timer=timer)
    times = {name: timing.median_us for name, timing in timings.items()}
    ours, copy = times["ours"], times["copy"]
    peers = {name: taken for name in case.peers if (taken := times[name]) is not None}
    best = min(peers, key=peers.__getitem__, default=None)
    failed = [f"{name}: {timing.error}" for name, timing in timings.items() if timing.error]
    return {
        "case": case.name,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "groups": case.groups,
        "recipe": case.recipe,
        "ours_us": ours,
        "best_peer_us": None if best is None else peers[best],
        "best_peer": best,
        "ratio": None if best is None or ours is None else peers[best] / ours,
        "floor_us": FIXED_US + case.moved / BYTES_PER_US,
        "copy_us": copy,
        "bandwidth": None if copy is None or ours is None else copy / ours,
        **{f"{name}_us": times.get(name) for name in ("eager", "compile", "deepgemm", "deepgemm_16")},
        "empty_us": times[EMPTY],
        "errors": "; ".join(["ours is wrong"] * (not right) + failed),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[], help="names; default: all")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--num-splits", nargs="*", type=int, default=[], help="of the prenorm GEMM")
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args(arguments)
    harness.require_gpu()
    say(harness.machine())
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 1024
    timer, rows = CudaTimer(), []
    with CsvLog(options.out, COLUMNS) as log:
        for case in cases(options.cases, options.tokens, options.num_splits):
            row = measured(case, timer)
            rows.append(row)
            log.write(row)
            fixed = harness.fixed
            say(
                f"{row['case']:18} {row['m']:5} {row['k']:6} {row['recipe']:14} ours {fixed(row['ours_us']):>7}"
                f"  best {fixed(row['best_peer_us']):>8} ({row['best_peer']})  ratio {fixed(row['ratio'])}"
                f"  floor {fixed(row['floor_us']):>6}  copy/ours {fixed(row['bandwidth'])}  {row['errors']}"
            )
    for name in dict.fromkeys(row["case"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["case"] == name and row["ratio"] is not None]
        say(f"{name}: ratio {harness.fixed(harness.geomean(ratios))} (geomean), worst {min(ratios, default=0):.2f}")
    bad = any(row["ours_us"] is None or "wrong" in row["errors"] or (row["ratio"] or 2) < 1 for row in rows)
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
