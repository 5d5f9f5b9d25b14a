"""NVRTC through ctypes: find the library, compile a rendered kernel, read its resource use from the log.

ctypes rather than cuda-bindings, because a binding serves one major version, and which of the installed
libraries is right depends on the driver. Nothing is loaded before the first compile.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgemm import settings
from jitgemm.errors import CompileError
from jitgemm.families.base import KernelSpec

if TYPE_CHECKING:
    from jitgemm.render import KernelSource

Version = tuple[int, int]

UNKNOWN = -1
"""Resource use that NVRTC's log did not tell."""


@dataclass(frozen=True)
class CubinMetadata:
    """What is known of a compiled kernel; stored with it."""

    key: str
    spec: dict[str, Any]
    kernel_name: str
    arch: str
    nvrtc_version: str
    build: str  # digest of templates, generators and options; with the spec it gives the key
    compile_seconds: float
    registers: int
    spill_bytes: int  # stores and loads together
    stack_bytes: int
    warnings: tuple[str, ...]  # ptxas advisories that cost performance, such as serialized WGMMA
    sha256: str  # of the image
    size: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; ``from_dict`` reverses it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CubinMetadata:
        """Reverse ``to_dict`` on data that nobody vouches for.

        Raises:
            ValueError: a field is missing, unknown, of a wrong type, or holds unprintable text.
        """
        if data.keys() != _METADATA_TYPES.keys():
            raise ValueError("its fields are not those of a kernel's metadata")
        for name, accepted in _METADATA_TYPES.items():
            if not isinstance(data[name], accepted) or isinstance(data[name], bool):
                raise ValueError(f"field {name} is {type(data[name]).__name__}")
        KernelSpec.from_dict(data["spec"])
        if not all(map(str.isprintable, _strings(data))):  # they reach terminals
            raise ValueError("a field holds unprintable text")
        if not all(isinstance(warning, str) for warning in data["warnings"]):
            raise ValueError("field warnings holds something else than text")
        if not all(abs(data[name]) < 2**63 for name, accepted in _METADATA_TYPES.items() if int in accepted):
            raise ValueError("a number is out of range")  # nan too
        return cls(**{**data, "warnings": tuple(data["warnings"])})


_METADATA_TYPES: dict[str, tuple[type, ...]] = {
    "key": (str,),
    "spec": (dict,),
    "kernel_name": (str,),
    "arch": (str,),
    "nvrtc_version": (str,),
    "build": (str,),
    "compile_seconds": (float, int),
    "registers": (int,),
    "spill_bytes": (int,),
    "stack_bytes": (int,),
    "warnings": (list, tuple),
    "sha256": (str,),
    "size": (int,),
}


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(name)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


@dataclass(frozen=True)
class Cubin:
    """A kernel's machine code and what is known of it."""

    image: bytes
    metadata: CubinMetadata


@dataclass(frozen=True)
class NvrtcLibrary:
    """An NVRTC library on this machine."""

    path: Path
    version: Version

    @property
    def version_text(self) -> str:
        """Such as ``13.5``."""
        return version_text(self.version)


@dataclass(frozen=True)
class NvrtcCandidate:
    """One library that the search met, and why it was chosen or not."""

    library: NvrtcLibrary
    chosen: bool
    reason: str


def version_text(version: Version) -> str:
    """``(13, 5)`` as ``13.5``."""
    return f"{version[0]}.{version[1]}"


def compile_options(arch: str) -> tuple[str, ...]:
    """NVRTC's options for one architecture; part of the cache key."""
    return (
        f"--gpu-architecture={arch}",
        "--std=c++20",
        "-default-device",
        "--ptxas-options=-v",
        "--no-cache",  # ours is the cache; NVRTC's own would answer without the resource use that -v prints
        "-diag-suppress=177",  # a constant that this variant of a kernel does not use
    )


# Discovery


