"""The one table of environment variables, and the settings in force.

No other module reads the environment. ``current()`` is cheap: the environment is parsed once,
at first use or at ``reload()``, and ``override()`` narrows it for one block of code (it follows
the context: threads and asyncio tasks don't see each other's overrides).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitgemm.errors import SettingsError

PREFIX = "JITGEMM_"


def _integer(low: int, high: int) -> tuple[Callable[[str], int], str]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse, f"an integer from {low} to {high}"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:  # also refuses nan
        raise ValueError
    return value


def _positive_seconds(text: str) -> float:
    if not (value := _seconds(text)):
        raise ValueError
    return value


def _boolean(text: str) -> bool:
    return {"0": False, "1": True, "false": False, "true": True, "off": False, "on": True}[text.strip().lower()]


def _choice(*values: str) -> tuple[Callable[[str], str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError
        return text

    return parse, " or ".join(values)


def _absolute_path(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute():  # a cache must not move with the working directory
        raise ValueError
    return path


def _remote(text: str) -> str:
    # No user or password: a URL appears in messages and logs.
    if not text.isprintable() or not re.fullmatch(r"(s3|gs)://[^/@]+(/.*)?|file:///.*[^/].*|memory://.*[^/].*", text):
        raise ValueError
    return text.rstrip("/")


def _directories(text: str) -> tuple[Path, ...]:
    return tuple(map(_absolute_path, text.split(os.pathsep)))


_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes that a text such as ``500M`` means.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.strip().upper())
    if match is None:
        raise ValueError(text)
    return int(match[1]) << _UNITS[match[2]]


SIZES = "bytes, such as 500M or 2G (K, M, G, T: powers of 1024)"
"""What ``parse_size`` accepts."""


def _cluster(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    value = (int(rows), int(columns or 1))
    if min(value) < 1:
        raise ValueError
    return value


def _config(text: str) -> str:
    from jitgemm.families.gemm import GemmConfig

    return str(GemmConfig.from_text(text))


@dataclass(frozen=True)
class Variable:
    """One environment variable: how it is parsed, what it does and when it is read."""

    field: str
    parse: Callable[[str], Any]
    accepts: str
    default: Any
    default_text: str
    doc: str
    read: str

    @property
    def name(self) -> str:
        """The variable's name in the environment."""
        return PREFIX + self.field.upper()


def _variable(
    field: str,
    parser: tuple[Callable[[str], Any], str],
    doc: str,
    *,
    default: Any = None,
    default_text: str = "chosen by the heuristics",
    read: str = "when a plan is made",
) -> Variable:
    return Variable(field, parser[0], parser[1], default, default_text, doc, read)


