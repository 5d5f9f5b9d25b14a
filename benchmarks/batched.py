"""What ``benchmarks.grouped`` races beside groups along m: groups along K (``k_grouped``) and ``einsum``.

Of groups along K m and n are those of a group, k is the sum of theirs, which are uneven multiples of 128; the result is
added to an FP32 D, as gradients are. Of einsum the groups are heads (or batches that are summed up), m is the batch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks.operands import poisoned, random_matrix
from jitgemm.device import PRESETS
from jitgemm.families.batched import EXPECTED_K, BatchedProblem
from jitgemm.heuristics.batched import problem_of_sum
from jitgemm.reference import einsum as reference_einsum
from jitgemm.reference import grouped as reference_grouped

CASES = ("k_grouped", "einsum")
RECIPES = {("k_grouped", "fp8"): "fp8_1x128_1x128", ("einsum", "fp8"): "fp8_1x128_128x128"}
HEADS = ((128, 512, 128), (8, 4096, 1024))  # h, r, d
FP8_HEADS = HEADS[1:]
BATCHES = (4, 32, 128, 4096, 8192)
SUMS = ((128, 384, 128), (256, 256, 256), (384, 128, 384))  # m, n, k
SUMMED = (129, 4096, 8192)
GROUPS_OF_K = (4, 8, 16)
LAYERS_OF_K = ((4096, 7168), (7168, 2048))  # m, n
TOTAL_K = 34304


@dataclass(frozen=True)
class Shape:
    """What is raced."""

    case: str
    recipe: str
    m: int
    n: int
    k: int
    groups: int
    expr: str = ""

    def __str__(self) -> str:
        return f"{self.case} {self.expr} {self.name} {self.groups} x {self.m}x{self.n}x{self.k}"

    @property
    def name(self) -> str:
        """The recipe's name in full."""
        return RECIPES.get((self.case, self.recipe), self.recipe)

    @property
    def sums_batches(self) -> bool:
        """Whether the groups are batches of one sum."""
        return self.expr == "bmk,bnk->mn"

    @property
    def problem(self) -> BatchedProblem:
        """The problem that ours is asked."""
        if self.case == "k_grouped":
            layout = "nt" if self.recipe == "fp8" else "tn"
            return BatchedProblem(self.n, EXPECTED_K, self.name, self.groups, self.case, self.m, layout, "fp32")
        if self.sums_batches:
            return problem_of_sum(self.groups, self.m, self.n, self.k, "nt", PRESETS["h200"])
        layout = "nn" if self.expr == "bhd,hdr->bhr" else "nt"
        return BatchedProblem(self.n, self.k, self.name, self.groups, "batched", self.m, layout)

    @property
    def bytes(self) -> float:
        """Read and written at least."""
        size, (m, n, k, groups) = 1 if self.recipe == "fp8" else 2, (self.m, self.n, self.k, self.groups)
        if self.case == "k_grouped":
            return (m + n) * k * size + 2 * groups * m * n * 4
        if self.sums_batches:
            return groups * (m + n) * k * size + 2 * m * n * 4
        return groups * ((m + n) * k * size + m * n * 2)

    @property
    def floor_us(self) -> float:
        """What no kernel gets below."""
        flop = 2 * self.m * self.n * self.k * (1 if self.case == "k_grouped" else self.groups)
        return max(4.8 + self.bytes / 4.3e6, 3.6 + flop / (1700e6 if self.recipe == "fp8" else 900e6))


def shapes_of(case: str, recipe: str, groups: Sequence[int] | None, ms: Sequence[int] | None) -> list[Shape]:
    """The shapes of a case: with so many groups along K, or batches of einsum, where given."""
    if case == "k_grouped":
        pairs = itertools.product(groups or GROUPS_OF_K, LAYERS_OF_K)
        return [Shape(case, recipe, m, n, sum(lengths_of(number)), number) for number, (m, n) in pairs]
    found = []
    for (h, r, d), b in itertools.product(FP8_HEADS if recipe == "fp8" else HEADS, ms or BATCHES):
        found.append(Shape(case, recipe, b, d, r, h, "bhr,hdr->bhd"))
        if recipe == "bf16":
            found.append(Shape(case, recipe, b, r, d, h, "bhd,hdr->bhr"))
    if recipe == "bf16":
        found += [
            Shape(case, recipe, m, n, k, b, "bmk,bnk->mn") for (m, n, k), b in itertools.product(SUMS, ms or SUMMED)
        ]
    return found


