"""Row-major scales to the MN-major, TMA-aligned layout that the GEMM kernels load."""

from __future__ import annotations

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
        """Symbol of the kernel's entry."""
        return "jitgemm_transpose_scales"

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
