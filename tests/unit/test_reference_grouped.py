"""Grouped GEMMs, batched products and epilogues of the reference, against loops over elements of rows."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm.errors import ProblemError
from jitgemm.reference.einsum import einsum, fp8_einsum, fp8_gemm_nt_skip_head_mid
from jitgemm.reference.epilogue import Epilogue, gemm_into, swiglu
from jitgemm.reference.gemm import gemm
from jitgemm.reference.grouped import (
    k_grouped_contiguous,
    m_grouped_contiguous,
    m_grouped_masked,
    rows_of_index,
    rows_of_psum,
)
from jitgemm.reference.layout import deinterleave_gate_up, empty_mn_major, interleave_gate_up, slice_scales

NAN = float("nan")
INF = float("inf")
RECIPES = ("fp8_1x128_128x128", "fp8_1x128_1x128", "bf16")


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape).mul(30).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.02 + 0.005


def operands(recipe: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A [..., k] and B [groups, n, k] of a recipe, with their scales."""
    if recipe == "bf16":
        return {"a": bf16(*a_shape), "b": bf16(*b_shape)}
    groups, n, k = b_shape
    rows = n if recipe == "fp8_1x128_1x128" else ceil_div(n, 128)
    blocks = ceil_div(k, 128)
    return {
        "a": fp8(*a_shape),
        "b": fp8(*b_shape),
        "a_scales": scales(*a_shape[:-1], blocks),
        "b_scales": scales(groups, rows, blocks),
    }


