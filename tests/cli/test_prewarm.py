"""``jitgemm prewarm`` from end to end."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command import NARROW, Jitgemm

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
    for cell in ("lm_head", "129280", "24576", "32768", "16384", "4096", "2112", "576"):
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
        ([], ["--preset", "--shapes"]),
        (["--preset", "deepseek-v3", "--shapes", "tiny.jsonl"], ["--preset", "--shapes", "both"]),
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
