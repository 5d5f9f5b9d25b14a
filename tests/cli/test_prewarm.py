"""``jitgemm prewarm`` from end to end."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import NARROW, Jitgemm

from jitgemm import resources, settings
from jitgemm.cache import KernelCache
from jitgemm.cache_tools import cli, prewarm
from jitgemm.device import ARCHITECTURES, H200, PRESETS, SM90A

BROKEN_LINES = {
    '{"n": 256, "k": 512, "recipe": "fp8_1x128_128x128"': "not JSON",
    "[256, 512]": "list",
    "17": "int",
    '{"n": 256, "k": 512}': "recipe",
    '{"n": 256, "k": 512, "recipe": "fp9"}': "fp9",
    '{"n": 256, "k": 512, "recipe": ["bf16"]}': "recipe",
    '{"n": 256, "k": 512, "recipe": "bf16", "d_dtype": {}}': "d_dtype",
    '{"n": 0, "k": 512, "recipe": "bf16"}': "n is 0",
    '{"n": "256", "k": 512, "recipe": "bf16"}': "n is '256'",
    '{"n": 256, "n": 512, "k": 512, "recipe": "bf16"}': "twice",
    '{"n": 256, "k": 512, "recipe": "bf16", "wide": 1}': "wide",
    '{"n": 256, "k": 512, "recipe": "fp8_rowwise", "layout": "nn"}': "layout",
    '{"n": 256, "k": 512, "recipe": "bf16", "layer": 7}': "layer",
    "[" * 100_000: "not JSON",
    '{"n": ' + "9" * 10_000 + "}": "not JSON",
}


def test_problems_that_are_no_gemm(jitgemm: Jitgemm, tmp_path: Path) -> None:
    lines = [
        {
            "kind": "rowwise",
            "op": "cast",
            "n": 7168,
            "format": "e4m3",
            "scales": "pow2",
            "group": 128,
            "layer": "quant",
        },
        {"kind": "rowwise", "op": "rms_norm", "n": 4096, "norm": "bf16"},
        {"kind": "tiles", "op": "per_block", "scales": "pow2", "group_rows": 128, "group_columns": 128},
    ]
    file = tmp_path / "small.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    built = jitgemm.json("prewarm", "--shapes", file, "--device", "h200", "--jobs", 2)
    assert (built["needed"], built["built"], built["failed"]) == (5, 5, 0)
    assert {kernel["config"] for kernel in built["kernels"]} >= {"per_block bf16 e4m3 128x128 pow2"}
    file.write_text('{"kind": "rowwise", "op": "sort", "n": 1}')
    assert "op is 'sort'" in jitgemm("prewarm", "--shapes", file, code=2).stderr


def test_builds_once_then_finds_all(jitgemm: Jitgemm, shapes: Path) -> None:
    first = jitgemm.json("prewarm", "--shapes", shapes, "--device", "h200", "--jobs", 2, environment=NARROW)
    assert first["needed"] == first["built"] == len(first["kernels"]) > 1
    assert (first["hits"], first["failed"], first["dry_run"], first["interrupted"]) == (0, 0, False, False)
    assert first["cache_dir"] == str(jitgemm.cache)
    for kernel in first["kernels"]:
        assert kernel["state"] == "built"
        assert kernel["seconds"] > 0
        assert kernel["registers"] > 0
        assert kernel["spill_bytes"] == 0
        assert kernel["error"] is None
        assert isinstance(kernel["config"], str)
        assert len(kernel["key"]) == 64
    files = {path: path.stat().st_mtime_ns for path in jitgemm.cached_files()}
    assert len(files) == first["needed"]

    # Neither NVRTC nor a template is needed to find what is there.
    second = jitgemm.json(
        "prewarm", "--shapes", shapes, "--device", "h200", environment={**NARROW, "JITGEMM_JIT": "forbid"}
    )
    assert (second["needed"], second["hits"], second["built"], second["failed"]) == (first["needed"], len(files), 0, 0)
    assert [kernel["key"] for kernel in second["kernels"]] == [kernel["key"] for kernel in first["kernels"]]
    assert [kernel["registers"] for kernel in second["kernels"]] == [kernel["registers"] for kernel in first["kernels"]]
    assert {path: path.stat().st_mtime_ns for path in jitgemm.cached_files()} == files


def test_closing_table(warm: Jitgemm) -> None:
    done = warm("prewarm", "--shapes", warm.home / "tiny.jsonl", "--device", "h200")
    assert "tiny" in done.stdout
    assert "together" in done.stdout
    assert f"built 0 of {len(warm.cached_files())} kernels" in done.stdout
    assert done.stderr == ""  # no progress where nobody watches


def test_dry_run_writes_nothing(jitgemm: Jitgemm, shapes: Path) -> None:
    report = jitgemm.json("prewarm", "--shapes", shapes, "--dry-run")
    assert report["needed"] > 0
    assert (report["hits"], report["built"], report["failed"], report["dry_run"]) == (0, 0, 0, True)
    assert {kernel["state"] for kernel in report["kernels"]} == {"missing"}
    assert not jitgemm.cache.exists()


BARREN = {"JITGEMM_NVRTC": "/nowhere/libnvrtc.so.13", "JITGEMM_JIT": "forbid"}
"""Where nothing can be compiled."""


def test_check_of_an_empty_cache(jitgemm: Jitgemm, shapes: Path) -> None:
    arguments = ("prewarm", "--shapes", shapes, "--device", "h200", "--check")
    report = jitgemm.json(*arguments, code=1, environment={**NARROW, **BARREN})
    assert report["missing"] == report["needed"] == len(report["kernels"]) > 1
    assert not jitgemm.cache.exists()


def test_check_answers_from_the_files_alone(filled: Jitgemm, shapes: Path) -> None:
    arguments = ("prewarm", "--shapes", shapes, "--device", "h200", "--check")
    files = {path: path.stat().st_mtime_ns for path in filled.cache.rglob("*")}
    full = filled.json(*arguments, environment=BARREN)
    assert (full["missing"], full["hits"], full["dry_run"]) == (0, full["needed"], False)
    done = filled(*arguments, environment=BARREN)
    assert f"{full['needed']} of {full['needed']} kernels cached, 0 missing" in done.stdout
    assert done.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in filled.cache.rglob("*")} == files

    damaged, removed = filled.cached_files()[:2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    removed.unlink()
    done = filled(*arguments, code=1, environment=BARREN)
    for path in (damaged, removed):
        assert path.name[:12] in done.stdout
    assert f"2 of {full['needed']} kernels are not in the cache {filled.cache}" in done.stderr
    listed = filled.json(*arguments, code=1, environment=BARREN)["kernels"]
    assert {k["key"] for k in listed if k["state"] == "missing"} == {path.name[:64] for path in (damaged, removed)}


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--require-complete"], 1)])
def test_require_complete_fails_for_what_is_lost_again(
    filled: Jitgemm,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
) -> None:
    build = prewarm._build
    absent, lost = filled.cached_files()[:2]
    absent.unlink()

    def build_and_lose_one(*arguments: Any) -> None:
        build(*arguments)
        lost.unlink()

    monkeypatch.setattr(prewarm, "_build", build_and_lose_one)
    for name, value in NARROW.items():
        monkeypatch.setenv(name, value)
    settings.reload()
    command = ["prewarm", "--shapes", str(shapes), "--device", "h200", "--cache-dir", str(filled.cache), *options]
    assert cli.run(command) == code
    assert absent.exists()
    assert not lost.exists()
    assert (lost.name[:12] in capsys.readouterr().out) == bool(code)


def test_require_complete_fails_for_what_cannot_be_built(jitgemm: Jitgemm, shapes: Path) -> None:
    arguments = ("prewarm", "--shapes", shapes, "--device", "h200")
    kernel = jitgemm.json(*arguments, "--dry-run", environment=NARROW)["kernels"][0]
    for version in ("12.9", *(f"13.{minor}" for minor in range(20))):  # a folder in its place
        KernelCache(jitgemm.cache).path_of(kernel["key"], version).mkdir(parents=True)
    jitgemm.cache.chmod(0o700)
    report = jitgemm.json(*arguments, "--require-complete", code=1, environment=NARROW)
    assert (report["failed"], report["missing"]) == (1, 0)


def test_several_architectures_at_once_and_no_stop_at_failures(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An architecture that the templates cannot be compiled for fails whole; the other is built whole."""
    other = dataclasses.replace(SM90A, name="sm_80")
    monkeypatch.setitem(ARCHITECTURES, "sm_80", other)
    monkeypatch.setitem(PRESETS, "a100", dataclasses.replace(H200, name="a100", arch=other))
    for name, value in NARROW.items():
        monkeypatch.setenv(name, value)
    settings.reload()
    arguments = ["prewarm", "--problem", '{"n": 256, "k": 512, "recipe": "bf16"}', "--jobs", "2"]
    assert cli.run([*arguments, "--json", "--dry-run"]) == 0
    assert {kernel["spec"]["arch"] for kernel in json.loads(capsys.readouterr().out)["kernels"]} == {"sm_90a"}
    for archs in ("all", "sm_80,sm_90a"):
        assert cli.run([*arguments, "--json", "--arch", archs]) == 1
        report = json.loads(capsys.readouterr().out)
        states = {(kernel["spec"]["arch"], kernel["state"]) for kernel in report["kernels"]}
        assert states == {("sm_80", "failed"), ("sm_90a", "built" if archs == "all" else "hit")}
    assert cli.run([*arguments, "--arch", "sm_80,sm_90a"]) == 1
    output = capsys.readouterr()
    assert f"{report['failed']} failed, such as bf16" in output.err
    assert cli.run([*arguments, "--arch", "sm_90a", "--device", "a100"]) == 2


