# SPDX-License-Identifier: Apache-2.0
"""A real sshd on one side of a `Link`, so that `migrate` can drive both sides from the other.

In: a directory, the link. Out: `Server`: an sshd with new keys, and a directory with an `ssh` that knows them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ebpf_mig.lab.netns import ADDRESSES, Link

PORT = 2222


class Server:
    """An sshd on the destination's side. `environment`: the environment of the commands it runs."""

    def __init__(
        self, directory: Path, link: Link, environment: dict[str, str] | None = None, before: str = ""
    ) -> None:
        self.directory, self._link, self._before = directory, link, before
        directory.mkdir()
        directory.chmod(0o700)
        for name in ("host", "user", "other"):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name))
        shutil.copy(directory / "user.pub", directory / "authorized_keys")
        tools = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        settings = {
            "Port": PORT,
            "ListenAddress": ADDRESSES["destination"],
            "HostKey": directory / "host",
            "AuthorizedKeysFile": directory / "authorized_keys",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "SetEnv": " ".join(f"{k}={v}" for k, v in ({"PATH": tools} | (environment or {})).items()),
        }
        (directory / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        self.trust("host")
        (directory / "bin").mkdir()
        script = directory / "bin" / "ssh"
        script.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory}/ssh_config "$@"\n')
        script.chmod(0o755)
        (directory / "ssh_config").write_text(
            f"Host far\n HostName {ADDRESSES['destination']}\n Port {PORT}\n User root\n"
            f" IdentityFile {directory}/user\n IdentitiesOnly yes\n UserKnownHostsFile {directory}/known_hosts\n"
        )

    def trust(self, key: str) -> None:
        """Makes `key` the host key that the client expects."""
        public = (self.directory / f"{key}.pub").read_text().split()
        (self.directory / "known_hosts").write_text(f"[{ADDRESSES['destination']}]:{PORT} {' '.join(public[:2])}\n")

    def __enter__(self) -> Server:
        Path("/run/sshd").mkdir(exist_ok=True)
        program = shutil.which("sshd", path="/usr/sbin:/usr/bin") or "sshd"
        daemon = shlex.join([program, "-D", "-e", "-f", f"{self.directory}/sshd_config"])
        command = ["unshare", "--mount", "sh", "-ec", f"{self._before}\nexec {daemon}"]
        with self._link.inside("destination"), (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + 10
        while "Server listening" not in (self.directory / "log").read_text():
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < until, "sshd does not listen"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()

    @property
    def environment(self) -> dict[str, str]:
        """An environment in which `ssh far` connects to this sshd."""
        return os.environ | {"PATH": f"{self.directory}/bin:{os.environ['PATH']}"}

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


def ssh_of(parent: int) -> int | None:
    """The ssh client that a process has started."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            head, _, rest = entry.read_text(errors="replace").rpartition(")")
            if int(rest.split()[1]) == parent and head.partition("(")[2] == "ssh":
                return int(entry.parent.name)
    return None


def ssh_during(process: subprocess.Popen[str], begun: Path, after_s: float) -> int:
    """The ssh client of a driven migration, `after_s` after this side's recording was created."""
    until = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(after_s)
    ssh = ssh_of(process.pid)
    assert ssh is not None
    return ssh
