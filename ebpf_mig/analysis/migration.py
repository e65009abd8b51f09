# SPDX-License-Identifier: Apache-2.0
"""One traced migration: its sides, its sockets, its fetches and its switchover.

In: a recording split by process. Out: a `TracedMigration`, made by `identify` and never changed. Derived values are
computed once, on first use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ebpf_mig.analysis import carrier, dirty_log, live_update, loading, restore, roles, snapshot, source_work
from ebpf_mig.analysis import switchover as switchovers
from ebpf_mig.analysis.dirty_log import Burst
from ebpf_mig.analysis.material import Material
from ebpf_mig.analysis.process import Process, begun, key_of
from ebpf_mig.analysis.restore import Restore
from ebpf_mig.analysis.snapshot import Snapshot
from ebpf_mig.analysis.sockets import Channels, transport_of
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.breakdown import OF_FILES, PHASES, PhaseName, Side, SwitchoverKind, Transport
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, SEND, Transfer

AFTER_START_BYTES = 65536
"""A source that sends more than this after the destination's vCPUs have their state is still sending memory: postcopy.
In pre-copy they are the last to be loaded, in QEMU by `cpu_synchronize_all_post_init`.
"""

_FILES = (Transport.FILE, Transport.NONE, Transport.UNKNOWN)
"""What a snapshot's carrier is before its files are known: it has no connection."""

_SHOWN_BY = {
    PhaseName.PAUSE: ("kick",),
    PhaseName.FETCH_KERNEL: ("dirty-log",),
    PhaseName.FETCH_USER: ("dirty-log",),
    PhaseName.MEMORY_SEND: ("socket",),
    PhaseName.STATE_SAVE: ("state",),
    PhaseName.STATE_SEND: ("socket",),
    PhaseName.HANDOVER: ("socket",),
    PhaseName.STATE_LOAD: ("state",),
    PhaseName.MANAGEMENT: ("socket", "off-cpu"),
}
"""For each phase, the signals that show it."""


