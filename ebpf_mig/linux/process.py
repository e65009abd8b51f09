# SPDX-License-Identifier: Apache-2.0
"""Child processes that cannot outlive this process, and a private directory for their files.

In: command lines. Out: running processes that the kernel kills when this process dies, even by SIGKILL; and a directory
that is removed at the end. The next run removes a directory that a killed run left.
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
"""Runs as a separate program, since code between fork and exec can deadlock in a process with threads."""


def spawn(command: Sequence[str], stdout: int | IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a child that gets SIGKILL when the calling *thread* ends, and no Ctrl-C from the terminal.

    Call it from the main thread, or from a thread that outlives the child (prctl(2), PR_SET_PDEATHSIG). PreflightError
    if the program does not exist.
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
    """The environment for a child `python -P`: it imports from the same places as this process, except the current
    directory.

    An installed package is found without this. A package from PYTHONPATH or from a clone is not.
    """
    own = str(Path(__file__).resolve().parents[2])
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(path).is_absolute()]
    ways = [path for path in given if path != os.path.realpath(".")]
    if own in sys.path and own not in ways and not _found_by_itself(own):
        ways.append(own)
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return rest | ({"PYTHONPATH": os.pathsep.join(ways)} if ways else {})


def _found_by_itself(path: str) -> bool:
    """Whether every Python of this installation has a directory on its path. Directories from PYTHONPATH come first."""
    places = [Path(place) for place in site.getsitepackages()]
    links = (link for place in places if place.is_dir() for link in place.glob("*.pth"))
    return Path(path) in places or any(path in link.read_text(errors="replace").splitlines() for link in links)


def status_of(process: subprocess.Popen[bytes], timeout_s: float = 0) -> int | None:
    """The exit status of a child, as `Popen.returncode`, after waiting at most `timeout_s`; None while it runs.

    It remains a zombie, so that the id of its process group cannot be reused before `end_group`.
    """
    until = time.monotonic() + timeout_s
    while process.returncode is None:
        try:
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # it was reaped elsewhere
            return process.poll()
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        if time.monotonic() >= until:
            return None
        time.sleep(0.01)
    return process.returncode


def end_group(process: subprocess.Popen[bytes], patience_s: float = 0) -> None:
    """Gives a child (started with `process_group=0`) time to end, then kills its process group and reaps it.

    Otherwise a shell that started ssh would leave ssh running, for example.
    """
    if process.returncode is None:
        status_of(process, patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills and reaps a child. A lab VM has nothing to save."""
    if process.poll() is None:
        process.kill()
    process.wait()


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory with mode 0700, removed at exit. Directories of dead runs are removed first."""
    _sweep()
    path, lock = _make_locked()
    try:
        yield path
    finally:
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def is_private(path: str) -> bool:
    """Whether a file is in a private directory, so that it will soon be removed."""
    return Path(path).parent.name.startswith(_PREFIX)


def _base() -> str:
    """The parent of private directories: TMPDIR, unless it makes socket paths too long (unix(7): 108 bytes)."""
    try:
        base = tempfile.gettempdir()
    except OSError as error:  # it has tried to write to each
        raise PreflightError(
            "no directory for temporary files can be written: /tmp, /var/tmp and TMPDIR are full or read-only",
            "free space, or set TMPDIR to a writable one",
        ) from error
    return base if len(os.fsencode(base)) <= _LONGEST_BASE else "/tmp"  # noqa: S108


def _make_locked() -> tuple[Path, int]:
    """A new directory and the descriptor that locks it. Retries if a sweep removed it between the two steps."""
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
    """Removes private directories without a held lock: their run was killed."""
    for path in Path(_base()).glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            with contextlib.suppress(OSError):  # in use by a live run
                if os.fstat(fd).st_uid == os.getuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
