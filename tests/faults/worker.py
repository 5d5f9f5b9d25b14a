"""A process of the fault tests; ``python worker.py build|hold`` says "ready" and does it when told to go on."""

from __future__ import annotations

import json
import logging
import sys
import time

from support import SPEC

from jitgemm import builder
from jitgemm.cache import default_cache
from jitgemm.cache_key import cache_key


def main() -> None:
    logging.basicConfig(format="%(message)s")
    if sys.argv[1] == "hold":
        with default_cache().lock(cache_key(SPEC)):
            print("ready", flush=True)
            time.sleep(600)
    print("ready", flush=True)
    sys.stdin.readline()
    built = builder.build(SPEC)
    print(
        json.dumps(
            {
                "source": built.source,
                "sha256": built.cubin.metadata.sha256,
                "compiles": builder.stats().compiles,
                "imported": sorted({"jinja2", "filelock", "torch", "cuda"} & set(sys.modules)),
            }
        )
    )


if __name__ == "__main__":
    main()
