"""What several tests need: a made-up kernel, and Python processes that find the checkout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jitgemm.cache_key import build_digest, key_of
from jitgemm.compiler import Cubin, CubinMetadata
from jitgemm.families.transpose_scales import FAMILY

ROOT = Path(__file__).resolve().parents[1]
SPEC = FAMILY.spec("sm_90a")
BUILDS = {key_of(SPEC, digit * 64): digit * 64 for digit in "0123456789"}
KEYS = tuple(BUILDS)
"""Keys that ``SPEC`` would have with other templates."""

KEY = KEYS[0]
NOBODY = 65534


def make_cubin(key: str = KEY, version: str = "13.5", image: bytes = b"\x7fELF machine code" * 8) -> Cubin:
    """A kernel that no compiler has seen; valid under one of ``KEYS`` and under that of ``SPEC``."""
    metadata = CubinMetadata(
        key=key,
        spec=SPEC.to_dict(),
        kernel_name="transpose_scales",
        arch="sm_90a",
        nvrtc_version=version,
        build=BUILDS.get(key) or build_digest(SPEC.arch),
        compile_seconds=0.25,
        registers=32,
        spill_bytes=0,
        stack_bytes=0,
        warnings=("a remark",),
        sha256=hashlib.sha256(image).hexdigest(),
        size=len(image),
    )
    return Cubin(image, metadata)


def environment(**variables: str) -> dict[str, str]:
    """The environment for a Python process that imports the package from the checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JITGEMM_")}
    return {**clean, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), **variables}


def in_forked_child(action: Callable[[], None], *, user: int | None = None) -> int:
    """Run ``action`` in a forked child, as another user if asked; its exit code, 0 if it raised nothing."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(60)  # a child that hangs is a failure, not a hang of the tests
        try:
            if user is not None:
                os.setgid(user)
                os.setuid(user)
            action()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_processes(count: int, action: Callable[[int], Any]) -> list[Any]:
    """What ``action(index)`` returns (JSON) in each of ``count`` forked children, which are all let go at once.

    A child inherits all that is imported, so that they really start together.
    """
    barrier, release = os.pipe()
    children: list[tuple[int, int]] = []
    for index in range(count):
        result, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            os.close(release)
            try:
                os.read(barrier, 1)  # its end comes when the parent lets go
                os.write(answer, json.dumps(action(index)).encode())
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.close(answer)
        children.append((pid, result))
    os.close(barrier)
    os.close(release)
    answers = []
    for pid, result in children:
        with open(result, "rb") as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        assert text, "a child failed; its traceback is on stderr"
        answers.append(json.loads(text))
    return answers


@contextlib.contextmanager
def warnings_of(logger: logging.Logger) -> Any:
    """The messages that are logged in the block, in a process of whatever handlers."""
    texts: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
