# SPDX-License-Identifier: Apache-2.0
"""A BPF object that another process compiled and loaded, used through file descriptors only.

In: a `ProgramDescription` and the descriptors that belong to it. Out: an `InheritedProgram`, a `BpfProgram` like
`loader.Program`, but with libbpf instead of bcc: no LLVM, a third of the memory. The programs live only as long as the
descriptors of this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux.kallsyms import Symbols
from ebpf_mig.probes.attachments import Attachments
from ebpf_mig.probes.hook import Hook
from ebpf_mig.probes.leaf_types import LeafType
from ebpf_mig.probes.run_statistics import run_statistics

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_PER_CPU = {5, 6, 10}
"""include/uapi/linux/bpf.h: BPF_MAP_TYPE_PERCPU_HASH, _PERCPU_ARRAY, _LRU_PERCPU_HASH."""
_MAX_STACK = 127
"""PERF_MAX_STACK_DEPTH: the number of frames per stack in bcc's BPF_STACK_TRACE."""


class MapDescription(msgspec.Struct, frozen=True):
    """One map: the index of its descriptor among those received, and the types of its entries."""

    fd: int
    kind: int
    key: LeafType
    leaf: LeafType
    entries: int


class ProgramDescription(msgspec.Struct, frozen=True):
    """Describes one loaded object."""

    functions: dict[str, int]
    """Loaded programs by name: the index of the descriptor among those received."""
    maps: dict[str, MapDescription]
    events: dict[str, int] = {}
    """Open kprobe events by the key of their hook: the index of the descriptor."""


def _libbpf() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise PreflightError(f"libbpf cannot be loaded: {error}", "apt-get install libbpf1") from error
    lib.ring_buffer__new.restype = ctypes.c_void_p
    lib.ring_buffer__new.argtypes = [ctypes.c_int, _CALLBACK, ctypes.c_void_p, ctypes.c_void_p]
    lib.ring_buffer__poll.argtypes = [ctypes.c_void_p, ctypes.c_int]
    lib.ring_buffer__consume.argtypes = [ctypes.c_void_p]
    lib.ring_buffer__free.argtypes = [ctypes.c_void_p]
    lib.bpf_map_lookup_elem.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    lib.bpf_map_update_elem.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    lib.bpf_map_delete_elem.argtypes = [ctypes.c_int, ctypes.c_void_p]
    lib.bpf_map_get_next_key.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return lib


class Table:
    """A map with the interface of a bcc table, with ctypes objects: `table[key]`, `table[key] = leaf`,
    `del table[key]`, `items()`, `clear()`.
    """

    def __init__(self, lib: ctypes.CDLL, fd: int, described: MapDescription) -> None:
        self._lib, self._fd, self.described = lib, fd, described
        self.Key, self.Leaf = described.key.ctype(), described.leaf.ctype()

    def __len__(self) -> int:
        return self.described.entries

    def __getitem__(self, key: Any) -> Any:
        return self.Leaf.from_buffer_copy(self.raw(key, self.described.leaf.size))

    def __setitem__(self, key: Any, leaf: Any) -> None:
        if self._lib.bpf_map_update_elem(self._fd, ctypes.byref(key), ctypes.byref(leaf), 0) < 0:
            raise KeyError(os.strerror(ctypes.get_errno()))

    def __delitem__(self, key: Any) -> None:
        if self._lib.bpf_map_delete_elem(self._fd, ctypes.byref(key)) < 0:
            raise KeyError(os.strerror(ctypes.get_errno()))

    def raw(self, key: Any, size: int) -> bytes:
        """The `size` bytes that the kernel stores for `key`. KeyError if there is no entry."""
        leaf = ctypes.create_string_buffer(size)
        if self._lib.bpf_map_lookup_elem(self._fd, ctypes.byref(key), leaf) < 0:
            raise KeyError(os.strerror(ctypes.get_errno()))
        return leaf.raw

    def keys(self) -> Iterator[Any]:
        """Every key. A key deleted during the walk may restart it; no key is returned twice in a row."""
        key = None
        while True:
            following = self.Key()
            at = None if key is None else ctypes.byref(key)
            if self._lib.bpf_map_get_next_key(self._fd, at, ctypes.byref(following)) < 0:
                return
            yield following
            key = following

    def items(self) -> list[tuple[Any, Any]]:
        """(key, leaf) of every entry."""
        entries = []
        for key in list(self.keys()):
            with contextlib.suppress(KeyError):
                entries.append((key, self[key]))
        return entries

    def clear(self) -> None:
        """Deletes every entry."""
        for key in list(self.keys()):
            with contextlib.suppress(KeyError):
                del self[key]


