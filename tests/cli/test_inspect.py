"""``list``, ``show``, ``explain``, ``doctor`` and the command itself."""

from __future__ import annotations

import hashlib
import json
import statistics
import struct
import subprocess
import time
from pathlib import Path

import pytest
from command import ROOT, Jitgemm

from jitgemm.cache_tools.cli import run

PROBLEM = ("--m", 128, "--n", 4096, "--k", 7168, "--recipe", "fp8_1x128_128x128")


def test_version_and_help(jitgemm: Jitgemm) -> None:
    assert jitgemm("--version").stdout == "jitgemm 0.1.0\n"
    for command in (
        (),
        ("prewarm",),
        ("list",),
        ("show",),
        ("explain",),
        ("doctor",),
        ("demo",),
        ("export",),
        ("import",),
    ):
        assert "Usage: jitgemm" in jitgemm(*command, "--help").stdout
    assert "Commands:" in jitgemm(code=2).stderr
    assert "'prewrm'" in jitgemm("prewrm", code=2).stderr


def test_empty_cache(jitgemm: Jitgemm) -> None:
    assert jitgemm("list").stdout.startswith("0 kernels")
    assert jitgemm.json("list")["entries"] == []
    done = jitgemm("show", "abc", code=1)
    assert done.stdout == ""
    assert "no kernel" in done.stderr
    assert "'abc'" in done.stderr
    assert jitgemm("doctor").stdout.endswith("OK\n")
    assert not jitgemm.cache.exists()


def test_list(warm: Jitgemm) -> None:
    listing = warm.json("list")
    assert listing["cache_dir"] == str(warm.cache)
    assert [entry["file"] for entry in listing["entries"]] == [str(path) for path in warm.cached_files()]
    for entry in listing["entries"]:
        assert entry["arch"] == "sm_90a"
        assert entry["registers"] > 0
        assert entry["bytes"] == Path(entry["file"]).stat().st_size
        assert entry["problem"] is None
    text = warm("list").stdout
    assert all(entry["key"][:12] in text and entry["config"] in text for entry in listing["entries"])


def test_show(warm: Jitgemm) -> None:
    key = warm.json("list")["entries"][0]["key"]
    shown = warm.json("show", key[:12])
    assert shown["key"] == key
    assert shown["spec"]["arch"] == "sm_90a"
    assert [entry["key"] for entry in shown["entries"]] == [key]
    assert "source" not in shown
    text = warm("show", key.upper()).stdout
    assert key in text
    assert "registers" in text
    source = warm("show", key[:12], "--source").stdout
    assert "__global__" in source
    assert warm.json("show", key, "--source")["source"] == source


def test_show_wants_a_unique_prefix(warm: Jitgemm) -> None:
    done = warm("show", "", code=2)
    assert "more digits" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "no kernel" in warm("show", "zz", code=1).stderr


def _copy_with_metadata(warm: Jitgemm, jitgemm: Jitgemm, **changes: object) -> None:
    """An entry whose digest is right and whose metadata is what its author likes."""
    original = warm.cached_files()[0]
    data = original.read_bytes()[:-32]
    magic, metadata_bytes, payload_bytes = struct.unpack_from("<8sIQ", data)
    start = struct.calcsize("<8sIQ")
    metadata = json.loads(data[start : start + metadata_bytes])
    metadata.update(changes)
    text = json.dumps(metadata).encode()
    body = struct.pack("<8sIQ", magic, len(text), payload_bytes) + text + data[start + metadata_bytes :]
    folder = jitgemm.cache / "kernels" / original.name[:2]
    folder.mkdir(parents=True)
    jitgemm.cache.chmod(0o700)
    (folder / original.name).write_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize("source", [False, True])
