# SPDX-License-Identifier: Apache-2.0
"""Child processes that cannot outlive us, and a private place for their files.

In: command lines. Out: running processes that the kernel kills when we die, even by SIGKILL, and a directory that is
removed at the end; one left by a killed run is removed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ebpf_mig.errors import PreflightError

_PREFIX = "ebpf-mig-lab-"
_LONGEST_BASE = 107 - len("/ebpf-mig-lab-12345678/destination.events.sock")
_LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]):
    os._exit(125)  # the parent died before that took effect
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
"""
"""Runs as a program of its own, since code between fork and exec can deadlock in a process with threads."""


def spawn(command: Sequence[str], stdout: int | IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a child that gets SIGKILL when the calling *thread* ends, and no Ctrl-C from our terminal.

    Call it from the main thread, or from one that outlives the child (prctl(2), PR_SET_PDEATHSIG). PreflightError if
    there is no such program.
    """
    path = shutil.which(command[0])
    if path is None:
        raise PreflightError(f"cannot run {command[0]}: no such program")
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(Path(path).absolute())]
    try:
        return subprocess.Popen(
            [*launcher, *command[1:]], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0
        )
    except OSError as error:
        raise PreflightError(f"cannot start {command[0]}: {error.strerror}") from error


def python_environment() -> dict[str, str]:
    """Our environment, for a `python -P` of our own: it imports from where we did, but not from the current directory.

    An installed package is found without this; one that was found by PYTHONPATH, or in a clone, is not.
    """
    own = str(Path(__file__).resolve().parents[2])
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(path).is_absolute()]
    ways = [path for path in given if path != os.path.realpath(".")]
    if own in sys.path and own not in ways and not _found_by_itself(own):
        ways.append(own)
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return rest | ({"PYTHONPATH": os.pathsep.join(ways)} if ways else {})


def _found_by_itself(path: str) -> bool:
    """Whether every Python of this installation has a directory on its path: what PYTHONPATH names comes first."""
    places = [Path(place) for place in site.getsitepackages()]
    links = (link for place in places if place.is_dir() for link in place.glob("*.pth"))
    return Path(path) in places or any(path in link.read_text(errors="replace").splitlines() for link in links)


def status_of(process: subprocess.Popen[bytes], timeout_s: float = 0) -> int | None:
    """How a child ended, as `Popen.returncode`, after at most so long; None while it runs.

    It stays a zombie, so its process group's number cannot become another's before `end_group`.
    """
    until = time.monotonic() + timeout_s
    while process.returncode is None:
        try:
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody else reaped it
            return process.poll()
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        if time.monotonic() >= until:
            return None
        time.sleep(0.01)
    return process.returncode


def end_group(process: subprocess.Popen[bytes], patience_s: float = 0) -> None:
    """Gives a child (started with `process_group=0`) so long to end; then kills it and all that it began, and reaps it.

    A shell between us and ssh, say, would leave ssh behind.
    """
    if process.returncode is None:
        status_of(process, patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills and reaps; a lab VM has nothing to save."""
    if process.poll() is None:
        process.kill()
    process.wait()


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A new 0700 directory, removed on leaving; directories of dead runs are removed first."""
    _sweep()
    path, lock = _make_locked()
    try:
        yield path
    finally:
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def is_private(path: str) -> bool:
    """Whether a file lies in a private directory, and so is gone in a moment."""
    return Path(path).parent.name.startswith(_PREFIX)


def _base() -> str:
    """Where private directories lie: TMPDIR's, unless sockets below it could not be bound (unix(7): 108 bytes)."""
    base = tempfile.gettempdir()
    return base if len(os.fsencode(base)) <= _LONGEST_BASE else "/tmp"  # noqa: S108


def _make_locked() -> tuple[Path, int]:
    """A new directory and the descriptor that locks it; tried again if a sweep took it between the two steps."""
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base()))
        except OSError as error:
            raise PreflightError(
                f"cannot make a directory in {_base()}: {error.strerror}", "set TMPDIR to a writable one"
            ) from error
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        if path.exists():
            return path, lock
        os.close(lock)


def _sweep() -> None:
    """Removes our own directories whose lock nobody holds: their run was killed."""
    for path in Path(_base()).glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            with contextlib.suppress(OSError):  # in use by a run that lives
                if os.fstat(fd).st_uid == os.getuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