@functools.cache
def driver_version() -> Version | None:
    """The CUDA version of the driver, without making a context; None where there is no driver."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if libcuda.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_accepts(version: Version) -> bool:
    """Whether the driver loads what NVRTC of ``version`` compiled; without a driver everything is accepted.

    Within one major version the driver loads cubins of newer minor versions too.
    """
    driver = driver_version()
    return driver is None or version[0] <= driver[0]


def find_nvrtc() -> NvrtcLibrary:
    """The library that compiles here: ``JITGEMM_NVRTC``, else the newest that the driver accepts.

    The version is read from file names where possible, so that this loads no library.

    Raises:
        CompileError: there is none; the message says what was found and why it does not serve.
    """
    return _find_nvrtc(settings.current().nvrtc)


@functools.lru_cache(maxsize=8)
def _find_nvrtc(override: Path | None) -> NvrtcLibrary:
    candidates = _candidates(override)
    for candidate in candidates:
        if candidate.chosen:
            return candidate.library
    if not candidates:
        raise CompileError(
            "no NVRTC library was found in site-packages, by the system's loader or under CUDA_HOME; "
            "install one with: pip install nvidia-cuda-nvrtc"
        )
    reasons = "; ".join(f"{candidate.library.path}: {candidate.reason}" for candidate in candidates)
    raise CompileError(f"no installed NVRTC library serves this driver: {reasons}")


def list_nvrtc() -> list[NvrtcCandidate]:
    """Every library that the search meets, best first, with the reason why it was chosen or not.

    Raises:
        CompileError: ``JITGEMM_NVRTC`` names a file that is not an NVRTC library.
    """
    return _candidates(settings.current().nvrtc)


def _candidates(override: Path | None) -> list[NvrtcCandidate]:
    if override is not None:
        return [NvrtcCandidate(_identify(override), True, "JITGEMM_NVRTC names it")]
    libraries = sorted(_installed(), key=lambda library: library.version, reverse=True)
    best = next((library for library in libraries if driver_accepts(library.version)), None)
    return [NvrtcCandidate(library, library is best, _reason(library, best)) for library in libraries]


def _reason(library: NvrtcLibrary, best: NvrtcLibrary | None) -> str:
    driver = driver_version()
    if library is best:
        return "the newest" if driver is None else f"the newest that the CUDA {version_text(driver)} driver accepts"
    if driver is not None and not driver_accepts(library.version):
        return f"version {library.version_text} is too new for the CUDA {version_text(driver)} driver"
    assert best is not None
    return f"version {best.version_text} is preferred"


def _installed() -> list[NvrtcLibrary]:
    """Libraries in site-packages and under CUDA_HOME; without any, what the system's loader knows."""
    found: dict[Path, NvrtcLibrary] = {}
    for folder in _folders():
        for path in sorted(folder.glob("libnvrtc.so.*")):
            real = path.resolve()
            if real not in found:
                with contextlib.suppress(CompileError):  # a broken library must not hide a good one
                    found[real] = _identify(path)
    return list(found.values()) or list(_known_to_loader())


def _folders() -> Iterator[Path]:
    nvidia = importlib.util.find_spec("nvidia")  # the name space that the wheels of CUDA's parts share
    for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
        yield from sorted(Path(root).glob("*/lib"))
    home = settings.cuda_home()
    if home is not None:
        yield home / "lib64"


def _known_to_loader() -> Iterator[NvrtcLibrary]:
    for soname in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            yield NvrtcLibrary(Path(soname), _load(soname).version)
        except CompileError:
            continue


def _identify(path: Path) -> NvrtcLibrary:
    """Tell the version by the builtins library that lies beside; load the library where that fails."""
    major = re.fullmatch(r"libnvrtc\.so\.(\d+)(\.[\d.]+)?", path.name)
    beside = path.resolve().parent.glob("libnvrtc-builtins.so.*")
    matches = (re.match(r"libnvrtc-builtins\.so\.(\d+)\.(\d+)", builtins.name) for builtins in beside)
    versions = {(int(match[1]), int(match[2])) for match in matches if match and major and match[1] == major[1]}
    return NvrtcLibrary(path, versions.pop() if len(versions) == 1 else _load(str(path)).version)