@pytest.mark.parametrize(("options", "jobs"), [([], 3), (["--jobs", "5"], 5)])
def test_processes_are_as_many_as_the_machine_can_take(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], jobs: int
) -> None:
    asked: list[int] = []

    def note(problems: object, devices: object, *, jobs: int, **rest: Any) -> prewarm.Report:
        asked.append(jobs)
        return prewarm.Report([], [], KernelCache(shapes.parent))

    monkeypatch.setattr(resources, "compile_jobs", lambda: 3)
    monkeypatch.setattr(prewarm, "prewarm", note)
    assert cli.run(["prewarm", "--shapes", str(shapes), *options]) == 0
    assert asked == [jobs]


def test_the_command_that_a_refused_call_names_is_enough(jitgemm: Jitgemm) -> None:
    call = (
        "from jitgemm import builder, heuristics; from jitgemm.device import H200\n"
        "from jitgemm.families.gemm import GemmProblem\n"
        "problem = GemmProblem(256, 512, 'fp8_1x128_128x128', 64)\n"
        "for spec in heuristics.enumerate_specs(problem, H200): builder.build(spec, problem=problem)\n"
    )

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**jitgemm.environment, **NARROW, "JITGEMM_JIT": "forbid"}
        command = [sys.executable, "-c", call]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    refused = run()
    assert "CacheMissError" in refused.stderr
    variables, text = refused.stderr.rpartition("build it with: ")[2].split("jitgemm prewarm ")
    environment = dict(variable.split("=") for variable in shlex.split(variables))
    assert environment == NARROW
    jitgemm("prewarm", *shlex.split(text), environment=environment)
    assert run().returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(jitgemm: Jitgemm, shell: str) -> None:
    script = jitgemm("completion", shell).stdout
    assert "_JITGEMM_COMPLETE" in script
    assert f"{shell}_complete" in script
    assert "sh" in jitgemm("completion", "tcsh", code=2).stderr


