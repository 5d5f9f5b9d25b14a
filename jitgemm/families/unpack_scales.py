"""Packed UE8M0 scales to the fp32, MN-major, TMA-aligned layout that the GEMM kernels load."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from jitgemm.families.base import KernelSpec

THREADS = 128


class UnpackScales:
    """One kernel per architecture: ``[groups, mn, words]`` int32, any strides, to fp32 ``[groups, mn, k_blocks]``."""

    name = "unpack_scales"
    template = "unpack_scales.cu.jinja"

    def spec(self, arch: str) -> KernelSpec:
        """The spec of the kernel for ``arch``."""
        return KernelSpec.make(self.name, arch, {"threads": THREADS})

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry, without the prefix, as that of ``transpose_scales``."""
        return "unpack_scales"

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        return {**dict(spec.constants), "kernel_name": self.kernel_name(spec)}

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        return int(spec["threads"])

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block: none."""
        return 0

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        return f"unpack_scales ue8m0 {spec['threads']} threads"


FAMILY = UnpackScales()

# The template's `Params`: input, output, stride_group, stride_mn, stride_k, output_stride_group, mn, mn_aligned,
# k_blocks, padding.
_PARAMS = struct.Struct("<QQqqqqiiii")


def launch(
    shape: Sequence[int], strides: Sequence[int], k_blocks: int, source: int, destination: int, device: int
) -> None:
    """Write the scales that are packed at ``source`` to ``destination``, on torch's current stream.

    Args:
        shape: ``[mn, words]`` or ``[groups, mn, words]``, without zeros.
        strides: of the source, in words.
        k_blocks: scales of a row.
        source: its address.
        destination: address of the scales, MN-major with TMA-aligned rows.
        device: ordinal of the current device.
    """
    from jitgemm import settings
    from jitgemm.driver import Arguments, Launch
    from jitgemm.kernel import load
    from jitgemm.plan import device_facts, raw_stream

    groups, mn, words = (1, *shape)[-3:]
    stride_group, stride_mn, stride_k = (0, *strides)[-3:]
    mn_aligned = -(-mn // 4) * 4
    kernel = load(FAMILY.spec(device_facts(device)[0].arch.name), device)
    arguments = Arguments(_PARAMS.size)
    params = _PARAMS.pack(
        *(source, destination, stride_group, stride_mn, stride_k, mn_aligned * k_blocks),
        *(mn, mn_aligned, k_blocks, 0),
    )
    ctypes.memmove(arguments.address, params, len(params))
    grid = (-(-mn // THREADS), words, groups)
    pdl = settings.current().pdl
    Launch(kernel.handle, grid, kernel.num_threads, 0, device, pdl)(arguments, raw_stream(device))
