"""Every exception that jitgemm raises on purpose.

A message names the argument or variable, what it was, and what is accepted.
"""

from __future__ import annotations


class JitGemmError(Exception):
    """Root of jitgemm's own exceptions."""


class ProblemError(JitGemmError, ValueError):
    """The tensors or shapes of a call are not something jitgemm can compute."""


class SettingsError(JitGemmError, ValueError):
    """An environment variable or an override has a value that is not accepted."""


class ConfigError(JitGemmError):
    """No legal kernel configuration satisfies the problem and the overrides in force."""


class CompileError(JitGemmError):
    """NVRTC is missing or rejected a rendered kernel; carries NVRTC's whole log."""


class CacheError(JitGemmError):
    """The kernel cache cannot be used as asked."""


class CacheMissError(CacheError):
    """A kernel is not in the cache and compiling is forbidden (``JITGEMM_JIT=forbid``)."""


class DriverError(JitGemmError):
    """A CUDA driver call failed; carries the name and the text of the CUDA error."""