def test_what_completion_offers(jitgemm: Jitgemm) -> None:
    def offers(words: str, count: int) -> list[str]:
        asked = {"_JITGEMM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        return jitgemm(environment=asked).stdout.split()

    assert "plain,prewarm" in offers("jitgemm pre", 1)
    assert offers("jitgemm prewarm --preset kimi", 3) == ["plain,kimi-k2"]
    assert offers("jitgemm prewarm --arch ", 3) == ["plain,sm_90a", "plain,all"]
    assert "plain,--require-complete" in offers("jitgemm prewarm --re", 2)


def test_devices_and_problems_share_kernels(jitgemm: Jitgemm, shapes: Path) -> None:
    def keys(*arguments: object) -> list[str]:
        return [k["key"] for k in jitgemm.json("prewarm", "--shapes", shapes, "--dry-run", *arguments)["kernels"]]

    shapes.write_text(
        "# two layers of one kind\n\n"
        '{"n": 256, "k": 512, "recipe": "bf16", "m": 64}\n'
        '{"n": 256, "k": 512, "recipe": "bf16", "kind": "gemm"}\n'
    )
    everywhere = keys()
    assert len(set(everywhere)) == len(everywhere)
    of_each = {name: keys("--device", name) for name in ("h200", "h100", "h20")}
    assert set(everywhere) == set().union(*of_each.values())
    assert set(keys("--device", "h200", "--device", "h20")) == {*of_each["h200"], *of_each["h20"]}


def test_the_preset_is_known(jitgemm: Jitgemm) -> None:
    report = jitgemm("prewarm", "--preset", "deepseek-v3", "--device", "h200", "--dry-run")
    for cell in ("lm_head", "129280", "24576", "32768", "16384", "4096", "2112", "36864"):
        assert cell in report.stdout


@pytest.mark.parametrize("line", BROKEN_LINES, ids=[text[:50] for text in BROKEN_LINES])
def test_broken_shapes_file(jitgemm: Jitgemm, shapes: Path, line: str) -> None:
    shapes.write_text(f'# a comment\n{{"n": 256, "k": 512, "recipe": "bf16"}}\n{line}\n')
    done = jitgemm("prewarm", "--shapes", shapes, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"jitgemm: --shapes: {shapes}:3: ")
    assert BROKEN_LINES[line] in done.stderr
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 600
    assert not jitgemm.cache.exists()


def test_unreadable_shapes_files(jitgemm: Jitgemm, shapes: Path) -> None:
    shapes.write_bytes(b'{"n": 256, "k": 512, "recipe": "\xff"}\n')
    assert f"{shapes}:1: not UTF-8" in jitgemm("prewarm", "--shapes", shapes, code=2).stderr
    shapes.write_text("# nothing\n")
    assert "no problem" in jitgemm("prewarm", "--shapes", shapes, code=2).stderr
    assert "does not exist" in jitgemm("prewarm", "--shapes", shapes.with_name("absent"), code=2).stderr
    assert "directory" in jitgemm("prewarm", "--shapes", shapes.parent, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "deepseek-v9"], ["--preset", "deepseek-v9", "deepseek-v3"]),
        ([], ["--preset", "--model", "--shapes", "--problem", "none"]),
        (["--preset", "deepseek-v3", "--shapes", "tiny.jsonl"], ["got --preset and --shapes"]),
        (["--shapes", "tiny.jsonl", "--tp", "2"], ["--tp", "--model", "got --shapes"]),
        (["--problem", '{"n": 256}'], ["--problem: field 'k' is missing"]),
        (["--problem", "256"], ["--problem: a int"]),
        (["--preset", "deepseek-v3", "--check", "--dry-run"], ["--check", "--dry-run", "accepted is one"]),
        (["--preset", "deepseek-v3", "--check", "--require-complete"], ["accepted is one"]),
        (["--preset", "deepseek-v3", "--arch", "sm_90a,sm_80"], ["--arch", "'sm_80'", "sm_90a", "all"]),
        (["--preset", "deepseek-v3", "--arch", ""], ["--arch", "sm_90a", "all"]),
        (["--preset", "deepseek-v3", "--device", "b200"], ["--device", "b200", "h200", "h100", "h20"]),
        (["--preset", "deepseek-v3", "--arch", "sm_80"], ["--arch", "sm_80", "sm_90a"]),
        (["--preset", "deepseek-v3", "--jobs", "0"], ["--jobs", "0", "1024"]),
        (["--preset", "deepseek-v3", "--cache-dir", ""], ["--cache-dir", "empty"]),
        (["--preset", "deepseek-v3", "--cache-dir", "tiny.jsonl"], ["--cache-dir", "tiny.jsonl"]),
        (["--presets", "deepseek-v3"], ["--presets"]),
    ],
)
def test_usage_errors(jitgemm: Jitgemm, shapes: Path, arguments: list[str], said: list[str]) -> None:
    done = jitgemm("prewarm", *arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in said), done.stderr
    assert not jitgemm.cache.exists()


