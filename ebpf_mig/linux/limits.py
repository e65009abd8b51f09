# SPDX-License-Identifier: Apache-2.0
"""What this process may use of descriptors and memory, and whether an error says that there is none left.

In: getrlimit(2), exceptions. Out: a PreflightError with a remedy before anything is loaded; a sentence for an error.
LLVM aborts the process where it gets no memory, so that has to be checked before.
"""

from __future__ import annotations

import errno
import resource

from ebpf_mig.errors import PreflightError

DESCRIPTORS = 320
"""Tracing takes 45 in the tracepoint tier, 180 by fentry and 240 by kprobes, the exporter one more a connection."""
ADDRESS_SPACE = 512 << 20
"""Loading and compiling with LLVM 14 takes 350 MB."""
_SPENT = {
    errno.EMFILE: "this process has no file descriptor left",
    errno.ENFILE: "this machine has no file descriptor left",
    errno.ENOMEM: "there is no memory left",
}


def require_room() -> None:
    """PreflightError if the limits of this process are too low for tracing."""
    descriptors, space = (resource.getrlimit(of)[0] for of in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS))
    if descriptors != resource.RLIM_INFINITY and descriptors < DESCRIPTORS:
        raise PreflightError(
            f"this process may open {descriptors} files only, and tracing takes up to {DESCRIPTORS}", "ulimit -n 1024"
        )
    if space != resource.RLIM_INFINITY and space < ADDRESS_SPACE:
        most, wanted = space >> 20, ADDRESS_SPACE >> 20
        raise PreflightError(
            f"this process may use {most} MiB of address space only, and compiling BPF programs takes {wanted} MiB",
            "ulimit -v unlimited",
        )


def spent(error: BaseException) -> str:
    """What this process has used up, if that is what the error means; otherwise empty."""
    if isinstance(error, MemoryError):
        return _SPENT[errno.ENOMEM]
    return _SPENT.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def require_descriptor(error: OSError) -> None:
    """PreflightError if the error means that no descriptor is left. It says nothing of the file then."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise PreflightError(spent(error), "ulimit -n 1024") from error
