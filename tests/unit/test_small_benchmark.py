"""The race of small kernels on the CPU: peers compute what we do; bytes, rows, targets and options are right."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import jitgemm
from benchmarks import small, small_moe, small_rowwise, small_work
from benchmarks.harness import CsvLog
from benchmarks.small_work import Case
from jitgemm.reference.quantize import ceil_div

REQUIRED = "case,m,n,k,groups,recipe,ours_us,best_peer_us,best_peer,ratio,floor_us"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_work, "DEVICE", "cpu")


@pytest.mark.parametrize("name", small_rowwise.KINDS)
def test_row_wise_peers_compute_the_same(name: str) -> None:
    kind = small_rowwise.KINDS[name]
    work = small_rowwise.work_of(kind, 128, min(kind.widths))
    assert work.right()
    ours, peers = map(small_work.as_tuple, (work.ours(), work.in_torch(*work.arguments)))
    for a, b in zip(ours, peers, strict=True):
        if a.dtype == torch.int32:  # packed exponents
            a = (a.contiguous().view(torch.uint8).int() << 23).view(torch.float32)[:, : b.shape[1]]
        if a.dtype == torch.uint8:
            assert (a != b).float().mean() < 0.01
            continue
        assert a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=1 / 7, atol=2e-2)


def layer_cases() -> list[Case]:
    torch.manual_seed(0)
    return list(small_moe.layer_cases(9, 256, 16))


@pytest.mark.parametrize("name", small_moe.NAMES[1:])
def test_peers_around_experts_compute_the_same(name: str) -> None:
    (case,) = (case for case in layer_cases() if case.name == name)
    work = case.make()
    assert work.right()
    ours, peers = map(small_work.as_tuple, (work.ours(), work.in_torch(*work.arguments)))
    if name == "moe_permutation":  # torch's is a sort without padding: the same choices in the same order
        of_rows = ours[2]
        assert torch.equal(of_rows[of_rows >= 0], peers[0].int())
    elif name == "moe_permute":  # of which torch copies the rows that there are
        assert torch.equal(ours[0][find_rows(work)], peers[0])
    else:
        for a, b in zip(ours, peers, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def find_rows(work: small_work.Work) -> torch.Tensor:
    """Rows of the result that are a token's, as they hold the item that the peer copies there."""
    x, items = work.arguments
    copied = work.ours()[0]
    rows = [row for row in range(len(copied)) if (copied[row] == x).all(1).any()]
    assert len(rows) == len(items)
    return torch.tensor(rows)


def test_the_prenorm_gemm_is_checked() -> None:
    work = small_moe.prenorm(5, 256, 3)
    assert work.right()
    product, squares = work.in_torch(*work.arguments)
    assert product.shape == (5, 24) and squares.shape == (5,)
    assert not work.others  # DeepGEMM needs a GPU


