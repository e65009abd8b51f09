# SPDX-License-Identifier: Apache-2.0
"""The kernel functions of a wait that mean something to a reader.

In: a stack, innermost function first; its user half, if it was recorded. Out: the function that the thread waited for,
and the next two behind it; and the VMM's own functions that led there. Every
wait ends in the scheduler and begins with a system call, so these functions are left out: `schedule_timeout`,
`wait_for_completion`, `futex_wait`, `do_syscall_64`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

SHOWN = 3
_INNER = re.compile(
    r"(io_)?schedule(_\w+)?|_*wait_\w+|_*futex_\w+|do_futex|do_nanosleep|poll_schedule_timeout|rwsem_down_\w+"
    r"|_*folio_wait_\w+|_*prepare_to_wait\w*|rpc_wait\w*|bit_wait\w*|out_of_line_wait_\w+|_*wait_on_\w+"
    r"|_*mutex_lock_slowpath|_*mutex_lock\.\w+|rt_mutex_\w+",
    re.ASCII,
)
"""Functions that only say that the thread waits."""
_OUTER = re.compile(r"_*(x64|ia32|arm64|se)_(compat_)?sys_\w+|_*do_?sys(call)?_\w*(64|32)\w*|entry_\w+|asm_\w+|el0\w+"
                    r"|invoke_syscall\w*|ret_from_fork\w*|x64_sys_call|exc_\w+", re.ASCII)  # fmt: skip
"""Functions that only say how the thread entered the kernel."""


_LIBRARY = re.compile(
    r"_*(p?poll|p?select|epoll_p?wait2?|futex\w*|lll_\w+|pthread_\w+|(clock_)?nanosleep(64)?|u?sleep|syscall|ioctl"
    r"|(recv|send)(from|to|m?msg)?|p?(read|write)v?(64)?(_nocancel)?|libc_\w+|start_thread|clone3?|g_\w+|start|main"
    r"|\w*cond_(timed)?wait\w*|\w+_poll_ns|do_run_on_cpu|run_on_cpu|\w+_thread_join)"
    r"|<?(core|std|alloc|flume|parking_lot\w*|vm_memory|kvm_ioctls)::.*|_RN.*3std.*|.*\+0x[0-9a-f]+",
    re.ASCII,
)
"""User-space functions that only say that the thread waits or began, and places without a name."""


def callers(user: Sequence[str]) -> tuple[str, ...]:
    """At most three named functions of the VMM, the innermost first."""
    named = (function for function in user if not function.startswith("(") and not _LIBRARY.fullmatch(function))
    return tuple(itertools.islice(named, SHOWN))


def plain(function: str) -> str:
    """The name without what the compiler added, and without leading underscores."""
    return function.partition(".")[0].lstrip("_") or function


def meaningful(stack: Sequence[str]) -> tuple[str, ...]:
    """At most three functions, the one that was waited for first; a word in parentheses stays as it is.

    Where all functions only say that the thread waits, the outermost of those that do is given: `futex_wait`.
    """
    if not stack or stack[0].startswith("("):
        return tuple(stack[:1])
    inner = [function for function in stack if not _OUTER.fullmatch(function.partition(".")[0])]
    first = next((at for at, function in enumerate(inner) if not _INNER.fullmatch(function.partition(".")[0])), None)
    if first is None:
        named = [plain(function) for function in inner or stack]
        return (next((name for name in named if name in ("futex_wait", "nanosleep")), named[-1]),)
    return tuple(map(plain, inner[first : first + SHOWN]))


def described(stack: Sequence[str], user: Sequence[str] = ()) -> str:
    """`synchronize_srcu (kvm_swap_active_memslots < kvm_set_memslot)`, or `futex_wait, called by bdrv_drain_all`; empty
    without a stack.
    """
    shown, behind = meaningful(stack), callers(user)
    if not shown:
        return " < ".join(behind)
    called = f", called by {' < '.join(behind)}" if behind else ""
    return shown[0] + (f" ({' < '.join(shown[1:])})" if shown[1:] else "") + called