VARIABLES: tuple[Variable, ...] = (
    _variable(
        "cache_dir",
        (_directories, "an absolute path, or several with : between them"),
        "Directory of the kernel cache; of several, the first is written and the others are read only.",
        default_text="the user's cache directory",
        read="when the cache is first used",
    ),
    _variable(
        "cache_max_bytes",
        (parse_size, SIZES),
        "Bound of what entries take in the cache directory: when one is published, the least recently used go.",
        default_text="no bound",
        read="at each compile",
    ),
    _variable(
        "cache_group",
        (_boolean, "0 or 1"),
        "Share the cache directory with its group: files are made for the group, and those of its members are trusted.",
        default=False,
        default_text="0",
        read="when the cache is first used",
    ),
    _variable(
        "jit",
        _choice("allow", "warn", "forbid"),
        "What a call does when its kernel is in no cache: compile, compile with a warning, or raise CacheMissError.",
        default="allow",
        default_text="allow",
        read="at each look-up of a kernel",
    ),
    _variable(
        "nvrtc",
        (_absolute_path, "an absolute path"),
        "The NVRTC library to compile with.",
        default_text="the newest installed one that the driver accepts",
        read="at the first compile",
    ),
    _variable(
        "exact_nvrtc",
        (_boolean, "0 or 1"),
        "Accept cached kernels of the NVRTC version in use only, not of any that the driver can load.",
        default=False,
        default_text="0",
        read="at each look-up of a kernel",
    ),
    _variable(
        "lock_timeout",
        (_seconds, "seconds, at least 0"),
        "How long to wait for another process that compiles the same kernel before compiling it here too.",
        default=60.0,
        default_text="60",
        read="at each compile",
    ),
    _variable(
        "remote",
        (_remote, "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, file:///PATH or memory://NAME"),
        "A cache that hosts share, asked after a miss in the cache directory and before a compile.",
        default_text="none",
        read="at each look-up of a kernel",
    ),
    _variable(
        "remote_write",
        (_boolean, "0 or 1"),
        "Whether what is compiled here is uploaded to JITGEMM_REMOTE.",
        default=False,
        default_text="0",
        read="at each compile",
    ),
    _variable(
        "remote_timeout",
        (_positive_seconds, "seconds, more than 0"),
        "How long a look-up in JITGEMM_REMOTE, and likewise an upload, may hold up a call.",
        default=2.0,
        default_text="2",
        read="at each look-up of a kernel",
    ),
    _variable(
        "num_sms",
        _integer(0, 2**31 - 1),
        "Multiprocessors that calls may use; 0 means all.",
        default=0,
        default_text="0",
    ),
    _variable(
        "pdl",
        (_boolean, "0 or 1"),
        "Programmatic dependent launch: a kernel may start before the one ahead of it in its stream has ended.",
        default=False,
        default_text="0",
    ),
    _variable(
        "mk_alignment",
        _integer(1, 1 << 16),
        "Rows, or elements of K, to whose multiples the groups of a contiguous grouped GEMM are padded.",
        default=128,
        default_text="128",
    ),
    _variable("tile_m", _integer(1, 1024), "Rows of D in one tile."),
    _variable("tile_n", _integer(1, 1024), "Columns of D in one tile."),
    _variable("tile_k", _integer(1, 1024), "Elements of K in one pipeline stage."),
    _variable("stages", _integer(1, 64), "Depth of the shared-memory ring."),
    _variable("cluster", (_cluster, "MxN, such as 2x1"), "Thread-block cluster that shares operands by multicast."),
    _variable("split_k", _integer(1, 64), "CTAs of a cluster that share one tile, each with a part of K."),
    _variable("swap_ab", (_boolean, "0 or 1"), "Whether B's rows take the M side of the MMA."),
    _variable(
        "config",
        (_config, "a config as explain shows it, such as 8x64x128 s12 k4 swap"),
        "All of a configuration at once.",
    ),
    _variable(
        "expand_fp4",
        (_boolean, "0 or 1"),
        "Whether dense GEMMs expand MXFP4 weights to FP8 in memory first, a byte each that the call allocates.",
    ),
    _variable(
        "tuned",
        (_boolean, "0 or 1"),
        "Whether tuned tables win over the cost model.",
        default=True,
        default_text="1",
    ),
    _variable(
        "autotune",
        (_boolean, "0 or 1"),
        "Whether the first use of a problem measures candidates on the GPU and adds the best to the user's table.",
        default=False,
        default_text="0",
    ),
    _variable(
        "batch_invariant",
        (_boolean, "0 or 1"),
        "Whether a row of D has the same bits whatever m is.",
        default=False,
        default_text="0",
    ),
    _variable(
        "record",
        (_absolute_path, "an absolute path"),
        "A file to which every problem that is met is added, once a process, for `jitgemm prewarm --shapes`.",
        default_text="none",
    ),
    _variable(
        "debug",
        (_boolean, "0 or 1"),
        "Check the layouts of grouped GEMMs, which only the device knows, ahead of each launch; waits for the device.",
        default=False,
        default_text="0",
    ),
    _variable(
        "nvtx",
        (_boolean, "0 or 1"),
        "Whether launches and loads of kernels are NVTX ranges, for profilers.",
        default=False,
        default_text="0",
    ),
)
_BY_FIELD = {variable.field: variable for variable in VARIABLES}