@dataclass(frozen=True)
class TracedMigration:
    """One migration in a recording. Instants are absolute, in ns."""

    material: Material
    source: Process | None
    destination: Process | None
    notes: list[str]
    """Notes about doubts which side is which."""
    began: int | None
    """When dirty logging was switched on, else the trigger; None if neither was seen."""
    channels: Channels
    switchover: Switchover | None
    bursts: list[Burst]
    """The source's dirty-log fetches."""
    source_transfers: list[Transfer]
    """The source's transfers on the migration's sockets, both directions."""
    sends: list[Transfer]
    """The source's sends for the migration since it began."""
    reported_postcopy: bool = False
    """Whether the VMM reported that it switched to postcopy."""
    live_update: bool = False
    """A new program on the same host keeps the memory (CPR)."""
    stopped_early: bool = False
    """The guest stopped while its memory was copied, and not for the switchover: it shut down, or was paused."""
    snapshot: Snapshot | None = None
    """The files into which the source wrote the guest; None: into none, or one that only carries a stream. Of one that
    is written in the background: the carrier."""
    restored: Restore | None = None
    """When the destination loaded the guest from files; None: it did not. Or the source, see `loaded_again`."""

    @property
    def since(self) -> int:
        """`began`, or the recording's begin if that is unknown."""
        return self.began if self.began is not None else self.material.header.begin_ns

    @property
    def loaded_again(self) -> bool:
        """The source stopped its guest, and replaced it by one from a file (QEMU's loadvm)."""
        back = self.switchover is not None and self.switchover.kind == SwitchoverKind.ABORTED
        return back and self.restored is not None and self.destination is None

    @cached_property
    def nothing_seen(self) -> bool:
        """Whether a VM only ran, and stopped or ended: nothing was logged, fetched, sent or read for a migration."""
        source = self.source
        if source is None or self.destination is not None or self.live_update or source.execs:
            return False
        if self.began is not None or self.bursts or self.sends or self.snapshot or self.restored or self.stopped_early:
            return False
        if any(map(self.material.absent, ("dirty-log", "state", "socket"))):
            return False
        return not any(kvm.name_of(ioctl.cmd) in kvm.VCPU_STATE_GET for ioctl in source.other_ioctls)

    @cached_property
    def unmeasured(self) -> frozenset[PhaseName]:
        """Phases that the recording cannot show, because their side or their signal was not traced."""
        missing = {
            side
            for side, process in ((Side.SOURCE, self.source), (Side.DESTINATION, self.destination))
            if process is None and not self.loaded_again
        }
        if missing:
            missing.add(Side.BOTH)
        return frozenset(
            name
            for name, side in PHASES
            if name != PhaseName.UNATTRIBUTED
            and name not in OF_FILES
            and (
                # A side that was not traced has no part of the window, so no wait of it can be missing.
                (side in missing and name != PhaseName.MANAGEMENT)
                or any(map(self.material.absent, _SHOWN_BY.get(name, ())))
            )
        )

    def side_of(self, process: Process) -> Side:
        """SOURCE or DESTINATION; UNKNOWN for a process that takes no part in the migration."""
        if process is self.source:
            return Side.SOURCE
        return Side.DESTINATION if process is self.destination else Side.UNKNOWN

    def transfers(self, process: Process | None) -> list[Transfer]:
        """A side's transfers on the migration's sockets, both directions; empty for another process."""
        if process is None:
            return []
        if process is self.source:
            return self.source_transfers
        return self.destination_transfers if process is self.destination else []

    @cached_property
    def destination_transfers(self) -> list[Transfer]:
        """The destination's transfers on the migration's sockets, both directions."""
        return _on(self.channels.destination, self.destination)

    @cached_property
    def receives(self) -> list[Transfer]:
        """The destination's receives for the migration."""
        return [t for t in self.destination_transfers if t.direction == RECEIVE]

    @cached_property
    def postcopy(self) -> bool:
        """Whether the source sent memory when the destination had its state, or the VMM reported postcopy.

        If the manager takes long before it lets the guest start, all memory can be there by then. Without the
        destination: whether the source sent memory after the state was answered. In pre-copy nothing large follows.
        """
        found = self.switchover
        if not self.reported_postcopy and self.destination is None and self.answered is not None:
            return sum(t.bytes for t in begun(self.sends, self.answered)) > AFTER_START_BYTES
        if self.reported_postcopy or found is None or found.kind != SwitchoverKind.COMPLETED:
            return self.reported_postcopy
        loaded = found.last_start
        if self.destination is not None and found.first_start is not None:
            loaded = loading.vcpus_loaded(self.destination.ioctls, found.stop, found.first_start) or loaded
        late = sum(t.bytes for t in begun(self.sends, loaded + 1)) if loaded is not None else 0
        return late > AFTER_START_BYTES

    @cached_property
    def answered(self) -> int | None:
        """When the first answer to the state came, to a source whose destination was not traced; None: none came.

        In postcopy it is the first request for a page, or QEMU's answer to its own ping
        (migration/migration.c, `postcopy_start`).
        """
        found, source = self.switchover, self.source
        if found is None or source is None or self.destination is not None or found.kind == SwitchoverKind.ABORTED:
            return None
        since = source_work.observe(source, found.stop, self.bursts, self.source_transfers).work(FOREVER).state_from
        if since is None:
            return None
        answers = (t.end_ns for t in self.source_transfers if t.direction == RECEIVE and t.bytes)
        return min((end for end in answers if end > since), default=None)

    @cached_property
    def answering(self) -> frozenset[int]:
        """In postcopy: the source's migration sockets on which a thread first receives after the stop, and then sends.

        Cloud Hypervisor opens such a connection (vmm/src/migration/transport.rs, `open_fault_connection`). QEMU has
        none: its migration thread sends both requested and other pages, and another thread reads the requests.
        """
        if self.source is None or self.switchover is None or not self.postcopy:
            return frozenset()
        first: dict[tuple[int, int], int] = {}
        serving: set[int] = set()
        for transfer in self.source_transfers:
            if transfer.begin_ns < self.switchover.stop or not transfer.bytes:
                continue
            user = transfer.tid, key_of(transfer)
            if first.setdefault(user, transfer.direction) == RECEIVE and transfer.direction == SEND:
                serving.add(user[1])
        return frozenset(serving)

    @cached_property
    def own_transfers(self) -> list[Transfer]:
        """The source's transfers for the migration, without those on sockets that only answer page requests.

        The answers are not part of the source's way to the handover: the destination requests pages while it restores,
        and waits for each of them.
        """
        serving = self.answering
        return [t for t in self.source_transfers if key_of(t) not in serving] if serving else self.source_transfers