def test_cache_dir_option_wins_and_may_be_relative(jitgemm: Jitgemm, shapes: Path) -> None:
    arguments = ("prewarm", "--shapes", shapes, "--device", "h200", "--cache-dir", "other")
    report = jitgemm.json(*arguments, environment=NARROW)
    assert report["cache_dir"] == str(jitgemm.home / "other")
    assert len(list((jitgemm.home / "other").rglob("*.jgk"))) == report["built"] > 0
    assert not jitgemm.cache.exists()


def test_environment_faults(jitgemm: Jitgemm, shapes: Path) -> None:
    def fault(**environment: str) -> str:
        done = jitgemm("prewarm", "--shapes", shapes, code=3, environment=environment)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "JITGEMM_JIT is 'never'" in fault(JITGEMM_JIT="never")
    assert "/no/libnvrtc.so.13" in fault(JITGEMM_NVRTC="/no/libnvrtc.so.13")
    assert not jitgemm.cache.exists()


def _without_root_rights() -> None:
    """A superuser writes wherever it likes: drop that right (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_read_only_cache(jitgemm: Jitgemm, shapes: Path) -> None:
    jitgemm.cache.mkdir(mode=0o500)
    done = jitgemm("prewarm", "--shapes", shapes, code=3, preexec=_without_root_rights)
    assert f"{jitgemm.cache} cannot be written: Permission denied" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(jitgemm.cache.iterdir()) == []


def test_read_only_cache_that_holds_all_is_enough(warm: Jitgemm, tmp_path: Path) -> None:
    warm.cache.chmod(0o500)
    (warm.cache / "kernels").chmod(0o500)
    try:
        arguments = ("prewarm", "--shapes", warm.home / "tiny.jsonl", "--device", "h200")
        assert warm.json(*arguments, preexec=_without_root_rights)["built"] == 0
    finally:
        warm.cache.chmod(0o700)
        (warm.cache / "kernels").chmod(0o700)


def test_a_damaged_entry_is_built_again(jitgemm: Jitgemm, shapes: Path) -> None:
    arguments = ("prewarm", "--shapes", shapes, "--device", "h200")
    needed = jitgemm.json(*arguments, environment=NARROW)["needed"]
    damaged = jitgemm.cached_files()[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = jitgemm(*arguments, "--json", environment=NARROW)
    report = json.loads(done.stdout)
    assert (report["hits"], report["built"]) == (needed - 1, 1)
    assert done.stderr.startswith(f"jitgemm: warning: kernel cache: {damaged} is ignored")


def test_one_failure_does_not_stop_the_rest(jitgemm: Jitgemm, shapes: Path) -> None:
    arguments = ("prewarm", "--shapes", shapes, "--device", "h200")
    kernels = jitgemm.json(*arguments, "--dry-run", environment=NARROW)["kernels"]
    # A folder at the place of an entry: the kernel compiles, but cannot be stored.
    for version in ("12.9", *(f"13.{minor}" for minor in range(20))):
        key = kernels[0]["key"]
        (jitgemm.cache / "kernels" / key[:2] / f"{key}.{version}.jgk").mkdir(parents=True)
    jitgemm.cache.chmod(0o700)
    report = jitgemm.json(*arguments, code=1, environment=NARROW)
    assert (report["failed"], report["built"]) == (1, len(kernels) - 1)
    assert [kernel["key"] for kernel in report["kernels"] if kernel["error"]] == [kernels[0]["key"]]
    assert "not stored" in report["kernels"][0]["error"]
    done = jitgemm(*arguments, code=1, environment=NARROW)
    assert "1 failed, such as" in done.stderr
    assert kernels[0]["key"][:12] in done.stderr


def _start(jitgemm: Jitgemm, shapes: Path) -> subprocess.Popen[str]:
    """A long prewarm, in a process group of its own; returns once it has built something."""
    process = subprocess.Popen(
        jitgemm.command("prewarm", "--shapes", shapes, "--json", "--jobs", "2"),
        env=jitgemm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not jitgemm.cached_files():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _wait_until_gone(group: int) -> None:
    """Until no process of the group is left; workers, and multiprocessing's tracker, end soon after the parent."""
    deadline = time.monotonic() + 20
    while _processes_of_group(group):
        assert time.monotonic() < deadline, _processes_of_group(group)
        time.sleep(0.05)


