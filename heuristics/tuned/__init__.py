"""Tuned tables: configs that were measured on a GPU and win over the cost model.

A table belongs to a device preset. One ships with the package where someone measured it; the user's own lies beside
the kernel cache, in ``tuned/<preset>.jsonl``, and wins over it, anchor by anchor. The file has one JSON object a line:
first what it is and under which circumstances its entries were measured, then a line for each problem (without m)::

    {"jitgemm_tuned": 1, "device": {"name": "h200", "num_sms": 132}, "runs": [{"gpu": "NVIDIA H200", ...}]}
    {"problem": {"kind": "gemm", "n": 576, ...}, "entries": [{"m": 64, "config": "...", "us": ..., ...}]}

A choice reads the first line and its own problem's, so that large tables cost no time. Nothing in a table can break a
call: a file or line that is damaged, or that belongs to another device, is ignored with one warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgemm import settings
from jitgemm.cache import default_cache, logger, read_trusted
from jitgemm.device import Device
from jitgemm.errors import CacheError, JitGemmError
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.settings import Settings

if TYPE_CHECKING:
    import filelock

SCHEMA = 1
"""Raised when the meaning of a table changes; others are ignored."""

MAX_BYTES = 64 << 20


class TableError(JitGemmError):
    """A file is not a tuned table, or one of another device."""


@dataclass(frozen=True)
class Run:
    """The circumstances of measurements."""

    gpu: str
    num_sms: int
    jitgemm: str
    templates: str  # digest of templates and generators
    nvrtc: str
    driver: str
    torch: str
    date: str  # UTC, such as 2026-11-21

    def differences(self, other: Run) -> list[str]:
        """What differs, but for the date: ``torch 2.11.0, now 2.12.0``."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "date"]
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name} {_short(old)}, now {_short(new)}" for name, old, new in pairs if old != new]


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a digest


@dataclass(frozen=True)
class Entry:
    """The config of one problem at one anchor m, what the model chose instead, and their times in us."""

    m: int
    config: GemmConfig
    us: float
    model_config: GemmConfig
    model_us: float
    run: Run

    @property
    def margin(self) -> float:
        """Time of the model's choice over that of the config; below 1 where the limit on kernels took the best."""
        return self.model_us / self.us


Problems = dict[GemmProblem, dict[int, Entry]]
"""Entries by problem (without its m) and anchor."""


# -- The file.


