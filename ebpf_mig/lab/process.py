# SPDX-License-Identifier: Apache-2.0
"""Child processes that cannot outlive us, and a private place for their files.

In: command lines. Out: running processes that the kernel kills when we die, even by SIGKILL, and a directory that is
removed at the end; one left by a killed run is removed by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ebpf_mig.errors import PreflightError

_PR_SET_PDEATHSIG = 1
_PREFIX = "ebpf-mig-lab-"
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child: SIGKILL when the thread that forked it ends (prctl(2)); also off our terminal's Ctrl-C."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)


def spawn(command: Sequence[str], stdout: int | IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a child from the main thread; PreflightError if the program cannot be started."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - prctl and setpgid only, before any thread matters
        )
    except OSError as error:
        raise PreflightError(f"cannot run {command[0]}: {error.strerror}") from error


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills and reaps; a lab VM has nothing to save."""
    if process.poll() is None:
        process.kill()
    process.wait()


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A new 0700 directory, removed on leaving; directories of dead runs are removed first."""
    _sweep()
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield path
    finally:
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def _sweep() -> None:
    """Removes our own directories whose lock nobody holds: their run was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if path.stat().st_uid != os.getuid():
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # in use by a run that lives
        finally:
            os.close(fd)
