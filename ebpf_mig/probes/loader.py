# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
# bcc is a distribution package without types, and may be missing.
"""Compiles, loads and attaches the BPF programs. This is the only module that imports bcc.

In: names of `.bpf.c` files and -D constants. Out: a `Program` whose functions can be attached, whose ring buffer can be
polled and whose maps can be read. Nothing is pinned: the kernel removes everything when the process ends, also after
SIGKILL. No kernel headers are needed (`bpf/headers` replaces them).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import bpf, btf, procfs
from ebpf_mig.probes import leaf_types, source
from ebpf_mig.probes.attachments import Attachments
from ebpf_mig.probes.contract import Contract
from ebpf_mig.probes.hook import TRACE_EVENT, TRACEPOINT, Hook
from ebpf_mig.probes.inherited import MapDescription, ProgramDescription
from ebpf_mig.probes.run_statistics import run_statistics

_FASTER = ("-g0", "-Xclang", "-disable-llvm-passes")
"""They take a quarter off the compile time. bcc optimises what clang returns (`run_pass_manager` of its bpf_module.cc),
so that clang need not; and no program of ours needs BTF of its own.
"""
SAMPLING = "sampling"
"""A program for samples of a perf event, beside the ways to attach of `hook`."""


def require_bcc() -> Any:
    """The bcc module; PreflightError with the package to install if this Python has none."""
    try:
        import bcc
    except ImportError as error:
        raise PreflightError(
            f"bcc cannot be imported by this Python: {error}",
            "apt-get install python3-bpfcc, and run with the distribution's /usr/bin/python3 (or a venv of it "
            "made with --system-site-packages)",
        ) from error
    if not hasattr(bcc, "BPF"):
        raise PreflightError(
            f"{bcc.__file__} is not the BPF compiler collection (PyPI's `bcc` is an unrelated project)",
            "pip uninstall bcc; apt-get install python3-bpfcc",
        )
    return bcc


def read_symbols() -> threading.Thread:
    """Starts to read /proc/kallsyms, which `Program.symbol` needs. Join the thread before that."""
    bcc = require_bcc()

    def read() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are for the main thread
        bcc.BPF.ksym(0)

    thread = threading.Thread(target=read, name="symbols", daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def _safe_directory() -> Iterator[None]:
    """Changes to a directory that only root can write: bcc puts the current directory first on the include path."""
    before = Path.cwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _stderr_to(sink: list[str]) -> Iterator[None]:
    """Captures the output of libbcc on file descriptor 2, so that one line of it can become the error message."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    saved = os.dup(2)
    os.dup2(write_end, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(write_end)
        with contextlib.suppress(BlockingIOError):
            sink.append(os.read(read_end, 1 << 16).decode(errors="replace"))
        os.close(read_end)


class Program:
    """One compiled BPF object. `close()` detaches and frees it; the kernel does the same if this process dies."""

    def __init__(self, family: str, defines: Mapping[str, str | int], contract: Contract) -> None:
        """Compiles a family of programs. PreflightError if it does not compile or violates its contract with Python."""
        bcc = require_bcc()
        os.environ["BCC_KERNEL_SOURCE"] = str(source.HEADERS)
        flags = [*_FASTER, "-w", f"-DEBPF_MIG_PAGE_SIZE={os.sysconf('SC_PAGESIZE')}"]
        flags += [f"-D{name}={value}" for name, value in defines.items()]
        try:
            # LLVM ends the process on some errors, so its output must not be captured.
            with _safe_directory():
                self._bpf = bcc.BPF(text=source.source_text(family, contract).encode(), cflags=flags)
        except Exception as error:
            raise PreflightError(f"{family} does not compile: {error}", "ebpf-mig doctor") from error
        self._types = {
            TRACEPOINT: bcc.BPF.RAW_TRACEPOINT,
            TRACE_EVENT: bcc.BPF.TRACEPOINT,
            SAMPLING: bcc.BPF.PERF_EVENT,
        }
        self._records: list[bytes] = []
        self._rings: set[str] = set()
        self._urgent = select.epoll()
        """Wakes for records that ask for it. libbpf waits level-triggered: once it was woken, that returns at once for
        each record that has arrived since, so that a reader hardly sleeps while many arrive.
        """
        self._functions: dict[str, Any] = {}
        self._fds: dict[str, int] = {}
        """Descriptors of loaded programs, by the key of their hook."""
        self._attachments = Attachments()

    def load(self, function: str, how: str = TRACEPOINT) -> int:
        """Loads one function for a tracepoint, a trace event or `SAMPLING`, and returns its descriptor.

        PreflightError if refused.
        """
        output: list[str] = []
        try:
            with _stderr_to(output):
                self._functions[function] = self._bpf.load_func(function.encode(), self._types[how])
        except Exception as error:
            detail = _last_line(output) or str(error)
            raise PreflightError(f"the kernel refuses {function}: {detail}", "ebpf-mig doctor") from error
        self._fds[function] = int(self._functions[function].fd)
        return self._fds[function]

    def load_iterator(self, function: str, of: str) -> int:
        """Loads one function as an iterator over the kernel's objects of a kind, and returns its descriptor.

        PreflightError if refused.
        """
        name = f"bpf_iter_{of}"
        known = btf.functions(btf.VMLINUX, [name])
        try:
            if name not in known:
                raise OSError(0, f"it has no iterator over every {of}")
            fd = bpf.load(self._bpf.dump_func(function.encode()), bpf.ITERATOR, known[name].btf_id)
        except OSError as error:
            raise PreflightError(f"the kernel refuses {function}: {error.strerror}", "ebpf-mig doctor") from error
        self._fds[function] = fd
        return fd

    def load_hook(self, hook: Hook, module_fd: int = 0) -> None:
        """Loads the function of a hook for its way of attaching. `module_fd`: the BTF of the function's module.

        PreflightError if refused.
        """
        if hook.how in (TRACEPOINT, TRACE_EVENT):
            self._fds[hook.key] = self.load(hook.program, hook.how)
            return
        code = self._bpf.dump_func(hook.program.encode())
        try:
            fd = bpf.load(code, hook.how, hook.btf_id, module_fd)
            self._attachments.prepare(hook)
        except OSError as error:
            why = f"the kernel refuses {hook.program} as {hook.how} of {hook.target}: {error.strerror}"
            raise PreflightError(why, "run ebpf-mig doctor, or use --tier tracepoint") from error
        self._fds[hook.key] = fd

    def attach(self, hook: Hook) -> None:
        """Attaches a loaded hook; PreflightError if the kernel refuses."""
        self._attachments.attach(hook, self._fds[hook.key])

    def detach(self, hook: Hook) -> None:
        """Detaches what `attach` attached."""
        self._attachments.detach(hook)

    def table(self, name: str) -> Any:
        """The bcc table of that name."""
        return self._bpf[name.encode()]

    def open_ring(self, name: str) -> None:
        """Starts to collect the records of a ring buffer; fetch them with `poll`. Idempotent."""
        if name in self._rings:
            return
        self._rings.add(name)
        records = self._records

        def take(_context: object, data: int, size: int) -> None:
            records.append(ctypes.string_at(data, size))

        table = self._bpf[name.encode()]
        table.open_ring_buffer(take)
        self._urgent.register(table.map_fd, select.EPOLLIN | select.EPOLLET)

    def close_ring(self) -> None:
        """Does nothing: bcc keeps the ring buffer mapped. An inherited program unmaps it."""

    def poll(self, timeout_ms: int) -> list[bytes]:
        """The records that arrived. Waits at most `timeout_ms` for a record that wakes the reader; most do not."""
        if timeout_ms:
            self._urgent.poll(timeout_ms / 1000)
        self._bpf.ring_buffer_consume()  # records that do not wake the reader, and records behind them
        taken = self._records[:]
        self._records.clear()
        return taken

    def per_cpu_sums(self, name: str) -> list[int]:
        """A per-CPU array's entries, each summed over the CPUs."""
        table = self._bpf[name.encode()]
        return [sum(table[ctypes.c_int(i)]) for i in range(len(table))]

    def kernel_stack(self, name: str, stack_id: int) -> tuple[str, ...]:
        """Function names of one stack, innermost first; empty if the kernel did not keep it."""
        try:
            return tuple(procfs.decoded(self._bpf.ksym(address)) for address in self._bpf[name.encode()].walk(stack_id))
        except KeyError:
            return ()

    def symbol(self, address: int) -> str:
        """Name of the kernel function at an address."""
        return procfs.decoded(self._bpf.ksym(address))

    def run_statistics(self) -> dict[str, tuple[int, int, int]]:
        """(run time in ns, runs, recursion misses) of each loaded function. The first two need `BpfStatistics`."""
        return {name: run_statistics(fd) for name, fd in self._fds.items()}

    def describe(self, fds: list[int]) -> ProgramDescription:
        """Describes the loaded object for another process. Adds the descriptors of programs and maps to `fds`."""
        from bcc.libbcc import lib

        def place(fd: int) -> int:
            fds.append(fd)
            return len(fds) - 1

        functions = {name: place(fd) for name, fd in self._fds.items()}
        events = {key: place(fd) for key, fd in self._attachments.events().items()}
        maps = {}
        for number in range(lib.bpf_num_tables(self._bpf.module)):
            name = ctypes.string_at(lib.bpf_table_name(self._bpf.module, number)).decode()
            table = self.table(name)
            types = leaf_types.describe(table.Key), leaf_types.describe(table.Leaf)
            maps[name] = MapDescription(place(table.map_fd), table.ttype, *types, table.max_entries)
        return ProgramDescription(functions, maps, events)

    def close(self) -> None:
        """Detaches everything; idempotent."""
        self._attachments.close()
        self._urgent.close()
        for name in self._fds.keys() - self._functions.keys():
            os.close(self._fds.pop(name))
        self._bpf.cleanup()


def _last_line(output: list[str]) -> str:
    lines = [line.strip() for text in output for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
