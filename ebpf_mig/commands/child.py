# SPDX-License-Identifier: Apache-2.0
"""The user's COMMAND. `record` starts it, traces while it runs, and never ends it.

In: a command line. Out: its exit code. The only signal that COMMAND gets from us is the user's interruption, once. It
stays in our process group, so that it can read the terminal and receives Ctrl-C from there directly.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from ebpf_mig.commands.options import say
from ebpf_mig.errors import UsageError

_INTERRUPTS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_SI_KERNEL = 0x80
"""siginfo's `si_code` of a signal that the terminal sent, to the whole process group (sigaction(2))."""
PATIENCE_S = 10.0
"""How long we wait for COMMAND after an interruption. Then we leave it alone."""
_POLL_S = 0.05


class Child:
    """COMMAND. Use as a context manager: SIGINT, SIGTERM and SIGHUP wait until `interruption` takes them."""

    def __init__(self, command: Sequence[str], *, stdout: int = 1) -> None:
        """Starts COMMAND with our descriptor `stdout` as its standard output. UsageError if that fails."""
        self._name = command[0]
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        try:
            self.pid = os.posix_spawnp(
                self._name,
                list(command),
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdout, 1)] if stdout != 1 else [],
                setsigmask=self._before,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them
            )
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
            raise UsageError(f"cannot run {self._name}: {error.strerror}") from error
        self.interrupted: signal.Signals | None = None
        """The user's first interruption."""
        self._interrupted_s = 0.0
        self._again = False
        self._code: int | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    @property
    def code(self) -> int | None:
        """Its exit code, or 128 plus the signal number if a signal ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._code = code if code >= 0 else 128 - code
        return self._code

    def abandoned(self) -> bool:
        """Whether the user no longer waits: interrupted twice, or COMMAND did not end after the first time.

        Handles the interruptions that arrived since the last call. The first one is passed on.
        """
        while (came := signal.sigtimedwait(_INTERRUPTS, 0)) is not None:
            if self.interrupted is not None:
                self._again = True
                continue
            self.interrupted = signal.Signals(came.si_signo)
            self._interrupted_s = time.monotonic()
            self._pass_on(self.interrupted, by_terminal=came.si_code == _SI_KERNEL)
        if self.interrupted is None:
            return False
        return self._again or time.monotonic() - self._interrupted_s >= PATIENCE_S

    def wait(self) -> None:
        """Waits for its end. The user can still interrupt."""
        while self.code is None and not self.abandoned():
            time.sleep(_POLL_S)
        if self.code is None:
            say(f"{self._name} ({self.pid}) still runs; it is left alone")

    def _pass_on(self, number: signal.Signals, *, by_terminal: bool) -> None:
        if self.code is not None:
            return
        if not (by_terminal and os.getpgid(self.pid) == os.getpgrp()):
            os.kill(self.pid, number)  # our child, not reaped yet: the pid cannot belong to another process
        say(f"{number.name}: waiting for {self._name} to end; interrupt again to stop waiting")