def encode(device: Device, problems: Problems) -> bytes:
    """The bytes of a table."""
    entries = [entry for of_problem in problems.values() for entry in of_problem.values()]
    runs = sorted({entry.run for entry in entries}, key=lambda run: (run.date, dataclasses.astuple(run)))
    lines: list[Mapping[str, Any]] = [
        {
            "jitgemm_tuned": SCHEMA,
            "device": {"name": device.name, "num_sms": device.num_sms},
            "runs": [dataclasses.asdict(run) for run in runs],
        }
    ]
    lines += [
        {"problem": problem.to_dict(), "entries": [_to_dict(of_problem[m], runs) for m in sorted(of_problem)]}
        for problem, of_problem in sorted(problems.items(), key=lambda item: _line_start(item[0]))
        if of_problem
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _to_dict(entry: Entry, runs: list[Run]) -> dict[str, Any]:
    return {
        "m": entry.m,
        "config": str(entry.config),
        "us": entry.us,
        "model_config": str(entry.model_config),
        "model_us": entry.model_us,
        "run": runs.index(entry.run),
    }


def _line_start(problem: GemmProblem) -> bytes:
    return b'{"problem": ' + json.dumps(problem.to_dict()).encode() + b', "entries": '


class Table:
    """The content of one file; lines are parsed when they are asked for.

    Raises:
        TableError: the first line is not that of a table, or is one of another device.
    """

    def __init__(self, data: bytes, device: Device) -> None:
        first, _, self._lines = data.partition(b"\n")
        self._lines = b"\n" + self._lines
        try:
            header = json.loads(first)
            schema, of = header["jitgemm_tuned"], header["device"]
            runs = header["runs"]
            if schema == SCHEMA:
                self._runs = [Run(**run) for run in runs]
                for run in self._runs:
                    _check_types(run)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise TableError("its first line is not that of a tuned table") from None
        if schema != SCHEMA:
            raise TableError(f"it has schema {schema!r}; this version reads {SCHEMA}")
        if of != {"name": device.name, "num_sms": device.num_sms}:
            raise TableError(f"it was measured for {of!r}, not for {device.name} with {device.num_sms} SMs")

    def entries(self, problem: GemmProblem) -> dict[int, Entry]:
        """The entries of a problem without its m, by anchor.

        Raises:
            TableError: its line is damaged.
        """
        start = _line_start(problem)
        at = self._lines.find(b"\n" + start)
        if at < 0:
            return {}
        end = self._lines.find(b"\n", at + 1)
        return self._parse(self._lines[at + 1 : end if end >= 0 else None])[1]

    def problems(self) -> Problems:
        """All of it.

        Raises:
            TableError: a line is damaged.
        """
        return dict(map(self._parse, filter(None, self._lines.split(b"\n"))))

    def _parse(self, line: bytes) -> tuple[GemmProblem, dict[int, Entry]]:
        try:
            content = json.loads(line)
            problem = GemmProblem.from_dict(content["problem"])
            entries = [self._entry(fields) for fields in content["entries"]]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise TableError(f"a line of it is damaged ({line[:60].decode(errors='replace')}...): {error}") from None
        if problem.m is not None or line[: len(_line_start(problem))] != _line_start(problem):
            raise TableError("a line of it does not begin with a problem as tables write it")
        return problem, {entry.m: entry for entry in entries}

    def _entry(self, fields: Mapping[str, Any]) -> Entry:
        m, us, model_us, run = fields["m"], fields["us"], fields["model_us"], fields["run"]
        configs = GemmConfig.from_text(fields["config"]), GemmConfig.from_text(fields["model_config"])
        if type(m) is not int or m < 1 or type(run) is not int or not 0 <= run < len(self._runs):
            raise ValueError(f"m {m!r}, run {run!r}")
        if not (0 < us < 1e9 and 0 < model_us < 1e9):  # also refuses nan
            raise ValueError(f"times {us!r} and {model_us!r}")
        return Entry(m, configs[0], float(us), configs[1], float(model_us), self._runs[run])


def _check_types(run: Run) -> None:
    for field in dataclasses.fields(run):
        if type(getattr(run, field.name)) is not (int if field.name == "num_sms" else str):
            raise TypeError(field.name)


# -- Which tables are in force.


class Tables:
    """The user's table and the shipped one of a device. Compared by identity: a new object means new content."""

    def __init__(self, device: Device, paths: tuple[Path, ...]) -> None:
        self._tables = [(path, table) for path in paths if (table := _load(path, device)) is not None]

    def __bool__(self) -> bool:
        return bool(self._tables)

    def entries(self, problem: GemmProblem) -> dict[int, tuple[Entry, Path]]:
        """The entries of a problem by anchor, with the file that each is from. Damage is reported and left out."""
        found: dict[int, tuple[Entry, Path]] = {}
        for path, table in self._tables:
            try:
                entries = table.entries(problem.without_m())
            except TableError as error:
                warn(path, error)
                continue
            found = {m: (entry, path) for m, entry in entries.items()} | found
        return found


NONE = Tables.__new__(Tables)
NONE._tables = []
"""No tables."""

_lock = threading.Lock()
_in_force: dict[tuple[tuple[Path, ...] | None, Device], Tables] = {}
_warned: set[tuple[Path, str]] = set()
_warned_lock = threading.Lock()


def tables(device: Device, in_force: Settings | None = None) -> Tables:
    """The tables that calls on a device use under some settings; read when first asked for, and after ``forget``."""
    current = in_force or settings.current()
    if not current.tuned:
        return NONE
    key = current.cache_dir, device
    found = _in_force.get(key)
    if found is None:
        with _lock:
            found = _in_force.get(key)
            if found is None:
                found = _in_force[key] = Tables(device, (*_user_paths(device), *shipped_paths(device)))
    return found


def forget() -> None:
    """Read tables anew at the next choice."""
    with _lock:
        _in_force.clear()


def user_path(device: Device) -> Path:
    """Where the user's own table of a device is, or would be.

    Raises:
        CacheError: the cache directory is not safe to use.
    """
    return default_cache().directory / "tuned" / f"{device.name}.jsonl"


def shipped_paths(device: Device) -> list[Path]:
    """The table of a device in the package, if there is one."""
    path = Path(__file__).with_name(f"{device.name}.jsonl")
    return [path] if path.exists() else []


def _user_paths(device: Device) -> list[Path]:
    with contextlib.suppress(CacheError):  # a call that looks for its kernel there raises it
        cache = default_cache()
        return [folder / "tuned" / f"{device.name}.jsonl" for folder in (cache.directory, *cache.layers)]
    return []


def _load(path: Path, device: Device) -> Table | None:
    try:
        return read_table(path, device)
    except FileNotFoundError:
        return None
    except (OSError, CacheError, TableError) as error:
        warn(path, error)
        return None


def warn(path: Path, problem: object) -> None:
    """Say once that something in a table is not used."""
    with _warned_lock:
        first = (path, str(problem)) not in _warned
        _warned.add((path, str(problem)))
    if first:
        logger.warning("tuned table: %s: %s; the cost model chooses instead", path, problem)


def read_table(path: Path, device: Device) -> Table:
    """The table in a file.

    Raises:
        FileNotFoundError: there is none.
        CacheError: someone else could have written it.
        TableError: it is not a table of this device.
    """
    shipped = path.parent == Path(__file__).parent  # as trusted as this code
    return Table(path.read_bytes() if shipped else read_trusted(path, MAX_BYTES), device)


# -- Writing.


def update(path: Path, device: Device, problem: GemmProblem, entries: Mapping[int, Entry]) -> None:
    """Add or replace entries of a problem (without its m) in a file; whole or not at all. Under ``lock``.

    A file that is no table of the device is kept beside, as ``.bak``, and replaced.

    Raises:
        OSError: the file system refused; the file is as it was.
    """
    problems: Problems = {}
    try:
        problems = read_table(path, device).problems()
    except FileNotFoundError:
        pass
    except (CacheError, TableError) as error:
        logger.warning("tuned table: %s is kept as %s.bak and begun anew: %s", path, path.name, error)
        os.replace(path, path.with_name(f"{path.name}.bak"))
    problems[problem] = problems.get(problem, {}) | dict(entries)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(encode(device, problems))
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(staged)
        raise
    forget()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[filelock.BaseFileLock]:
    """Hold the lock of a table, so that no other process's entries are lost between reading and writing.

    Raises:
        OSError: the directory cannot be made.
        filelock.Timeout: another process holds it for longer than ``JITGEMM_LOCK_TIMEOUT``.
    """
    import filelock

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = filelock.FileLock(path.with_suffix(".lock"), mode=0o600, preserve_lock_file=True)
    with held.acquire(timeout=settings.current().lock_timeout):
        yield held