def _on(keys: frozenset[int], process: Process | None) -> list[Transfer]:
    return [t for t in process.transfers if (t.socket or key_of(t)) in keys] if process else []


def _sends(transfers: list[Transfer], since: int) -> list[Transfer]:
    return [t for t in transfers if t.direction == SEND and t.begin_ns >= since]


def identify(material: Material, names: MarkNames) -> TracedMigration:
    """Finds a migration's sides, switchover, begin, sockets and fetches. `names` are the names of the VMMs' marks."""
    source, destination, notes = roles.assign(material.processes.values())
    if source is None:
        return _of_a_destination(material, destination, notes)
    channels = carrier.choose(source, destination, 0, source.fetchers)
    transfers = _on(channels.source, source)
    sends = _sends(transfers, material.header.begin_ns)
    stop_marks = [m.at_ns for m in material.marks if m.name in names.stopped and m.pid == source.pid]
    triggers = [m.at_ns for m in material.marks if m.name == "session.trigger"]
    last = dirty_log.switched_on(source, None)
    found = switchovers.find(source, destination, sends, stop_marks)
    updated = live_update.took_place(source, destination, found, last, sends)
    paused = switchovers.paused(source, last if last is not None else max(triggers, default=None), sends)
    if paused is not None and not updated:
        found = switchovers.find(source, destination, sends, stop_marks, paused)
    early = not updated and found is not None and switchovers.stopped_early(source, destination, found, sends)
    stop = found.stop if found else None
    on = dirty_log.switched_on(source, stop)
    began = on if on is not None else max([at for at in triggers if stop is None or at < stop], default=None)
    if updated and found is not None:
        began = found.requested
    if began is not None:
        first, channels = channels, carrier.choose(source, destination, began, source.fetchers)
        transfers = transfers if channels.source == first.source else _on(channels.source, source)
        sends = _sends(transfers, began)
    if destination is not None and destination.born is not None and not channels.source:
        channels = Channels(transport=Transport.NONE)
    restored = None
    written = snapshot.in_background(source, found) if not updated and not early else None
    if written is not None:
        channels = Channels(written.files, frozenset(), transport_of(source, written.files))
        transfers = _on(channels.source, source)
        sends = _sends(transfers, material.header.begin_ns)
    elif not updated and not early and channels.transport in _FILES:
        written, restored = snapshot.find(source, found, source.fetchers), _restored(destination, channels)
        if written is not None:
            read = restored.files if restored is not None else frozenset()
            channels = Channels(written.files | channels.source, read or channels.destination, Transport.FILE)
            transfers = _on(channels.source, source)
            sends = _sends(transfers, began if began is not None else material.header.begin_ns)
    if written is None and not updated and not early and destination is None:
        restored = restore.again(source, found)
        if restored is not None:
            channels, transfers, sends = Channels(destination=restored.files, transport=Transport.FILE), [], []
    reported = any(m.name in names.postcopy for m in material.marks)
    if early:
        stop = found = None
    bursts = dirty_log.bursts(source, began if began is not None else 0, stop, sends)
    traced = TracedMigration(
        material,
        source,
        destination,
        notes,
        began,
        channels,
        found,
        bursts,
        transfers,
        sends,
        reported,
        updated,
        early,
        snapshot=written,
        restored=restored,
    )
    shut_down = traced.nothing_seen and found is not None and found.kind == SwitchoverKind.STOPPED
    return replace(traced, switchover=None) if shut_down else traced


def _of_a_destination(material: Material, destination: Process | None, notes: list[str]) -> TracedMigration:
    """What is known without a source."""
    channels = carrier.choose(None, destination, 0, frozenset())
    replaced = destination is not None and destination.born is not None
    restored = _restored(destination, channels) if not replaced else None
    if restored is not None:
        channels = Channels(destination=restored.files, transport=Transport.FILE)
    alone = TracedMigration(material, None, destination, notes, None, channels, None, [], [], [])
    return replace(alone, live_update=replaced, restored=restored)


def _restored(destination: Process | None, channels: Channels) -> Restore | None:
    if destination is None or channels.transport not in _FILES or destination.was_loaded:
        return None
    return restore.find(destination)
