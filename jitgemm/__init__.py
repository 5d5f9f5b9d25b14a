"""jitgemm: GEMM kernels for large language models, generated, compiled and cached at run time.

Importing this package loads neither torch nor CUDA; each public name is imported at first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout, heuristics/, templates/ and cache_tools/ lie beside this folder, not in it.
_package = Path(__file__).resolve().parent
if not (_package / "heuristics").is_dir() and (_package.parent / "heuristics").is_dir():
    __path__.append(str(_package.parent))

_PUBLIC = {
    "act_quant": "jitgemm.ops.rowwise",
    "add_hook": "jitgemm.hooks",
    "bf16_gemm_nn": "jitgemm.ops.gemm",
    "bf16_gemm_nt": "jitgemm.ops.gemm",
    "bf16_gemm_tn": "jitgemm.ops.gemm",
    "bf16_gemm_tt": "jitgemm.ops.gemm",
    "cache_stats": "jitgemm.builder",
    "cast_back_from_fp8": "jitgemm.ops.quantize",
    "fp4_act_quant": "jitgemm.ops.rowwise",
    "fp8_gemm_nt": "jitgemm.ops.gemm",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": "jitgemm.ops.layout",
    "get_mn_major_tma_aligned_tensor": "jitgemm.ops.layout",
    "get_num_sms": "jitgemm.plan",
    "get_pdl": "jitgemm.settings",
    "get_tma_aligned_size": "jitgemm.ops.layout",
    "head_norm_rope": "jitgemm.ops.rowwise",
    "head_norm_rope_act_quant": "jitgemm.ops.rowwise",
    "int8_act_quant": "jitgemm.ops.rowwise",
    "nvfp4_act_quant": "jitgemm.ops.rowwise",
    "override": "jitgemm.settings",
    "per_block_cast_to_fp8": "jitgemm.ops.quantize",
    "per_channel_cast_to_fp8": "jitgemm.ops.quantize",
    "per_token_cast_to_fp8": "jitgemm.ops.quantize",
    "prewarm": "jitgemm.prewarming",
    "rms_norm": "jitgemm.ops.rowwise",
    "rms_norm_act_quant": "jitgemm.ops.rowwise",
    "rope_cos_sin": "jitgemm.ops.rowwise",
    "set_num_sms": "jitgemm.plan",
    "set_pdl": "jitgemm.settings",
    "stage_fp8": "jitgemm.ops.rowwise",
    "stage_nvfp4": "jitgemm.ops.rowwise",
    "swiglu": "jitgemm.ops.rowwise",
    "swiglu_act_quant": "jitgemm.ops.rowwise",
    "tune": "jitgemm.tuning",
    "JitGemmError": "jitgemm.errors",
    "ProblemError": "jitgemm.errors",
    "SettingsError": "jitgemm.errors",
    "ConfigError": "jitgemm.errors",
    "CompileError": "jitgemm.errors",
    "CacheError": "jitgemm.errors",
    "CacheMissError": "jitgemm.errors",
    "DriverError": "jitgemm.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jitgemm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # the next access costs a dictionary look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
