# SPDX-License-Identifier: Apache-2.0
"""A restore whose memory comes when the guest touches it: from a mapped file, or by userfaultfd.

In: a `Plan` with a `backend`. Out: a `Loaded` whose pages another process serves, each after the plan's delay `page`.
The file is on a FUSE mount of a mount namespace of our own, so that nothing is left of it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

from tests.truth import kvm
from tests.truth.parts import Plan

TOUCHED_FIRST = 0x200
"""The first guest page that the guest writes after the restore; the code and the list of addresses are below."""
_MAP_FIXED = 0x10
_CLONE_NEWNS, _MS_PRIVATE_REC = 0x20000, 1 << 18 | 1 << 14
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


def touched(plan: Plan) -> list[int]:
    """The guest pages that the guest writes once it runs again."""
    return [TOUCHED_FIRST + 3 * number for number in range(plan.dirty_pages)]


class Pages:
    """The process that serves pages, and what it does in place of reading the memory."""

    def __init__(self, plan: Plan, slots: dict[int, tuple[int, int, int]]) -> None:
        self._slots = [slots[slot] for slot in sorted(slots)]
        self._mount = Path(plan.address) / "mount"
        if plan.backend == "file":
            self._fd = os.open("/dev/fuse", os.O_RDWR)
            self._own_mount()
        else:
            self._fd = kvm.hold_back(*[(address, size) for _, size, address in self._slots])
        os.set_inheritable(self._fd, True)
        kind = "fuse" if plan.backend == "file" else "userfaultfd"
        path, delay = f"{plan.address}/memory", str(plan.delays.get("page", 0))
        command = [sys.executable, "-m", "tests.truth.page_server", kind, str(self._fd), path, delay]
        Path(path).touch()
        self._kind, self._command = kind, command

    def start(self) -> None:
        """Starts the server; the memory file is there."""
        self._server = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(self._fd,)
        )
        assert self._read() == "ready\n"
        if self._kind == "userfaultfd":
            self._say(json.dumps([(address, size) for _, size, address in self._slots]))

    def load(self) -> None:
        """Maps the file over the guest's memory. With userfaultfd there is nothing left to do."""
        if self._kind == "userfaultfd":
            return
        file, offset = os.open(self._mount / "memory", os.O_RDONLY), 0
        for _, size, address in self._slots:
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
            assert _libc.mmap(address, size, protection, flags, file, offset) != -1, os.strerror(ctypes.get_errno())
            offset += size
        os.close(file)

    def served(self) -> list[tuple[int, int]]:
        """When each page was asked for, and when it was there, so far."""
        self._say("served")
        return [(begin, end) for begin, end in json.loads(self._read())]

    def outlive(self) -> int:
        """Lets the next program of this process read what `served` returns: from this descriptor, a line of JSON. The
        server prints it when this program's end of its input is closed."""
        assert self._server.stdout is not None
        os.set_inheritable(self._server.stdout.fileno(), True)
        return self._server.stdout.fileno()

    def close(self) -> None:
        self._server.kill()
        self._server.wait()

    def _own_mount(self) -> None:
        self._mount.mkdir()
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0"
        done = _libc.unshare(_CLONE_NEWNS) or _libc.mount(b"none", b"/", None, _MS_PRIVATE_REC, None)
        done = done or _libc.mount(b"pages", str(self._mount).encode(), b"fuse.pages", 0, options.encode())
        if done:
            raise OSError(ctypes.get_errno(), "mount")

    def _say(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()
