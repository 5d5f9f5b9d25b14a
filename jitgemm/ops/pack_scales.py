"""Scales packed as UE8M0, on checked tensors: by a kernel, on CPU tensors by the reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jitgemm.families.pack_scales import PACK_UE8M0, THREADS
from jitgemm.families.small_problem import SmallProblem
from jitgemm.ops.plain import Call, Gpu, on_gpu, plan_of, record_if_asked
from jitgemm.plan import raw_stream
from jitgemm.reference import layout as reference
from jitgemm.reference.quantize import ceil_div


def pack_planes(sf: Tensor) -> Tensor:
    """fp32 [mn, k_blocks] or [groups, mn, k_blocks] as int32 [.., mn, ceil(k_blocks / 4)], MN-major."""

    def make() -> Call:
        problem = SmallProblem.make("pack_ue8m0", grouped=False)
        record_if_asked(problem)
        if not on_gpu(sf):
            return reference.get_mn_major_tma_aligned_packed_ue8m0_tensor
        output = reference.empty_packed(sf)
        if not output.numel():
            return reference.empty_packed
        planes, mn, words = (1, *output.shape)[-3:]
        where = Gpu(sf, problem)
        stride_plane, stride_mn, stride_k = (0, *sf.stride())[-3:]
        output_stride_plane, _, output_stride_word = (0, *output.stride())[-3:]
        launch = where.launch(
            PACK_UE8M0,
            PACK_UE8M0.spec(where.arch, grouped=False),
            (planes * words, ceil_div(mn, THREADS)),
            stride_plane=stride_plane,
            stride_mn=stride_mn,
            stride_k=stride_k,
            output_stride_plane=output_stride_plane,
            output_stride_word=output_stride_word,
            mn=mn,
            k_blocks=sf.shape[-1],
            words=words,
            gran_k=0,
            alignment=0,
        )

        def call(sf: Tensor) -> Tensor:
            output = reference.empty_packed(sf)
            launch(raw_stream(where.ordinal), sf.data_ptr(), 0, output.data_ptr())
            return output

        return where.here(call)

    packed: Tensor = plan_of("pack_ue8m0", (sf,), (), make)(sf)
    return packed


def pack_groups(sf: Tensor, grouped_layout: Tensor, blocks: Sequence[int], gran_k: int, alignment: int) -> Tensor:
    """fp32 [sum of blocks, mn] as int32 [sum of ceil(blocks / 4), mn].

    Args:
        sf: scales of groups along K, one group after the other.
        grouped_layout: int32 [groups], contiguous: each group's k, or where it ends.
        blocks: how many scales each group has along K.
        gran_k: elements of K that share a scale.
        alignment: to whose multiples groups are padded, if the layout says where they end; else 0.
    """
    rows = tuple(blocks)

    def make() -> Call:
        problem = SmallProblem.make("pack_ue8m0", grouped=True)
        record_if_asked(problem)
        if not on_gpu(sf):
            return lambda sf, _: reference.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, rows)
        output = reference.empty_packed_groups(sf, rows)
        if not output.numel():
            return lambda sf, _: reference.empty_packed_groups(sf, rows)
        words, mn = output.shape
        where = Gpu(sf, problem)
        launch = where.launch(
            PACK_UE8M0,
            PACK_UE8M0.spec(where.arch, grouped=True),
            (len(rows), ceil_div(mn, THREADS)),
            stride_plane=0,
            stride_mn=sf.stride(1),
            stride_k=sf.stride(0),
            output_stride_plane=0,
            output_stride_word=output.stride(0),
            mn=mn,
            k_blocks=sf.shape[0],
            words=words,
            gran_k=gran_k,
            alignment=alignment,
        )

        def call(sf: Tensor, grouped_layout: Tensor) -> Tensor:
            output = reference.empty_packed_groups(sf, rows)
            launch(raw_stream(where.ordinal), sf.data_ptr(), grouped_layout.data_ptr(), output.data_ptr())
            return output

        return where.here(call)

    tensors, numbers = (sf, grouped_layout), (rows, gran_k, alignment)
    packed: Tensor = plan_of("pack_ue8m0 groups", tensors, numbers, make)(*tensors)
    return packed
