"""Problems of the small kernels: lines of shapes files, and the kernels that they stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from jitgemm import prewarm
from jitgemm.builder import build
from jitgemm.cache_tools.problems import from_line, from_shapes_file
from jitgemm.device import H200, PRESETS
from jitgemm.errors import ProblemError
from jitgemm.families import family_of
from jitgemm.families.small_problem import KINDS, SmallProblem
from jitgemm.heuristics import enumerate_specs

_PAGES = "".join((ROOT / "docs" / name).read_text() for name in ("moe_kernels.md", "fp4.md"))
LINES = re.findall(r'^\{"kind": .*\}$', _PAGES, re.MULTILINE)


def test_the_documented_lines_are_all_kinds() -> None:
    assert sorted(json.loads(line)["kind"] for line in LINES) == sorted(KINDS)


@pytest.mark.parametrize("line", LINES, ids=lambda line: json.loads(line)["kind"])
def test_a_line_is_a_problem_with_kernels(line: str) -> None:
    problem = from_line(line).problem
    assert isinstance(problem, SmallProblem)
    assert problem.to_dict() == json.loads(line)
    assert SmallProblem.from_dict(problem.to_dict()) == problem
    assert problem.without_m() is problem
    specs = enumerate_specs(problem, H200)
    assert specs
    assert len(set(specs)) == len(specs)
    for spec in specs:
        assert family_of(spec).describe(spec)
        assert all(enumerate_specs(problem, device) == specs for device in PRESETS.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hc_pre"}, "precision is missing; kind hc_pre needs precision"),
        ({"kind": "hc_pre", "precision": "bf16"}, "precision is 'bf16'; accepted is tf32 or fp32"),
        ({"kind": "hc_post", "m": 3}, "'m' is no field of kind hc_post; accepted are dtype"),
        ({"kind": "hc_post", "dtype": "fp16"}, "dtype is 'fp16'; accepted is bf16 or fp32"),
        ({"kind": "hc_split_sinkhorn", "m": 3}, "'m' is no field of kind hc_split_sinkhorn; accepted are none"),
        ({"kind": "moe_combine", "topk": True}, "topk is True; accepted is an integer from 1 to 16"),
        ({"kind": "moe_combine", "topk": 0}, "topk is 0"),
        ({"kind": "moe_permute", "zero_padding": 1}, "zero_padding is 1; accepted is false or true"),
        ({"kind": "hc_nothing"}, "kind is 'hc_nothing'"),
    ],
)
def test_other_lines_say_why_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        from_line(json.dumps(fields))


def test_streams_are_bf16_unless_said() -> None:
    bf16 = from_line('{"kind": "hc_pre", "precision": "tf32", "dtype": "bf16"}').problem
    assert bf16 == from_line('{"kind": "hc_pre", "precision": "tf32"}').problem
    fp32 = from_line('{"kind": "hc_pre", "precision": "tf32", "dtype": "fp32"}').problem
    assert not set(enumerate_specs(bf16, H200)) & set(enumerate_specs(fp32, H200))


def test_prewarm_builds_them(cache_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    path.write_text('{"kind": "hc_post"}\n{"kind": "moe_combine", "topk": 2, "layer": "experts"}\n')
    assert [named.layer for named in from_shapes_file(path)] == ["", "experts"]
    done = prewarm(path, devices=["h200"], jobs=1)
    assert (done.kernels, done.compiled) == (2, 2)
    assert prewarm([SmallProblem.make("hc_post")], devices=["h200"], jobs=1).compiled == 0
    (spec,) = SmallProblem.make("hc_post").specs("sm_90a")
    assert build(spec).source == "memory"
