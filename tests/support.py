"""What several tests need: a made-up kernel, and Python processes that find the checkout."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from jitgemm.compiler import Cubin, CubinMetadata
from jitgemm.families.transpose_scales import FAMILY

ROOT = Path(__file__).resolve().parents[1]
SPEC = FAMILY.spec("sm_90a")
KEY = "0123456789abcdef" * 4
NOBODY = 65534


def make_cubin(key: str = KEY, version: str = "13.5", image: bytes = b"\x7fELF machine code" * 8) -> Cubin:
    """A valid kernel that no compiler has seen."""
    metadata = CubinMetadata(
        key=key,
        spec=SPEC.to_dict(),
        kernel_name="jitgemm_transpose_scales",
        arch="sm_90a",
        nvrtc_version=version,
        build="b" * 64,
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