TUNING_FIELDS = ("tile_m", "tile_n", "tile_k", "stages", "cluster", "split_k", "swap_ab", "config")
"""The settings that narrow the heuristics' candidates."""

_CHOOSING_FIELDS = (*TUNING_FIELDS, "expand_fp4", "tuned", "batch_invariant")


@dataclass(frozen=True)
class Settings:
    """A consistent set of values; equal settings are one object with one ``generation``."""

    cache_dir: tuple[Path, ...] | None = None
    cache_max_bytes: int | None = None
    cache_group: bool = False
    jit: str = "allow"
    nvrtc: Path | None = None
    exact_nvrtc: bool = False
    lock_timeout: float = 60.0
    remote: str | None = None
    remote_write: bool = False
    remote_timeout: float = 2.0
    num_sms: int = 0
    pdl: bool = False
    mk_alignment: int = 128
    tile_m: int | None = None
    tile_n: int | None = None
    tile_k: int | None = None
    stages: int | None = None
    cluster: tuple[int, int] | None = None
    split_k: int | None = None
    swap_ab: bool | None = None
    config: str | None = None
    expand_fp4: bool | None = None
    tuned: bool = True
    autotune: bool = False
    batch_invariant: bool = False
    record: Path | None = None
    debug: bool = False
    nvtx: bool = False
    generation: int = dataclasses.field(default=0, compare=False)

    def tuning(self) -> dict[str, Any]:
        """The tuning overrides in force, by field name."""
        values = {field: getattr(self, field) for field in TUNING_FIELDS}
        return {field: value for field, value in values.items() if value is not None}


_lock = threading.Lock()
_interned: dict[Settings, Settings] = {}
_process: Settings | None = None


@dataclass(frozen=True)
class _Override:
    """What the running blocks of ``override`` change, and the settings that makes of the process's."""

    values: Mapping[str, Any]
    base: Settings
    settings: Settings


_context: contextvars.ContextVar[_Override | None] = contextvars.ContextVar("jitgemm_settings", default=None)


def _intern(settings: Settings) -> Settings:
    with _lock:
        return _interned.setdefault(settings, dataclasses.replace(settings, generation=len(_interned)))


def from_environment(environ: Mapping[str, str]) -> Settings:
    """Parse the table's variables out of ``environ``.

    Raises:
        SettingsError: a ``JITGEMM_`` variable is unknown, or its value is not accepted.
    """
    known = {variable.name: variable for variable in VARIABLES}
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            raise SettingsError(f"{name} is not a setting of jitgemm; known are {', '.join(sorted(known))}")
        if text == "":  # set but empty means unset, as in most shells' idiom
            continue
        variable = known[name]
        try:
            values[variable.field] = variable.parse(text)
        except (ValueError, KeyError, RuntimeError):  # the last: a ~user who does not exist
            raise SettingsError(f"{name} is {text!r}; accepted is {variable.accepts}") from None
    return _intern(Settings(**values))


def current() -> Settings:
    """The settings in force here and now."""
    overridden = _context.get()
    if overridden is None:
        return _process or reload()
    if overridden.base is not _process:  # the process's settings have changed since the block began
        overridden = _overridden(overridden.values)
        _context.set(overridden)
    return overridden.settings


def reload() -> Settings:
    """Read the environment again; overrides of running blocks stay in force."""
    global _process
    _process = from_environment(os.environ)
    return current()


def assign(function: str, field: str, value: object) -> None:
    """Change a setting of the process until ``reload``; overrides of running blocks stay in force."""
    global _process
    _process = _intern(dataclasses.replace(_process or reload(), **{field: _checked(function, field, value)}))


