"""Code written for DeepGEMM 2.6.1 finds its functions here: names, and names, order and defaults of parameters.

What DeepGEMM does not have comes after its parameters, by keyword only.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import jitgemm
from jitgemm.device import H200
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.batched import BatchedProblem
from jitgemm.families.gemm import GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.families.small_problem import SmallProblem
from jitgemm.families.sum_parts import SUM_PARTS
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
from jitgemm.heuristics import enumerate_specs

RECIPES: dict[str, object] = {"recipe": None, "recipe_a": None, "recipe_b": None}
REQUIRED = inspect.Parameter.empty


def parameters(required: str, **optional: object) -> dict[str, object]:
    return {**dict.fromkeys(required.split(), REQUIRED), **optional}


FP8 = parameters("a b d", c=None, **RECIPES, compiled_dims="", disable_ue8m0_cast=False)
BF16 = parameters("a b d", c=None, compiled_dims="")
CUBLAS = parameters("a b d", c=None)
PADDED = {"use_psum_layout": False, "ensure_zero_padding": True}
EXPECTED = {"expected_m_for_psum_layout": None}
FP8_CONTIGUOUS = parameters("a b d grouped_layout", **RECIPES, compiled_dims="nk", disable_ue8m0_cast=False, **PADDED)
BF16_CONTIGUOUS = parameters("a b d grouped_layout", compiled_dims="nk", **PADDED)
FP8_MASKED = parameters("a b d masked_m expected_m", **RECIPES, compiled_dims="nk", disable_ue8m0_cast=False)
BF16_MASKED = parameters("a b d masked_m expected_m", compiled_dims="nk")
ALONG_K = "a b d ks grouped_layout"
FP8_ALONG_K = parameters(ALONG_K, c=None, recipe=(1, 1, 128), compiled_dims="mn", use_psum_layout=False)
BF16_ALONG_K = parameters(ALONG_K, c=None, compiled_dims="mn", use_psum_layout=False)

SIGNATURES: dict[str, dict[str, object]] = {
    **{f"{name}_gemm_{layout}": FP8 for name in ("fp8", "fp8_fp4") for layout in ("nt", "nn", "tn", "tt")},
    **{f"bf16_gemm_{layout}": BF16 for layout in ("nt", "nn", "tn", "tt")},
    **{f"cublaslt_gemm_{layout}": CUBLAS for layout in ("nt", "nn", "tn", "tt")},
    **{f"m_grouped_{name}_gemm_nt_contiguous": FP8_CONTIGUOUS | EXPECTED for name in ("fp8", "fp8_fp4")},
    **{f"m_grouped_{name}_gemm_nn_contiguous": FP8_CONTIGUOUS for name in ("fp8", "fp8_fp4")},
    **{f"m_grouped_{name}_gemm_nt_masked": FP8_MASKED for name in ("fp8", "fp8_fp4")},
    "fp8_m_grouped_gemm_nt_masked": FP8_MASKED,
    "m_grouped_bf16_gemm_nt_contiguous": BF16_CONTIGUOUS | EXPECTED,
    "m_grouped_bf16_gemm_nn_contiguous": BF16_CONTIGUOUS,
    "m_grouped_bf16_gemm_nt_masked": BF16_MASKED,
    "bf16_m_grouped_gemm_nt_masked": BF16_MASKED,
    "k_grouped_fp8_gemm_nt_contiguous": FP8_ALONG_K,
    "k_grouped_fp8_gemm_tn_contiguous": FP8_ALONG_K,
    "k_grouped_bf16_gemm_tn_contiguous": BF16_ALONG_K,
    "einsum": parameters("expr a b d", c=None, use_cublaslt=False),
    "fp8_einsum": parameters("expr a b d", c=None, recipe=(1, 128, 128)),
    "fp8_gemm_nt_skip_head_mid": parameters(
        "a b d head_splits", recipe=None, compiled_dims="nk", disable_ue8m0_cast=False
    ),
    "tf32_hc_prenorm_gemm": parameters("a b d sqr_sum", num_splits=None),
    "get_mn_major_tma_aligned_tensor": parameters("sf"),
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": parameters("sf"),
    "get_tma_aligned_size": parameters("mn element_size"),
    "get_num_sms": {},
    "get_tc_util": {},
    "get_pdl": {},
    "get_mk_alignment_for_contiguous_layout": {},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_are_the_peer_s(name: str) -> None:
    function: Any = getattr(jitgemm, name)
    own = inspect.Parameter.KEYWORD_ONLY
    found = {key: value.default for key, value in inspect.signature(function).parameters.items() if value.kind != own}
    assert list(found.items()) == list(SIGNATURES[name].items())
    assert name in jitgemm.__all__


@pytest.mark.parametrize(
    "name", ["set_num_sms", "set_tc_util", "set_pdl", "set_ignore_compile_dims", "set_block_size_multiple_of"]
)
def test_what_is_set_is_the_one_argument(name: str) -> None:
    """By position: there the parameter has no name."""
    assert len(inspect.signature(getattr(jitgemm, name)).parameters) == 1 and name in jitgemm.__all__


def test_numbers_of_rows_may_be_numpy_s() -> None:
    a, b = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 32, 64).bfloat16()
    counts, results = torch.tensor([3, 8], dtype=torch.int32), [torch.zeros(2, 8, 32) for _ in range(2)]
    for d, expected_m in zip(results, (5, np.int64(5)), strict=True):
        jitgemm.m_grouped_bf16_gemm_nt_masked(a, b, d, counts, expected_m)
    assert torch.equal(*results) and results[0].any()


FP8_RECIPE, ROW_RECIPE = "fp8_1x128_128x128", "fp8_1x128_1x128"
NAMES: dict[str, list[Any]] = {
    "fp8_gemm": [
        GemmProblem(256, 512, FP8_RECIPE),
        GemmProblem(256, 512, ROW_RECIPE, d_dtype="fp32"),
        *(GroupedProblem(256, 512, FP8_RECIPE, 4, kind) for kind in ("masked", "contiguous", "psum")),
        BatchedProblem(256, 512, FP8_RECIPE, 8),
        BatchedProblem(256, 512, ROW_RECIPE, 8, "k_grouped", d_dtype="fp32"),
    ],
    "bf16_gemm": [
        *(GemmProblem(256, 512, "bf16", layout=layout) for layout in ("nt", "nn", "tn", "tt")),
        *(GroupedProblem(256, 512, "bf16", 4, kind) for kind in ("masked", "contiguous", "psum")),
        BatchedProblem(256, 512, "bf16", 8),
        BatchedProblem(256, 512, "bf16", 8, "k_grouped", layout="tn", d_dtype="fp32"),
    ],
    "bmn_bnk_mn_gemm_impl": [BatchedProblem(256, 512, "bf16", 8, "batch_sum", d_dtype="fp32")],
    "tf32_hc_prenorm_gemm": [SmallProblem.make("hc_prenorm_gemm", n=24, precision="tf32")],
    "pack_fp32_into_ue8m0": [SmallProblem.make("pack_ue8m0", grouped=grouped) for grouped in (False, True)],
}


def name_of(spec: KernelSpec) -> str:
    return family_of(spec).kernel_name(spec)


@pytest.mark.parametrize("searched", NAMES)
def test_profiles_show_kernels_by_the_peer_s_names(searched: str) -> None:
    for problem in NAMES[searched]:
        specs = enumerate_specs(problem, H200)
        # With a GEMM, scales may be transposed, or parts added up; what is searched for is in one of the names only.
        names = {name_of(spec) for spec in specs if family_of(spec) not in (TRANSPOSE_SCALES, SUM_PARTS)}
        assert names and all(searched in name for name in names), problem
    assert "transpose" in name_of(TRANSPOSE_SCALES.spec("sm_90a"))
    assert "gemm" not in name_of(TRANSPOSE_SCALES.spec("sm_90a"))
    assert name_of(SUM_PARTS.spec("sm_90a", d_dtype="bf16")) == "jitgemm_sum_parts"
