# SPDX-License-Identifier: Apache-2.0
"""Attaches loaded programs to their hooks, and detaches them.

In: hooks and the descriptors of their programs. Out: nothing. Tracepoints, fentry and fexit are attached through BPF
links, kprobes through perf events; both are descriptors of this process. Needs neither bcc nor libbpf.
"""

from __future__ import annotations

import os

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux.bpf import KPROBE, KRETPROBE, attach_tracing
from ebpf_mig.linux.perf import KprobeEvent, attach_trace_event
from ebpf_mig.probes.hook import TRACE_EVENT, TRACEPOINT, Hook


class Attachments:
    """The attached programs of one BPF object. They can be attached and detached repeatedly."""

    def __init__(self) -> None:
        self._links: dict[Hook, int] = {}
        self._events: dict[str, KprobeEvent] = {}
        self._attached: list[Hook] = []

    def prepare(self, hook: Hook, fd: int = -1) -> None:
        """Opens a kprobe's perf event, or takes over `fd`; no program runs yet. OSError if the kernel refuses."""
        if hook.how in (KPROBE, KRETPROBE):
            self._events[hook.key] = KprobeEvent(hook.target, hook.how, fd)

    def events(self) -> dict[str, int]:
        """Descriptors of the open kprobe events."""
        return {key: event.open() for key, event in self._events.items()}

    def attach(self, hook: Hook, program: int) -> None:
        """Attaches a loaded program; PreflightError if the kernel refuses."""
        try:
            if hook.key in self._events:
                self._events[hook.key].attach(program)
            elif hook.how == TRACE_EVENT:
                self._links[hook] = attach_trace_event(program, hook.target)
            else:
                name = hook.target if hook.how == TRACEPOINT else ""
                self._links[hook] = attach_tracing(program, name)
        except OSError as error:
            raise PreflightError(f"cannot attach to {hook.how} {hook.target}: {error.strerror or error}") from error
        self._attached.append(hook)

    def detach(self, hook: Hook) -> None:
        """Detaches a program; its kprobe event stays open."""
        self._attached.remove(hook)
        if hook.key in self._events:
            self._events[hook.key].detach()
        else:
            os.close(self._links.pop(hook))

    def close(self) -> None:
        """Detaches everything and closes all events; idempotent."""
        for hook in list(self._attached):
            self.detach(hook)
        for event in self._events.values():
            event.close()
        self._events.clear()
