# SPDX-License-Identifier: Apache-2.0
"""A directory that only we can write to, held by a descriptor. A later change of its path has no effect.

In: a path, which may lead through directories that others can write to. Out: files that are created, read, listed and
removed relative to the descriptor, without following links. UsageError if the directory cannot be trusted.

The path is walked component by component. A symbolic link on it is followed only if it belongs to root or to us. The
last component must not be a link, must belong to us, and nobody else may have write permission. Someone who can write
to a parent can still move the directory away. It is then unusable until a trusted directory is at the path again.
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
    """Created if missing, with mode 0700. Thread-safe."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)  # noqa: PTH100 - links must not be resolved
        self._fd = _walk(self.path, make=True)
        try:
            self._identity = _trusted(self._fd, self.path)
        except BaseException:
            os.close(self._fd)
            raise

    def check(self) -> None:
        """Checks that the path leads to the directory we hold. If another trusted one is there now, switches to it."""
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
        """A new file, mode 0600, open for writing. FileExistsError if the name is taken."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self._fd)

    def open(self, name: str) -> int:
        """A regular file, open for reading."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(f"{printable(name)} is not a regular file")
        return fd

    def entries(self) -> dict[str, int]:
        """Our regular files, and their sizes in bytes."""
        found = {}
        listing = os.open(".", _OPEN, dir_fd=self._fd)  # its own file position: other threads list as well
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
        """Removes an entry. Does nothing if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._fd)


def _walk(path: str, *, make: bool) -> int:
    """A descriptor of the directory at an absolute path. UsageError if a component cannot be trusted."""
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
                    raise UsageError(
                        f"cannot use {printable(path)}: {printable(name)} is a link that another user made"
                    )
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
    """The identity (device, inode) of a directory that only we can write to. UsageError otherwise."""
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise UsageError(f"{printable(path)} belongs to user {status.st_uid}", "give a --state-directory of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{printable(path)} is writable by others", f"chmod go-w {printable(path)}")
    if not status.st_nlink:
        raise UsageError(f"{printable(path)} was removed")
    return status.st_dev, status.st_ino