def _processes_of_group(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("target", ["group", "parent"])
def test_interrupt(jitgemm: Jitgemm, shapes: Path, target: str) -> None:
    process = _start(jitgemm, shapes)
    (os.killpg if target == "group" else os.kill)(process.pid, signal.SIGINT)
    start = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    report = json.loads(stdout)
    assert report["interrupted"] is True
    assert report["failed"] == 0
    assert report["built"] < report["needed"]
    _wait_until_gone(process.pid)

    # What is there is whole, and the same command goes on from it.
    listing = jitgemm.json("list")["entries"]
    assert len(listing) >= report["built"]  # a worker finishes its kernel, even if nobody waits for it
    assert all(entry["problem"] is None for entry in listing)
    staging = jitgemm.cache / "staging"
    assert list(staging.iterdir()) == []
    again = jitgemm.json("prewarm", "--shapes", shapes, "--dry-run")
    assert again["hits"] == len(listing)


def test_killed_parent_leaves_no_worker(jitgemm: Jitgemm, shapes: Path) -> None:
    process = _start(jitgemm, shapes)
    process.kill()
    process.communicate()
    _wait_until_gone(process.pid)


def test_progress_on_a_terminal(jitgemm: Jitgemm, shapes: Path) -> None:
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        jitgemm.command("prewarm", "--shapes", shapes, "--device", "h200", "--json"),
        env={**jitgemm.environment, **NARROW, "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # Linux answers EIO once the other side is closed
            break
    os.close(terminal)
    assert process.stdout is not None
    report = json.loads(process.stdout.read())  # nothing but the object
    assert process.wait() == 0
    assert b"building" in shown
    assert b"kernels/s" in shown
    assert f"{report['built']}/{report['needed']}".encode() in shown
