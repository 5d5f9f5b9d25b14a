"""Tuned tables: the file, damage, the merge of two, and what they change in choices."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_gemm_problem import kernels

from jitgemm import settings
from jitgemm.cache import default_cache
from jitgemm.device import H100, H200
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config, enumerate_configs, explain, tuned
from jitgemm.heuristics.gemm import MAX_KERNELS, candidates, illegal, predict, rank_candidates
from jitgemm.heuristics.serving import ANCHORS
from jitgemm.heuristics.tuned import Entry, Run, Table, TableError

pytestmark = pytest.mark.usefixtures("no_shipped_table")

RUN = Run("NVIDIA H200", 132, "0.1.0", "ab" * 32, "13.5", "13.0", "2.11.0", "2026-11-21")
LATER = dataclasses.replace(RUN, torch="2.12.0", date="2026-12-01")
PROBLEM = GemmProblem(4096, 7168, "fp8_1x128_128x128")
OTHER = GemmProblem(576, 7168, "bf16", layout="tn", d_dtype="fp32")


@pytest.fixture(autouse=True)
def no_tables(cache_dir: Path) -> Iterator[None]:
    tuned.forget()
    yield
    tuned.forget()


def model(m: int, problem: GemmProblem = PROBLEM) -> GemmConfig:
    with settings.override(tuned=False):
        return choose_config(problem.with_m(m), H200)


def entry(m: int, place: int = 3, margin: float = 1.1, problem: GemmProblem = PROBLEM, run: Run = RUN) -> Entry:
    """Some candidate that the model would not choose at an anchor."""
    others = [config for config in rank_candidates(problem.with_m(m), H200) if config != model(m, problem)]
    return Entry(m, others[place], 10.0, model(m, problem), 10.0 * margin, run)


def save(*entries: Entry, problem: GemmProblem = PROBLEM) -> Path:
    path = tuned.user_path(H200)
    with tuned.lock(path):
        tuned.update(path, H200, problem, {one.m: one for one in entries})
    return path


# -- The file.


@given(st.lists(st.tuples(kernels(), st.sampled_from(ANCHORS), st.sampled_from((RUN, LATER))), max_size=6))
@hypothesis_settings(deadline=None, max_examples=40)
def test_tables_survive_their_file(drawn: list[tuple[tuple[GemmProblem, GemmConfig], int, Run]]) -> None:
    problems: tuned.Problems = {}
    for (problem, config), m, run in drawn:
        problems.setdefault(problem.without_m(), {})[m] = Entry(m, config, 1.5, config, 2.25, run)
    data = tuned.encode(H200, problems)
    table = Table(data, H200)
    assert table.problems() == problems
    for problem, entries in problems.items():
        assert table.entries(problem) == entries
    assert table.entries(GemmProblem(123456, 8, "bf16")) == {}
    assert tuned.encode(H200, table.problems()) == data


def test_updates_add_and_replace(tmp_path: Path) -> None:
    path = save(entry(64), entry(128))
    save(entry(128, place=1, run=LATER), entry(256))
    save(entry(64, problem=OTHER), problem=OTHER)
    problems = tuned.read_table(path, H200).problems()
    assert problems[PROBLEM] == {64: entry(64), 128: entry(128, place=1, run=LATER), 256: entry(256)}
    assert set(problems) == {PROBLEM, OTHER}
    header = json.loads(path.read_text().splitlines()[0])
    assert header["device"] == {"name": "h200", "num_sms": 132}
    assert [run["torch"] for run in header["runs"]] == ["2.11.0", "2.12.0"]
    assert path.parent == default_cache().directory / "tuned"
    assert sorted(file.name for file in path.parent.iterdir()) == ["h200.jsonl", "h200.lock"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_failed_update_leaves_the_file_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(entry(64))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save(entry(128))
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["h200.jsonl", "h200.lock"]


def test_an_update_keeps_a_file_that_is_no_table(caplog: pytest.LogCaptureFixture) -> None:
    path = save(entry(64))
    path.write_text("something else\n")
    save(entry(128))
    assert path.with_name("h200.jsonl.bak").read_text() == "something else\n"
    assert set(tuned.read_table(path, H200).problems()[PROBLEM]) == {128}
    assert "kept as h200.jsonl.bak" in caplog.text


# -- Damage.


def damaged_header(data: bytes) -> bytes:
    return data.replace(b'"runs"', b'"rnus"', 1)


def other_schema(data: bytes) -> bytes:
    return data.replace(b'{"jitgemm_tuned": 1', b'{"jitgemm_tuned": 7', 1)


def other_device(data: bytes) -> bytes:
    return data.replace(b'"name": "h200"', b'"name": "h100"', 1)


def truncated(data: bytes) -> bytes:
    return data[:-40]


def binary(_: bytes) -> bytes:
    return bytes(range(256)) * 40


def bad_run(data: bytes) -> bytes:
    return data.replace(b'"run": 0', b'"run": 9')


def bad_config(data: bytes) -> bytes:
    return data.replace(b'"config": "', b'"config": "x')


def bad_time(data: bytes) -> bytes:
    return data.replace(b'"us": 10.0', b'"us": NaN')


def illegal_config(data: bytes) -> bytes:
    return data.replace(str(entry(64).config).encode(), b"256x256x128 s9")


def no_anchor(data: bytes) -> bytes:
    return data.replace(b'"m": 64', b'"m": 65')


def empty(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged_header, "first line"),
        (other_schema, "schema 7"),
        (other_device, "measured for"),
        (truncated, "damaged"),
        (binary, "first line"),
        (empty, "first line"),
        (bad_run, "damaged"),
        (bad_config, "damaged"),
        (bad_time, "damaged"),
        (illegal_config, "cannot be used: "),
        (no_anchor, "m is no anchor"),
    ],
)
def test_damage_is_reported_once_and_the_model_chooses(
    damage: object, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(entry(64))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    tuned.forget()
    with caplog.at_level(logging.WARNING, "jitgemm"):
        for m in (64, 65, 100, 4096):
            assert choose_config(PROBLEM.with_m(m), H200) == model(m)
        assert len(enumerate_configs(PROBLEM, H200)) > 1
        tuned.forget()
        assert choose_config(PROBLEM.with_m(64), H200) == model(64)
    records = [record.getMessage() for record in caplog.records]
    assert len(records) == 1
    assert said in records[0]
    assert str(path) in records[0]


def test_a_table_that_others_could_write_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    path = save(entry(64))
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)
    tuned.forget()
    assert choose_config(PROBLEM.with_m(64), H200) == model(64)
    assert str(path) in caplog.text


def test_another_number_of_multiprocessors_is_another_device() -> None:
    data = tuned.encode(H200, {PROBLEM: {64: entry(64)}})
    with pytest.raises(TableError, match="not for h200 with 78 SMs"):
        Table(data, H200.with_num_sms(78))


# -- Choices.


def test_an_entry_wins_at_its_anchor_and_for_nothing_else() -> None:
    # A kernel that serves another m: one more might leave another without a place.
    other = next(config for config in enumerate_configs(PROBLEM, H200) if config != model(64))
    one = Entry(64, other, 10.0, model(64), 11.0, RUN)
    assert illegal(PROBLEM, one.config, H200) is None
    before = {m: model(m) for m in ANCHORS}
    path = save(one)
    assert choose_config(PROBLEM.with_m(64), H200) == one.config != before[64]
    assert one.config in enumerate_configs(PROBLEM, H200)
    for m in ANCHORS:
        if m != 64:
            assert choose_config(PROBLEM.with_m(m), H200) == before[m]
    assert choose_config(PROBLEM.with_m(64), H100) == choose_config(PROBLEM.with_m(64), H100)
    for unaffected in (dataclasses.replace(PROBLEM, d_dtype="fp32"), dataclasses.replace(PROBLEM, n=4032)):
        assert choose_config(unaffected.with_m(64), H200) == model(64, unaffected)
    explanation = explain(PROBLEM.with_m(64), H200)
    assert (explanation.winner, explanation.entry, explanation.table) == (one.config, one, path)
    assert one.config in [candidate.config for candidate in explanation.candidates]
    assert explain(PROBLEM.with_m(4096), H200).entry is None


def test_settings_decide_whether_tables_are_used() -> None:
    one = entry(64)
    save(one)
    with settings.override(tuned=False):
        assert choose_config(PROBLEM.with_m(64), H200) == model(64)
    with settings.override(tile_m=64, tile_n=128, swap_ab=False):
        assert (choose_config(PROBLEM.with_m(64), H200).tile_m, explain(PROBLEM.with_m(64), H200).entry) == (64, None)
    assert choose_config(PROBLEM.with_m(64), H200) == one.config


def test_between_anchors_the_greater_margin_wins() -> None:
    """Measurements scale the predictions around their anchor."""
    best = predict(PROBLEM.with_m(112), model(112), H200)["total"]

    def places(m: int) -> list[int]:
        """Of candidates that are not far from the best between the anchors."""
        every = {place: entry(m, place).config for place in range(40)}
        return [p for p, config in every.items() if predict(PROBLEM.with_m(112), config, H200)["total"] < 1.2 * best]

    at_96 = places(96)[0]
    low = entry(96, at_96)
    at_128 = next(place for place in places(128) if entry(128, place).config != low.config)
    high = entry(128, at_128)
    save(entry(96, at_96, margin=1.001), entry(128, at_128, margin=1.5))
    assert choose_config(PROBLEM.with_m(112), H200) == high.config
    save(entry(96, at_96, margin=1.5), entry(128, at_128, margin=1.001))
    assert choose_config(PROBLEM.with_m(112), H200) == low.config


def test_a_config_that_was_measured_at_one_of_two_anchors_is_not_forgotten_between() -> None:
    """It wins at both; its measured margin at the one is not overwritten by the prediction at the other."""
    one = entry(1, place=1, margin=1.2)
    save(one, entry(8, place=1, margin=1.0), entry(16, place=6, margin=1.2))
    configs = {m: choose_config(PROBLEM.with_m(m), H200) for m in (1, 2, 4, 7, 8, 16)}
    assert {configs[m] for m in (1, 2, 4, 7, 8)} == {one.config} != {configs[16]}


def test_a_margin_does_not_reach_past_the_next_anchors() -> None:
    at, rival = PROBLEM.with_m(100), entry(64, place=4, margin=1.4)
    before = choose_config(at, H200)
    save(rival)  # 96 and 128 lie around 100
    assert choose_config(PROBLEM.with_m(64), H200) == rival.config != before
    costs = [predict(at, config, H200)["total"] for config in (before, rival.config)]
    assert choose_config(at, H200) == (before if costs[0] <= costs[1] else rival.config)


def test_the_users_table_wins_over_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "h200.jsonl"
    shipped.write_bytes(tuned.encode(H200, {PROBLEM: {64: entry(64, place=1), 128: entry(128, place=1)}}))
    monkeypatch.setattr(tuned, "shipped_paths", lambda device: [shipped])
    mine = save(entry(64, place=4))
    for m, place, path in ((64, 4, mine), (128, 1, shipped)):
        explanation = explain(PROBLEM.with_m(m), H200)
        assert (explanation.winner, explanation.table) == (entry(m, place=place).config, path)


def test_what_ships_is_a_table_of_legal_configs() -> None:
    for path in Path(tuned.__file__).parent.glob("*.jsonl"):
        (device,) = (device for device in (H200, H100) if device.name == path.stem)
        for problem, entries in Table(path.read_bytes(), device).problems().items():
            assert set(entries) <= set(ANCHORS)
            assert all(illegal(problem, one.config, device) is None for one in entries.values())


@given(st.data())
@hypothesis_settings(deadline=None, max_examples=15)
def test_with_any_table_every_choice_is_enumerated_and_kernels_are_few(data: st.DataObject) -> None:
    problem = GemmProblem(data.draw(st.sampled_from((576, 2112, 7168))), 2048, "fp8_1x128_128x128")
    legal = sorted({c for m in (1, 128, 4096) for c in rank_candidates(problem.with_m(m), H200)[:40]})
    entries = {
        m: Entry(m, data.draw(st.sampled_from(legal)), 10.0, legal[0], data.draw(st.floats(9.0, 30.0)), RUN)
        for m in data.draw(st.sets(st.sampled_from(ANCHORS)))
    }
    path = tuned.user_path(H200)
    path.unlink(missing_ok=True)
    save(*entries.values(), problem=problem)
    enumerated = set(enumerate_configs(problem, H200))
    assert len(enumerated) <= MAX_KERNELS
    for m in (1, 5, 8, 64, 100, 777, 3000, 8192, 50_000):
        chosen = choose_config(problem.with_m(m), H200)
        assert chosen in enumerated
        assert choose_config(problem.with_m(m), H200) == chosen
    if len({*(one.config for one in entries.values()), *candidates(problem, ())}) <= MAX_KERNELS:
        assert all(choose_config(problem.with_m(m), H200) == one.config for m, one in entries.items())
