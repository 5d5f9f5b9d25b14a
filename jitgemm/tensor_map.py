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
_GroupedGeometry = ctypes.c_uint64 * 9  # three dimensions, two strides, and box and steps in 32 bits each


class OperandMap:
    """A 2-D operand as TMA sees it, for any base address; 3-D where it has groups, of which a box takes one.

    Args:
        dtype: ``uint8`` (FP8 too), ``bf16`` or ``fp32``.
        width: elements of the contiguous dimension.
        height: number of rows.
        stride: elements between rows; a multiple of 16 bytes.
        box_width: elements of a row that one copy takes.
        box_height: rows that one copy takes.
        swizzle: bytes of the swizzle's span (16 means none); a box row must not be wider.
        groups: number of such operands; 0 for one that has no third dimension.
        group_stride: elements between them; a multiple of 16 bytes.
    """

    __slots__ = ("_arguments", "_geometry", "_rank", "_type")
    _geometry: ctypes.Array[ctypes.c_uint64]

    def __init__(
        self,
        dtype: str,
        width: int,
        height: int,
        stride: int,
        box_width: int,
        box_height: int,
        swizzle: int,
        groups: int = 0,
        group_stride: int = 0,
    ) -> None:
        code, size = _TYPES[dtype]
        box, once = box_width | box_height << 32, 1 | 1 << 32
        if groups:
            strides = stride * size, group_stride * size
            self._geometry = _GroupedGeometry(width, height, groups, *strides, box, 1, once, 1)
            self._rank, offsets = 3, (0, 24, 40, 56)
        else:
            self._geometry = _Geometry(width, height, stride * size, box, once)
            self._rank, offsets = 2, (0, 16, 24, 32)
        at = ctypes.addressof(self._geometry)
        self._arguments = *(at + offset for offset in offsets), 0, _SWIZZLES[swizzle], _L2_PROMOTION_128B, 0
        self._type = code

    def write(self, target: int, address: int) -> None:
        """Put the map for a base address into memory at ``target``, which is aligned to 64 bytes.

        Raises:
            DriverError: the driver refuses the geometry or the address.
        """
        status = encode_tensor_map_function()(target, self._type, self._rank, address, *self._arguments)
        if status:
            numbers = list(self._geometry)
            sizes, strides, box = (
                numbers[: self._rank],
                numbers[self._rank : 2 * self._rank - 1],
                numbers[2 * self._rank - 1],
            )
            what = f"{'x'.join(map(str, sizes))}, strides {strides} bytes, box {box & 0xFFFFFFFF}x{box >> 32}"
            raise error_of(status, f"tensor map of {what} at {address:#x}")
