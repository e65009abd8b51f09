# SPDX-License-Identifier: Apache-2.0
"""A private systemd, so that a shipped unit runs as on a node: a service manager in its own mount namespace.

In: a unit and a drop-in for it. Out: a `Manager`, whose `ctl` is `systemctl`. It shares the machine's process ids, so
that an exporter sees the VMs. It is systemd's user manager run by root, which applies a unit's hardening as the system
manager does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.exporters import running

_RUN = "/run/systemd"
_STATE = f"{_RUN}/state"
"""XDG_CONFIG_HOME: a user manager's StateDirectory= is below it."""
_ENVIRONMENT = os.environ | {"XDG_RUNTIME_DIR": f"{_RUN}/user", "XDG_CONFIG_HOME": _STATE}
_SCRIPT = """
set -e
mount -t tmpfs none /run/systemd
cd /run/systemd
mkdir -p system user inaccessible/dir "state/systemd/user/$1.d"
chmod 700 user
touch inaccessible/reg; mkfifo inaccessible/fifo; mknod inaccessible/chr c 0 0; mknod inaccessible/blk b 0 0
chmod 0 inaccessible/*
cp "$2" "state/systemd/user/$1"
printf '%s\\n' "$3" > "state/systemd/user/$1.d/here.conf"
for group in $4; do mkdir "$group"; echo $$ > "$group/cgroup.procs"; done
exec /lib/systemd/systemd --user
"""


@dataclass(frozen=True)
class Manager:
    """A running service manager."""

    pid: int

    def ctl(self, *arguments: str) -> str:
        """The output of `systemctl --user ARGUMENTS`; CalledProcessError if it fails."""
        command = ["nsenter", "--mount", f"--target={self.pid}", "systemctl", "--user", *arguments]
        return subprocess.run(
            command, env=_ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    def up(self) -> bool:
        """Whether the manager answers."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return "Version=" in self.ctl("show", "--property=Version")
        return False

    def state(self, unit: str) -> Path:
        """The unit's StateDirectory=, by a path outside the mount namespace."""
        return Path(f"/proc/{self.pid}/root{_STATE}/{unit.partition('-exporter')[0]}")


@contextlib.contextmanager
def manager(unit: Path, change: str) -> Iterator[Manager]:
    """Runs a manager that has the unit, with the drop-in `change`."""
    mounted = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [at for at, kind in mounted if kind == "cgroup2" or (kind == "cgroup" and at.endswith("/systemd"))]
    groups = [f"{root}/ebpf-mig-test-{os.getpid()}" for root in roots]
    command = ["unshare", "--mount", "sh", "-c", _SCRIPT, "sh", unit.name, str(unit), change, " ".join(groups)]
    try:
        with running(*command, env=_ENVIRONMENT) as process:
            yield Manager(process.pid)
    finally:
        for group in groups:
            for inner, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(inner)  # noqa: PTH106
