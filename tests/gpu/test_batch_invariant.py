"""A row's bits do not depend on how many rows there are beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_gemm_on_gpu import DEVICE, DTYPES, KINDS, Kind, kind_name

import jitgemm
from benchmarks.operands import poisoned, quantize, random_matrix, same_bits
from jitgemm import settings
from jitgemm.families.gemm import GemmProblem
from jitgemm.heuristics import choose_config, enumerate_configs
from jitgemm.plan import device_facts
from jitgemm.reference.gemm import check_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MS = (1, 7, 16, 64, 100, 128, 512, 2048)
LAYERS = ((576, 7168), (2112, 2048), (4096, 512), (256, 8192), (1000, 1168))


@pytest.fixture
def batch_invariant() -> Iterator[None]:
    with settings.override(batch_invariant=True):
        yield


class Rows:
    """Operands with as many rows as there can be, of which calls take the first ones."""

    def __init__(self, kind: Kind, n: int, k: int, seed: int) -> None:
        self.recipe, self.layout, self.fast_accum = kind
        generator = torch.Generator(DEVICE).manual_seed(seed)
        a, b = (random_matrix(rows, k, generator, spread=True) for rows in (max(MS), n))
        self.whole = quantize(self.recipe, a, b)
        self.n = n

    def call(self, m: int, d_dtype: str) -> torch.Tensor:
        x, d = self.whole, poisoned((m, self.n), DTYPES[d_dtype], DEVICE)
        a, b = x.a[:m], x.b
        if x.a_scales is None:
            getattr(jitgemm, f"bf16_gemm_{self.layout}")(a, b if self.layout[1] == "t" else b.t().contiguous(), d)
        else:
            a_scales = x.a_scales if x.a_scales.numel() == 1 else x.a_scales[:m]
            jitgemm.fp8_gemm_nt((a, a_scales), (b, x.b_scales), d, recipe=x.recipe, fast_accum=self.fast_accum)
        return d


@pytest.mark.parametrize("d_dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1][0] == "n"], ids=kind_name)
@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_first_rows_have_the_same_bits(batch_invariant: None, kind: Kind, n: int, k: int, d_dtype: str) -> None:
    rows = Rows(kind, n, k, seed=n + k)
    results = {m: rows.call(m, d_dtype) for m in MS}
    largest = results[max(MS)]
    if not rows.fast_accum:
        check_close(largest, rows.whole.product(d_dtype), recipe=rows.recipe, d_dtype=d_dtype)
    for m, d in results.items():
        assert same_bits(d, largest[:m]), f"m = {m} differs from m = {max(MS)}"


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_every_config_of_the_mode_gives_the_same_bits(batch_invariant: None, kind: Kind) -> None:
    """Whatever m chooses among them: each is forced, at the same m."""
    recipe, layout, fast_accum = kind
    n, k, m = 576, 2048, 128
    problem = GemmProblem(n, k, recipe, m, layout, "fp32", fast_accum)
    configs = enumerate_configs(problem, device_facts(0)[0])
    assert len({config.split_k for config in configs}) == 1
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = quantize(recipe, *(random_matrix(count, k, generator, spread=True) for count in (m, n)))
    results = []
    for config in configs:
        d = poisoned((m, n), torch.float32, DEVICE)
        with settings.override(config=str(config)):
            if x.a_scales is None:
                a = x.a if layout[0] == "n" else x.a.t().contiguous()
                b = x.b if layout[1] == "t" else x.b.t().contiguous()
                getattr(jitgemm, f"bf16_gemm_{layout}")(a, b, d)
            else:
                jitgemm.fp8_gemm_nt((x.a, x.a_scales), (x.b, x.b_scales), d, recipe=recipe, fast_accum=fast_accum)
        results.append(d)
    for config, d in zip(configs, results, strict=True):
        assert same_bits(d, results[0]), f"{config} differs from {configs[0]}"


def test_without_the_mode_there_is_something_to_fix() -> None:
    """Of this problem, different m get different splits of K."""
    device = device_facts(0)[0]
    problem = GemmProblem(576, 7168, "fp8_1x128_128x128")
    assert len({choose_config(problem.with_m(m), device).split_k for m in MS}) > 1
