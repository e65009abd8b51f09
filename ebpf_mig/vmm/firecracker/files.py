# SPDX-License-Identifier: Apache-2.0
"""The files of a snapshot, seen as the two VMMs see them. A jailed Firecracker has a root directory of its own.

In: the directory that the user named, and the VMMs' pids. Out: two paths; a VmmError before the guest is paused if
the snapshot would fail there, or overwrite a file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import procfs
from ebpf_mig.text import printable, size

_STATE, _MEMORY = "vm.state", "vm.memory"
_STATE_ROOM_BYTES = 1 << 20
"""More than any state file has."""
_PLACE = "name a directory by a path that both VMMs have; a jailed VMM has a root directory of its own"
_EMPTY = "name an empty directory, or remove the file"


@dataclass(frozen=True)
class SnapshotFiles:
    """Where a snapshot is written to, as both VMMs name it."""

    state: Path
    memory: Path
    base: bool
    """The memory file is that of an earlier snapshot, and the changed pages are written into it."""

    @classmethod
    def of(cls, directory: str, base: str | None) -> SnapshotFiles:
        """`base`: the memory file of the VM's last snapshot, for one that writes only what has changed since."""
        place = Path(directory).absolute()
        memory = Path(base).absolute() if base is not None else place / _MEMORY
        return cls(place / _STATE, memory, base is not None)

    def check(self, source: int, destination: int, memory_bytes: int) -> None:
        """VmmError if the source could not write them or the destination not read them. Both ends by their pids."""
        for path in {self.state.parent, self.memory.parent}:
            here, there = _found(source, path), _found(destination, path)
            if here is None:
                raise VmmError(f"the source sees no directory {_name(path)}", _PLACE)
            if there is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
                raise VmmError(f"the destination does not see the source's directory {_name(path)}", _PLACE)
        for path in (self.state, *([] if self.base else [self.memory])):
            if _found(source, path) is not None:
                raise VmmError(f"{_name(path)} exists already", _EMPTY)
        if self.base:
            self._check_base(source, memory_bytes)
        else:
            self._check_room(source, memory_bytes)

    def _check_base(self, source: int, memory_bytes: int) -> None:
        found = _found(source, self.memory)
        if found is None:
            raise VmmError(f"the source sees no file {_name(self.memory)}", "take a full snapshot first")
        if found.st_size != memory_bytes:  # Firecracker would empty it, and the snapshot would lack most of the memory
            raise VmmError(
                f"{_name(self.memory)} has {found.st_size} bytes, the guest has {memory_bytes} bytes of memory",
                "name the memory file of this VM's last snapshot",
            )

    def _check_room(self, source: int, memory_bytes: int) -> None:
        place = self.memory.parent
        try:
            file_system = os.statvfs(_seen_by(source, place))
        except OSError:
            return
        free = file_system.f_bavail * file_system.f_frsize
        if free < memory_bytes + _STATE_ROOM_BYTES:
            raise VmmError(
                f"{_name(place)} has {size(free)} free, the guest has {size(memory_bytes)} of memory",
                "name a directory on a larger file system",
            )


def check_socket(destination: int, path: Path) -> None:
    """VmmError if the process would find no socket there to send its page faults to."""
    found = _found(destination, path)
    if found is None or not stat.S_ISSOCK(found.st_mode):
        why = "no socket" if found is not None else "nothing"
        remedy = "start your page fault handler first, and give the path of its socket as the destination has it"
        raise VmmError(f"the destination finds {why} at {_name(path)}", remedy)


def _seen_by(pid: int, path: Path) -> Path:
    """The path below the root directory of the process."""
    return Path(procfs.path(pid, "root") + str(path))


def _found(pid: int, path: Path) -> os.stat_result | None:
    """None if the process does not see it."""
    try:
        return _seen_by(pid, path).stat()
    except (OSError, ValueError):
        return None


def _name(path: Path) -> str:
    return printable(str(path))
