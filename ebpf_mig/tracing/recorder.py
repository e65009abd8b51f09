# SPDX-License-Identifier: Apache-2.0
"""A recorder on another host: a command that writes a recording to standard output and stops on stdin EOF.

In: a command line, most often `ssh HOST ebpf-mig record ... --until-eof --output -`. Out: the header once it has
armed, then the recording, possibly cut off. A recorder cannot harm a migration: every wait has a time-out, and the
amount of data is bounded.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence

from ebpf_mig.errors import PreflightError, RecordingError
from ebpf_mig.linux.process import end_group, status_of
from ebpf_mig.recording.events import Header
from ebpf_mig.recording.file import Recording, RecordingReader, read_recording
from ebpf_mig.recording.format import FRAME, MAGIC, MAX_RAW
from ebpf_mig.text import printable

RECORDING_MOST_BYTES = 4 << 30
"""Largest number of bytes kept of a recording."""
ARM_S = 120.0
"""Time-out for arming. Compiling and attaching take seconds, and longer on a busy host."""
FINISH_S = 30.0
_HEAD = len(MAGIC) + FRAME.size
_COMPLAINT = 16 << 10
_EARLY = "it ended early"


class RemoteError(PreflightError):
    """The other host cannot record, or cannot be reached."""


class Recorder:
    """One recorder. It starts when it is created. Call `armed`, then `finish` or `close`."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.lost = ""
        """Why it ended by itself before we stopped it; empty if it did not."""
        try:
            self._data = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`; it has no name
        except OSError as error:
            raise RemoteError(f"{name}: its recording has no place here: {error.strerror}") from error
        self._size = 0
        self._head = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._stderr = bytearray()
        self._released = False
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=environment,
                process_group=0,  # Ctrl-C must reach only us: the recording is still needed
            )
        except OSError as error:
            self._data.close()
            raise RemoteError(f"{name}: cannot run {printable(command[0])}: {error.strerror}") from error
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._take, self._listen)]
        for thread in self._threads:
            thread.start()

    def armed(self, timeout_s: float = ARM_S) -> Header:
        """Waits until it traces. RemoteError if it ended, sent invalid data or took too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended or self._complete(), timeout_s):
                raise RemoteError(f"{self.name} does not begin to trace within {timeout_s:.0f} s: {self.last_line()}")
        if not self._complete() and (not self._head or MAGIC.startswith(bytes(self._head[: len(MAGIC)]))):
            raise RemoteError(f"{self.name} cannot trace: {self.last_line()}", self._remedy())
        try:
            return RecordingReader(io.BytesIO(bytes(self._head))).header
        except RecordingError as error:
            raise RemoteError(f"{self.name} sends no recording that can be read: {error}", self._remedy()) from error

    def finish(self, timeout_s: float = FINISH_S) -> Recording:
        """Stops it and reads its recording. RecordingError if that has no complete header."""
        self._release()
        for thread in self._threads:
            thread.join(timeout_s)
        if any(thread.is_alive() for thread in self._threads):
            self.lost = self.lost or f"it did not end within {timeout_s:.0f} s"
            self._kill()
        self._data.seek(0)
        recording = read_recording(self._data)
        if not recording.truncated:
            self.lost = ""  # it had already seen the migration's end
        elif self.lost in ("", _EARLY):
            self.lost = self.last_line()
        return recording

    @property
    def status(self) -> int | None:
        """The command's exit status; None while it runs."""
        return status_of(self._process, 2 if self._ended else 0)

    def close(self) -> None:
        """Ends it if it still runs. Idempotent."""
        self._release()
        self._kill()
        for thread in self._threads:
            thread.join(5)
        self._data.close()

    def last_line(self) -> str:
        """The last line that it, or ssh, wrote."""
        if self._ended and self.status is not None:
            self._threads[1].join(2)
        lines = [line.strip() for line in self._stderr.decode(errors="replace").splitlines() if line.strip()]
        problems = [line for line in lines if not line.startswith("ebpf-mig: tracing")]
        status = status_of(self._process)
        ended = "the connection is gone" if status in (255, None) else f"it ended with status {status}"
        text = problems[-1].removeprefix("ebpf-mig: ").removeprefix("Error: ") if problems else ended
        return printable(text, 500)

    def _remedy(self) -> str:
        status = status_of(self._process)
        if status == 127:
            return "install ebpf-mig on that host, in the PATH of a non-interactive shell"
        if status == 255:
            return "try the same ssh by hand; it must work without a prompt"
        if status == 2:
            return "install the same version of ebpf-mig on both hosts"
        return "run ebpf-mig doctor on that host"

    def _complete(self) -> bool:
        """Whether the header, or invalid data, has arrived."""
        if len(self._head) < _HEAD:
            return False
        length = FRAME.unpack_from(self._head, len(MAGIC))[0]
        return len(self._head) >= _HEAD + length or length > MAX_RAW or not self._head.startswith(MAGIC)

    def _take(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 - asked for above
        try:
            while data := stdout.read(1 << 20):
                if self._size < RECORDING_MOST_BYTES:
                    self._data.write(data)
                    self._size += len(data)
                if len(self._head) <= _HEAD + MAX_RAW:
                    with self._changed:
                        self._head += data
                        self._changed.notify_all()
        except (OSError, ValueError) as error:
            self.lost = f"what it sends cannot be kept: {error}"
        with self._changed:
            if not self._released:
                self.lost = self.lost or _EARLY
            self._ended = True
            self._changed.notify_all()

    def _listen(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None  # noqa: S101
        with contextlib.suppress(OSError, ValueError):
            while data := stderr.read(4096):
                self._stderr += data
                del self._stderr[:-_COMPLAINT]

    def _release(self) -> None:
        self._released = True
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _kill(self) -> None:
        end_group(self._process, 2)