def lengths_of(groups: int) -> list[int]:
    """K of each group: uneven multiples of 128."""
    draw = random.Random(groups)
    return [int(TOTAL_K / groups * draw.uniform(0.7, 1.3)) // 128 * 128 for _ in range(groups)]


class Inputs:
    """Operands of one shape."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cuda") -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)
        make = self._groups_of_k if shape.case == "k_grouped" else self._heads
        self.a, self.b, self.d_shape, self.d_dtype = make(generator)
        self.adds = self.d_dtype == torch.float32
        self._expected: Tensor | None = None

    def _heads(self, generator: torch.Generator) -> tuple[Any, Any, tuple[int, ...], torch.dtype]:
        shape = self.shape
        m, n, k, h = shape.m, shape.n, shape.k, shape.groups
        if shape.sums_batches:
            a = random_matrix(h * m, k, generator).view(h, m, k)
            return a, random_matrix(h * n, k, generator).view(h, n, k), (m, n), torch.float32
        a = random_matrix(m * h, k, generator)
        if shape.expr == "bhd,hdr->bhr":
            return a.view(m, h, k), random_matrix(h * k, n, generator).view(h, k, n), (m, h, n), torch.bfloat16
        b = random_matrix(h * n, k, generator)
        if shape.recipe == "bf16":
            return a.view(m, h, k), b.view(h, n, k), (m, h, n), torch.bfloat16
        a, a_scales = jitgemm.per_token_cast_to_fp8(a)
        cast = [jitgemm.per_block_cast_to_fp8(part) for part in b.view(h, n, k)]
        b = torch.stack([data.view(torch.uint8) for data, _ in cast]).view(a.dtype)
        # Scales as a caller has them who casts tokens by heads: stored along heads' tokens, which no kernel copies.
        scales = jitgemm.get_mn_major_tma_aligned_tensor(a_scales.view(m, h, -1).transpose(0, 1).contiguous())
        first = a.view(m, h, k), scales.transpose(0, 1)
        return first, (b, torch.stack([scales for _, scales in cast])), (m, h, n), torch.bfloat16

    def _groups_of_k(self, generator: torch.Generator) -> tuple[Any, Any, tuple[int, ...], torch.dtype]:
        shape, ks = self.shape, lengths_of(self.shape.groups)
        self.ks = ks
        self.counts = torch.tensor(ks, dtype=torch.int32, device=generator.device)
        made: list[Any] = []
        for extent in (shape.m, shape.n):
            x = random_matrix(sum(ks), extent, generator)
            if shape.recipe == "bf16":
                made.append(x)
                continue
            data, scales = jitgemm.per_channel_cast_to_fp8(x)
            parts = [part.T.flatten() for part in data.view(torch.uint8).split(ks)]
            made.append((torch.cat(parts).view(data.dtype), scales.contiguous().T))
        return made[0], made[1], (shape.groups, shape.m, shape.n), torch.float32

    def output(self) -> Tensor:
        """A result that is still to be computed; zeros where it is added to."""
        device = (self.a if isinstance(self.a, Tensor) else self.a[0]).device
        if self.adds:
            return torch.zeros(self.d_shape, dtype=self.d_dtype, device=device)
        return poisoned(self.d_shape, self.d_dtype, device)

    def call_of(self, library: Any, d: Tensor) -> Callable[[], object]:
        """The call of a library that has the peer's names, or of torch itself."""
        shape, a, b, c = self.shape, self.a, self.b, d if self.adds else None
        if shape.case == "k_grouped":
            name = f"k_grouped_{shape.recipe}_gemm_{'nt' if shape.recipe == 'fp8' else 'tn'}_contiguous"
            call = getattr(library, name)
            return lambda: call(a, b, d, self.ks, self.counts, c)
        if library is torch:
            return self._call_of_torch(d)
        call = library.fp8_einsum if shape.recipe == "fp8" else library.einsum
        return lambda: call(shape.expr, a, b, d, c)

    def _call_of_torch(self, d: Tensor) -> Callable[[], object]:
        if self.shape.recipe == "fp8" or self.shape.sums_batches:
            raise ValueError("torch has no such operation")
        a, out = self.a.transpose(0, 1), d.transpose(0, 1)
        b = self.b if self.shape.expr == "bhd,hdr->bhr" else self.b.transpose(1, 2)
        return lambda: torch.bmm(a, b, out=out)

    def expected(self) -> Tensor:
        """D by the reference, of the first and the last group, or of all batches' sum."""
        if self._expected is None:
            self._expected = self._reference()
        return self._expected

    def _reference(self) -> Tensor:
        shape = self.shape
        if shape.sums_batches:
            d = self.output()
            reference_einsum.einsum(shape.expr, self.a, self.b, d)
            return d
        if shape.case == "k_grouped":
            d = self.output()[[0, -1]]
            ks, fp8 = self.ks, shape.recipe == "fp8"
            operands: dict[str, Any] = {}
            for key, operand, extent in (("a", self.a, shape.m), ("b", self.b, shape.n)):
                data, scales = operand if fp8 else (operand, None)
                ends = [(0, ks[0]), (sum(ks) - ks[-1], sum(ks))]
                if fp8:
                    bits = data.view(torch.uint8)
                    picked = torch.cat([bits[first * extent : last * extent] for first, last in ends])
                    operands[key] = picked.view(data.dtype)
                    blocks = [scales[:, first // 128 : last // 128] for first, last in ends]
                    operands[f"{key}_scales"] = torch.cat(blocks, 1)
                else:
                    operands[key] = torch.cat([data[first:last] for first, last in ends])
            reference_grouped.k_grouped_contiguous(
                *(operands.pop("a"), operands.pop("b"), d, [ks[0], ks[-1]]),
                recipe=shape.name,
                layout="nt" if fp8 else "tn",
                **operands,
            )
            return d
        ends = [0, shape.groups - 1]
        d = self.output()[:, ends]
        if shape.recipe == "fp8":
            (a, a_scales), (b, b_scales) = self.a, self.b
            first = torch.stack([a[:, i].view(torch.uint8) for i in ends], 1).view(a.dtype), a_scales[:, ends]
            second = torch.stack([b[i].view(torch.uint8) for i in ends]).view(b.dtype), b_scales[ends]
            reference_einsum.fp8_einsum(shape.expr, first, second, d)
        else:
            reference_einsum.einsum(shape.expr, self.a[:, ends], self.b[ends], d)
        return d

    def found(self, d: Tensor) -> Tensor:
        """The part of D that ``expected`` has."""
        if self.shape.sums_batches:
            return d
        ends = [0, self.shape.groups - 1]
        return d[ends] if self.shape.case == "k_grouped" else d[:, ends]
