"""Whether the cache directory takes files."""

from __future__ import annotations

import os.path
import tempfile
from pathlib import Path


def write_fault(directory: Path) -> str | None:
    """Why files cannot be made in ``directory``, or None where they can; leaves nothing behind.

    A directory that does not exist is as good as its nearest ancestor that does.
    """
    existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    try:
        tempfile.TemporaryFile(dir=existing).close()  # also tells a full disk and a read-only mount
    except OSError as error:
        return error.strerror
    return None
