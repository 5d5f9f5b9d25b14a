"""Runs the command as users do: a process of its own, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

NARROW = {
    "JITGEMM_TILE_M": "64",
    "JITGEMM_TILE_N": "128",
    "JITGEMM_CLUSTER": "1x1",
    "JITGEMM_SPLIT_K": "1",
    "JITGEMM_SWAP_AB": "0",
}
"""Overrides that leave few kernels to build, so that the tests are quick."""

TINY = '{"layer": "tiny", "n": 256, "k": 512, "recipe": "fp8_1x128_128x128"}\n'


@dataclass
class Jitgemm:
    """The ``jitgemm`` command with its own cache, and a torch that tells when it is imported."""

    home: Path
    cache: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        decoys = self.home / "decoys"
        decoys.mkdir(parents=True, exist_ok=True)
        self.tell_tale = decoys / "imported"
        (decoys / "torch.py").write_text(f"open({str(self.tell_tale)!r}, 'w').close()\nraise ImportError('decoy')\n")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("JITGEMM_")}
        self.environment = {
            **clean,
            "PYTHONPATH": os.pathsep.join((str(decoys), str(ROOT))),
            "HOME": str(self.home),
            "JITGEMM_CACHE_DIR": str(self.cache),
            **self.environment,
        }

    @staticmethod
    def command(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "jitgemm.cache_tools.cli", *map(str, arguments)]

    def __call__(
        self,
        *arguments: object,
        code: int = 0,
        environment: Mapping[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run it, wait for it, and check its exit code and what every command promises."""
        done = subprocess.run(
            self.command(*arguments),
            env={**self.environment, **(environment or {})},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=preexec,
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert not self.tell_tale.exists(), f"{arguments} imported torch"
        return done

    def json(self, *arguments: object, **options: Any) -> dict[str, Any]:
        """Run it with ``--json``; the one object that it prints."""
        answer: dict[str, Any] = json.loads(self(*arguments, "--json", **options).stdout)
        assert answer["schema"] == 1
        return answer

    def cached_files(self) -> list[Path]:
        return sorted(self.cache.rglob("*.jgk"))
