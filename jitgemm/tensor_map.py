"""TMA tensor maps: the geometry of an operand, encoded by the driver for an address."""

from __future__ import annotations

import ctypes

from jitgemm.driver import encode_tensor_map_function, error_of

BYTES = 128  # of one encoded map
ALIGNMENT = 16  # bytes, of base addresses and strides

_TYPES = {"uint8": (0, 1), "bf16": (9, 2), "fp32": (7, 4)}  # CUtensorMapDataType, bytes of an element
_SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle by the bytes of a box row
_L2_PROMOTION_128B = 2  # as fast as 256 or faster: the boxes are 128 bytes wide
_Geometry = ctypes.c_uint64 * 5  # two dimensions, stride in bytes, and pairs of 32 bits: box, steps through the box


class OperandMap:
    """A 2-D operand as TMA sees it, for any base address.

    Args:
        dtype: ``uint8`` (FP8 too), ``bf16`` or ``fp32``.
        width: elements of the contiguous dimension.
        height: number of rows.
        stride: elements between rows; a multiple of 16 bytes.
        box_width: elements of a row that one copy takes.
        box_height: rows that one copy takes.
        swizzle: bytes of the swizzle's span (16 means none); a box row must not be wider.
    """

    __slots__ = ("_arguments", "_geometry", "_type")

    def __init__(
        self, dtype: str, width: int, height: int, stride: int, box_width: int, box_height: int, swizzle: int
    ) -> None:
        code, size = _TYPES[dtype]
        geometry = self._geometry = _Geometry(width, height, stride * size, box_width | box_height << 32, 1 | 1 << 32)
        at = ctypes.addressof(geometry)
        self._arguments = at, at + 16, at + 24, at + 32, 0, _SWIZZLES[swizzle], _L2_PROMOTION_128B, 0
        self._type = code

    def write(self, target: int, address: int) -> None:
        """Put the map for a base address into memory at ``target``, which is aligned to 64 bytes.

        Raises:
            DriverError: the driver refuses the geometry or the address.
        """
        status = encode_tensor_map_function()(target, self._type, 2, address, *self._arguments)
        if status:
            width, height, stride, box, _ = self._geometry
            what = f"{width}x{height}, {stride} bytes between rows, box {box & 0xFFFFFFFF}x{box >> 32}"
            raise error_of(status, f"tensor map of {what} at {address:#x}")
