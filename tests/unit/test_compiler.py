from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from support import make_cubin

from jitgemm import compiler, settings
from jitgemm.compiler import UNKNOWN, CubinMetadata, Version
from jitgemm.errors import CompileError

LOG = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'gemm'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'gemm'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compiling entry function 'gemm' for 'sm_90a'
ptxas info    : Function properties for gemm
ptxas         .     800 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 800 bytes cumulative stack size
"""


def test_resource_use_is_read_from_the_log() -> None:
    assert compiler.resource_use(LOG, "gemm") == (168, 32, 800)
    assert compiler.resource_use(LOG, "other")[0] == 8


def test_what_the_log_does_not_tell_is_unknown_rather_than_zero() -> None:
    assert compiler.resource_use("", "gemm") == (UNKNOWN, UNKNOWN, UNKNOWN)
    assert compiler.resource_use(LOG, "gem") == (UNKNOWN, 32, 800)


def test_performance_warnings_are_kept_once() -> None:
    (warning,) = compiler.performance_warnings(LOG)
    assert "(C7510)" in warning
    assert "serialized" in warning


# Discovery. The libraries are empty files: loading one would fail.


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheels of CUDA 12 and 13, each in the layout of its time, and nothing else on the machine."""
    _library(tmp_path / "nvidia/cuda_nvrtc/lib", "12", "12.9")
    _library(tmp_path / "nvidia/cu13/lib", "13", "13.5")
    monkeypatch.setattr(compiler, "_folders", lambda: sorted(tmp_path.glob("nvidia/*/lib")))
    monkeypatch.setattr(compiler, "_known_to_loader", lambda: iter(()))
    monkeypatch.setattr(compiler, "_find_nvrtc", compiler._find_nvrtc.__wrapped__)  # remembers nothing
    return tmp_path


def _library(folder: Path, major: str, version: str) -> Path:
    folder.mkdir(parents=True)
    for name in (f"libnvrtc.so.{major}", f"libnvrtc-builtins.so.{version}", f"libnvrtc.alt.so.{major}"):
        (folder / name).touch()
    return folder / f"libnvrtc.so.{major}"


def _set_driver(monkeypatch: pytest.MonkeyPatch, version: Version | None) -> None:
    monkeypatch.setattr(compiler, "driver_version", lambda: version)


def test_a_library_comes_with_its_builtins(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Library:
        def __init__(self, path: str) -> None:
            loaded.append(Path(path).name)
            self.nvrtcGetErrorString = lambda status: b""

        @staticmethod
        def nvrtcVersion(major: Any, minor: Any) -> int:  # noqa: N802
            major._obj.value, minor._obj.value = 13, 5
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert compiler._Nvrtc(str(installed / "nvidia/cu13/lib/libnvrtc.so.13")).version == (13, 5)
    assert loaded == ["libnvrtc.so.13", "libnvrtc-builtins.so.13.5"]


@pytest.mark.parametrize(
    ("driver", "chosen", "reason"),
    [
        (None, (13, 5), "the newest"),
        ((13, 0), (13, 5), "the newest that the CUDA 13.0 driver accepts"),
        ((12, 4), (12, 9), "the newest that the CUDA 12.4 driver accepts"),
    ],
)
def test_the_newest_that_the_driver_accepts(
    installed: Path, monkeypatch: pytest.MonkeyPatch, driver: Version | None, chosen: Version, reason: str
) -> None:
    _set_driver(monkeypatch, driver)
    assert compiler.find_nvrtc().version == chosen
    candidates = compiler.list_nvrtc()
    assert [candidate.library.version for candidate in candidates] == [(13, 5), (12, 9)]
    assert [candidate.reason for candidate in candidates if candidate.chosen] == [reason]
    assert all(candidate.reason for candidate in candidates)


def test_none_that_the_driver_accepts_is_an_error_with_the_reasons(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set_driver(monkeypatch, (11, 8))
    with pytest.raises(CompileError, match=r"13\.5 is too new for the CUDA 11\.8 driver.*12\.9 is too new"):
        compiler.find_nvrtc()


def test_no_library_at_all_is_an_error_that_says_what_to_install(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_folders", list)
    with pytest.raises(CompileError, match="pip install nvidia-cuda-nvrtc"):
        compiler.find_nvrtc()
    assert compiler.list_nvrtc() == []


def test_the_setting_overrides_the_search(installed: Path) -> None:
    path = installed / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
    with settings.override(nvrtc=str(path)):
        library = compiler.find_nvrtc()
        assert (library.path, library.version_text) == (path, "12.9")
        assert "JITGEMM_NVRTC" in compiler.list_nvrtc()[0].reason


def test_a_setting_that_names_something_else_is_an_error(installed: Path) -> None:
    (installed / "notes.txt").write_text("not a library")
    with settings.override(nvrtc=str(installed / "notes.txt")), pytest.raises(CompileError, match=r"notes\.txt"):
        compiler.find_nvrtc()


def test_a_broken_library_does_not_hide_a_good_one(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_driver(monkeypatch, None)
    (installed / "nvidia/cu13/lib/libnvrtc-builtins.so.13.5").unlink()  # so it has to be loaded, which fails
    assert compiler.find_nvrtc().version == (12, 9)


def test_a_toolkit_is_found_through_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _library(tmp_path / "lib64", "14", "14.2")
    (tmp_path / "lib64/libnvrtc.so.14.2.99").symlink_to(path)  # another name of the same file
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tmp_path / "lib64" in compiler._folders()
    monkeypatch.setattr(compiler, "_folders", lambda: [tmp_path / "lib64"])
    assert [library.version for library in compiler._installed()] == [(14, 2)]


# Metadata


def test_metadata_survives_a_round_trip() -> None:
    metadata = make_cubin().metadata
    assert CubinMetadata.from_dict(metadata.to_dict()) == metadata


@pytest.mark.parametrize(
    "change",
    [
        {"registers": "32"},
        {"registers": True},
        {"key": 5},
        {"spec": {"family": "gemm"}},
        {"spec": {"family": "gemm", "arch": "sm_90a", "constants": {"a": [1]}}},
        {"warnings": "one"},
        {"kernel_name": "\x1b[2J"},
        {"warnings": ["bell\a"]},
        {"surprise": 1},
    ],
)
def test_metadata_of_a_wrong_form_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        CubinMetadata.from_dict({**make_cubin().metadata.to_dict(), **change})


def test_metadata_with_a_field_missing_is_refused() -> None:
    data = make_cubin().metadata.to_dict()
    del data["sha256"]
    with pytest.raises(ValueError, match="fields"):
        CubinMetadata.from_dict(data)
