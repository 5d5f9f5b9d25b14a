"""Row-major scales to the MN-major, TMA-aligned layout that the GEMM kernels load."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from jitgemm.families.base import KernelSpec

TILE = 32
THREADS = 256


class TransposeScales:
    """One kernel per architecture: ``[groups, mn, k_blocks]`` fp32, any strides, to MN-major."""

    name = "transpose_scales"
    template = "transpose_scales.cu.jinja"

    def spec(self, arch: str) -> KernelSpec:
        """The spec of the kernel for ``arch``."""
        return KernelSpec.make(self.name, arch, {"tile": TILE, "threads": THREADS})

    def kernel_name(self, spec: KernelSpec) -> str:
        """Symbol of the kernel's entry.

        Without the prefix, in which profiles that are searched for ``gemm_``, as the peer's tests do, would find it.
        """
        return "transpose_scales"

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        """Values that the template names."""
        return {**dict(spec.constants), "kernel_name": self.kernel_name(spec)}

    def num_threads(self, spec: KernelSpec) -> int:
        """Threads of a block."""
        return int(spec["threads"])

    def smem_bytes(self, spec: KernelSpec) -> int:
        """Dynamic shared memory of a block: none, the tile is static."""
        return 0

    def describe(self, spec: KernelSpec) -> str:
        """One line for people."""
        return f"transpose_scales fp32 {spec['tile']}x{spec['tile']}"


FAMILY = TransposeScales()

# The template's `Params`: input, output, stride_group, stride_mn, stride_k, output_stride_group, mn, mn_aligned,
# k_blocks, padding.
_PARAMS = struct.Struct("<QQqqqqiiii")


def launch(shape: Sequence[int], strides: Sequence[int], source: int, destination: int, device: int) -> None:
    """Copy fp32 scales at ``source`` to ``destination``, MN-major with TMA-aligned rows, on torch's current stream.

    Args:
        shape: ``[mn, k_blocks]`` or ``[groups, mn, k_blocks]``, without zeros.
        strides: of the source, in elements.
        source: its address.
        destination: address of the copy, 16-byte aligned.
        device: ordinal of the current device.
    """
    from jitgemm import settings
    from jitgemm.driver import Arguments, Launch
    from jitgemm.kernel import load
    from jitgemm.plan import device_facts, raw_stream

    groups, mn, k_blocks = (1, *shape)[-3:]
    stride_group, stride_mn, stride_k = (0, *strides)[-3:]
    mn_aligned = -(-mn // 4) * 4
    kernel = load(FAMILY.spec(device_facts(device)[0].arch.name), device)
    arguments = Arguments(_PARAMS.size)
    params = _PARAMS.pack(
        source,
        destination,
        stride_group,
        stride_mn,
        stride_k,
        mn_aligned * k_blocks,
        mn,
        mn_aligned,
        k_blocks,
        0,
    )
    ctypes.memmove(arguments.address, params, len(params))
    grid = (-(-mn // TILE), -(-k_blocks // TILE), groups)
    pdl = settings.current().pdl
    Launch(kernel.handle, grid, kernel.num_threads, 0, device, pdl)(arguments, raw_stream(device))