@pytest.mark.parametrize("name", ["hc_split_sinkhorn", "hc_post", "topk_gate", "moe_permutation", "moe_combine"])
def test_a_wrong_result_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in layer_cases() if case.name == name)
    work, right = case.make(), getattr(jitgemm, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = right(*arguments, **options)
        first, *rest = small_work.as_tuple(result)
        last = rest[-1] if rest and rest[-1] is not None else first
        (first if name == "moe_permutation" else last)[-1] += 1
        return result

    monkeypatch.setattr(jitgemm, name, wrong)
    assert not work.right()


def test_bytes_are_those_of_the_operands() -> None:
    m, n = 8, 4096
    moved = {name: small_rowwise.work_of(small_rowwise.KINDS[name], m, n).moved for name in ("act_quant", "rms_norm")}
    assert moved == {"act_quant": m * n * 3 + m * ceil_div(n, 128) * 4, "rms_norm": 4 * m * n}
    fp4 = small_rowwise.work_of(small_rowwise.KINDS["fp4_act_quant"], m, n)
    assert fp4.moved == m * n * 2 + m * n // 2 + m * n // 32


def test_cases_are_of_the_names_and_tokens_asked_for() -> None:
    chosen = small.cases(["rms_norm", "hc_post", "per_block_cast_to_fp8"], [1, 64])
    assert [(c.name, c.m, c.n) for c in chosen] == [
        *(("per_block_cast_to_fp8", 128, n) for n in (4096, 7168)),
        *(("rms_norm", m, n) for n in (512, 1536, 4096, 7168) for m in (1, 64)),
        *(("hc_post", m, 4 * width) for width in (4096, 7168) for m in (1, 64)),
    ]
    everything = small.cases(small.NAMES, small.MS)
    assert {case.name for case in everything} == set(small.NAMES)
    assert 100 < len(everything) < 200  # which fit into a few minutes
    splits = small.cases(["hc_prenorm"], [1], [1, 16])
    assert [(c.m, c.recipe) for c in splits[:2]] == [(13, "tf32 splits 1"), (13, "tf32 splits 16")]
    assert len(splits) == 2 * len(small_moe.PRENORM_SHAPES)


class Clock:
    """Makes each call, and finds that they take so long in turn."""

    def __init__(self, *us: float) -> None:
        self.us, self.count = us, 0

    def __call__(self, call: Any) -> float:
        call()
        self.count += 1
        return self.us[(self.count - 1) % len(self.us)]

    def empty(self) -> None:
        pass

    def check(self) -> None:
        pass


def test_rows(tmp_path: Path) -> None:
    (case,) = small.cases(["rms_norm_act_quant"], [2])[:1]
    row = small.measure(case, Clock(3, 8, 4, 12), False, 2)  # empty, ours, copy, torch
    assert (row["ours_us"], row["copy_us"], row["torch_us"], row["empty_us"]) == (8, 4, 12, 3)
    assert (row["best_peer"], row["best_peer_us"], row["ratio"], row["of_copy"]) == ("torch", 12, 1.5, 0.5)
    assert (row["m"], row["n"], row["errors"], row["samples"]) == (2, 4096, "", 2)
    assert row["floor_us"] == pytest.approx(4.8 + 1e6 * row["megabytes"] / 4.3e6)
    path = tmp_path / "small.csv"
    with CsvLog(path, small.COLUMNS) as log:
        log.write({**row, "measured": "on a Tuesday"})
    assert path.read_text().startswith(REQUIRED + ",")
    (read,) = csv.DictReader(path.open())
    assert read["compiled_us"] == read["k"] == ""
    assert "rms_norm_act_quant m=2 n=4096" in small.line(row)
    assert small.summary([row]).splitlines()[-1].split()[:4] == ["rms_norm_act_quant", "1", "1.5", "1.5"]


def test_what_is_wrong_or_fails_is_said() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    work = small_work.Work(broken, lambda: False, torch.neg, (torch.ones(4),), 32)
    row = small.measure(Case("x", 1, 4, None, 1, "bf16", 0.6, lambda: work), Clock(5), False, 2)
    assert row["ours_us"] is None and row["ratio"] is None
    assert row["errors"] == "wrong result | jitgemm: RuntimeError: no such kernel"
    assert small.misses(row, 0.6) == "no time"


def test_pairs_are_compared_with_the_sum() -> None:
    pdl = []

    def capture(calls: Any) -> Any:
        pdl.append(jitgemm.get_pdl())
        return lambda: [call() for call in calls]

    lines = small.pairs(capture, Clock(3, 10, 20, 28, 15), 2).splitlines()  # empty, first, second, both, both with PDL
    assert pdl == [False, False, False, True] * 3
    assert [line.split()[-5:] for line in lines[2:]] == [["10", "20", "28", "15", "0.5"]] * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"ours_us": 5.7}, "0.7 us over the floor, not 0.6"),
        ({"ours_us": 5.7, "m": 65}, ""),
        ({"ratio": 0.96, "best_peer": "torch.compile"}, "0.96 of torch.compile's speed"),
        ({"m": 4096, "megabytes": 16, "of_copy": 0.8}, "0.80 of the copy's bandwidth, not 0.85"),
        ({"m": 4096, "megabytes": 15, "of_copy": 0.8}, ""),
        ({"m": 4096, "megabytes": 16, "of_copy": None}, ""),
    ],
)
def test_targets(changed: dict[str, Any], message: str) -> None:
    row = {"ours_us": 5.5, "floor_us": 5.0, "m": 64, "megabytes": 1, "of_copy": 0.1, "ratio": 1.0, "best_peer": "torch"}
    assert small.misses({**row, **changed}, 0.6) == message


def test_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert small.main(["--list", "--cases", "hc_head", "--ms", "3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["hc_head", "3", "4096", "16384", "1", "bf16"], ["hc_head", "3", "7168", "28672", "1", "bf16"]]
    with pytest.raises(SystemExit):
        small.main(["--cases", "gemm"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        small.main([])
    assert raised.value.code == 3
