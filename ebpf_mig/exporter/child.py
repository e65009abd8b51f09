# SPDX-License-Identifier: Apache-2.0
"""Keeps one process running: starts it, notices that it ended, stopped or hangs, and starts it again a little later.

In: a module and how to make its argument. Out: a `Child`. Call `look` after each SIGCHLD, and every few seconds. The
process writes a byte into its pipe when it is ready. One that has a heartbeat goes on to write a byte each second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ebpf_mig.exporter.leash import Leash, is_stopped, kill_first
from ebpf_mig.exporter.spawn import start

if TYPE_CHECKING:
    import subprocess

STOPPED_S = 2.0
"""A process that has been stopped for this long is replaced. A debugger may stop it for a moment."""
SILENT_S = 30.0
"""A process whose heartbeat has been missing for this long is replaced. A busy machine may delay it."""
START_S = 180.0
"""A process that is not ready after this long is replaced. Loading BPF programs may take two minutes."""
SOON_S, LATE_S = 0.25, 10.0
"""Delay of a restart: the first of these after the first end, doubled at each further one, at most the second."""
PROVEN_S = 30.0
"""A process that has run for this long is restarted soon again."""

_log = logging.getLogger("ebpf_mig.exporter")


class Child:
    """One of our processes, or the time between two of its lives."""

    def __init__(
        self,
        name: str,
        module: str,
        argument: Callable[[int], str],
        fds: Sequence[int],
        *,
        beats: bool = False,
        expendable: bool = False,
    ) -> None:
        """`argument`: makes the process's argument from the descriptor of its pipe. `beats`: it has a heartbeat.
        `expendable`: when memory runs out, the kernel kills it before others."""
        self.name = name
        self.restarts = 0
        self.status: int | None = None
        """How it ended last: an exit code, or the negative number of a signal. None while it runs."""
        self.was_ready = False
        """Whether any of its lives got ready."""
        self._module, self._argument, self._fds = module, argument, fds
        self._beats, self._expendable = beats, expendable
        self._process: subprocess.Popen[bytes] | None = None
        self._leash: Leash | None = None
        self._pipe = -1
        self._is_ready = False
        self._started = self._heard = self._due = 0.0
        self._wait = SOON_S
        self._stopped: float | None = None

    @property
    def runs(self) -> bool:
        """Whether there is a process, even if it is stopped."""
        return self._process is not None

    @property
    def missing(self) -> str:
        """Why it does not do its work; empty if it does."""
        if self._process is None:
            status = self.status or 0
            return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if self._stopped is not None:
            return "is stopped"
        return "" if self._is_ready else "is starting"

    @property
    def pipe(self) -> int:
        """The descriptor to poll while it starts; -1 otherwise."""
        return self._pipe if not self._is_ready else -1

    def due_in(self) -> float:
        """Seconds until `look` or `start` has something to do, as far as is known now."""
        now = time.monotonic()
        if self._process is None:
            return max(0.0, self._due - now)
        return STOPPED_S / 4 if self._stopped is not None else 5.0

    def start(self) -> None:
        """Starts it if it does not run and its delay is over."""
        now = time.monotonic()
        if self._process is not None or now < self._due:
            return
        self._leash = Leash()
        self._pipe, theirs = os.pipe()
        os.set_blocking(self._pipe, False)
        os.set_blocking(theirs, False)
        self._is_ready, self._stopped = False, None
        self._started = self._heard = now
        try:
            fds = [*self._fds, theirs, self._leash.theirs]
            self._process = start(self._module, self._argument(theirs), fds=fds)
            self._leash.tie(self._process.pid)
            if self._expendable:
                kill_first(self._process.pid)
            self.status = None
        except OSError as error:  # too many processes, or no memory; it may work later
            _log.error("the process %s cannot be started: %s", self.name, error)
            self._over(1)
        finally:
            os.close(theirs)

    def look(self) -> bool:
        """Notes what became of it, and kills it if it is stopped or hangs. True if it has just ended."""
        if self._process is None:
            return False
        now = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            if os.read(self._pipe, 4096):
                self._heard = now
                self._is_ready = self.was_ready = True
        status = self._process.poll()
        if status is not None:
            self._over(status)
            return True
        if not is_stopped(self._process.pid):
            self._stopped = None
        elif self._stopped is None:
            self._stopped = now
        elif now - self._stopped > STOPPED_S:
            self._kill("is stopped")
        if not self._is_ready and now - self._started > START_S:
            self._kill("does not get ready")
        if self._is_ready and self._beats and now - self._heard > SILENT_S:
            self._kill("does not react")
        return False

    def _kill(self, why: str) -> None:
        _log.error("the process %s %s; it is killed", self.name, why)
        self.kill()

    def _over(self, status: int) -> None:
        now = time.monotonic()
        self._process = None
        if self._leash is not None:
            self._leash.let_go()
        os.close(self._pipe)
        self._pipe, self._is_ready, self._stopped, self.status = -1, False, None, status
        if now - self._started > PROVEN_S:
            self._wait = SOON_S
        self._due = now + self._wait
        self._wait = min(LATE_S, 2 * self._wait)

    def count_restart(self) -> None:
        """Call it when the process ended and should not have."""
        self.restarts += 1
        _log.error("the process %s %s; it is started again", self.name, self.missing)

    def start_now(self) -> None:
        """Starts it without a delay: its end was no failure."""
        self._due, self._wait = 0.0, SOON_S
        self.start()

    def terminate(self) -> None:
        """Sends SIGTERM, and SIGCONT so that a stopped process gets it."""
        with contextlib.suppress(OSError):
            if self._process is not None:
                os.kill(self._process.pid, signal.SIGTERM)
                os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Has the kernel kill it; `look` notices the end. Works without CAP_KILL."""
        if self._leash is not None:
            self._leash.let_go()

    def wait(self, seconds: float) -> None:
        """Waits for its end, at most so long."""
        deadline = time.monotonic() + seconds
        while self._process is not None and time.monotonic() < deadline:
            if not self.look():
                time.sleep(0.005)