def test_hostile_metadata_reaches_no_terminal_raw(warm: Jitgemm, jitgemm: Jitgemm, source: bool) -> None:
    evil = "x\x1b[2J\x07\r\u202e\x9b31m[bold]"
    spec = {"family": "transpose_scales", "arch": "sm_90a", "constants": {"tile": evil, "threads": 32, evil: evil}}
    _copy_with_metadata(warm, jitgemm, kernel_name=evil, spec=spec, warnings=[evil])
    key = jitgemm.cached_files()[0].name[:64]
    runs = [jitgemm("list"), jitgemm("list", "--json"), jitgemm("doctor")]
    for flags in ((), ("--json",)):
        process = subprocess.run(
            jitgemm.command("show", key, *flags, *(["--source"] if source else [])),
            env=jitgemm.environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode in (0, 1)  # refused or shown, but never raw
        runs.append(process)
    for done in runs:
        for char in done.stdout + done.stderr:
            assert char.isprintable() or char == "\n", (done.args, char)


def test_entries_of_unknown_families_are_listed(warm: Jitgemm, jitgemm: Jitgemm) -> None:
    _copy_with_metadata(warm, jitgemm, spec={"family": "of_tomorrow", "arch": "sm_90a", "constants": {}})
    assert "of_tomorrow" in jitgemm("list").stdout
    key = jitgemm.json("list")["entries"][0]["key"]
    assert "of_tomorrow" in jitgemm("show", key).stdout
    assert "of_tomorrow" in jitgemm("show", key, "--source", code=1).stderr


def test_damaged_entries_are_listed_as_such(warm: Jitgemm, jitgemm: Jitgemm) -> None:
    _copy_with_metadata(warm, jitgemm)
    path = jitgemm.cached_files()[0]
    path.write_bytes(path.read_bytes()[:-1])
    (entry,) = jitgemm.json("list")["entries"]
    assert entry["problem"]
    assert "damaged" in jitgemm("list").stdout
    assert "damaged" in jitgemm("show", entry["key"][:12], code=1).stderr


def test_explain(jitgemm: Jitgemm) -> None:
    report = jitgemm.json("explain", *PROBLEM)
    assert report["problem"]["m"] == 128
    assert report["device"] == "h200"
    costs = [candidate["cost_us"] for candidate in report["candidates"]]
    assert costs == sorted(costs)
    assert costs[0] > 0
    assert report["winner"] in [candidate["config"] for candidate in report["candidates"]]
    assert all(group["reason"] and group["configs"] for group in report["illegal"])
    text = jitgemm("explain", *PROBLEM, "--top", 3).stdout
    assert text.count("<- winner") == 1
    assert "4096" in text
    assert jitgemm("explain", *PROBLEM).stdout == jitgemm("explain", *PROBLEM).stdout
    assert not jitgemm.cache.exists()


def test_explain_of_several_gemms(jitgemm: Jitgemm) -> None:
    for kind, recipe in (("masked", "fp8_1x128_128x128"), ("batched", "bf16"), ("k_grouped", "fp8_1x128_1x128")):
        sizes = ("--m", 64, "--n", 1024, "--k", 4096, "--groups", 8)
        text = jitgemm("explain", *sizes, "--recipe", recipe, "--kind", kind, "--top", 3).stdout
        assert text.startswith(f"8 groups, {kind}, 64 x 1024 x 4096, {recipe} nt")
        assert "<- winner" in text


def test_explain_of_groups(jitgemm: Jitgemm) -> None:
    for kind, alignment in (("masked", 128), ("psum", 1)):
        arguments = (*PROBLEM, "--groups", 8, "--kind", kind, "--alignment", alignment)
        report = jitgemm.json("explain", *arguments)
        assert report["problem"]["kind"] == f"m_grouped_{kind}"
        assert (report["problem"]["groups"], report["problem"]["alignment"]) == (8, alignment)
        assert report["winner"] == report["candidates"][0]["config"]
        assert f"8 groups, {kind}" in jitgemm("explain", *arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--m", 1, "--n", 2, "--k", 3), ["--recipe"]),
        (("--m", -1, "--n", 2, "--k", 3, "--recipe", "bf16"), ["--m", "-1"]),
        (("--m", 1, "--n", 2, "--k", 3, "--recipe", "fp4"), ["--recipe", "fp4", "fp8_rowwise"]),
        (("--m", 1, "--n", 2, "--k", 3, "--recipe", "fp8_rowwise", "--layout", "tn"), ["layout", "tn", "nt"]),
        (("--m", 1, "--n", 2, "--k", 3, "--recipe", "bf16", "--device", "v100"), ["--device", "v100", "h200"]),
        (("--m", 1, "--n", 2**31, "--k", 3, "--recipe", "bf16"), ["n is 2147483648"]),
        (
            ("--m", 64, "--n", 256, "--k", 512, "--recipe", "fp8_rowwise", "--fast-accum", "--groups", 4),
            ["--fast-accum", "grouped"],
        ),
        (("--m", 64, "--n", 256, "--k", 512, "--recipe", "fp8_rowwise", "--groups", 4), ["fp8_rowwise", "bf16"]),
    ],
)
def test_explain_usage(jitgemm: Jitgemm, arguments: tuple[object, ...], said: list[str]) -> None:
    done = jitgemm("explain", *arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in said), done.stderr


