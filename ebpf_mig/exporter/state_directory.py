# SPDX-License-Identifier: Apache-2.0
"""A directory that is ours alone, held by a descriptor: what others do to the path that led to it changes nothing.

In: a path, as root often, maybe through directories that others can write. Out: files that are made, read, listed and
removed relative to the descriptor, no link ever followed. UsageError where the directory cannot be trusted.

The path is walked component by component. A symbolic link on it is followed only if it belongs to root or to us; the
last component may be no link at all, must belong to us, and nobody else may write to it. Who can write a parent can
still move the directory away: then it cannot be used until one that can be trusted lies there again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import PurePosixPath

from ebpf_mig.errors import UsageError
from ebpf_mig.text import printable

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS = 40
"""MAXSYMLINKS of the kernel."""


class StateDirectory:
    """Made if need be, mode 0700. Safe for threads."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)  # noqa: PTH100 - no link may be resolved here
        self._fd = _walk(self.path, make=True)
        try:
            self._identity = _trusted(self._fd, self.path)
        except BaseException:
            os.close(self._fd)
            raise

    def check(self) -> None:
        """Whether the path still leads to what we hold; if another lies there that can be trusted, takes that one."""
        fd = _walk(self.path, make=False)
        try:
            identity = _trusted(fd, self.path)
        except BaseException:
            os.close(fd)
            raise
        if identity == self._identity:
            os.close(fd)
            return
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        self._identity = identity

    def create(self, name: str) -> int:
        """A new file, 0600, open for writing. FileExistsError if there is something of that name."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self._fd)

    def open(self, name: str) -> int:
        """A regular file of ours, open for reading."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(f"{printable(name)} is not a regular file")
        return fd

    def entries(self) -> dict[str, int]:
        """Regular files that belong to us, and their sizes in bytes."""
        found = {}
        listing = os.open(".", _OPEN, dir_fd=self._fd)  # with a position of its own: other threads list as well
        try:
            with os.scandir(listing) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                            found[entry.name] = status.st_size
        finally:
            os.close(listing)
        return found

    def remove(self, name: str) -> None:
        """Removes an entry; silent if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Lets go of it."""
        os.close(self._fd)


def _walk(path: str, *, make: bool) -> int:
    """A descriptor of the directory at an absolute path; UsageError where a step cannot be trusted."""
    try:
        return _steps(path, make=make)
    except OSError as error:
        raise UsageError(f"cannot use {printable(path)} as state directory: {error.strerror or error}") from error
    except ValueError as error:  # a NUL
        raise UsageError(f"cannot use {printable(path)} as state directory: {error}") from error


def _steps(path: str, *, make: bool) -> int:
    parts = list(PurePosixPath(path).parts[1:])
    here, links = os.open("/", _OPEN), 0
    try:
        while parts:
            name = parts.pop(0)
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=here)
            status = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode) and parts:
                links += 1
                if links > _LINKS or status.st_uid not in (0, os.geteuid()):
                    raise UsageError(f"cannot use {printable(path)}: {printable(name)} is a link that others made")
                target = PurePosixPath(os.readlink(name, dir_fd=here))
                parts = [*(target.parts[1:] if target.is_absolute() else target.parts), *parts]
                following = os.open("/", _OPEN) if target.is_absolute() else os.dup(here)
            else:
                following = os.open(name, _OPEN, dir_fd=here)
            os.close(here)
            here = following
    except BaseException:
        os.close(here)
        raise
    return here


def _trusted(fd: int, path: str) -> tuple[int, int]:
    """The identity of a directory that belongs to us alone."""
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise UsageError(f"{printable(path)} belongs to user {status.st_uid}", "give a --state-directory of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{printable(path)} is writable for others", f"chmod go-w {printable(path)}")
    if not status.st_nlink:
        raise UsageError(f"{printable(path)} was removed")
    return status.st_dev, status.st_ino
