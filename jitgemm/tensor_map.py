"""TMA tensor maps: the geometry of an operand, encoded by the driver for an address."""

from __future__ import annotations

import ctypes
import functools
import struct

from jitgemm.driver import encode_tensor_map_function, error_of, replace_tensor_map_address_function

BYTES = 128  # of one encoded map
ALIGNMENT = 16  # bytes, of base addresses and strides

_TYPES = {"uint8": (0, 1), "bf16": (9, 2), "fp32": (7, 4)}  # CUtensorMapDataType, bytes of an element
_SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle by the bytes of a box row
_L2_PROMOTION_128B = 2  # as fast as 256 or faster: the boxes are 128 bytes wide
_GEOMETRY = struct.Struct("<2Q Q 2I 2I")  # dimensions, stride in bytes, box, steps through the box


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

    __slots__ = ("_arguments", "_encoded")

    def __init__(
        self, dtype: str, width: int, height: int, stride: int, box_width: int, box_height: int, swizzle: int
    ) -> None:
        self._arguments = (dtype, width, height, stride, box_width, box_height, swizzle)
        self._encoded: bytes | None = None  # for the first address; another address is put into a copy

    def write(self, target: int, address: int) -> None:
        """Put the map for a base address into memory at ``target``, which is aligned to 64 bytes.

        Raises:
            DriverError: the driver refuses the geometry or the address.
        """
        if self._encoded is None:
            self._encode(target, address)
            self._encoded = ctypes.string_at(target, BYTES)
        else:
            ctypes.memmove(target, self._encoded, BYTES)
            replace_address(target, address)

    def _encode(self, target: int, address: int) -> None:
        dtype, width, height, stride, box_width, box_height, swizzle = self._arguments
        code, size = _TYPES[dtype]
        numbers = ctypes.create_string_buffer(
            _GEOMETRY.pack(width, height, stride * size, box_width, box_height, 1, 1), _GEOMETRY.size
        )
        at = ctypes.addressof(numbers)
        status = encode_tensor_map_function()(
            target, code, 2, address, at, at + 16, at + 24, at + 32, 0, _SWIZZLES[swizzle], _L2_PROMOTION_128B, 0
        )
        if status:
            what = f"{width}x{height} {dtype}, row stride {stride}, box {box_width}x{box_height}"
            raise error_of(status, f"tensor map of {what} at {address:#x}")


operand_map = functools.lru_cache(maxsize=4096)(OperandMap)
"""The ``OperandMap`` of some arguments, from a bounded table: calls that differ in m share that of the weights."""


def replace_address(target: int, address: int) -> None:
    """Change the base address of the encoded map at ``target``.

    Raises:
        DriverError: the driver refuses the address.
    """
    status = replace_tensor_map_address_function()(target, address)
    if status:
        raise error_of(status, f"address {address:#x} of a tensor map")