def test_doctor(warm: Jitgemm) -> None:
    report = warm.json("doctor")
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["versions"]["jitgemm"] == "0.1.0"
    assert [library["chosen"] for library in report["nvrtc"]].count(True) == 1
    assert report["cache"]["entries"] == len(warm.cached_files())
    assert report["cache"]["bytes"] == sum(path.stat().st_size for path in warm.cached_files())
    assert report["cache"]["mode"] == "0700"
    settings = {row["name"]: row for row in report["settings"]}
    assert settings["JITGEMM_CACHE_DIR"] == {
        "name": "JITGEMM_CACHE_DIR",
        "value": str(warm.cache),
        "source": "environment",
    }
    assert settings["JITGEMM_JIT"]["source"] == "default"
    option = warm.json("doctor", "--cache-dir", warm.home)
    assert next(row for row in option["settings"] if row["name"] == "JITGEMM_CACHE_DIR")["source"] == "override"
    assert warm("doctor").stdout.endswith("OK\n")


def test_doctor_names_what_is_missing(jitgemm: Jitgemm) -> None:
    environment = {"JITGEMM_NVRTC": "/no/libnvrtc.so.13", "JITGEMM_CACHE_DIR": "/dev/null/cache"}
    done = jitgemm("doctor", code=3, environment=environment)
    assert "problem: /no/libnvrtc.so.13" in done.stdout
    assert "problem: the cache directory /dev/null/cache" in done.stdout
    assert "OK" not in done.stdout
    assert len(jitgemm.json("doctor", code=3, environment=environment)["problems"]) == 2
    assert "JITGEMM_TILE_M is 'x'" in jitgemm("doctor", code=3, environment={"JITGEMM_TILE_M": "x"}).stderr


def test_cache_that_others_can_write_is_refused(jitgemm: Jitgemm) -> None:
    jitgemm.cache.mkdir()
    jitgemm.cache.chmod(0o777)
    for command in (("list",), ("doctor",), ("prewarm", "--preset", "deepseek-v3")):
        assert "chmod o-w" in (done := jitgemm(*command, code=3)).stderr + done.stdout


def test_a_reader_may_stop_reading(warm: Jitgemm) -> None:
    command = " ".join(warm.command("list", "--json"))
    done = subprocess.run(["sh", "-c", f"{command} | head -n 1"], env=warm.environment, capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_an_ascii_terminal_is_enough(warm: Jitgemm) -> None:
    assert "kernels" in warm("list", environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}).stdout


def test_list_is_quick(warm: Jitgemm) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        warm("list")
        return time.perf_counter() - start

    assert statistics.median(seconds() for _ in range(3)) < 2  # its figure, 0.4 s, is measured by a benchmark


def test_demo_without_a_gpu(warm: Jitgemm) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = "from jitgemm.cache_tools import demo; import sys; sys.exit(demo.check([]))"
    done = subprocess.run(
        [*warm.command()[:1], "-c", script],
        env={**warm.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    assert "1 of 1 right" in done.stdout


def test_demo_without_torch(
    jitgemm: Jitgemm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["demo", "--cache-dir", str(jitgemm.cache)]) == 3
    assert "torch is not installed" in capsys.readouterr().err
    assert not jitgemm.cache.exists()
