"""The casts and layout transforms as torch operators, ``torch.ops.jitgemm.*``.

What a graph, a fake tensor or a dispatch mode sees in place of the public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jitgemm.ops import fp4
from jitgemm.ops.layout import check_scales, copy_to_mn_major
from jitgemm.ops.pack_scales import pack_groups, pack_planes
from jitgemm.ops.quantize import (
    cast_back,
    check_cast,
    check_cast_back,
    check_packing,
    per_block,
    per_channel,
    per_token,
)
from jitgemm.reference import layout
from jitgemm.reference.quantize import ceil_div


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name, signature = schema.split("(", 1)
    operator = torch.library.custom_op(f"jitgemm::{name}", implementation, mutates_args=(), schema=f"({signature}")
    operator.register_fake(fake)


def _per_token(x: Tensor, use_ue8m0: bool, gran_k: int, use_packed_ue8m0: bool) -> tuple[Tensor, Tensor]:
    check_cast(x, gran_k)
    check_packing(use_ue8m0, use_packed_ue8m0)
    return per_token(x, use_ue8m0, gran_k, use_packed_ue8m0)


def _per_token_fake(x: Tensor, use_ue8m0: bool, gran_k: int, use_packed_ue8m0: bool) -> tuple[Tensor, Tensor]:
    check_cast(x, gran_k)
    check_packing(use_ue8m0, use_packed_ue8m0)
    m, groups = x.shape[0], ceil_div(x.shape[1], gran_k)
    sf = (
        x.new_empty((m, ceil_div(groups, 4)), dtype=torch.int32)
        if use_packed_ue8m0
        else x.new_empty((m, groups), dtype=torch.float32)
    )
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), sf


def _per_channel(x: Tensor, use_ue8m0: bool, gran_k: int) -> tuple[Tensor, Tensor]:
    check_cast(x, gran_k)
    return per_channel(x, use_ue8m0, gran_k)


def _per_channel_fake(x: Tensor, use_ue8m0: bool, gran_k: int) -> tuple[Tensor, Tensor]:
    check_cast(x, gran_k)
    sf = x.new_empty((ceil_div(x.shape[0], gran_k), x.shape[1]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), sf


def _per_block(x: Tensor, use_ue8m0: bool, gran_k: int) -> tuple[Tensor, Tensor]:
    check_cast(x, gran_k)
    return per_block(x, use_ue8m0, gran_k)


def _per_block_fake(x: Tensor, use_ue8m0: bool, gran_k: int) -> tuple[Tensor, Tensor]:
    check_cast(x, gran_k)
    sf = x.new_empty((ceil_div(x.shape[0], gran_k), ceil_div(x.shape[1], gran_k)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), sf


def _cast_back(x: Tensor, sf: Tensor, rows: int, columns: int, packed: bool, dtype: torch.dtype) -> Tensor:
    check_cast_back(x, sf, (rows or None, columns or None), packed, dtype)
    return cast_back(x, sf, rows, columns, packed, dtype)


def _cast_back_fake(x: Tensor, sf: Tensor, rows: int, columns: int, packed: bool, dtype: torch.dtype) -> Tensor:
    check_cast_back(x, sf, (rows or None, columns or None), packed, dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _mn_major(sf: Tensor) -> Tensor:
    check_scales(sf)
    return copy_to_mn_major(sf)


def _mn_major_fake(sf: Tensor) -> Tensor:
    check_scales(sf)
    return layout.empty_mn_major(sf.shape, sf.dtype, sf.device)


def _packed(sf: Tensor) -> Tensor:
    check_scales(sf)
    return pack_planes(sf)


def _packed_fake(sf: Tensor) -> Tensor:
    check_scales(sf)
    return layout.empty_packed(sf)


def _packed_groups_fake(
    sf: Tensor, grouped_layout: Tensor, blocks: Sequence[int], gran_k: int, alignment: int
) -> Tensor:
    return layout.empty_packed_groups(sf, blocks)


def _unpack_fake(sf: Tensor, k_blocks: int) -> Tensor:
    return layout.empty_mn_major((*sf.shape[:-1], k_blocks), torch.float32, sf.device)


_define(
    "per_token_cast_to_fp8(Tensor x, bool use_ue8m0, int gran_k, bool use_packed_ue8m0) -> (Tensor, Tensor)",
    _per_token,
    _per_token_fake,
)
_define(
    "per_channel_cast_to_fp8(Tensor x, bool use_ue8m0, int gran_k) -> (Tensor, Tensor)",
    _per_channel,
    _per_channel_fake,
)
_define(
    "per_block_cast_to_fp8(Tensor x, bool use_ue8m0, int gran_k) -> (Tensor, Tensor)",
    _per_block,
    _per_block_fake,
)
_define("prepare_fp4_weights(Tensor packed, Tensor exponents) -> (Tensor, Tensor)", fp4.pack, fp4.pack_fake)
_define(
    "prepare_nvfp4_weights(Tensor packed, Tensor scales, Tensor units) -> (Tensor, Tensor)",
    fp4.pack_nvfp4,
    fp4.pack_fake,
)
_define(
    "cast_back_from_fp8(Tensor x, Tensor sf, int group_rows, int group_columns, bool use_packed_ue8m0,"
    " ScalarType dtype) -> Tensor",
    _cast_back,
    _cast_back_fake,
)
_define("get_mn_major_tma_aligned_tensor(Tensor sf) -> Tensor", _mn_major, _mn_major_fake)
_define("get_mn_major_tma_aligned_packed_ue8m0_tensor(Tensor sf) -> Tensor", _packed, _packed_fake)
_define(
    "pack_k_grouped_ue8m0(Tensor sf, Tensor grouped_layout, int[] blocks, int gran_k, int alignment) -> Tensor",
    pack_groups,
    _packed_groups_fake,
)
_define("unpack_ue8m0(Tensor sf, int k_blocks) -> Tensor", fp4.unpack_ue8m0, _unpack_fake)
