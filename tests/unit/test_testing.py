"""jitgemm.testing, as far as it needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import environment

from jitgemm import testing
from jitgemm.testing import assert_bitwise_equal, bench_kineto, calc_diff, count_bytes, ignore_env


def test_calc_diff() -> None:
    x, y = torch.randn(30, 40), torch.randn(30, 40).bfloat16()
    exact = 1 - 2 * (x.double() * y.double()).sum() / (x.double().square() + y.double().square()).sum()
    assert calc_diff(x, y) == pytest.approx(exact.item(), rel=1e-12)
    assert calc_diff(x, x) == calc_diff(torch.zeros(3), torch.zeros(3)) == 0
    assert not calc_diff(torch.tensor([float("nan"), 1.0]), torch.ones(2)) < 1
    with pytest.raises(ValueError, match="actual has shape"):
        calc_diff(x, x[0])


def test_count_bytes() -> None:
    x, y = torch.ones(3, 5), torch.ones(7).bfloat16()
    assert count_bytes() == count_bytes(None) == 0
    assert count_bytes(x, None, (y, [x, y])) == 2 * 60 + 2 * 14
    assert count_bytes(x[:, ::2]) == 36


def test_bitwise_equality_sees_what_equality_does_not() -> None:
    x = torch.tensor([[1.0, float("nan")], [0.0, 2.0]])
    assert_bitwise_equal(x, x.clone())
    assert_bitwise_equal(x.T, x.T.contiguous())
    y = x.clone()
    y[1, 0] = -0.0
    with pytest.raises(AssertionError, match=r"1 of 4 elements \(D\) differ, first at \(1, 0\): 0.0 and -0.0"):
        assert_bitwise_equal(x, y, "D")
    with pytest.raises(AssertionError, match=r"tensors are torch.float32 \(2, 2\) and torch.bfloat16 \(2, 2\)"):
        assert_bitwise_equal(x, x.bfloat16())
    with pytest.raises(AssertionError, match=r"\(2, 2\) and torch.float32 \(4,\)"):
        assert_bitwise_equal(x, x.flatten())


def test_a_filter_is_asked_when_the_test_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runs, allowed = [], False

    @testing.test_filter(lambda: allowed)
    def check(value: int) -> None:
        runs.append(value)

    check(1)
    assert not runs and "check: left out by its filter" in capsys.readouterr().out
    allowed = True
    check(value=2)
    assert runs == [2] and check.__name__ == "check"


def test_an_environment_variable_is_away_while_a_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "x")
    seen, ignore = [], True

    @ignore_env("SOME_VARIABLE", lambda: ignore)
    def look(fail: bool = False) -> None:
        seen.append(os.environ.get("SOME_VARIABLE"))
        if fail:
            raise KeyError

    look()
    with pytest.raises(KeyError):
        look(fail=True)
    assert os.environ["SOME_VARIABLE"] == "x"
    ignore = False
    look()
    assert seen == [None, None, "x"]
    monkeypatch.delenv("SOME_VARIABLE")
    ignore = True
    look()
    assert "SOME_VARIABLE" not in os.environ


def test_output_of_c_libraries_is_discarded_and_comes_back() -> None:
    code = """
import os, sys
from jitgemm.testing import suppress_stdout_stderr
print("one")
try:
    with suppress_stdout_stderr():
        print("lost"); print("lost", file=sys.stderr); os.write(1, b"lost"); os.write(2, b"lost")
        raise KeyError
except KeyError:
    pass
print("two"); sys.stdout.flush(); os.write(1, b"three"); os.write(2, b"four")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout == "one\ntwo\nthree" and result.stderr == "four"


EVENTS = [
    ("jitgemm_fp8_gemm<64, 128>", 30.0, 3),
    ("nvjet_tst_128x64", 40.0, 2),
    ("nvjet_tst_64x64_splitK", 20.0, 4),
    ("x" * 90 + "far_gemm", 5.0, 1),
]


def test_times_of_kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(testing, "_profile", lambda *arguments: asked.append(arguments) or EVENTS)
    calls: list[int] = []

    def call() -> None:
        calls.append(1)

    assert bench_kineto(call, "fp8_gemm") == pytest.approx(10e-6)
    assert calls == [1] and asked == [(call, 30, None, True, None)]  # what the first call compiles is not profiled
    assert bench_kineto(call, ("fp8_gemm", "absent")) == (pytest.approx(10e-6), 0)
    with pytest.raises(AssertionError, match="'nvjet' is in the names of 2 kernels: nvjet_tst_128x64, nvjet_tst_64x64"):
        bench_kineto(call, "nvjet")
    assert bench_kineto(call, ("nvjet",), with_multiple_kernels=True) == (pytest.approx(10e-6),)
    assert bench_kineto(call, "far_gemm", suppress_kineto_output=True) == 0  # too far into the name
    monkeypatch.setenv("DG_USE_NVIDIA_TOOLS", "1")
    assert bench_kineto(call, "fp8_gemm") == 1 and bench_kineto(call, ("a", "b")) == (1, 1)
    monkeypatch.setenv("DG_USE_NVIDIA_TOOLS", "0")
    assert bench_kineto(call, "fp8_gemm") == pytest.approx(10e-6)
