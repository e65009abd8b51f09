# SPDX-License-Identifier: Apache-2.0
"""Names of this process's own threads, as the kernel has them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ebpf_mig.probes.thread_names import ThreadNames
from ebpf_mig.recording.events import Thread

OURS = os.getpid()


class Named(threading.Thread):
    """A thread whose kernel name is `name`, until it is released."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True)
        self._ready, self._over, self._called = threading.Event(), threading.Event(), name
        self.start()
        self._ready.wait()

    def run(self) -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(self._called)
        self._ready.set()
        self._over.wait()

    def end(self) -> int:
        tid = self.native_id
        assert tid is not None
        self._over.set()
        self.join()
        return tid


def test_a_thread_that_is_gone_keeps_its_name() -> None:
    names, thread = ThreadNames(), Named("migration")
    names.read([OURS])
    tid = thread.end()
    names.read([OURS])
    names.seen(OURS, tid)
    assert Thread(OURS, tid, "migration") in names.events(OURS)


def test_a_thread_that_is_seen_before_we_read() -> None:
    names, thread = ThreadNames(), Named("send_0")
    assert thread.native_id is not None
    names.seen(OURS, thread.native_id)
    names.ran_vcpu(OURS, thread.native_id, 12)
    tid = thread.end()
    assert names.events() == [Thread(OURS, tid, "send_0", -1)]


def test_a_process_that_is_forgotten() -> None:
    names = ThreadNames()
    names.read([OURS])
    names.seen(1, 1)
    names.forget(OURS)
    assert [thread.pid for thread in names.events()] == [1]
