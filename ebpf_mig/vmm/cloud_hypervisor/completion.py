# SPDX-License-Identifier: Apache-2.0
"""Finds out how a Cloud Hypervisor migration ended. The API has no call for this.

In: the send and the receive call, each in a thread of its own, and the two processes. Out: a result and a reason. One
poll(2) waits for all of them, without periodic wake-ups:

- the source's process exits after success, and only then;
- the receive call answers when the destination has the VM, or has given up. Up to v52 it reports success for
  an aborted migration, too;
- the send call answers at the end up to v52, at once from v53 on. From then on a thread of the source migrates, and
  if it ends and the process does not exit, the migration failed. There may be no other sign.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from ebpf_mig.vmm.call import Call, readable
from ebpf_mig.vmm.cloud_hypervisor.source import LOOK_S, SourceEnd
from ebpf_mig.vmm.unix_http import RefusedError

AFTER_S = 5.0
"""How long to wait for one end to confirm what the other end shows."""
DEATH_S = 1.0
"""A process that ends closes its sockets a little before."""
REASON_S = 1.0
"""How long to wait for the reason in its log."""
_LOST = "the connection to its host broke"


@dataclass
class Ending:
    """Waits for the end of one migration."""

    send: Call
    receive: Call
    cancelled: Call
    source: SourceEnd
    destination: int
    """pidfd; -1: on another host."""
    long: bool
    """The source may live long after the destination starts, because it serves pages (postcopy)."""
    why_failed: Callable[[], str]
    """The source's own reason, if its log is known."""
    destination_has_vm: Callable[[], bool]

    def wait(self, deadline: float) -> tuple[str, str]:
        """(result, reason): completed, failed, or unknown at the deadline or when cancelled."""
        with contextlib.closing(self.source):
            while True:
                if self._send_failed():
                    return "failed", str(self.send.error)
                if self.receive.done.is_set() and not self._unheard():
                    return self._received(deadline)
                if self.cancelled.done.is_set():
                    return "unknown", "interrupted; Cloud Hypervisor has no call to cancel, the migration goes on"
                if self.source.gone():
                    if self._unheard():
                        return "unknown", f"the source is done; whether the destination runs is not known: {_LOST}"
                    if self._soon(self.receive.fd):
                        continue
                    return "failed", (
                        "the source ended, and the destination does not report that it has the VM; it may wait for "
                        "its sender for ever"
                    )
                if self.source.gave_up(self.send):
                    if self._soon(self.receive.fd, ending=True):
                        continue
                    why = self._sources_reason() or "its migration thread ended, the reason is in its log"
                    return "failed", f"the source goes on with the VM: {why}"
                left = deadline - time.monotonic()
                if left <= 0:
                    return "unknown", "not done in time; Cloud Hypervisor has no call to cancel, it may go on"
                fds = [self.cancelled.fd, *self.source.fds()]
                if not self._unheard():
                    fds.append(self.receive.fd)
                if not self.send.done.is_set():
                    fds.append(self.send.fd)
                readable(fds, min(left, self.source.patience()))

    @staticmethod
    def _lost(call: Call, far: bool) -> bool:
        """Whether the call ended only because the other host is unreachable. The migration may go on."""
        return far and call.error is not None and not isinstance(call.error, RefusedError)

    def _send_failed(self) -> bool:
        """Whether the send call says that the migration failed. A source that is ended answers nothing, but the
        destination may have everything by then.
        """
        if self.send.error is None or self._lost(self.send, self.source.far):
            return False
        return isinstance(self.send.error, RefusedError) or not self._soon(limit=DEATH_S, ending=True)

    def _unheard(self) -> bool:
        """Whether the destination will never report how the migration ended."""
        return self._lost(self.receive, self.destination < 0)

    def _received(self, deadline: float) -> tuple[str, str]:
        """The receive call has returned."""
        if self.receive.error is not None:
            return "failed", str(self._sources_reason() or self.receive.error)
        if not self._lost(self.send, self.source.far):
            limit = max(AFTER_S, deadline - time.monotonic()) if self.long else AFTER_S
            self._soon(*([] if self.send.done.is_set() else [self.send.fd]), limit=limit, ending=True)
            if self._send_failed():
                return "failed", str(self.send.error)
            if not self.source.gone():
                self._soon(limit=limit, ending=True)
        if self.destination >= 0 and readable([self.destination], 0):
            return "failed", "the destination ended"
        if self.destination_has_vm():
            return "completed", ""
        if self.source.gone():
            return "failed", "the source ended, and the destination has no VM although it reported success"
        return "failed", self._sources_reason() or "the destination has no VM and the source goes on"

    def _sources_reason(self) -> str:
        """The reason from its send call or log after the other end failed. The switchover is over by then.

        Also waits until the source has noticed the failure. Only then does it resume its guest, which must be traced.
        """
        until = time.monotonic() + AFTER_S
        if not self.send.done.is_set():
            self._soon(self.send.fd)
        while self.send.done.is_set() and self.send.error is None and time.monotonic() < until:
            if self.source.gave_up(self.send) or self.source.gone():
                break
            readable(self.source.fds(), LOOK_S)
        until = time.monotonic() + REASON_S
        while not (why := str(self.send.error or "") or self.why_failed()) and time.monotonic() < until:
            time.sleep(0.05)
        return why

    def _soon(self, *fds: int, limit: float | None = None, ending: bool = False) -> bool:
        """Whether one of `fds` becomes readable soon or, with `ending`, the source's process ends."""
        until = time.monotonic() + (AFTER_S if limit is None else limit)
        while not (ending and self.source.gone()):
            left = until - time.monotonic()
            own = self.source.exit_fds() if ending else []
            pause = min(left, self.source.hurry()) if ending else left
            ready = readable([*fds, *own, self.cancelled.fd], max(0, pause))
            if ready or left <= 0:
                return bool(ready - {self.cancelled.fd})
        return True
