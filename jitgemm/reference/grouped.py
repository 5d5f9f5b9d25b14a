"""GEMMs of several groups: experts that share no weights (along m), or sums over parts of K (along k).

All write into D and touch none of its other rows. Where groups lie is read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.reference.epilogue import PLAIN, Epilogue, Output, gemm_into
from jitgemm.reference.quantize import align, ceil_div

M_ALIGNMENT = 128
"""Rows to whose multiples groups are padded, unless the caller declares fewer."""


def m_grouped_contiguous(
    a: Tensor,
    b: Tensor,
    d: Output,
    grouped_layout: Tensor,
    *,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    recipe: str,
    layout: str = "nt",
    use_psum_layout: bool = False,
    alignment: int = M_ALIGNMENT,
    zero_padding: bool = True,
    epilogue: Epilogue = PLAIN,
) -> None:
    """``D[row] = A[row] @ B[group of the row]^T``.

    Args:
        a: [m, k].
        b: [groups, n, k], or [groups, k, n] in layout ``nn``.
        d: [m, n]; see ``gemm_into``.
        grouped_layout: int32 [m], each row's group or a negative number for padding; or, in the psum layout, int32
            [groups], where each group ends, which the next one follows at the next multiple of ``alignment``.
        a_scales: as ``gemm`` takes them.
        b_scales: the same for each group, in layout ``nt`` whatever that of B.
        recipe: a key of ``SCALE_GROUPS``.
        layout: ``nt`` or ``nn``.
        use_psum_layout: what ``grouped_layout`` is.
        alignment: multiple of which groups start at; 1 for any.
        zero_padding: whether the psum layout's rows of D that belong to no group become zeros, or are left alone;
            with an index they always become zeros.
        epilogue: what follows the product.

    Raises:
        ProblemError: groups that are not there or not aligned, or shapes that don't fit each other.
    """
    if layout not in ("nt", "nn"):
        raise ProblemError(f"layout is {layout!r}; accepted is nt, nn")
    groups, m = b.shape[0], a.shape[0]
    if use_psum_layout:
        rows_of_groups = rows_of_psum(grouped_layout, groups, m, alignment)
    else:
        rows_of_groups = rows_of_index(grouped_layout, groups, m, alignment)
    zero_padding = zero_padding or not use_psum_layout
    _each_group(a, b, d, rows_of_groups, a_scales, b_scales, recipe, layout, zero_padding, epilogue)


def m_grouped_masked(
    a: Tensor,
    b: Tensor,
    d: Output,
    masked_m: Tensor,
    *,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    recipe: str,
    epilogue: Epilogue = PLAIN,
) -> None:
    """``D[group, row] = A[group, row] @ B[group]^T`` for the first ``masked_m[group]`` rows of each group.

    Args:
        a: [groups, max_m, k].
        b: [groups, n, k].
        d: [groups, max_m, n]; see ``gemm_into``.
        masked_m: int32 [groups]; what is negative counts as 0, what exceeds max_m as max_m.
        a_scales: those of ``gemm`` for each group.
        b_scales: the same.
        recipe: a key of ``SCALE_GROUPS``.
        epilogue: what follows the product.

    Raises:
        ProblemError: shapes that don't fit each other.
    """
    groups, max_m = a.shape[0], a.shape[1]
    if b.shape[0] != groups:
        raise ProblemError(f"b has {b.shape[0]} groups; a has {groups}")
    _check_shape("masked_m", masked_m, (groups,))
    for group, count in enumerate(masked_m.tolist()):
        gemm_into(
            a[group],
            b[group],
            d[group] if isinstance(d, Tensor) else (d[0][group], d[1][group]),
            a_scales=None if a_scales is None else a_scales[group],
            b_scales=None if b_scales is None else b_scales[group],
            recipe=recipe,
            epilogue=epilogue.of_group(group),
            rows=torch.arange(min(max(count, 0), max_m), device=a.device),
        )


def k_grouped_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    ks: Sequence[int],
    c: Tensor | None = None,
    *,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    recipe: str = "bf16",
    layout: str = "tn",
) -> None:
    """``D[group] = A[group] @ B[group]^T (+ C[group])``, where the groups are parts of K: gradients of weights.

    Args:
        a: the groups one after the other: [sum of ks, m] in layout ``tn``; in ``nt`` the elements of each group's
            [m, k], in any shape.
        b: the same with n.
        d: fp32 or bf16 [groups, m, n]; a group without elements gets C, or zeros.
        ks: elements of K in each group; any may be 0.
        c: [groups, m, n], may be ``d`` itself.
        a_scales: fp32, of single rows: [sum of ceil(k / 128), m] in layout ``tn``, else [m, that sum].
        b_scales: the same with n.
        recipe: ``fp8_1x128_1x128`` or ``bf16``.
        layout: ``tn`` or ``nt``.

    Raises:
        ProblemError: an unknown recipe or layout, or shapes that don't fit each other.
    """
    if recipe not in ("fp8_1x128_1x128", "bf16"):
        raise ProblemError(f"recipe is {recipe!r}; accepted is fp8_1x128_1x128, bf16")
    if layout not in ("tn", "nt"):
        raise ProblemError(f"layout is {layout!r}; accepted is tn, nt")
    groups, m, n = d.shape
    if len(ks) != groups or any(k < 0 for k in ks):
        raise ProblemError(f"ks is {list(ks)}; accepted are {groups} numbers, at least 0")
    total, scales = sum(ks), sum(ceil_div(k, 128) for k in ks)
    for name, operand, operand_scales, extent in (("a", a, a_scales, m), ("b", b, b_scales, n)):
        if operand.numel() != total * extent or (layout == "tn" and operand.shape != (total, extent)):
            accepted = f"{(total, extent)}" if layout == "tn" else f"{total * extent} elements"
            raise ProblemError(f"{name} has shape {tuple(operand.shape)}; accepted is {accepted}")
        if operand_scales is not None:
            _check_shape(f"{name}_scales", operand_scales, (scales, extent) if layout == "tn" else (extent, scales))
    start = scale = 0
    for group, k in enumerate(ks):
        blocks = ceil_div(k, 128)
        gemm_into(
            _part_of_k(a, m, start, k, layout),
            _part_of_k(b, n, start, k, layout),
            d[group],
            None if c is None else c[group],
            a_scales=_scales_of_part(a_scales, scale, blocks, layout),
            b_scales=_scales_of_part(b_scales, scale, blocks, layout),
            recipe=recipe,
        )
        start, scale = start + k, scale + blocks


def rows_of_index(index: Tensor, groups: int, m: int, alignment: int = 1) -> list[Tensor]:
    """The rows of each group, from each row's group.

    Raises:
        ProblemError: see ``check_index``.
    """
    check_index(index, groups, m, alignment)
    return [(index == group).nonzero().squeeze(1) for group in range(groups)]


def check_index(index: Tensor, groups: int, m: int, alignment: int = 1) -> None:
    """Check the group of each row; negative ones are padding.

    Raises:
        ProblemError: another shape, a group that is not there, or two groups (or padding and then a group) between
            multiples of ``alignment``; of several faults the first is named.
    """
    _check_shape("grouped_layout", index, (m,))
    _check_alignment(alignment)
    index = index.clamp(min=-1)
    bad = index >= groups
    starts = (index[1:] != index[:-1]) & (index[1:] >= 0)
    bad[1:] |= starts & (torch.arange(1, max(m, 1), device=index.device) % alignment != 0)
    if not bad.any():
        return
    row = int(bad.nonzero()[0])
    if index[row] >= groups:
        raise ProblemError(f"grouped_layout[{row}] is {int(index[row])}; accepted is less than {groups} (groups)")
    raise ProblemError(
        f"grouped_layout[{row}] is {int(index[row])} after {int(index[row - 1])};"
        f" accepted is a group that starts at a multiple of {alignment} rows"
    )


def check_counts(counts: Tensor, groups: int, max_m: int) -> None:
    """Check the rows of each group of a masked GEMM, which takes what is not between 0 and ``max_m`` for the nearer.

    Raises:
        ProblemError: another shape, or a count that is not; the first is named.
    """
    _check_shape("masked_m", counts, (groups,))
    for group, count in enumerate(counts.tolist()):
        if not 0 <= count <= max_m:
            raise ProblemError(f"masked_m[{group}] is {count}; accepted is 0 to {max_m} (rows of a group)")


def rows_of_psum(ends: Tensor, groups: int, m: int, alignment: int = 1) -> list[Tensor]:
    """The rows of each group, from where each ends; a group that ends where the one before did has none.

    Raises:
        ProblemError: another shape, ends that decrease, or one past ``m``.
    """
    _check_shape("grouped_layout", ends, (groups,))
    _check_alignment(alignment)
    rows, last = [], 0
    for group, end in enumerate(ends.tolist()):
        start = align(last, alignment)
        if end != last and not start <= end <= m:
            raise ProblemError(f"grouped_layout[{group}] is {end}; accepted is {last}, or from {start} to {m}")
        rows.append(torch.arange(min(start, end), end, device=ends.device))
        last = end
    return rows


def _each_group(
    a: Tensor,
    b: Tensor,
    d: Output,
    rows_of_groups: list[Tensor],
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    recipe: str,
    layout: str,
    zero_padding: bool,
    epilogue: Epilogue,
) -> None:
    for group, rows in enumerate(rows_of_groups):
        gemm_into(
            a,
            b[group] if layout == "nt" else b[group].mT,
            d,
            a_scales=a_scales,
            b_scales=None if b_scales is None else b_scales[group],
            recipe=recipe,
            epilogue=epilogue.of_group(group),
            rows=rows,
        )
    if zero_padding:
        padding = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
        for rows in rows_of_groups:
            padding[rows] = False
        for part in (d,) if isinstance(d, Tensor) else d:
            (part.view(torch.uint8) if part.element_size() == 1 else part)[padding] = 0


def _part_of_k(x: Tensor, extent: int, start: int, k: int, layout: str) -> Tensor:
    if layout == "tn":
        return x[start : start + k].mT
    return x.reshape(-1)[start * extent : (start + k) * extent].view(extent, k)


def _scales_of_part(scales: Tensor | None, start: int, blocks: int, layout: str) -> Tensor | None:
    if scales is None:
        return None
    return scales[start : start + blocks].mT if layout == "tn" else scales[:, start : start + blocks]


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ProblemError(f"{name} has shape {tuple(x.shape)}; accepted is {shape}")


def _check_alignment(alignment: int) -> None:
    if alignment < 1:
        raise ProblemError(f"alignment is {alignment}; accepted is at least 1")
