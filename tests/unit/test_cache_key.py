from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
from support import SPEC, environment

from jitgemm import cache_key as module
from jitgemm.cache_key import cache_key
from jitgemm.families.base import KernelSpec, Scalar


def _spec(family: str = "gemm", arch: str = "sm_90a", **constants: Scalar) -> KernelSpec:
    return KernelSpec.make(family, arch, constants)


def test_a_key_is_64_hexadecimal_digits() -> None:
    assert re.fullmatch("[0-9a-f]{64}", cache_key(SPEC))


def test_order_of_constants_and_round_trips_do_not_matter() -> None:
    assert cache_key(_spec(a=1, b=2)) == cache_key(_spec(b=2, a=1))
    assert cache_key(KernelSpec.from_dict(SPEC.to_dict())) == cache_key(SPEC)


def test_whatever_differs_gives_another_key() -> None:
    specs = [
        _spec(a=1),
        _spec(a=2),
        _spec(a=True),
        _spec(a="1"),
        _spec(a="True"),
        _spec(b=1),
        _spec(a=1, b=1),
        _spec(a="1b1"),
        _spec(ab="c"),
        _spec(a="bc"),
        _spec(),
        _spec(arch="sm_90", a=1),
        _spec(family="gem", arch="msm_90a", a=1),
    ]
    keys = [cache_key(spec) for spec in specs]
    for (one, spec), (other, another) in itertools.combinations(zip(keys, specs, strict=True), 2):
        assert one != other, (spec, another)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SCHEMA", 999),
        ("template_digest", lambda: "another"),
        ("compile_options", lambda arch: (f"--gpu-architecture={arch}", "--use_fast_math")),
    ],
)
def test_schema_templates_and_options_are_in_the_key(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    before = cache_key(SPEC)
    monkeypatch.setattr(module, name, value)
    assert cache_key(SPEC) != before


def test_another_process_elsewhere_gives_the_same_key(tmp_path: object) -> None:
    code = "import support; from jitgemm.cache_key import cache_key; print(cache_key(support.SPEC))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(PYTHONHASHSEED="7", JITGEMM_NVRTC="/another/libnvrtc.so.12"),
        cwd=str(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == cache_key(SPEC)
