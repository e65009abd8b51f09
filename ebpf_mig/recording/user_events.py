# SPDX-License-Identifier: Apache-2.0
"""Events of user-space stacks: where a thread of a VMM was when it went to sleep, and in which files.

In: nothing. Out: `UserStack` and `Module`, which stand in recordings that were made with `--user-stacks`.
"""

from __future__ import annotations

from ebpf_mig.recording.fields import Count, Event, FreeText, Instant, MaybeFlag, Pid, Symbol, Value


class UserStack(Event, frozen=True, tag=24):
    """The user half of a wait's stack. The three lists have one item for each frame, innermost first."""

    at_ns: Instant
    """`end_ns` of the `OffCpu`."""
    pid: Pid
    tid: Pid
    names: tuple[Symbol, ...] = ()
    """The function, as the file or its debug file called it when the recording was made; empty: it has no name there.
    """
    modules: tuple[Count, ...] = ()
    """`number` of the `Module`."""
    offsets: tuple[Count, ...] = ()
    """Where in the file the instruction is that was called from, in bytes."""
    end: FreeText = ""
    """Why the stack ends before the thread's first function; empty: it does not."""


class Module(Event, frozen=True, tag=25):
    """A file that a traced process executes."""

    pid: Pid
    number: Count
    build_id: FreeText = ""
    """The GNU build ID in hexadecimal digits; empty: it has none."""
    path: FreeText = ""
    """As the process sees it."""
    bias: Value = 0
    """What to add to an offset in the file for the address in its symbol table."""
    frame_pointers: MaybeFlag = -1
    """Whether its functions keep a frame pointer; -1: unknown."""