# Compilation


class _Nvrtc:
    """A loaded library. Its functions release the GIL and may run in several threads at once."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
            self.version: Version = (major.value, minor.value)
            builtins = Path(path).resolve().with_name(f"libnvrtc-builtins.so.{version_text(self.version)}")
            if Path(path).is_absolute() and builtins.exists():
                # Version 13.0 does not look beside itself for them, but by name, which a loaded library answers to.
                ctypes.CDLL(str(builtins))
        except (OSError, AttributeError) as error:
            raise CompileError(f"{path} is not a usable NVRTC library: {error}") from error

    def call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            text = self._library.nvrtcGetErrorString(status).decode(errors="replace")
            raise CompileError(f"{function}: {text}")

    def read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, source: KernelSource, options: tuple[str, ...]) -> tuple[bytes, str]:
        """The cubin and the log."""
        program = ctypes.c_void_p()
        self.call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.text.encode(),
            f"{source.name}.cu".encode(),
            len(source.headers),
            _c_strings(source.headers.values()),
            _c_strings(source.headers),
        )
        try:
            self.call("nvrtcCompileProgram", program, len(options), _c_strings(options))
        except CompileError as error:
            raise CompileError(f"{error}\n{self._log(program)}") from None
        else:
            return self.read("CUBIN", program), self._log(program)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        return self.read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")


def _c_strings(texts: Any) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


@functools.cache
def _load(path: str) -> _Nvrtc:
    return _Nvrtc(path)


def compile_source(source: KernelSource, spec: KernelSpec, key: str) -> Cubin:
    """Compile for ``spec.arch``; ``spec`` and ``key`` go into the metadata.

    Raises:
        CompileError: no library serves, or NVRTC rejected the source; the message holds its whole log.
    """
    from jitgemm.cache_key import build_digest  # which imports this module

    library = find_nvrtc()
    nvrtc = _load(str(library.path))
    start = time.perf_counter()
    try:
        image, log = nvrtc.compile(source, compile_options(spec.arch))
    except CompileError as error:
        version = version_text(nvrtc.version)
        raise CompileError(f"NVRTC {version} failed on {source.name}.cu for {spec.arch}: {error}") from None
    seconds = time.perf_counter() - start
    registers, spills, stack = resource_use(log, source.name)
    metadata = CubinMetadata(
        key=key,
        spec=spec.to_dict(),
        kernel_name=source.name,
        arch=spec.arch,
        nvrtc_version=version_text(nvrtc.version),
        build=build_digest(spec.arch),
        compile_seconds=round(seconds, 6),
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        warnings=performance_warnings(log),
        sha256=hashlib.sha256(image).hexdigest(),
        size=len(image),
    )
    return Cubin(image, metadata)


def resource_use(log: str, kernel_name: str) -> tuple[int, int, int]:
    """Registers, bytes spilled (stores and loads) and bytes of stack of a kernel, from ``ptxas -v`` in the log.

    Functions that were not inlined count towards the bytes. What the log does not tell is ``UNKNOWN``.
    """
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    entry = re.search(rf"Compiling entry function '{re.escape(kernel_name)}'.*?Used (\d+) registers", log, re.DOTALL)
    registers = int(entry[1]) if entry else UNKNOWN
    if not frames:
        return registers, UNKNOWN, UNKNOWN
    return registers, sum(int(f[1]) + int(f[2]) for f in frames), sum(int(f[0]) for f in frames)


def performance_warnings(log: str) -> tuple[str, ...]:
    """Advisories of ptxas (codes C75xx) in the log, each once."""
    lines = (" ".join(line.split()) for line in log.splitlines() if re.search(r"\bC75\d\d\b", line))
    return tuple(dict.fromkeys(lines))
