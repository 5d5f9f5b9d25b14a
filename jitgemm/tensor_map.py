"""TMA tensor maps: the geometry of an operand, encoded by the driver for one address."""

from __future__ import annotations

import ctypes

from jitgemm.driver import encode_tensor_map_function, error_of

BYTES = 128  # of one encoded map
ALIGNMENT = 16  # bytes, of base addresses and strides

_TYPES = {"uint8": (0, 1), "bf16": (9, 2), "fp32": (7, 4)}  # CUtensorMapDataType, bytes of an element
_SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle by the bytes of a box row
_L2_PROMOTION_128B = 2  # as fast as 256 or faster: the boxes are 128 bytes wide
_ADDRESSES = 1024  # encoded maps kept per operand


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

    def __init__(
        self, dtype: str, width: int, height: int, stride: int, box_width: int, box_height: int, swizzle: int
    ) -> None:
        code, size = _TYPES[dtype]
        self._code = code
        self._dims = (ctypes.c_uint64 * 2)(width, height)
        self._strides = (ctypes.c_uint64 * 1)(stride * size)
        self._box = (ctypes.c_uint32 * 2)(box_width, box_height)
        self._steps = (ctypes.c_uint32 * 2)(1, 1)
        self._swizzle = _SWIZZLES[swizzle]
        self._what = f"{width}x{height} {dtype}, row stride {stride}, box {box_width}x{box_height}"
        self._encoded: dict[int, bytes] = {}

    def encoded(self, address: int) -> bytes:
        """The map for a base address, from a bounded table.

        Raises:
            DriverError: the driver refuses the geometry or the address.
        """
        known = self._encoded.get(address)
        if known is not None:
            return known
        buffer = ctypes.create_string_buffer(2 * BYTES)
        aligned = -(-ctypes.addressof(buffer) // BYTES) * BYTES
        status = encode_tensor_map_function()(
            aligned, self._code, 2, address, ctypes.addressof(self._dims), ctypes.addressof(self._strides),
            ctypes.addressof(self._box), ctypes.addressof(self._steps), 0, self._swizzle, _L2_PROMOTION_128B, 0,
        )  # fmt: skip
        if status:
            raise error_of(status, f"tensor map of {self._what} at {address:#x}")
        encoded = ctypes.string_at(aligned, BYTES)
        if len(self._encoded) >= _ADDRESSES:
            self._encoded = {}  # replaced, not cleared: another thread may be reading it
        self._encoded[address] = encoded
        return encoded
