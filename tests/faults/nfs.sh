#!/usr/bin/env bash
# Scenario 2, by hand: two clients of one NFS export, 8 processes each, at one cold key. At most one compile per client,
# the same kernel everywhere, a valid entry, nobody fails. Exit code 0 if so.
#
#   sudo PYTHON=.venv-test/bin/python tests/faults/nfs.sh            mounts an export of its own twice, on this host;
#                                                                    needs root and a running NFS server (exportfs)
#   PYTHON=.venv-test/bin/python tests/faults/nfs.sh MOUNT MOUNT     two mounts of one export that are there already
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

if [[ $# -eq 0 ]]; then
    work=$(mktemp -d)
    mkdir "$work/export" "$work/a" "$work/b"
    chmod 755 "$work"
    clean() {
        umount "$work/a" "$work/b" 2>/dev/null || true
        exportfs -u "127.0.0.1:$work/export" || true
        rm -rf "$work"
    }
    trap clean EXIT
    exportfs -o rw,sync,no_root_squash,no_subtree_check,insecure,fsid=4242 "127.0.0.1:$work/export"
    for client in a b; do # without a shared cache of attributes and data, the mounts see as much of each other as two hosts
        mount -t nfs -o vers=4.2,nosharecache "127.0.0.1:$work/export" "$work/$client"
    done
    set -- "$work/a" "$work/b"
elif [[ $# -ne 2 ]]; then
    echo "usage: nfs.sh [MOUNT MOUNT]" >&2
    exit 2
fi

PYTHONPATH="$PWD:$PWD/tests" "$python" - "$1" "$2" <<'PROGRAM'
import os
import shutil
import sys
from pathlib import Path

from support import SPEC, in_processes, warnings_of

from jitgemm import builder, settings
from jitgemm.cache import KernelCache, logger

clients = [Path(mount).resolve() / "jitgemm-nfs-test" for mount in sys.argv[1:3]]
before = builder.stats().compiles


def work(index):
    with settings.override(cache_dir=clients[index % 2]), warnings_of(logger) as texts:
        built = builder.build(SPEC)
    return index % 2, builder.stats().compiles - before, built.cubin.metadata.sha256, texts


try:
    results = in_processes(16, work)
    compiles = [sum(count for client, count, *_ in results if client == one) for one in (0, 1)]
    kernels = {sha256 for _, _, sha256, _ in results}
    warnings = sorted({text for *_, texts in results for text in texts})
    entries = [entry.problem for client in clients for entry in KernelCache(client).entries()]
    print(f"compiles by client: {compiles}; kernels: {len(kernels)}; entries: {entries}; warnings: {warnings}")
    right = max(compiles) <= 1 and sum(compiles) >= 1 and len(kernels) == 1 and entries == [None, None] and not warnings
finally:
    shutil.rmtree(clients[0], ignore_errors=True)
print("right" if right else "WRONG")
sys.exit(not right)
PROGRAM
