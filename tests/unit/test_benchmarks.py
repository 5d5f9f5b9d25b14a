"""The parts of the benchmarks that need no GPU: shapes, floors, races with a made-up clock, tables, CSV, options."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import jitgemm
from benchmarks import chain, dense, first_call, harness, host_time, numerics
from benchmarks.harness import EMPTY, CsvLog, Timing, race
from benchmarks.operands import Embedded, lay_out_scales, poisoned, quantize, random_matrix, same_bits, sample_rows
from benchmarks.shapes import (
    LAYERS,
    MS,
    OTHER_LAYERS,
    OTHER_MS,
    Case,
    Shape,
    chain_floor_us,
    dense_cases,
    dense_shapes,
    floor_us,
    ragged_cases,
)
from jitgemm.families.gemm import RECIPES, GemmProblem
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES

CPU = torch.device("cpu")


# m, n, k, floors of FP8 and BF16 as they were published with the measured anchors
@pytest.mark.parametrize(
    ("shape", "fp8", "bf16"),
    [
        (Shape(1, 2112, 7168), 8.3, 11.8),
        (Shape(64, 24576, 1536), 14.3, 23.1),
        (Shape(128, 7168, 16384), 33.0, 60.8),
        (Shape(512, 2112, 7168), 12.7, 20.8),
    ],
)
def test_floor(shape: Shape, fp8: float, bf16: float) -> None:
    assert floor_us(shape, 1) == pytest.approx(fp8, abs=0.051)
    assert floor_us(shape, 2) == pytest.approx(bf16, abs=0.051)


def test_floor_of_a_chain_has_one_start() -> None:
    stream, compute = Shape(1, 576, 7168), Shape(4096, 4096, 7168)
    assert chain_floor_us([stream], 1) == floor_us(stream, 1)
    assert chain_floor_us([stream] * 8, 1) - 4.8 == pytest.approx(8 * (floor_us(stream, 1) - 4.8))
    assert chain_floor_us([compute] * 2, 2) - 3.6 == pytest.approx(2 * (floor_us(compute, 2) - 3.6))


def test_dense_shapes_are_56_and_every_recipe_runs_on_each() -> None:
    shapes = dense_shapes()
    assert len(set(shapes)) == 56
    cases = dense_cases(shapes)
    assert {case.recipe for case in cases} == set(RECIPES)
    assert len({(case.shape, case.kind) for case in cases}) == len(cases) == 56 * 7 * 2
    assert all(case.sampled == (case.shape.m > 512) for case in cases)


def test_ragged_cases_cover_what_the_api_has() -> None:
    cases = ragged_cases(240, seed=3)
    assert cases == ragged_cases(240, seed=3)
    assert cases != ragged_cases(240, seed=4)
    assert len({(case.kind, case.c) for case in cases}) == 10 * 2 * 3
    assert {case.scales for case in cases} == {"row_major", "mn_major", "mn_major_shifted", "strided"}
    for size, largest in (("m", 4097), ("n", 4200), ("k", 5000)):
        sizes = [getattr(case.shape, size) for case in cases]
        assert min(sizes) >= 1
        assert max(sizes) <= largest
        assert sum(size % 128 != 0 for size in sizes) > 120
    for case in cases:
        assert case.problem == GemmProblem.from_dict(case.problem.to_dict())
        unit = 16 // RECIPES[case.recipe].operand_bytes
        assert case.a_margin[0] % unit == case.b_margin[0] % unit == 0


# -- The harness.


class FakeTimer:
    """A clock that says what the calls return."""

    def __init__(self) -> None:
        self.order: list[float] = []

    def __call__(self, call: Callable[[], object]) -> float:
        value = call()
        assert isinstance(value, float)
        self.order.append(value)
        return value

    def empty(self) -> float:
        return 3.5

    def check(self) -> None:
        pass


def test_race_interleaves_and_takes_medians() -> None:
    timer, noisy = FakeTimer(), iter([9.0] * 5 + [1.0, 50.0, 2.0])
    result = race({"a": lambda: next(noisy), "b": lambda: 30.0}, samples=3, timer=timer)
    assert result == {EMPTY: Timing(3.5, 3), "a": Timing(2.0, 3), "b": Timing(30.0, 3)}
    assert timer.order[-9:] == [3.5, 1.0, 30.0, 3.5, 50.0, 30.0, 3.5, 2.0, 30.0]


@pytest.mark.parametrize(("us", "samples"), [(19.0, 100), (21.0, 30)])
def test_race_takes_more_samples_of_short_calls(us: float, samples: int) -> None:
    assert race({"a": lambda: us, "b": lambda: 500.0}, timer=FakeTimer())["b"].samples == samples


def test_race_records_who_raises_and_goes_on() -> None:
    def refuse() -> float:
        raise ValueError("scales\nof the wrong kind")

    tired = iter([1.0] * 7)
    result = race({"a": refuse, "b": lambda: 5.0, "c": lambda: next(tired)}, samples=4, timer=FakeTimer())
    assert result["a"] == Timing(None, 0, "ValueError: scales")
    assert result["b"] == Timing(5.0, 4)
    assert result["c"].median_us is None
    assert (result["c"].error or "").startswith("StopIteration")


def test_race_ends_where_the_gpu_is_lost() -> None:
    class Lost(FakeTimer):
        def check(self) -> None:
            raise RuntimeError("CUDA error")

    def fail() -> float:
        raise ValueError

    with pytest.raises(RuntimeError, match="CUDA error"):
        race({"a": fail}, samples=1, timer=Lost())


def test_host_time_measures_and_records_errors() -> None:
    def fail(_: int) -> None:
        raise TypeError("no")

    calls: list[int] = []
    contenders = {
        "a": host_time.Contender(calls.append, [(1,), (2,), (3,)]),
        "b": host_time.Contender(fail, [(1,)]),
    }
    result = host_time.measure(contenders, batch=4, batches=2, synchronize=lambda: None)
    assert calls == [1, 2, 3, *[1, 2, 3], *[1, 2, 3, 1], *[2, 3, 1, 2]]
    assert result["a"].median_us is not None
    assert result["a"].median_us > 0
    assert result["b"] == Timing(None, 0, "TypeError: no")


def test_kernels_of_a_problem() -> None:
    problem = GemmProblem(n=576, k=7168, recipe="fp8_1x128_128x128")
    every = harness.kernels_of(problem, "h200")
    for m in (1, 500):
        kernels = harness.kernels_of(problem.with_m(m), "h200")
        assert kernels[-1] == TRANSPOSE_SCALES.spec("sm_90a")
        assert len(kernels) == 2
        assert set(kernels) <= set(every)
    assert len(harness.kernels_of(GemmProblem(n=576, k=7168, recipe="bf16", m=1), "h200")) == 1


# -- Tables and CSV.


def make_rows() -> list[dict[str, object]]:
    shapes = [Shape(64, 576, 7168), Shape(512, 576, 7168), Shape(4096, 576, 7168)]
    medians = [
        {"jitgemm": 10.0, "deepgemm": 9.0, "cublaslt_rowwise": 20.0, EMPTY: 3.5},
        {"jitgemm": 10.0, "deepgemm": 30.0, "cublaslt_rowwise": 20.0, EMPTY: 3.5},
        {"deepgemm": 30.0, EMPTY: 3.5},
    ]
    errors = [{}, {"cublaslt_blockwise": "RuntimeError: no; never"}, {"jitgemm": "ArithmeticError: wrong result"}]
    rows = [
        dense.make_row("fp8", shape, "64x64x128", median, error, 30)
        for shape, median, error in zip(shapes, medians, errors, strict=True)
    ]
    return [{**row, "measured": "on a Tuesday"} for row in rows]


def test_dense_rows() -> None:
    rows = make_rows()
    assert [row["best_peer"] for row in rows] == ["deepgemm", "cublaslt_rowwise", "deepgemm"]
    assert [row["ratio"] for row in rows] == [0.9, 2.0, None]
    assert all(tuple(row) == dense.COLUMNS for row in rows)
    assert dense.faults(rows) == [
        "cublaslt_blockwise: RuntimeError: no; never [1 shapes, first fp8_1x128_128x128/512x576x7168]",
        "jitgemm: ArithmeticError: wrong result [1 shapes, first fp8_1x128_128x128/4096x576x7168]",
    ]
    assert "ratio -" in dense.progress(rows[2])


class OneCall(FakeTimer):
    """A clock that makes each call and finds it takes 25 us."""

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        return 25.0


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_dense_runs_its_contenders(recipe: str) -> None:
    row = dense.run_shape(recipe, dense.Inputs(Shape(32, 256, 512), device="cpu"), "h200", 2, OneCall())
    assert row["ours_us"] == 25.0
    assert row["config"]
    if recipe == "bf16":
        assert (row["best_peer"], row["ratio"]) == ("cublas", 1.0)


def test_dense_times_no_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(recipe: str, inputs: dense.Inputs) -> dense.Contender:
        right = dense._cublas(recipe, inputs)
        return dense.Contender(lambda: right.d.zero_(), right.operands, right.d)

    monkeypatch.setitem(dense.MAKERS, "jitgemm", wrong)
    row = dense.run_shape("bf16", dense.Inputs(Shape(32, 256, 512), device="cpu"), "h200", 2, OneCall())
    assert row["ours_us"] is None
    assert "jitgemm: ArithmeticError: wrong result: cosine 1" in row["errors"]


def test_host_time_runs_its_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "MANY_SETS", 3)
    monkeypatch.setattr(host_time, "FEW_SETS", 2)
    monkeypatch.setattr(host_time, "ACTIVATIONS", 4)
    found = host_time.contenders(Shape(4, 16, 32), device="cpu")
    running = {name: contender for name, contender in found.items() if isinstance(contender, host_time.Contender)}
    timings = host_time.measure(running, 2, 1, lambda: None)
    ours = [timing for name, timing in timings.items() if name.startswith(("jitgemm", host_time.MATMUL))]
    assert len(ours) == 11
    assert all(timing.error is None for timing in ours), timings


def test_host_time_of_new_m(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "NEW_M", 20)
    sets = host_time.new_m_sets(Shape(4, 16, 32), "bf16", device="cpu")
    assert list(sets) == list(range(1, 21))
    called: list[int] = []
    timing = host_time.measure_new_m(lambda a, b, d: called.append(len(a)), sets, lambda: None)
    assert timing.samples == 9
    assert sorted(called) == list(sets)
    assert called[-9:] == [3, 5, 7, 9, 11, 13, 15, 17, 19]
    refused = host_time.measure_new_m(jitgemm.bf16_gemm_nt, {1: (1, 2, 3)}, lambda: None)
    assert refused.median_us is None
    assert "ProblemError" in (refused.error or "")


def test_csv_keeps_each_row_at_once(tmp_path: Path) -> None:
    path = tmp_path / "dense.csv"
    with CsvLog(path, dense.COLUMNS) as log:
        for count, row in enumerate(make_rows(), start=1):
            log.write(row)
            assert len(path.read_text().splitlines()) == 1 + count
    read = list(csv.DictReader(path.open()))
    assert list(read[0])[:11] == (
        ["case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"]
    )
    assert (read[0]["case"], read[0]["ratio"], read[2]["ours_us"]) == ("fp8_1x128_128x128/64x576x7168", "0.9", "")
    with CsvLog(None, dense.COLUMNS) as log:
        log.write(make_rows()[0])


def test_first_call_rows() -> None:
    assert first_call.Measurement("x", 0.5, (0.1, 0.4, 0.9)).row() == ("x", 0.4, 0.5, "yes", 0.1, 0.9, "")
    assert first_call.Measurement("x", 0.3, (0.4,)).row()[3] == "NO"
    assert first_call.Measurement("x", 0.3, error="why").row() == ("x", None, 0.3, "", None, None, "why")


def test_first_call_measures_processes(tmp_path: Path) -> None:
    assert 0 < first_call.snippet(first_call.IMPORT, tmp_path) < 5
    with pytest.raises(first_call.ChildError, match="exit code 1: ValueError: why"):
        first_call.snippet("raise ValueError('why')", tmp_path)
    failed = first_call.measure("x", 1.0, 2, lambda: first_call.snippet("1 / 0", tmp_path))
    assert "ZeroDivisionError" in failed.error


@pytest.mark.parametrize(("recipe", "function"), [("bf16", "bf16_gemm_nt"), ("fp8_1x128_128x128", "fp8_gemm_nt")])
def test_first_call_code(recipe: str, function: str, tmp_path: Path) -> None:
    code = first_call.FIRST_CALL.format(library="jitgemm", function=function, recipe=recipe)
    on_cpu = code.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "").replace("7168", "16")
    assert 0 < first_call.snippet(on_cpu, tmp_path) < 60


# -- Operands.


def test_embedded_tells_what_was_touched() -> None:
    d = Embedded((3, 5), torch.bfloat16, CPU, (2, 1), unit=8)
    assert d.view.stride() == (8, 1)
    assert not d.view.isfinite().any()
    x = torch.arange(15, dtype=torch.bfloat16).reshape(3, 5)
    assert same_bits(d.fill(x), x)
    assert d.intact()
    d.view.as_strided((1,), (1,), d.view.storage_offset() + 5).zero_()
    assert not d.intact()


@pytest.mark.parametrize("how", ["row_major", "mn_major", "mn_major_shifted", "strided"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (5, 3), (1, 3), (1,)])
def test_scales_keep_their_values(how: str, shape: tuple[int, ...]) -> None:
    scales = torch.rand(shape)
    laid_out = lay_out_scales(scales, how)
    assert torch.equal(laid_out, scales)
    if how == "mn_major" and shape == (5, 3):
        assert laid_out.stride() == (1, 8)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_sampled_rows_of_the_product(recipe: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = random_matrix(40, 200, generator, spread=True), random_matrix(30, 200, generator)
    operands = quantize(recipe, a, b)
    c = random_matrix(40, 30, generator)
    rows = sample_rows(40, generator, count=4, last=3)
    assert rows[-3:].tolist() == [37, 38, 39]
    assert torch.equal(operands.product("fp32", rows, c), operands.product("fp32", None, c)[rows])
    exact = a.double() @ b.double().t() + c.double()
    assert (operands.product("fp32", None, c).double() - exact).norm() < 0.1 * exact.norm()


# -- Numerics: the check itself, with the reference in place of the kernels.


@pytest.mark.parametrize(
    "case", [case for case in ragged_cases(240) if case.shape.m * case.shape.n < 20_000][:40], ids=str
)
def test_numerics_passes_what_is_right(case: Case) -> None:
    outcome = numerics.check(case, CPU)
    assert outcome.failures == []
    assert outcome.errors == (0, 0)


def test_numerics_samples_rows_of_tall_results() -> None:
    case = Case(Shape(600, 64, 128), "fp8_1x128_128x128", sampled=True)
    assert numerics.Call(case, CPU).expected().shape[0] < 500
    assert numerics.check(case, CPU).failures == []


def _unwritten(d: Embedded) -> None:
    d.view[100, 7] = float("nan")


def _wrong_row(d: Embedded) -> None:
    d.view[511] = 0


def _outside(d: Embedded) -> None:
    d.view.as_strided((1,), (1,), d.view.storage_offset() - 1).zero_()


@pytest.mark.parametrize(
    ("fault", "message"),
    [(_unwritten, "1 elements of D are NaN"), (_wrong_row, "element (511, "), (_outside, "wrote around D")],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_numerics_fails_what_is_wrong(fault: Callable[[Embedded], None], message: str, sampled: bool) -> None:
    case = Case(Shape(512, 1024, 64), "fp8_rowwise", d_margin=(1, 0), sampled=sampled)
    call = numerics.Call(case, CPU)
    first, second = call.run(), call.run()
    fault(first)
    d = first.view if call.rows is None else first.view[call.rows]
    outcome = numerics.judge(case, d, call.expected(), first, second)
    if sampled:
        message = message.replace("(511, ", f"({len(d) - 1}, ")
    assert any(message in failure for failure in outcome.failures), outcome.failures
    if fault is not _outside:
        assert "another result the second time" in outcome.failures


def test_numerics_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numerics.csv"
    arguments = ["--device", "cpu", "--no-dense", "--ragged", "12", "--recipes", "bf16", "--out", str(out)]
    assert numerics.main(arguments) == 0
    assert "4 of 4 cases run, 0 failed" in capsys.readouterr().out
    assert len(list(csv.DictReader(out.open()))) == 4


def test_numerics_command_reports_exceptions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(case: Case, device: torch.device) -> numerics.Outcome:
        raise ValueError("broken")

    monkeypatch.setattr(numerics, "check", fail)
    assert numerics.main(["--device", "cpu", "--no-dense", "--ragged", "3"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("ValueError: broken") == 3
    assert "3 of 3 cases run, 3 failed" in printed


# -- Command lines.


def test_lists_need_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert dense.main(["--list", "--m", "1", "64", "--shapes", "576,7168", "--recipes", "bf16"]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["bf16", "1x576x7168", "6.724"],
        ["bf16", "64x576x7168", "6.951"],
    ]
    assert dense.main(["--list", "--shapes", "unlisted"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 * 7 * 8
    assert chain.main(["--list", "--m", "16", "--recipes", "fp8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["fp8_1x128_128x128", "16"]
    assert numerics.main(["--list", "--quick"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 * 7 * 7 + 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [dense.main, chain.main, numerics.main, host_time.main])
def test_races_need_a_gpu(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 3
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--m", "0"],
        ["--shapes", "576"],
        ["--shapes", "listed", "unlisted"],
        ["--recipes", "fp4"],
        ["--samples", "-1"],
        ["--out", "a.csv", "--report", "a"],
        ["--report", "a", "--sweep", "missing.csv"],
    ],
)
def test_bad_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        dense.main([*arguments, "--list"])
    assert exit_.value.code == 2


def test_defaults() -> None:
    options = dense.parse([])
    assert (options.m, options.layers) == (list(MS), LAYERS)
    assert dense_shapes(options.m, options.layers) == dense_shapes()
    options = dense.parse(["--shapes", "unlisted", "--m", "7"])
    assert (options.m, options.layers) == ([7], OTHER_LAYERS)
    assert not set(dense_shapes(OTHER_MS, OTHER_LAYERS)) & set(dense_shapes())
    assert dense.parse(["--shapes", "64,128", "128,64"]).layers == [(64, 128), (128, 64)]
    assert len(numerics.select(numerics.parse([]))) == 784 + 240
    assert host_time.parse([]).batch == 200
    assert first_call.parse(["--no-gpu"]).no_gpu
    assert not poisoned((2, 2), torch.float32, CPU).isfinite().any()
