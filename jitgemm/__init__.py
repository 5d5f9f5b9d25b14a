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
    "align": "jitgemm.utils.math",
    "bf16_gemm_nn": "jitgemm.ops.gemm",
    "bf16_gemm_nt": "jitgemm.ops.gemm",
    "bf16_gemm_tn": "jitgemm.ops.gemm",
    "bf16_gemm_tt": "jitgemm.ops.gemm",
    "bf16_m_grouped_gemm_nt_masked": "jitgemm.ops.grouped",
    "cache_stats": "jitgemm.builder",
    "cast_back_from_fp4": "jitgemm.utils.math",
    "cast_back_from_fp8": "jitgemm.ops.quantize",
    "ceil_div": "jitgemm.utils.math",
    "ceil_to_ue8m0": "jitgemm.utils.math",
    "cublaslt_gemm_nn": "jitgemm.ops.cublas",
    "cublaslt_gemm_nt": "jitgemm.ops.cublas",
    "cublaslt_gemm_tn": "jitgemm.ops.cublas",
    "cublaslt_gemm_tt": "jitgemm.ops.cublas",
    "deinterleave_gate_up": "jitgemm.ops.layout",
    "einsum": "jitgemm.ops.batched",
    "empty_quantized": "jitgemm.ops.epilogue",
    "Epilogue": "jitgemm.ops.epilogue",
    "fp4_act_quant": "jitgemm.ops.rowwise",
    "fp8_einsum": "jitgemm.ops.batched",
    "fp8_fp4_gemm_nn": "jitgemm.ops.gemm",
    "fp8_fp4_gemm_nt": "jitgemm.ops.gemm",
    "fp8_fp4_gemm_tn": "jitgemm.ops.gemm",
    "fp8_fp4_gemm_tt": "jitgemm.ops.gemm",
    "fp8_gemm_nn": "jitgemm.ops.gemm",
    "fp8_gemm_nt": "jitgemm.ops.gemm",
    "fp8_gemm_nt_skip_head_mid": "jitgemm.ops.batched",
    "fp8_gemm_tn": "jitgemm.ops.gemm",
    "fp8_gemm_tt": "jitgemm.ops.gemm",
    "fp8_m_grouped_gemm_nt_masked": "jitgemm.ops.grouped",
    "get_deterministic_algorithms": "jitgemm.knobs",
    "get_hc_prenorm_num_splits": "jitgemm.ops.hyper_connections",
    "get_k_alignment_for_contiguous_layout": "jitgemm.utils.layout",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor": "jitgemm.ops.layout",
    "get_m_alignment_for_contiguous_layout": "jitgemm.utils.layout",
    "get_mk_alignment_for_contiguous_layout": "jitgemm.settings",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": "jitgemm.ops.layout",
    "get_mn_major_tma_aligned_tensor": "jitgemm.ops.layout",
    "get_num_sms": "jitgemm.plan",
    "get_pdl": "jitgemm.settings",
    "get_tc_util": "jitgemm.knobs",
    "get_theoretical_mk_alignment_for_contiguous_layout": "jitgemm.ops.layout",
    "get_tma_aligned_size": "jitgemm.ops.layout",
    "hc_head": "jitgemm.ops.hyper_connections",
    "hc_post": "jitgemm.ops.hyper_connections",
    "hc_pre": "jitgemm.ops.hyper_connections",
    "hc_split_sinkhorn": "jitgemm.ops.hyper_connections",
    "head_norm_rope": "jitgemm.ops.rowwise",
    "head_norm_rope_act_quant": "jitgemm.ops.rowwise",
    "int8_act_quant": "jitgemm.ops.rowwise",
    "interleave_gate_up": "jitgemm.ops.layout",
    "k_grouped_bf16_gemm_tn_contiguous": "jitgemm.ops.batched",
    "k_grouped_fp8_gemm_nt_contiguous": "jitgemm.ops.batched",
    "k_grouped_fp8_gemm_tn_contiguous": "jitgemm.ops.batched",
    "m_grouped_bf16_gemm_nn_contiguous": "jitgemm.ops.grouped",
    "m_grouped_bf16_gemm_nt_contiguous": "jitgemm.ops.grouped",
    "m_grouped_bf16_gemm_nt_masked": "jitgemm.ops.grouped",
    "m_grouped_fp8_fp4_gemm_nn_contiguous": "jitgemm.ops.grouped",
    "m_grouped_fp8_fp4_gemm_nt_contiguous": "jitgemm.ops.grouped",
    "m_grouped_fp8_fp4_gemm_nt_masked": "jitgemm.ops.grouped",
    "m_grouped_fp8_gemm_nn_contiguous": "jitgemm.ops.grouped",
    "m_grouped_fp8_gemm_nt_contiguous": "jitgemm.ops.grouped",
    "m_grouped_fp8_gemm_nt_masked": "jitgemm.ops.grouped",
    "moe_combine": "jitgemm.ops.moe",
    "moe_gate": "jitgemm.ops.moe",
    "moe_permutation": "jitgemm.ops.moe",
    "moe_permute": "jitgemm.ops.moe",
    "mxfp4_to_fp8": "jitgemm.ops.fp4",
    "nvfp4_act_quant": "jitgemm.ops.rowwise",
    "override": "jitgemm.settings",
    "pack_ue8m0_to_int": "jitgemm.utils.math",
    "per_block_cast_to_fp8": "jitgemm.ops.quantize",
    "per_channel_cast_to_fp8": "jitgemm.ops.quantize",
    "per_custom_dims_cast_to_fp8": "jitgemm.utils.math",
    "per_token_cast_to_fp4": "jitgemm.utils.math",
    "per_token_cast_to_fp8": "jitgemm.ops.quantize",
    "per_token_cast_to_int8": "jitgemm.ops.rowwise",
    "prepare_fp4_weights": "jitgemm.ops.fp4",
    "prewarm": "jitgemm.prewarming",
    "restore_fp4_weights": "jitgemm.ops.fp4",
    "rms_norm": "jitgemm.ops.rowwise",
    "rms_norm_act_quant": "jitgemm.ops.rowwise",
    "rms_norm_cast_to_int8": "jitgemm.ops.rowwise",
    "rope_cos_sin": "jitgemm.ops.rowwise",
    "set_block_size_multiple_of": "jitgemm.knobs",
    "set_ignore_compile_dims": "jitgemm.knobs",
    "set_mk_alignment_for_contiguous_layout": "jitgemm.settings",
    "set_num_sms": "jitgemm.plan",
    "set_pdl": "jitgemm.settings",
    "set_tc_util": "jitgemm.knobs",
    "shard_weights": "jitgemm.ops.layout",
    "stage_fp8": "jitgemm.ops.rowwise",
    "stage_nvfp4": "jitgemm.ops.rowwise",
    "swiglu": "jitgemm.ops.rowwise",
    "swiglu_act_quant": "jitgemm.ops.rowwise",
    "tf32_hc_prenorm_gemm": "jitgemm.ops.hyper_connections",
    "topk_gate": "jitgemm.ops.moe",
    "transform_sf_into_required_layout": "jitgemm.ops.layout",
    "transpose_packed_fp4": "jitgemm.utils.math",
    "tune": "jitgemm.tuning",
    "unpack_ue8m0_from_int": "jitgemm.utils.math",
    "use_deterministic_algorithms": "jitgemm.knobs",
    "MoePermutation": "jitgemm.ops.moe",
    "PreparedWeights": "jitgemm.ops.fp4",
    "JitGemmError": "jitgemm.errors",
    "ProblemError": "jitgemm.errors",
    "SettingsError": "jitgemm.errors",
    "ConfigError": "jitgemm.errors",
    "CompileError": "jitgemm.errors",
    "CacheError": "jitgemm.errors",
    "CacheMissError": "jitgemm.errors",
    "DriverError": "jitgemm.errors",
}
_SUBMODULES = ("testing", "utils")  # to be there, as in the peer, without an import of their own
__all__ = sorted({*_PUBLIC, *_SUBMODULES})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"jitgemm.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jitgemm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # the next access costs a dictionary look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_SUBMODULES})
