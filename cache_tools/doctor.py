"""Whether this machine can build, find and load kernels, and if not, why."""

from __future__ import annotations

import os
import platform
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jitgemm
from jitgemm import settings
from jitgemm.cache_tools.console import print_table, printable
from jitgemm.cache_tools.storage import write_fault
from jitgemm.errors import CacheError, CompileError, SettingsError

REQUIRED = ("click", "filelock", "jinja2", "numpy", "platformdirs", "rich")
"""Without these the commands do not work."""

FOR_CALLS = ("torch", "cuda-bindings")
"""Needed to launch kernels, not to build them."""


@dataclass
class Diagnosis:
    """What the machine has; ``problems`` is empty where nothing essential is missing."""

    versions: dict[str, str | None]
    driver: str | None
    nvrtc: list[dict[str, Any]]
    cache: dict[str, Any]
    settings: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON report, without its schema."""
        return {"ok": not self.problems, **vars(self)}


def examine() -> Diagnosis:
    """Look at everything; changes nothing, makes no CUDA context."""
    from jitgemm.compiler import driver_version, version_text

    driver = driver_version()
    problems: list[str] = []
    return Diagnosis(
        versions=dict(_versions(problems)),
        driver=None if driver is None else version_text(driver),
        nvrtc=_nvrtc(problems),
        cache=_cache(problems),
        settings=[
            {"name": name, "value": None if value is None else settings.as_written(value), "source": source}
            for name, value, source in settings.in_force()
        ],
        problems=problems,
    )


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The report for people; the last line is OK, or each problem has one."""
    print_table(["package", "version"], [(name, text or "not installed") for name, text in diagnosis.versions.items()])
    print(f"CUDA driver: {diagnosis.driver or 'none (kernels can be built, not run)'}\n")
    print_table(
        ["NVRTC", "version", "chosen", "because"],
        [(n["path"], n["version"], "yes" if n["chosen"] else "no", n["reason"]) for n in diagnosis.nvrtc],
    )
    print_table(["cache", ""], [(name, _text(value)) for name, value in diagnosis.cache.items() if value is not None])
    defaults = {name: default for name, default, _, _ in settings.table()}
    print_table(
        ["setting", "value", "from"],
        [(s["name"], s["value"] or f"({defaults[s['name']]})", s["source"]) for s in diagnosis.settings],
    )
    for problem in diagnosis.problems:
        print(printable(f"problem: {problem}"))
    if not diagnosis.problems:
        print("OK")


def _text(value: object) -> object:
    return os.pathsep.join(value) if isinstance(value, list) else value


def _versions(problems: list[str]) -> Iterator[tuple[str, str | None]]:
    yield "jitgemm", jitgemm.__version__
    yield "python", platform.python_version()
    for name in (*REQUIRED, *FOR_CALLS):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in REQUIRED:
                problems.append(f"{name} is not installed; pip install {name}")
            yield name, None


def _nvrtc(problems: list[str]) -> list[dict[str, Any]]:
    from jitgemm.compiler import find_nvrtc, list_nvrtc

    candidates = []
    try:
        candidates = list_nvrtc()
        find_nvrtc()
    except CompileError as error:
        problems.append(str(error))
    return [
        {
            "path": str(candidate.library.path),
            "version": candidate.library.version_text,
            "chosen": candidate.chosen,
            "reason": candidate.reason,
        }
        for candidate in candidates
    ]


def _cache(problems: list[str]) -> dict[str, Any]:
    from jitgemm.cache import default_cache

    try:
        cache = default_cache()
    except CacheError as error:
        problems.append(str(error))
        return {}
    entries = list(cache.entries())
    owner, mode = _owner_and_mode(cache.directory)
    fault = write_fault(cache.directory)
    if fault and not entries:  # a read-only cache that somebody filled is fine
        problems.append(f"the cache directory {cache.directory} cannot be written: {fault}")
    return {
        "directory": str(cache.directory),
        "layers": [str(layer) for layer in cache.layers] or None,
        "exists": cache.directory.is_dir(),
        "writable": fault is None,
        "owner": owner,
        "mode": mode,
        "entries": len(entries),
        "bytes": sum(entry.size for entry in entries),
        **_remote(problems),
    }


def _remote(problems: list[str]) -> dict[str, Any]:
    from jitgemm.remote import default_remote

    try:
        remote = default_remote()
    except SettingsError as error:
        problems.append(str(error))
        return {}
    if remote is None:
        return {}
    answers = remote.answers()
    if not answers:
        problems.append(f"the remote {remote.url} failed: {remote.fault}")
    return {"remote": remote.url, "remote_answers": answers}


def _owner_and_mode(directory: Path) -> tuple[str | None, str | None]:
    try:
        status = directory.stat()
    except OSError:
        return None, None
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:  # a container may run as a number that has no name
        owner = str(status.st_uid)
    return owner, f"{stat.S_IMODE(status.st_mode):04o}"