class InheritedProgram:
    """A `BpfProgram` that is already loaded. `close()` detaches and closes everything."""

    def __init__(self, description: ProgramDescription, fds: Sequence[int]) -> None:
        self._lib = _libbpf()
        self._functions = {name: fds[place] for name, place in description.functions.items()}
        self._tables = {name: Table(self._lib, fds[m.fd], m) for name, m in description.maps.items()}
        self._map_fds = [fds[m.fd] for m in description.maps.values()]
        self._attachments = Attachments()
        self._events = {key: fds[place] for key, place in description.events.items()}
        self._records: list[bytes] = []
        self._ring: int | None = None
        self._take = _CALLBACK(self._keep)
        self._cpus: int = self._lib.libbpf_num_possible_cpus()
        self._closed = False

    def attach(self, hook: Hook) -> None:
        """Attaches one of the loaded functions; PreflightError if the kernel refuses."""
        if hook.key in self._events:
            self._attachments.prepare(hook, self._events.pop(hook.key))
        self._attachments.attach(hook, self._functions[hook.key])

    def detach(self, hook: Hook) -> None:
        """Detaches what `attach` attached."""
        self._attachments.detach(hook)

    def table(self, name: str) -> Table:
        """The map of that name."""
        return self._tables[name]

    def open_ring(self, name: str) -> None:
        """Maps a ring buffer (twice its size) and collects its records; fetch them with `poll`."""
        self._ring = self._lib.ring_buffer__new(self._map_fds[list(self._tables).index(name)], self._take, None, None)
        if not self._ring:
            raise PreflightError(f"the ring buffer {name} cannot be mapped: {os.strerror(ctypes.get_errno())}")

    def close_ring(self) -> None:
        """Unmaps the ring buffer, to save memory while no VM migrates."""
        if self._ring:
            self._lib.ring_buffer__free(self._ring)
        self._ring = None

    def _keep(self, _context: int, data: int, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        return 0

    def poll(self, timeout_ms: int) -> list[bytes]:
        """The records that arrived. Waits at most `timeout_ms` for the first; a signal ends the wait."""
        if not self._ring:
            return []
        self._lib.ring_buffer__poll(self._ring, timeout_ms)
        self._lib.ring_buffer__consume(self._ring)  # records that do not wake the reader, and records behind them
        taken = self._records[:]
        self._records.clear()
        return taken

    def per_cpu_sums(self, name: str) -> list[int]:
        """A per-CPU array's entries, each summed over the CPUs."""
        table = self._tables[name]
        if table.described.kind not in _PER_CPU:
            raise KeyError(name)
        number = self._cpus
        return [sum(struct.unpack(f"={number}Q", table.raw(ctypes.c_int(i), 8 * number))) for i in range(len(table))]

    def kernel_stack(self, name: str, stack_id: int) -> tuple[str, ...]:
        """Function names of one stack, innermost first; empty if the kernel did not keep it."""
        try:
            raw = self._tables[name].raw(ctypes.c_int(stack_id), 8 * _MAX_STACK)
        except KeyError:
            return ()
        symbols = Symbols.of_kernel()
        return tuple(symbols.name(address) for address in struct.unpack(f"={_MAX_STACK}Q", raw) if address)

    def symbol(self, address: int) -> str:
        """Name of the kernel function at an address."""
        return Symbols.of_kernel().name(address)

    def descriptor(self, function: str) -> int:
        """The descriptor of a loaded function; -1 if it was not loaded."""
        return self._functions.get(function, -1)

    def run_statistics(self) -> dict[str, tuple[int, int, int]]:
        """(run time in ns, runs, recursion misses) of each loaded function. The first two need `BpfStatistics`."""
        return {name: run_statistics(fd) for name, fd in self._functions.items()}

    def close(self) -> None:
        """Detaches everything and closes the received descriptors; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._attachments.close()
        self.close_ring()
        for fd in (*self._functions.values(), *self._map_fds, *self._events.values()):
            os.close(fd)
