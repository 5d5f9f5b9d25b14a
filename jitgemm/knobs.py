"""Knobs of DeepGEMM that code written for it turns; here they only remember their values."""

from __future__ import annotations

from jitgemm.errors import SettingsError

_tc_util = 100
_deterministic = False


def set_tc_util(new_tc_util: int) -> None:
    """Accepted for the peer's callers, where it is the part of the tensor cores, in percent, that kernels may use.

    Raises:
        SettingsError: ``new_tc_util`` is not an integer from 0 to 100.
    """
    global _tc_util
    if not isinstance(new_tc_util, int) or isinstance(new_tc_util, bool) or not 0 <= new_tc_util <= 100:
        raise SettingsError(f"new_tc_util is {new_tc_util!r}; accepted is an integer from 0 to 100")
    _tc_util = new_tc_util


def get_tc_util() -> int:
    """What ``set_tc_util`` was given last; 100 before."""
    return _tc_util


def use_deterministic_algorithms(mode: bool) -> None:
    """Accepted for the peer's callers; kernels here give the same bits every time, whatever this says.

    Raises:
        SettingsError: ``mode`` is not a boolean.
    """
    global _deterministic
    if not isinstance(mode, bool):
        raise SettingsError(f"mode is {mode!r}; accepted is a boolean")
    _deterministic = mode


def get_deterministic_algorithms() -> bool:
    """What ``use_deterministic_algorithms`` was given last; False before."""
    return _deterministic


def set_ignore_compile_dims(new_value: bool) -> None:
    """Accepted for the peer's callers, where it makes sizes run-time values of kernels; here they always are.

    Raises:
        SettingsError: ``new_value`` is not a boolean.
    """
    if not isinstance(new_value, bool):
        raise SettingsError(f"new_value is {new_value!r}; accepted is a boolean")


def set_block_size_multiple_of(new_value: int | tuple[int, int]) -> None:
    """Accepted for the peer's callers, where it narrows the tiles of kernels; here ``override`` does (``tile_m=128``).

    Raises:
        SettingsError: ``new_value`` is neither a positive integer nor two of them, along m and n.
    """
    values = new_value if isinstance(new_value, (tuple, list)) else (new_value, new_value)
    if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
        raise SettingsError(f"new_value is {new_value!r}; accepted is a positive integer, or two of them")