def exact_row(x: Tensor, x_scales: Tensor | None, row: int, rows_per_scale: int) -> np.ndarray:
    """A row of a matrix, dequantized one element after the other."""
    values = x[row].float().tolist()
    if x_scales is None:
        return np.array(values)
    of_row = x_scales[row // rows_per_scale].tolist()
    return np.array([value * of_row[i // 128] for i, value in enumerate(values)])


def rows_per_scale(recipe: str) -> int:
    return 128 if recipe == "fp8_1x128_128x128" else 1


def naive(
    recipe: str, a: Tensor, b: Tensor, a_scales: Tensor | None = None, b_scales: Tensor | None = None
) -> np.ndarray:
    """A [m, k] times B [n, k]^T."""
    columns = [exact_row(b, b_scales, j, rows_per_scale(recipe)) for j in range(b.shape[0])]
    rows = [exact_row(a, a_scales, i, 1) for i in range(a.shape[0])]
    return np.array([[math.fsum(row * column) for column in columns] for row in rows]).reshape(len(rows), len(columns))


def close(actual: Tensor, expected: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
    assert actual.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=tolerance, atol=1e-6)


def group_of(data: dict[str, Tensor], group: int, rows: slice) -> tuple[Tensor, ...]:
    """What ``naive`` takes after the recipe, of one group and some rows of A."""
    taken = [data["a"][rows], data["b"][group]]
    return (*taken, data["a_scales"][rows], data["b_scales"][group]) if "a_scales" in data else tuple(taken)


def random_runs(generator: random.Random, groups: int, alignment: int) -> list[tuple[int, int, int]]:
    """Group, first row and row after the last for groups of random sizes, some empty."""
    runs, start = [], 0
    for group in range(groups):
        size = generator.choice([0, 1, generator.randrange(1, 12), alignment])
        runs.append((group, start, start + size))
        start += ceil_div(size, alignment) * alignment
    return runs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["nt", "nn"])
@pytest.mark.parametrize("use_psum_layout", [False, True])
def test_contiguous_groups_of_random_sizes(recipe: str, layout: str, use_psum_layout: bool, seed: int) -> None:
    torch.manual_seed(seed)
    generator = random.Random(seed)
    alignment = (1, 8, 16, 8)[seed]
    groups, n, k = 4, generator.choice([5, 130]), generator.choice([16, 136, 256])
    runs = random_runs(generator, groups, alignment)
    m = max(ceil_div(stop, alignment) * alignment for _, _, stop in runs) + alignment  # and rows after the last group
    data = operands(recipe, (m, k), (groups, n, k))
    grouped_layout = torch.full((m,), -1, dtype=torch.int32)
    for group, start, stop in runs:
        grouped_layout[start:stop] = group
    if use_psum_layout:
        grouped_layout = torch.tensor([stop for _, _, stop in runs], dtype=torch.int32)

    zero_padding = bool(seed % 2)
    d = torch.full((m, n), NAN)
    call = dict(data, b=data["b"] if layout == "nt" else data["b"].mT)
    m_grouped_contiguous(
        d=d,
        grouped_layout=grouped_layout,
        recipe=recipe,
        layout=layout,
        use_psum_layout=use_psum_layout,
        alignment=alignment,
        zero_padding=zero_padding,
        **call,
    )
    computed = torch.zeros(m, dtype=torch.bool)
    for group, start, stop in runs:
        close(d[start:stop], naive(recipe, *group_of(data, group, slice(start, stop))))
        computed[start:stop] = True
    assert computed.sum() == sum(stop - start for _, start, stop in runs)
    assert (d[~computed] == 0).all() if zero_padding or not use_psum_layout else d[~computed].isnan().all()


def test_rows_of_contiguous_groups_need_no_order_without_alignment() -> None:
    groups, n, k = 3, 7, 16
    index = torch.tensor([2, 0, -1, 2, 1, 0, -7], dtype=torch.int32)
    data = operands("bf16", (7, k), (groups, n, k))
    d = torch.full((7, n), 5.0).bfloat16()
    m_grouped_contiguous(d=d, grouped_layout=index, recipe="bf16", alignment=1, **data)
    for row, group in enumerate(index.tolist()):
        if group < 0:
            assert (d[row] == 0).all()
        else:
            close(d[row : row + 1], naive("bf16", *group_of(data, group, slice(row, row + 1))), torch.bfloat16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_masked_groups_of_random_counts(recipe: str) -> None:
    groups, max_m, n, k = 6, 9, 131, 136
    counts = torch.tensor([0, 1, 9, 4, 12, -3], dtype=torch.int32)  # the last two beyond either end
    data = operands(recipe, (groups, max_m, k), (groups, n, k))
    d = torch.full((groups, max_m, n), NAN, dtype=torch.bfloat16)
    m_grouped_masked(d=d, masked_m=counts, recipe=recipe, **data)
    for group, count in enumerate([0, 1, 9, 4, 9, 0]):
        of_group = {name: x if name.startswith("b") else x[group] for name, x in data.items()}
        close(d[group, :count], naive(recipe, *group_of(of_group, group, slice(0, count))), torch.bfloat16)
        assert d[group, count:].isnan().all()


def test_padding_is_never_read_and_nan_stays_in_its_row_and_group() -> None:
    a, b, d = torch.ones(24, 32).bfloat16(), torch.ones(3, 5, 32).bfloat16(), torch.full((24, 5), 7.0)
    a[3:8] = NAN  # padding
    a[9, 4], b[2, 1, 3] = INF, NAN
    index = torch.tensor([0] * 3 + [-1] * 5 + [1] * 8 + [2] * 8, dtype=torch.int32)
    m_grouped_contiguous(a, b, d, index, recipe="bf16", alignment=8)
    assert (d[:3] == 32).all() and (d[3:8] == 0).all() and (d[9] == INF).all()
    assert d[16:, 1].isnan().all()
    d[9], d[16:, 1] = 32, 32
    assert (d[8:] == 32).all()

    a, d = torch.full((2, 4, 32), NAN).bfloat16(), torch.full((2, 4, 5), 7.0)
    a[0, :2] = 1
    m_grouped_masked(a, b[:2], d, torch.tensor([2, 0], dtype=torch.int32), recipe="bf16")
    assert (d[0, :2] == 32).all() and (d[0, 2:] == 7).all() and (d[1] == 7).all()


@pytest.mark.parametrize(
    ("index", "alignment", "message"),
    [
        ([0, 0, 3, 3], 1, r"grouped_layout\[2\] is 3; accepted is less than 3"),
        ([0, 0, 1, 1], 4, r"grouped_layout\[2\] is 1 after 0; accepted is a group that starts at a multiple of 4"),
        ([-1, 2, 2, 2], 2, r"grouped_layout\[1\] is 2 after -1"),
        ([0, 0, 0], 1, r"grouped_layout has shape \(3,\); accepted is \(4,\)"),
        ([0, 0, 0, 0], 0, "alignment is 0"),
    ],
)
def test_indices_that_are_refused(index: list[int], alignment: int, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        rows_of_index(torch.tensor(index, dtype=torch.int32), 3, 4, alignment)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([3, 2, 8], r"grouped_layout\[1\] is 2; accepted is 3, or from 4 to 12"),
        ([3, 8, 13], r"grouped_layout\[2\] is 13; accepted is 8, or from 8 to 12"),
        ([-1, 8, 8], r"grouped_layout\[0\] is -1"),
        ([5, 6, 8], r"grouped_layout\[1\] is 6; accepted is 5, or from 8"),
        ([5, 8], r"grouped_layout has shape \(2,\); accepted is \(3,\)"),
    ],
)
def test_running_ends_that_are_refused(ends: list[int], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        rows_of_psum(torch.tensor(ends, dtype=torch.int32), 3, 12, 4)


def test_no_rows_at_all() -> None:
    assert [len(rows) for rows in rows_of_index(torch.empty(0, dtype=torch.int32), 2, 0, 8)] == [0, 0]
    assert [len(rows) for rows in rows_of_psum(torch.zeros(2, dtype=torch.int32), 2, 0, 8)] == [0, 0]
    assert [rows.tolist() for rows in rows_of_psum(torch.tensor([3, 3, 5]), 3, 8, 4)] == [[0, 1, 2], [], [4]]


@pytest.mark.parametrize("ks", [[16, 0, 130, 128], [0, 0], [257], [0, 3, 0, 1]])
@pytest.mark.parametrize("layout", ["tn", "nt"])
@pytest.mark.parametrize("recipe", ["fp8_1x128_1x128", "bf16"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_k_groups_of_any_sizes(ks: list[int], layout: str, recipe: str, accumulate: bool) -> None:
    m, n = 5, 6
    is_fp8 = recipe != "bf16"
    make = fp8 if is_fp8 else bf16
    parts = [(make(m, k), make(n, k)) for k in ks]
    part_scales = [(scales(m, ceil_div(k, 128)), scales(n, ceil_div(k, 128))) for k in ks]

    def joined(index: int) -> Tensor:
        flat = [pair[index].mT if layout == "tn" else pair[index].reshape(-1) for pair in parts]
        return torch.cat([x.float() for x in flat]).to(flat[0].dtype)

    def joined_scales(index: int) -> Tensor | None:
        if not is_fp8:
            return None
        return (
            torch.cat([pair[index].mT for pair in part_scales])
            if layout == "tn"
            else torch.cat([pair[index] for pair in part_scales], 1)
        )

    d = torch.randn(len(ks), m, n) if accumulate else torch.full((len(ks), m, n), NAN)
    before = d.double().numpy().copy() if accumulate else np.zeros(d.shape)
    k_grouped_contiguous(
        joined(0),
        joined(1),
        d,
        ks,
        d if accumulate else None,
        a_scales=joined_scales(0),
        b_scales=joined_scales(1),
        recipe=recipe,
        layout=layout,
    )
    for group, ((a, b), (a_scales, b_scales)) in enumerate(zip(parts, part_scales, strict=True)):
        product = naive(recipe, a, b, a_scales, b_scales) if is_fp8 else naive(recipe, a, b)
        close(d[group], before[group] + product)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": [16]}, r"ks is \[16\]; accepted are 2 numbers"),
        ({"ks": [40, -8]}, r"ks is \[40, -8\]"),
        ({"ks": [16, 24]}, r"a has shape \(32, 4\); accepted is \(40, 4\)"),
        ({"layout": "nn"}, "layout is 'nn'; accepted is tn, nt"),
        ({"layout": "nt", "ks": [16, 24]}, r"a has shape \(32, 4\); accepted is 160 elements"),
        ({"recipe": "fp8_rowwise"}, "recipe is 'fp8_rowwise'"),
    ],
)
def test_k_groups_that_are_refused(changes: dict[str, object], message: str) -> None:
    call: dict[str, object] = {"a": bf16(32, 4), "b": bf16(32, 6), "d": torch.zeros(2, 4, 6), "ks": [16, 16]}
    with pytest.raises(ProblemError, match=message):
        k_grouped_contiguous(**(call | changes))  # type: ignore[arg-type]


SIZES = {"b": 5, "h": 3, "r": 20, "d": 12, "m": 6, "n": 7, "k": 9}


def of_letters(letters: str) -> tuple[int, ...]:
    return tuple(SIZES[letter] for letter in letters)


@pytest.mark.parametrize("expr", ["bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr", "bmk,bnk->mn"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_einsum_of_strided_operands(
    expr: str, accumulate: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jitgemm.reference.einsum._BATCH_ELEMENTS", 100)  # two batches at a time
    (first, second), output = expr.split("->")[0].split(","), expr.split("->")[1]
    a_all, b_all = bf16(*of_letters(first)[:-1], 32), bf16(*of_letters(second)[:-1], 32)
    a, b = a_all[..., : of_letters(first)[-1]], b_all[..., : of_letters(second)[-1]]
    d_all = torch.randn(*of_letters(output)[:-1], 32).to(dtype)
    d = d_all[..., : of_letters(output)[-1]]
    beyond = d_all[..., d.shape[-1] :].clone()
    before = d.double().numpy().copy() if accumulate else 0
    einsum(expr, a, b, d, d if accumulate else None)
    expected = np.einsum(expr, a.double().numpy(), b.double().numpy()) + before
    close(d, expected, dtype)
    assert torch.equal(d_all[..., d.shape[-1] :], beyond)


def spread(x: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Scales repeated to the shape of what they scale: 128 times where there are fewer."""
    values = x.double().numpy()
    for dim, size in enumerate(shape):
        if values.shape[dim] != size:
            values = np.take(values, np.arange(size) // 128, axis=dim)
    return values


@pytest.mark.parametrize(
    ("expr", "recipe", "a_scales", "b_scales"),
    [
        ("bhr,hdr->bhd", "fp8_1x128_128x128", (5, 2, 2), (2, 2, 2)),
        ("bhr,hdr->bhd", "fp8_1x128_1x128", (5, 2, 2), (2, 130, 2)),
        ("bhd,hdr->bhr", "fp8_1x128_128x128", (5, 2, 2), (2, 2, 2)),
        ("bhd,hdr->bhr", "fp8_1x128_1x128", (5, 2, 2), (2, 2, 140)),
        ("bhd,bhr->hdr", "fp8_1x128_1x128", (2, 2, 130), (2, 2, 140)),
    ],
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_fp8_einsum(
    expr: str, recipe: str, a_scales: tuple[int, ...], b_scales: tuple[int, ...], accumulate: bool
) -> None:
    sizes = {"b": 131 if expr.endswith("hdr") else 5, "h": 2, "d": 130, "r": 140}
    (first, second), output = expr.split("->")[0].split(","), expr.split("->")[1]
    a, b = (fp8(*(sizes[letter] for letter in letters)) for letters in (first, second))
    a_sf, b_sf = scales(*a_scales), scales(*b_scales)
    d = torch.randn([sizes[letter] for letter in output])
    before = d.double().numpy().copy() if accumulate else 0
    fp8_einsum(expr, (a, a_sf), (b, b_sf), d, d if accumulate else None, recipe=recipe)
    exact_a = a.double().numpy() * spread(a_sf, tuple(a.shape))
    exact_b = b.double().numpy() * spread(b_sf, tuple(b.shape))
    np.testing.assert_allclose(d.double().numpy(), np.einsum(expr, exact_a, exact_b) + before, rtol=1e-5, atol=1e-5)


def test_einsum_refuses() -> None:
    a, b, d = bf16(2, 3, 4), bf16(3, 5, 4), bf16(2, 3, 5)
    with pytest.raises(ProblemError, match="expr is 'ij,jk->ik'; accepted is bhr,hdr->bhd, "):
        einsum("ij,jk->ik", a, b, d)
    with pytest.raises(ProblemError, match=r"b has r = 3 in bhr,hdr->bhd; accepted is 4"):
        einsum("bhr,hdr->bhd", a, b[..., :3], d)
    with pytest.raises(ProblemError, match=r"d has shape \(3, 5\); bhr,hdr->bhd accepts \[b, h, d\]"):
        einsum("bhr,hdr->bhd", a, b, d[0])
    with pytest.raises(ProblemError, match="expr is 'bmk,bnk->mn'; accepted is bhr,hdr->bhd, bhd,hdr->bhr, bhd"):
        fp8_einsum("bmk,bnk->mn", (a, a), (b, b), d)
    with pytest.raises(ProblemError, match="recipe is 'fp8_1x128_128x128'; bhd,bhr->hdr accepts fp8_1x128_1x128"):
        fp8_einsum("bhd,bhr->hdr", (a, a), (a, a), torch.zeros(3, 4, 4))


@pytest.mark.parametrize("head_splits", [(4, 3, 2), (4, 0, 2), (0, 5, 6), (6, 5, 0), (3, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_skip_head_mid_leaves_the_holes(head_splits: tuple[int, int, int], dtype: torch.dtype) -> None:
    left, mid, right = head_splits
    m, n, k = 5, 4 * (left + right), 130
    a, b = (fp8(m, k), scales(m, 2)), (fp8(n, k), scales(1, 2))
    d = torch.full((m, 4 * sum(head_splits)), 3.0, dtype=dtype)
    fp8_gemm_nt_skip_head_mid(a, b, d, head_splits)
    expected = naive("fp8_1x128_128x128", a[0], b[0], a[1], b[1])
    kept = [column for column in range(d.shape[1]) if not left <= column % sum(head_splits) < left + mid]
    close(d[:, kept], expected, dtype)
    holes = [column for column in range(d.shape[1]) if column not in kept]
    assert (d[:, holes] == 3).all() and len(holes) == 4 * mid


def test_skip_head_mid_refuses() -> None:
    a, b = (fp8(2, 8), scales(2, 1)), (fp8(12, 8), scales(1, 1))
    with pytest.raises(ProblemError, match=r"accepted are left \+ right that divide n = 12"):
        fp8_gemm_nt_skip_head_mid(a, b, torch.zeros(2, 20), (4, 4, 1))
    with pytest.raises(ProblemError, match=r"d has shape \(2, 12\); accepted is \(2, 16\)"):
        fp8_gemm_nt_skip_head_mid(a, b, torch.zeros(2, 12), (4, 2, 2))


def naive_swiglu(row: np.ndarray, limit: float | None) -> np.ndarray:
    """Of a row in which runs of 8 elements of gate and of up alternate."""
    result = []
    for i in range(len(row) // 2):
        gate, up = row[i // 8 * 16 + i % 8], row[i // 8 * 16 + 8 + i % 8]
        if limit is not None:
            gate, up = min(gate, limit), max(min(up, limit), -limit)
        result.append(gate / (1 + math.exp(-gate)) * up)
    return np.array(result)


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("recipe", ["fp8_1x128_1x128", "bf16"])
def test_everything_in_an_epilogue(recipe: str, limit: float | None) -> None:
    m, n, k = 12, 48, 136
    data = operands(recipe, (m, k), (1, n, k))
    bias, weights = torch.randn(n), torch.rand(m)
    epilogue = Epilogue(alpha=0.3, bias=bias, swiglu=True, limit=limit, row_weights=weights)
    expected = 0.3 * naive(recipe, *group_of(data, 0, slice(None))) + bias.numpy()
    expected = np.array([naive_swiglu(row, limit) for row in expected]) * weights[:, None].numpy()
    d = torch.empty(m, n // 2)
    rest = {name: x[0] if name.startswith("b") else x for name, x in data.items()}
    gemm_into(d=d, recipe=recipe, epilogue=epilogue, **rest)
    close(d, expected)
    with pytest.raises(ProblemError, match="c is given with SwiGLU"):
        gemm_into(d=d, c=torch.zeros(m, n), recipe=recipe, epilogue=epilogue, **rest)


def test_alpha_is_for_the_product_alone() -> None:
    a, b, c, bias = bf16(4, 16), bf16(6, 16), torch.randn(4, 6), torch.randn(6)
    d = torch.empty(4, 6)
    gemm_into(a, b, d, c, recipe="bf16", epilogue=Epilogue(alpha=-2.0, bias=bias))
    close(d, -2 * naive("bf16", a, b) + c.numpy() + bias.numpy())


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_swiglu_of_special_values(special: float) -> None:
    gate, up = torch.tensor([special, 1.0]), torch.tensor([1.0, special])
    for limit in (None, 2.0):
        result = swiglu(gate, up, limit)
        if special != special:
            assert result.isnan().all()  # a clamp must not hide it
        elif limit is None:
            assert result[1] == special and (result[0] == INF if special > 0 else result[0].isnan())
        else:
            silu_1 = 1 / (1 + math.exp(-1))
            assert result[1] == pytest.approx(math.copysign(2 * silu_1, special))
            assert result[0] == pytest.approx(2 / (1 + math.exp(-2))) if special > 0 else result[0].isnan()


@pytest.mark.parametrize("groups_layout", ["contiguous", "masked"])
@pytest.mark.parametrize("quantized", ["fp32", "ue8m0", "packed"])
def test_gate_up_to_fp8_equals_the_separate_steps(groups_layout: str, quantized: str) -> None:
    groups, rows, n, k = 3, 8, 512, 256
    gate_up, gate_up_scales = fp8(groups, n, k), scales(groups, n // 128, k // 128)
    shape = (groups * rows,) if groups_layout == "contiguous" else (groups, rows)
    a, a_scales, weights = fp8(*shape, k), scales(*shape, k // 128), torch.rand(shape)
    gran_k, use_ue8m0 = (32, True) if quantized == "packed" else (128, quantized == "ue8m0")
    sf_columns = n // 2 // gran_k // (4 if quantized == "packed" else 1)
    d = torch.zeros(*shape, n // 2).to(torch.float8_e4m3fn)
    d_scales = torch.zeros(*shape, sf_columns, dtype=torch.int32 if quantized == "packed" else torch.float32)
    epilogue = Epilogue(swiglu=True, limit=10.0, row_weights=weights, gran_k=gran_k, use_ue8m0=use_ue8m0)
    call = {
        "a": a,
        "b": interleave_gate_up(gate_up, 1),
        "d": (d, d_scales),
        "a_scales": a_scales,
        "b_scales": interleave_gate_up(gate_up_scales, 1, run=1),
        "recipe": "fp8_1x128_128x128",
        "epilogue": epilogue,
    }
    counts = [8, 0, 5]
    if groups_layout == "masked":
        m_grouped_masked(masked_m=torch.tensor(counts, dtype=torch.int32), **call)
    else:
        index = torch.tensor([g if i < count else -1 for g, count in enumerate(counts) for i in range(rows)])
        m_grouped_contiguous(grouped_layout=index.int(), alignment=rows, **call)

    a, a_scales, weights = a.view(groups, rows, k), a_scales.view(groups, rows, -1), weights.view(groups, rows)
    d, d_scales = d.view(groups, rows, -1), d_scales.view(groups, rows, -1)
    for group, count in enumerate(counts):
        both = torch.empty(rows, n, dtype=torch.float64)
        both[:] = torch.from_numpy(
            naive("fp8_1x128_128x128", a[group], gate_up[group], a_scales[group], gate_up_scales[group])
        )
        activated = swiglu(both[:, : n // 2], both[:, n // 2 :], 10.0) * weights[group, :, None]
        values, sf = jitgemm.per_token_cast_to_fp8(activated.float(), use_ue8m0, gran_k, quantized == "packed")
        torch.testing.assert_close(d_scales[group, :count], sf[:count], rtol=1e-6, atol=0)
        same = d[group, :count].view(torch.uint8) == values[:count].view(torch.uint8)
        assert same.float().mean() > 0.99 if count else True  # fp32 sums of another order may round to a neighbour
        assert not d[group, count:].view(torch.uint8).any() and not d_scales[group, count:].any()


def test_quantized_output_refuses_scales_of_another_shape() -> None:
    d = (fp8(4, 256), torch.zeros(4, 1))
    with pytest.raises(ProblemError, match=r"d's scales have shape \(4, 1\); accepted is \(4, 2\) for 256 columns"):
        gemm_into(bf16(4, 16), bf16(256, 16), d, recipe="bf16")


def test_outputs_of_any_strides_are_written_in_place() -> None:
    a, b = bf16(2, 6, 16), bf16(2, 256, 16)
    counts = torch.tensor([4, 6], dtype=torch.int32)
    contiguous = torch.zeros(2, 6, 256).to(torch.float8_e4m3fn), torch.zeros(2, 6, 2)
    around = torch.zeros(2, 8, 300).to(torch.float8_e4m3fn)
    strided = around[:, 1:7, 20:276], empty_mn_major((2, 6, 2), torch.float32, torch.device("cpu")).zero_()
    assert strided[1].stride() == (16, 1, 8)
    for d in (contiguous, strided):
        m_grouped_masked(a, b, d, counts, recipe="bf16")
    for x, y in zip(strided, contiguous, strict=True):
        assert torch.equal(x.float(), y.float())
    strided[0].view(torch.uint8).zero_()
    assert not around.view(torch.uint8).any()


def test_nan_and_inf_reach_quantized_outputs() -> None:
    a, b = torch.ones(3, 16).bfloat16(), torch.ones(256, 16).bfloat16()
    a[1, 0], b[200, 3] = NAN, NAN
    d = (torch.zeros(3, 256).to(torch.float8_e4m3fn), torch.zeros(3, 2))
    gemm_into(a, b, d, recipe="bf16")
    restored = d[0].float() * d[1].repeat_interleave(128, 1)
    assert restored[1].isnan().all() and restored[:, 128:].isnan().all()
    assert (restored[[0, 2], :128] == 16).all()


def test_bias_of_groups() -> None:
    bias = torch.randn(2, 6)
    a, b, d = bf16(4, 16), bf16(2, 6, 16), torch.empty(4, 6)
    index = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    m_grouped_contiguous(a, b, d, index, recipe="bf16", alignment=1, epilogue=Epilogue(bias=bias))
    for row, group in enumerate(index.tolist()):
        close(d[row], naive("bf16", a[row : row + 1], b[group])[0] + bias[group].numpy())


def test_interleaving_by_position() -> None:
    x = torch.arange(48).view(48, 1).repeat(2, 1, 3)
    interleaved = interleave_gate_up(x, 1)
    order = [*range(8), *range(24, 32), *range(8, 16), *range(32, 40), *range(16, 24), *range(40, 48)]
    assert interleaved[1, :, 2].tolist() == order
    for dim in (1, -2):
        assert torch.equal(deinterleave_gate_up(interleave_gate_up(x, dim), dim), x)
    quantized = fp8(32, 16)
    back = deinterleave_gate_up(interleave_gate_up(quantized, 0), 0)
    assert back.dtype == quantized.dtype and torch.equal(back.view(torch.uint8), quantized.view(torch.uint8))
    assert interleave_gate_up(torch.tensor([1, 2, 3, 4]), 0, run=1).tolist() == [1, 3, 2, 4]
    with pytest.raises(ProblemError, match="gate and up have 24 rows; accepted is a multiple of 16"):
        interleave_gate_up(bf16(24, 3), 0)


@pytest.mark.parametrize(("n_start", "n"), [(0, 192), (192, 192), (64, 300), (100, 20)])
@pytest.mark.parametrize(("k_start", "k"), [(0, 352), (352, 352), (96, 32), (1, 700)])
def test_shards_that_start_or_end_inside_a_block(n_start: int, n: int, k_start: int, k: int) -> None:
    m = 3
    whole_b, whole_sf = fp8(400, 720), scales(4, 6)
    a, a_scales = fp8(m, 720), scales(m, 6)
    b_scales, n_offset = slice_scales(whole_sf, 0, n_start, n)
    b_scales, k_offset = slice_scales(b_scales, 1, k_start, k)
    a_part_scales, a_offset = slice_scales(a_scales, 1, k_start, k)
    assert (n_offset, k_offset, a_offset) == (n_start % 128, k_start % 128, k_start % 128)
    d = gemm(
        a[:, k_start : k_start + k],
        whole_b[n_start : n_start + n, k_start : k_start + k],
        a_scales=a_part_scales,
        b_scales=b_scales,
        recipe="fp8_1x128_128x128",
        d_dtype="fp32",
        a_offset=a_offset,
        b_offset=(n_offset, k_offset),
    )
    rows = [exact_row(a, a_scales, i, 1)[k_start : k_start + k] for i in range(m)]
    columns = [exact_row(whole_b, whole_sf, j, 128)[k_start : k_start + k] for j in range(n_start, n_start + n)]
    close(d, np.array([[math.fsum(row * column) for column in columns] for row in rows]))


def test_shards_quantized_for_themselves_may_have_other_blocks() -> None:
    # A quantized after the cut, from its own first element; B cut from a quantized whole.
    a, a_scales, b, b_scales = fp8(2, 352), scales(2, 3), fp8(10, 352), scales(1, 4)
    d = gemm(a, b, a_scales=a_scales, b_scales=b_scales, recipe="fp8_1x128_128x128", d_dtype="fp32", b_offset=(5, 96))
    k_of_b = np.array([b_scales[0, (96 + i) // 128].item() for i in range(352)])
    rows = [exact_row(a, a_scales, i, 1) for i in range(2)]
    close(d, np.array([[math.fsum(row * b[j].double().numpy() * k_of_b) for j in range(10)] for row in rows]))


def test_a_shards_scales_must_begin_with_its_block() -> None:
    with pytest.raises(ProblemError, match=r"b_scales have shape \(1, 1\); accepted is \(2, 1\)"):
        gemm(
            fp8(2, 64),
            fp8(100, 64),
            a_scales=scales(2, 1),
            b_scales=scales(1, 1),
            recipe="fp8_1x128_128x128",
            b_offset=(64, 0),
        )


def test_many_rows_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = operands("fp8_1x128_128x128", (300, 200), (2, 130, 200))
    index = torch.tensor([0] * 160 + [1] * 140, dtype=torch.int32)
    whole, parts = torch.empty(300, 130), torch.empty(300, 130)
    m_grouped_contiguous(d=whole, grouped_layout=index, recipe="fp8_1x128_128x128", alignment=32, **data)
    monkeypatch.setattr("jitgemm.reference.epilogue._ROWS_AT_A_TIME", 37)
    m_grouped_contiguous(d=parts, grouped_layout=index, recipe="fp8_1x128_128x128", alignment=32, **data)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