def set_pdl(enabled: bool) -> None:
    """Launch kernels with programmatic dependent launch, or without it (the default), from the next call on.

    A kernel may then be set up while the one ahead of it in its stream ends. It still waits for that one before it
    reads or writes anything.

    Raises:
        SettingsError: ``enabled`` is not a boolean.
    """
    assign("set_pdl", "pdl", enabled)


def get_pdl() -> bool:
    """Whether calls launch with programmatic dependent launch."""
    return current().pdl


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Declare that groups start at multiples of ``new_value``: rows along m, elements along K; 128 by default.

    Raises:
        SettingsError: ``new_value`` is not an integer from 1 to 65536.
    """
    assign("set_mk_alignment_for_contiguous_layout", "mk_alignment", new_value)


def get_mk_alignment_for_contiguous_layout() -> int:
    """At which multiples of rows, or of elements of K, groups start."""
    return current().mk_alignment


@contextlib.contextmanager
def override(**values: Any) -> Iterator[Settings]:
    """Change settings for one block of code: ``with override(tile_m=128, jit="forbid"): ...``.

    Values may be given as Python values or as the text that the variable would hold.

    Raises:
        SettingsError: an unknown name, or a value that is not accepted.
    """
    checked = {
        field: _BY_FIELD[field].default if value is None and field in _BY_FIELD else _checked("override", field, value)
        for field, value in values.items()
    }
    running = _context.get()
    token = _context.set(_overridden({**(running.values if running else {}), **checked}))
    try:
        yield current()
    finally:
        _context.reset(token)


def _overridden(values: Mapping[str, Any]) -> _Override:
    base = _process or reload()
    return _Override(values, base, _intern(dataclasses.replace(base, **values)))


def as_written(value: Any) -> str:
    """A value as the text that its variable would hold."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return (os.pathsep if all(isinstance(item, Path) for item in value) else "x").join(map(str, value))
    return str(value)


def choosing_variables(settings: Settings) -> dict[str, str]:
    """The variables, with values, that make another process choose the kernels that ``settings`` do."""
    chosen = ((_BY_FIELD[field], getattr(settings, field)) for field in _CHOOSING_FIELDS)
    return {variable.name: as_written(value) for variable, value in chosen if value != variable.default}


def _checked(function: str, field: str, value: Any) -> Any:
    """A value that a caller of ``function`` gave, parsed as the variable's text would be."""
    variable = _BY_FIELD.get(field)
    if variable is None:
        raise SettingsError(f"{function}: {field!r} is not a setting; known are {', '.join(sorted(_BY_FIELD))}")
    try:
        return variable.parse(as_written(value))
    except (ValueError, KeyError, RuntimeError):
        raise SettingsError(f"{function}: {field} is {value!r}; accepted is {variable.accepts}") from None


def table() -> list[tuple[str, str, str, str]]:
    """Rows of (variable, default, accepted values, what it does and when it is read) for the docs."""
    return [(v.name, v.default_text, v.accepts, f"{v.doc} Read {v.read}.") for v in VARIABLES]


def in_force() -> list[tuple[str, Any, str]]:
    """Rows of (variable, value, where it comes from: ``override``, ``environment`` or ``default``)."""
    here, process = current(), _process or reload()

    def source(v: Variable) -> str:
        if getattr(here, v.field) != getattr(process, v.field):
            return "override"
        return "environment" if os.environ.get(v.name) else "default"

    return [(v.name, getattr(here, v.field), source(v)) for v in VARIABLES]


def other_profiler() -> bool:
    """Whether ``DG_USE_NVIDIA_TOOLS`` says that another tool watches the GPU; profilers can't share it."""
    return os.environ.get("DG_USE_NVIDIA_TOOLS", "0") not in ("", "0")


def cuda_home() -> Path | None:
    """Where ``CUDA_HOME`` or ``CUDA_PATH`` says that a CUDA toolkit is installed, if either is set."""
    text = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(text) if text else None
